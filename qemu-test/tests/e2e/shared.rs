//! The lab and the host that the tests share, and what most tests need.

use crate::turns::{self, Turn, Use};
use anyhow::Context;
use atoll_qemu_test::artifacts::{Artifacts, Profile};
use atoll_qemu_test::inspect::Inspector;
use atoll_qemu_test::lab::Lab;
use atoll_qemu_test::machine::Machine;
use atoll_qemu_test::process::wait_for;
use atoll_qemu_test::progress::Progress;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Deadline for a pod to get where it should under emulation, image pull included.
pub const POD: Duration = Duration::from_secs(180);

/// Whether the long forms of the tests are wanted (`./just soak`): more rounds, more pods, every step.
pub fn long() -> bool {
    std::env::var_os("ATOLL_SOAK").is_some()
}

/// The lab without a host: whoever uses it has its turn ([`turns`]).
pub fn lab() -> &'static (Artifacts, Lab) {
    static LAB: OnceLock<Result<(Artifacts, Lab), String>> = OnceLock::new();
    let lab = LAB.get_or_init(|| {
        let start = || {
            let artifacts = Artifacts::locate()?;
            let directory = artifacts.out().join("e2e");
            let lab = Lab::start(&artifacts, &directory, &mut Progress::default())?;
            anyhow::Ok((artifacts, lab))
        };
        start().map_err(|error| format!("{error:#}"))
    });
    match lab {
        Ok(lab) => lab,
        Err(error) => panic!("the lab did not start: {error}"),
    }
}

/// The host `node-1` of the lab, booted once.
pub fn machine() -> MutexGuard<'static, Machine> {
    static MACHINE: OnceLock<Result<Mutex<Machine>, String>> = OnceLock::new();
    let machine = MACHINE.get_or_init(|| {
        let (artifacts, lab) = lab();
        let boot = || {
            let mut machine = lab.boot_host(artifacts, Profile::Test, 0)?;
            lab.wait_ready(&mut machine, 0)?;
            anyhow::Ok(Mutex::new(machine))
        };
        boot().map_err(|error| format!("{error:#}"))
    });
    match machine {
        Ok(machine) => machine.lock().unwrap_or_else(PoisonError::into_inner),
        Err(error) => panic!("the shared host did not become Ready: {error}"),
    }
}

/// A test's hold on the shared host, and its lab.
#[derive(Clone)]
pub struct Shared {
    _turn: Arc<Turn>,
}

impl std::ops::Deref for Shared {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &lab().1
    }
}

impl Shared {
    fn take(wanted: Use) -> Self {
        let turn = turns::take(wanted);
        drop(machine());
        Self { _turn: turn }
    }

    /// Looks into the shared host and signals its processes.
    pub fn inspector(&self) -> Inspector {
        Inspector::new(&atoll_qemu_test::network::address(0)).expect("the lab's addresses are addresses")
    }
}

/// The lab with `node-1` Ready, shared with the tests that run beside.
pub fn ready_lab() -> Shared {
    Shared::take(Use::SharedHost)
}

/// The lab with `node-1` Ready, for a test that harms it or measures it: waits until no other test uses it.
pub fn alone() -> Shared {
    Shared::take(Use::SharedHostAlone)
}

/// The lab with `node-1` Ready, for a test that harms the control plane: waits until there is no other test.
pub fn alone_in_the_lab() -> Shared {
    Shared::take(Use::Lab)
}

/// A pod that is deleted, without waiting, when the test ends.
pub struct Pod {
    pub lab: Shared,
    pub name: String,
}

impl Drop for Pod {
    fn drop(&mut self) {
        // The lab dies with the tests: a pod left over harms nothing but their speed.
        let _ =
            self.lab.supervisor.kubectl(&["delete", "pod", &self.name, "--wait=false", "--grace-period=1"]);
    }
}

/// Applies a pod; `spec` is the YAML of its spec, indented by two.
pub fn apply_pod(lab: &Shared, name: &str, spec: &str) -> anyhow::Result<Pod> {
    lab.supervisor.apply(&format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec:\n  nodeName: node-1\n{spec}"))?;
    Ok(Pod { lab: lab.clone(), name: name.to_owned() })
}

/// A pod with one busybox container that runs a shell script.
pub fn shell_pod(lab: &Shared, name: &str, script: &str, restart: &str) -> anyhow::Result<Pod> {
    let script = serde_json::to_string(script)?;
    apply_pod(
        lab,
        name,
        &format!(
            "  restartPolicy: {restart}\n  terminationGracePeriodSeconds: 3\n  containers:\n  - name: main\n    image: {}\n    command: [/bin/sh, -c, {script}]\n",
            atoll_qemu_test::lab::BUSYBOX
        ),
    )
}

impl Pod {
    pub fn wait_phase(&self, phase: &str) -> anyhow::Result<()> {
        self.lab.supervisor.wait_field("pod", &self.name, "{.status.phase}", phase, POD)
    }

    pub fn field(&self, path: &str) -> anyhow::Result<String> {
        self.lab.supervisor.field("pod", &self.name, path)
    }

    pub fn wait_field(&self, path: &str, value: &str) -> anyhow::Result<()> {
        self.lab.supervisor.wait_field("pod", &self.name, path, value, POD)
    }

    pub fn logs(&self) -> anyhow::Result<String> {
        self.lab.supervisor.kubectl_ok(&["logs", &self.name])
    }

    /// Runs a command in the pod and returns its output; fails when it fails.
    pub fn exec(&self, command: &[&str]) -> anyhow::Result<String> {
        self.lab.supervisor.kubectl_ok(&[&["exec", &self.name, "--"], command].concat())
    }

    /// Waits for an event of this reason about the pod and returns its message.
    pub fn wait_event(&self, reason: &str) -> anyhow::Result<String> {
        let selector = format!("involvedObject.name={},reason={reason}", self.name);
        wait_for(&format!("an event {reason} about {}", self.name), POD, || {
            let text = self.lab.supervisor.kubectl_ok(&[
                "get",
                "events",
                "--field-selector",
                &selector,
                "-o",
                "jsonpath={.items[*].message}",
            ])?;
            Ok((!text.is_empty()).then_some(text))
        })
    }

    /// Deletes it and waits until it is gone.
    pub fn delete(&self) -> anyhow::Result<()> {
        atoll_qemu_test::process::run_ok(
            &mut self.lab.supervisor.kubectl_command(&["delete", "pod", &self.name]),
            POD,
        )
        .map(drop)
        .with_context(|| format!("cannot delete pod {}", self.name))
    }
}
