//! Container commands of the owner.

use crate::console::Console;
use crate::error::{Error, Result};
use crate::logs::LogPlace;
use crate::service::admission::{self, Admission};
use crate::service::container::{
    CODE_START_FAILED, ContainerEvent, ContainerPhase, Ended, REASON_COMPLETED, REASON_ERROR, REASON_OOM,
};
use crate::service::owner::{Container, Done, Owner, answer};
use crate::service::process::SIGTERM;
use crate::service::{EventKind, Reply, RunningContainer, jobs, random_hex};
use crate::spec::{ContainerSpec, Resources, SandboxSpec};
use crate::vm::launch::unix_ns;
use atoll_spec::guest::{Exit, GuestErrorKind};
use atoll_spec::ids::ContainerId;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

impl Owner {
    pub(super) fn create_container(&mut self, sandbox: &str, spec: ContainerSpec, reply: Reply<ContainerId>) {
        match self.prepare_container(sandbox, spec) {
            Ok((id, making)) => {
                self.jobs.spawn(async move { Done::ContainerMade(id, making.run().await, reply) });
            }
            Err(error) => answer(reply, Err(error)),
        }
    }

    fn prepare_container(
        &mut self,
        sandbox_id: &str,
        spec: ContainerSpec,
    ) -> Result<(ContainerId, jobs::Making)> {
        let found = self.find_sandbox(sandbox_id);
        if let Admission::Deny(error) = admission::create_container(sandbox_id, found.map(|s| &s.phase)) {
            return Err(error);
        }
        let sandbox = found.ok_or_else(|| Error::no_sandbox(sandbox_id))?;
        let vm =
            sandbox.vm.clone().ok_or_else(|| Error::State(format!("sandbox {sandbox_id} is not ready")))?;
        let twin = |c: &&Container| {
            c.sandbox == sandbox.id && c.spec.name == spec.name && c.spec.attempt == spec.attempt
        };
        if let Some(twin) = self.containers.values().find(twin) {
            return Err(Error::Exists(format!(
                "the pod has container {} attempt {} already, {}: remove that one, or count the attempt up",
                spec.name, spec.attempt, twin.id
            )));
        }
        let id: ContainerId = random_hex()?.parse().map_err(|e| Error::Invalid(format!("{e}")))?;
        let (stdio_stream, stdio) = vm.link.expect_stream();
        let log_path = log_path(&sandbox.spec, &spec);
        if let Some(path) = &log_path {
            self.shared.roots.check_log(path)?;
        }
        let making = jobs::Making {
            shared: self.shared.clone(),
            vm,
            id: id.clone(),
            spec: spec.clone(),
            sandbox: sandbox.spec.clone(),
            known_trees: sandbox.watches.keys().cloned().collect(),
            stdio_stream,
        };
        let container = Container {
            id: id.clone(),
            sandbox: sandbox.id.clone(),
            phase: ContainerPhase::Creating,
            created_ns: unix_ns(),
            image_id: String::new(),
            image_ref: String::new(),
            process: None,
            log_path,
            stop_signal: if spec.stop_signal == 0 { SIGTERM } else { spec.stop_signal },
            copy_back: Vec::new(),
            stdio_stream,
            stdio: Some(stdio),
            console: None,
            in_start: false,
            reopening: false,
            reopen_failures: 0,
            kept: false,
            ending: None,
            exited: watch::Sender::new(false),
            remove_waiters: Vec::new(),
            spec,
        };
        self.containers.insert(id.clone(), container);
        Ok((id, making))
    }

    pub(super) fn container_made(
        &mut self,
        id: &ContainerId,
        result: Result<jobs::Made>,
        reply: Reply<ContainerId>,
    ) {
        let made = match result {
            Ok(made) => made,
            Err(error) => {
                self.drop_container(id);
                return answer(reply, Err(error));
            }
        };
        let Some(container) = self.containers.get_mut(id) else {
            return answer(reply, Err(Error::no_container(id.as_str())));
        };
        let sandbox_id = container.sandbox.clone();
        container.image_id = made.image_id;
        container.image_ref = made.image_ref;
        container.process = Some(made.process);
        container.copy_back = made.copy_back;
        if container.spec.stop_signal == 0 {
            container.stop_signal = made.stop_signal;
        }
        if let Some(sandbox) = self.sandboxes.get_mut(&sandbox_id) {
            sandbox.extents = made.extents;
            for (name, directory, watched) in made.trees {
                sandbox.trees.insert(name.clone(), directory);
                sandbox.watches.insert(name, watched);
            }
        }
        if self.move_container(id, &ContainerEvent::Made) {
            self.emit(&sandbox_id, id.as_str(), EventKind::Created);
            answer(reply, Ok(id.clone()));
        } else {
            answer(
                reply,
                Err(Error::State(format!(
                    "sandbox {sandbox_id} ended while the container was being created"
                ))),
            );
        }
    }

    pub(super) fn start_container(&mut self, id: &str, reply: Reply<()>) {
        match self.prepare_start(id) {
            Ok((id, starting)) => {
                self.move_container(&id, &ContainerEvent::StartAsked);
                self.jobs.spawn(async move { Done::ContainerStarted(id, starting.run().await, reply) });
            }
            Err(error) => answer(reply, Err(error)),
        }
    }

    fn prepare_start(&mut self, id: &str) -> Result<(ContainerId, jobs::Starting)> {
        let found = self.find_container(id);
        if let Admission::Deny(error) = admission::start_container(id, found.map(|c| &c.phase)) {
            return Err(error);
        }
        let key = found.map(|c| c.id.clone()).ok_or_else(|| Error::no_container(id))?;
        let container = self.containers.get_mut(&key).ok_or_else(|| Error::no_container(id))?;
        let vm = self.sandboxes.get(&container.sandbox).and_then(|s| s.vm.clone());
        let vm = vm.ok_or_else(|| Error::State(format!("the sandbox of container {id} is not ready")))?;
        container.in_start = true;
        let starting = jobs::Starting {
            vm,
            id: key.clone(),
            stdio: container.stdio.take(),
            log: container.log_path.clone().map(|path| LogPlace { roots: self.shared.roots.clone(), path }),
            tty: container.spec.tty,
        };
        Ok((key, starting))
    }

    pub(super) fn container_started(
        &mut self,
        id: &ContainerId,
        result: Result<Arc<Console>>,
        reply: Reply<()>,
    ) {
        let Some(container) = self.containers.get_mut(id) else {
            return answer(reply, Err(Error::no_container(id.as_str())));
        };
        let sandbox = container.sandbox.clone();
        container.in_start = false;
        match result {
            Ok(console) => {
                container.console = Some(console);
                if self.move_container(id, &ContainerEvent::Started { at_ns: unix_ns() }) {
                    self.emit(&sandbox, id.as_str(), EventKind::Started);
                }
                self.finish_ending(id);
                answer(reply, Ok(()));
            }
            Err(error @ Error::Guest { .. }) => {
                let code = match &error {
                    Error::Guest { kind: GuestErrorKind::CommandNotFound, .. } => 127,
                    Error::Guest { kind: GuestErrorKind::CommandNotExecutable, .. } => 126,
                    _ => CODE_START_FAILED,
                };
                self.container_ended(id, start_failed(code, error.to_string()));
                answer(reply, Err(error));
            }
            // The guest may have started it all the same, or still do so.
            Err(error) => {
                self.undo_start(id, jobs::Unsure { why: error.to_string(), asker: Some((error, reply)) })
            }
        }
    }

    /// Takes back a start of which nobody knows what became. Only then is it told to have ended: kubelet starts the next
    /// instance at once, and two of them must not run side by side.
    pub(super) fn undo_start(&mut self, id: &ContainerId, unsure: jobs::Unsure) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let vm = self.sandboxes.get(&container.sandbox).and_then(|s| s.vm.clone());
        container.in_start = true;
        let id = id.clone();
        self.jobs.spawn(async move {
            jobs::undo_start(vm, &id).await;
            Done::StartUndone(id, unsure)
        });
    }

    pub(super) fn start_undone(&mut self, id: &ContainerId, unsure: jobs::Unsure) {
        if let Some(container) = self.containers.get_mut(id) {
            container.in_start = false;
            let told = container.ending.take();
            let ended = told.unwrap_or_else(|| start_failed(CODE_START_FAILED, unsure.why));
            self.container_ended(id, ended);
        }
        if let Some((error, reply)) = unsure.asker {
            answer(reply, Err(error));
        }
    }

    /// An event of a guest: the end of a container is told once its last output is in the log.
    pub(super) fn note_exit(&mut self, id: &ContainerId, exit: Exit) {
        let Some(container) = self.containers.get_mut(id) else { return };
        if matches!(container.phase, ContainerPhase::Exited { .. }) || container.ending.is_some() {
            return;
        }
        container.ending = Some(ended(exit, container.created_ns, unix_ns()));
        if container.in_start || container.reopening {
            return; // `container_started`, `start_undone` or `console_back` goes on
        }
        // It ended while the runtime was away: what it said since then still waits in the guest.
        let sandbox = container.sandbox.clone();
        if container.console.is_some() || !self.reopen_console(&sandbox, id) {
            self.finish_ending(id);
        }
    }

    /// Waits for the last output and copies files back, in a job.
    pub(super) fn finish_ending(&mut self, id: &ContainerId) {
        let Some(container) = self.containers.get(id) else { return };
        let Some(ended) = container.ending.clone() else { return };
        let vm = self.sandboxes.get(&container.sandbox).and_then(|s| s.vm.clone());
        let ending = jobs::Ending {
            vm,
            id: id.clone(),
            console: container.console.clone(),
            copy_back: container.copy_back.clone(),
            roots: self.shared.roots.clone(),
        };
        let id = id.clone();
        self.jobs.spawn(async move {
            ending.run().await;
            Done::ContainerEnded(id, ended)
        });
    }

    pub(super) fn container_ended(&mut self, id: &ContainerId, ended: Ended) {
        if let Some(container) = self.containers.get_mut(id) {
            container.ending = None;
            container.console = None;
            let sandbox = container.sandbox.clone();
            if self.move_container(id, &ContainerEvent::Exited(ended)) {
                self.emit(&sandbox, id.as_str(), EventKind::Stopped);
            }
            self.keep_exits(&sandbox);
        }
    }

    pub(super) fn stop_container(&mut self, id: &str, timeout: Duration, reply: Reply<()>) {
        let found = self.find_container(id);
        match (admission::stop_container(found.map(|c| &c.phase)), found) {
            (Admission::Go, Some(container)) => {
                let Some(vm) = self.sandboxes.get(&container.sandbox).and_then(|s| s.vm.clone()) else {
                    return answer(reply, Ok(()));
                };
                let stopping = jobs::Stopping {
                    vm,
                    id: container.id.clone(),
                    signal: container.stop_signal,
                    timeout,
                    exited: container.exited.subscribe(),
                };
                self.jobs.spawn(async move {
                    answer(reply, stopping.run().await);
                    Done::Nothing
                });
            }
            (Admission::Deny(error), _) => answer(reply, Err(error)),
            _ => answer(reply, Ok(())),
        }
    }

    pub(super) fn remove_container(&mut self, id: &str, reply: Reply<()>) {
        let found = self.find_container(id);
        match (admission::remove_container(id, found.map(|c| &c.phase)), found.map(|c| c.id.clone())) {
            (Admission::Go, Some(id)) => {
                self.move_container(&id, &ContainerEvent::RemoveAsked);
                let Some(container) = self.containers.get_mut(&id) else { return };
                container.remove_waiters.push(reply);
                let vm = self.sandboxes.get(&container.sandbox).and_then(|s| s.vm.clone());
                self.jobs.spawn(async move {
                    let result = jobs::remove(vm, &id).await;
                    Done::ContainerRemoved(id, result)
                });
            }
            (Admission::Join, Some(id)) => {
                if let Some(container) = self.containers.get_mut(&id) {
                    container.remove_waiters.push(reply);
                }
            }
            (Admission::Deny(error), _) => answer(reply, Err(error)),
            _ => answer(reply, Ok(())),
        }
    }

    pub(super) fn container_removed(&mut self, id: &ContainerId, result: Result<()>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let waiters = std::mem::take(&mut container.remove_waiters);
        let sandbox = container.sandbox.clone();
        let failed = result.err().map(|e| e.to_string());
        if let Some(why) = &failed {
            tracing::warn!(container = %id, why, "cannot remove a container");
            // It can be asked for again.
            self.move_container(id, &ContainerEvent::RemoveFailed);
        } else {
            self.emit(&sandbox, id.as_str(), EventKind::Deleted);
            self.drop_container(id);
            self.save(&sandbox);
        }
        for waiter in waiters {
            answer(waiter, failed.clone().map_or(Ok(()), |why| Err(Error::State(why))));
        }
    }

    /// Forgets a container and what it held.
    pub(super) fn drop_container(&mut self, id: &ContainerId) {
        if let Some(container) = self.containers.remove(id) {
            self.shared.images.release(id.as_str());
            container.exited.send_replace(true);
            for waiter in container.remove_waiters {
                answer(waiter, Ok(()));
            }
            self.keep_exits(&container.sandbox);
        }
    }

    pub(super) fn update_container(&mut self, id: &str, resources: Box<Resources>, reply: Reply<()>) {
        match self.find_container(id) {
            None => answer(reply, Err(Error::no_container(id))),
            Some(container) => {
                let vm = self.sandboxes.get(&container.sandbox).and_then(|s| s.vm.clone());
                let id = container.id.clone();
                self.jobs.spawn(async move {
                    let result = jobs::update_limits(vm, &id, &resources).await;
                    Done::LimitsChanged(id, resources, result, reply)
                });
            }
        }
    }

    pub(super) fn limits_changed(
        &mut self,
        id: &ContainerId,
        new: Resources,
        result: Result<()>,
        reply: Reply<()>,
    ) {
        if result.is_ok()
            && let Some(container) = self.containers.get_mut(id)
        {
            container.spec.resources.change(new);
            let sandbox = container.sandbox.clone();
            self.save(&sandbox);
        }
        answer(reply, result);
    }

    pub(super) fn use_container(&self, id: &str) -> Result<RunningContainer> {
        let found = self.find_container(id);
        if let Admission::Deny(error) = admission::use_container(id, found.map(|c| &c.phase)) {
            return Err(error);
        }
        let container = found.ok_or_else(|| Error::no_container(id))?;
        let vm = self.sandboxes.get(&container.sandbox).and_then(|s| s.vm.clone());
        let not_ready = || Error::State(format!("the sandbox of container {id} is not ready"));
        Ok(RunningContainer {
            id: container.id.clone(),
            vm: vm.ok_or_else(not_ready)?,
            process: container.process.clone().ok_or_else(not_ready)?,
            spec: container.spec.clone(),
            console: container.console.clone(),
        })
    }
}

/// Where a container's log goes, when it is to have one.
fn log_path(sandbox: &SandboxSpec, spec: &ContainerSpec) -> Option<PathBuf> {
    let wanted = !sandbox.log_directory.is_empty() && !spec.log_path.is_empty();
    wanted.then(|| Path::new(&sandbox.log_directory).join(&spec.log_path))
}

fn start_failed(code: i32, message: String) -> Ended {
    Ended { code, reason: "StartError".to_owned(), message, finished_ns: unix_ns() }
}

/// The end of a container as CRI words it. The guest says when, by its own clock; what waits for a time after that is
/// the host's, so it cannot have been before the container was made, nor in the future.
fn ended(exit: Exit, created_ns: i64, now_ns: i64) -> Ended {
    let reason = match exit {
        Exit { oom_killed: true, .. } => REASON_OOM,
        Exit { code: 0, .. } => REASON_COMPLETED,
        _ => REASON_ERROR,
    };
    let finished_ns = exit.at_unix_ns.min(now_ns).max(created_ns);
    Ended { code: exit.code, reason: reason.to_owned(), message: String::new(), finished_ns }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_clock_moves_no_end_into_the_future_or_before_the_beginning() {
        for (said, finished) in [(150, 150), (0, 100), (i64::MIN, 100), (999, 200), (i64::MAX, 200)] {
            let exit = Exit { code: 1, oom_killed: false, at_unix_ns: said };
            assert_eq!(ended(exit, 100, 200).finished_ns, finished, "{said}");
        }
    }
}
