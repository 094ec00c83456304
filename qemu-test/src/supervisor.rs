//! The real control plane of a lab: `atoll-supervisor up`, its tokens, and upstream's kubectl.

use crate::process::{Background, Output, run, run_ok, run_with_input, wait_for};
use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Time a single kubectl call may take unless the caller says otherwise.
const KUBECTL: Duration = Duration::from_secs(60);

/// A running Supervisor.
#[derive(Debug)]
pub struct Supervisor {
    binary: PathBuf,
    data: PathBuf,
    address: String,
    /// Tests stop and start it while others hold on to the lab.
    process: Mutex<Background>,
    log: PathBuf,
}

impl Supervisor {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready within two minutes.
    pub fn start(binary: &Path, data: &Path, address: &str, log: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(data)?;
        let process = Self::spawn(binary, data, address, log, &[])?;
        let supervisor = Self {
            binary: binary.to_owned(),
            data: data.to_owned(),
            address: address.to_owned(),
            process: Mutex::new(process),
            log: log.to_owned(),
        };
        supervisor.wait_ready()?;
        Ok(supervisor)
    }

    fn spawn(
        binary: &Path,
        data: &Path,
        address: &str,
        log: &Path,
        more: &[&str],
    ) -> anyhow::Result<Background> {
        let mut command = Command::new(binary);
        command.args(["up", "--data"]).arg(data).args(["--address", address]).args(more);
        Background::spawn("atoll-supervisor", &mut command, log)
    }

    fn process(&self) -> MutexGuard<'_, Background> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it answers and its controllers work.
    ///
    /// # Errors
    /// When it ends or is not ready within three minutes.
    pub fn wait_ready(&self) -> anyhow::Result<()> {
        wait_for("the Supervisor to be ready", Duration::from_secs(180), || {
            self.process().check_alive()?;
            let ready = self.data.join("admin.kubeconfig").exists()
                && self.kubectl(&["get", "--raw", "/readyz"]).is_ok_and(|out| out.code == 0)
                && self.kubectl(&["get", "serviceaccount", "default"]).is_ok_and(|out| out.code == 0);
            Ok(ready.then_some(()))
        })
        .with_context(|| format!("log: {}", self.log.display()))
    }

    /// Stops it.
    pub fn stop(&self) {
        self.process().stop(Duration::from_secs(30));
    }

    /// Starts it again after [`Supervisor::stop`], on the same data, with more arguments for this run.
    ///
    /// # Errors
    /// Those of [`Supervisor::start`].
    pub fn resume(&self, more: &[&str]) -> anyhow::Result<()> {
        *self.process() = Self::spawn(&self.binary, &self.data, &self.address, &self.log, more)?;
        self.wait_ready()
    }

    /// Kills one of its components (SIGKILL), by the name that its program knows it by, such as `etcd`.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn kill_component(&self, name: &str) -> anyhow::Result<()> {
        let pid = crate::process::child_with_argument(self.process().pid(), name)
            .with_context(|| format!("the Supervisor has no component {name}"))?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)
            .with_context(|| format!("cannot kill {name}"))
    }

    /// A bootstrap token that is good for this long, as `id.secret`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create_token(&self, good_for: &str) -> anyhow::Result<String> {
        let mut command = self.command();
        command.args(["token", "create", "--ttl", good_for, "--data"]).arg(&self.data);
        let line = run_ok(&mut command, KUBECTL)?;
        let token = line.split_whitespace().find_map(|word| word.strip_prefix("token="));
        token.map(str::to_owned).with_context(|| format!("no token in {line:?}"))
    }

    /// Takes a bootstrap token back.
    ///
    /// # Errors
    /// When there is no such token.
    pub fn delete_token(&self, token: &str) -> anyhow::Result<()> {
        let mut command = self.command();
        run_ok(command.args(["token", "delete", token, "--data"]).arg(&self.data), KUBECTL).map(drop)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.env("KUBECONFIG", self.kubeconfig()).env("HOME", &self.data);
        command
    }

    /// Path of the administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.data.join("admin.kubeconfig")
    }

    /// A machine config with a fresh token for joining this Supervisor; it speaks plain HTTP to these registries.
    ///
    /// # Errors
    /// When the token cannot be made.
    pub fn machine_config(&self, registries: &[&str]) -> anyhow::Result<String> {
        let mut command = self.command();
        command.args(["token", "create", "--data"]).arg(&self.data).arg("--machine-config");
        for registry in registries {
            command.arg("--registry").arg(format!("{registry}=plain-http"));
        }
        run_ok(&mut command, KUBECTL)
    }

    /// Runs kubectl.
    ///
    /// # Errors
    /// When it cannot be started or takes over a minute; a non-zero exit is in the output.
    pub fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        run(self.command().arg("kubectl").args(arguments), KUBECTL)
    }

    /// kubectl as a command, to run with a deadline or input of one's own.
    pub fn kubectl_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.command();
        command.arg("kubectl").args(arguments);
        command
    }

    /// Runs kubectl and returns what it printed.
    ///
    /// # Errors
    /// As [`Supervisor::kubectl`], and when it ends with another status than 0.
    pub fn kubectl_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        run_ok(self.command().arg("kubectl").args(arguments), KUBECTL)
    }

    /// Applies YAML.
    ///
    /// # Errors
    /// When kubectl refuses it.
    pub fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        let output =
            run_with_input(self.command().args(["kubectl", "apply", "-f", "-"]), yaml.as_bytes(), KUBECTL)?;
        if output.code != 0 {
            bail!("kubectl apply: {}{}\n{yaml}", output.stdout, output.stderr);
        }
        Ok(())
    }

    /// A field of an object, by JSONPath; empty when the object or field is not there.
    ///
    /// # Errors
    /// When kubectl cannot be run.
    pub fn field(&self, kind: &str, name: &str, path: &str) -> anyhow::Result<String> {
        let output =
            self.kubectl(&["get", kind, name, "--ignore-not-found", "-o", &format!("jsonpath={path}")])?;
        Ok(output.stdout)
    }

    /// Waits until a field has a value.
    ///
    /// # Errors
    /// At the deadline, with a description of the object.
    pub fn wait_field(
        &self,
        kind: &str,
        name: &str,
        path: &str,
        value: &str,
        deadline: Duration,
    ) -> anyhow::Result<()> {
        wait_for(&format!("{kind} {name}: {path} = {value:?}"), deadline, || {
            Ok((self.field(kind, name, path)? == value).then_some(()))
        })
        .with_context(|| match self.kubectl(&["describe", kind, name]) {
            Ok(output) => format!("{}{}", output.stdout, output.stderr),
            Err(error) => format!("and kubectl describe failed: {error}"),
        })
    }

    /// Waits until the node is Ready.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_node_ready(&self, node: &str, deadline: Duration) -> anyhow::Result<()> {
        self.wait_field("node", node, "{.status.conditions[?(@.type==\"Ready\")].status}", "True", deadline)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.process().stop(Duration::from_secs(10));
    }
}
