//! Processes run beside a container's own: `exec`.

use crate::container::{Container, pipes};
use crate::error::{Context as _, Failure, Result};
use crate::process::{Launch, Launched, PidNamespace, launch};
use crate::reap::Processes;
use crate::stage::plan::Plan;
use crate::stdio::{Pump, Role, Stream};
use crate::sys;
use atoll_spec::guest::ExecSpec;
use atoll_spec::ids::ExecId;
use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The execs that run, by id: process number, which is also their process group.
#[derive(Default)]
pub struct Execs(Mutex<HashMap<ExecId, i32>>);

impl Execs {
    fn lock(&self) -> MutexGuard<'_, HashMap<ExecId, i32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one in a running container.
    pub fn start(
        self: &Arc<Self>,
        spec: ExecSpec,
        container: &Container,
        stream: Stream,
        processes: &Processes,
    ) -> Result<i32> {
        let pidfd = container.running()?;
        let mut process = spec.process;
        if process.env.is_empty() {
            process.env.clone_from(&container.spec.process.env);
        }
        if process.cwd.is_empty() {
            process.cwd.clone_from(&container.spec.process.cwd);
        }
        let (theirs, mut ports) = pipes(process.tty, spec.stdin)?;
        let plan = Plan { tree: None, process };
        let request = Launch {
            namespace: PidNamespace::Of(pidfd.as_fd()),
            cgroup: &container.cgroup,
            plan: &plan,
            stdio: theirs,
            container: Some(pidfd.as_fd()),
        };
        let Launched { pid, ending, terminal, .. } = launch(processes, request)?;
        ports.terminal = terminal;
        let number = pid.as_raw_nonzero().get();
        // Listed before its end can be seen, so that the end finds it.
        self.lock().insert(spec.exec.clone(), number);
        let (execs, id) = (Arc::clone(self), spec.exec);
        let pump = Pump::start(Role::Exec, ports, Some(stream), ending, move |_| {
            execs.lock().remove(&id);
        });
        match pump {
            Ok(_) => Ok(number),
            Err(error) => {
                // Nobody would see its end: it must not run.
                let _ = sys::kill(-number, libc::SIGKILL);
                Err(error).during(|| "start the thread that moves the output".into())
            }
        }
    }

    /// Kills the process group of one.
    pub fn kill(&self, id: &ExecId) -> Result<()> {
        // The lock is held while killing: the number cannot be given to another process before its end was seen.
        let running = self.lock();
        let Some(number) = running.get(id) else {
            return Err(Failure::not_found(format!("exec {id} does not run")));
        };
        match sys::kill(-number, libc::SIGKILL) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other.during(|| format!("kill exec {id}")),
        }
    }
}
