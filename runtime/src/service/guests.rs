//! What guests say unasked, and what is asked of them when they come back.
//!
//! Called by the owner's loop. Invariants: a guest speaks of its own containers only; whatever it says, and however
//! often, at most one acknowledgement and one comparison of each guest are under way, so a guest that floods the runtime
//! delays nobody but itself.

use crate::console::Console;
use crate::logs::LogPlace;
use crate::service::container::{ContainerEvent, ContainerPhase};
use crate::service::jobs;
use crate::service::owner::{Container, Done, Owner};
use crate::service::sandbox::SandboxPhase;
use crate::vm::launch::unix_ns;
use atoll_spec::guest::{ContainerPhase as GuestPhase, ContainerState, Event};
use atoll_spec::ids::{ContainerId, SandboxId};
use std::sync::Arc;

/// Most containers that one comparison removes from a guest: more than a restart can leave there.
const MOST_DISCARDED: usize = 64;

/// What is being asked of a guest, and what is to be asked next.
#[derive(Debug, Default)]
pub(super) struct Attention {
    acknowledging: bool,
    /// The last event that has not been acknowledged yet.
    seen: Option<u64>,
    comparing: bool,
    compare_again: bool,
}

impl Owner {
    /// Something happened in a guest.
    pub(super) fn guest_event(&mut self, sandbox: &SandboxId, sequence: u64, event: Event) {
        let Event::Exited { container, exit } = event;
        if self.is_in(&container, sandbox) {
            self.note_exit(&container, exit);
        }
        if let Some(sandbox) = self.sandboxes.get_mut(sandbox) {
            sandbox.attention.seen = Some(sequence);
        }
        self.acknowledge(sandbox);
    }

    fn is_in(&self, container: &ContainerId, sandbox: &SandboxId) -> bool {
        self.containers.get(container).is_some_and(|known| known.sandbox == *sandbox)
    }

    fn acknowledge(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        if let (false, Some(vm)) = (sandbox.attention.acknowledging, &sandbox.vm)
            && let Some(sequence) = sandbox.attention.seen.take()
        {
            sandbox.attention.acknowledging = true;
            self.jobs.spawn(jobs::acknowledge(id.clone(), vm.clone(), sequence));
        }
    }

    /// An acknowledgement has been taken, or not: what came meanwhile is next.
    pub(super) fn acknowledged(&mut self, id: &SandboxId) {
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.attention.acknowledging = false;
        }
        self.acknowledge(id);
    }

    /// The control connection is there again: what does the guest have?
    pub(super) fn guest_connected(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        // While it is being launched, the launch itself speaks to the guest first.
        if let (SandboxPhase::Ready, Some(vm)) = (&sandbox.phase, &sandbox.vm) {
            if sandbox.attention.comparing {
                sandbox.attention.compare_again = true;
                return;
            }
            sandbox.attention.comparing = true;
            self.jobs.spawn(jobs::list(id.clone(), vm.clone()));
        }
    }

    /// Compares what a guest has with what is known; `None` when it did not say.
    pub(super) fn reconciled(&mut self, id: &SandboxId, states: Option<&[ContainerState]>) {
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.attention.comparing = false;
            if std::mem::take(&mut sandbox.attention.compare_again) {
                self.guest_connected(id);
            }
        }
        let mut unknown = Vec::new();
        for state in states.unwrap_or_default() {
            if self.is_in(&state.container, id) {
                self.compare(id, state);
            } else if !self.containers.contains_key(&state.container) {
                unknown.push(state.container.clone());
            }
        }
        if states.is_some() {
            self.undo_starts(id);
        }
        // Half made or half removed when the runtime was restarted: nobody will ask for them again.
        unknown.truncate(MOST_DISCARDED);
        let vm = self.sandboxes.get(id).and_then(|sandbox| sandbox.vm.clone());
        if let (Some(vm), false) = (vm, unknown.is_empty()) {
            self.jobs.spawn(jobs::discard(vm, unknown));
        }
    }

    /// What the guest had started has been moved on. What still is `Starting`, with nobody at it, was being started when
    /// the runtime was killed: the guest may be at it yet, or never have been asked.
    fn undo_starts(&mut self, id: &SandboxId) {
        let stuck = |c: &&Container| {
            c.sandbox == *id && c.phase == ContainerPhase::Starting && !c.in_start && c.ending.is_none()
        };
        let stuck: Vec<ContainerId> = self.containers.values().filter(stuck).map(|c| c.id.clone()).collect();
        for container in stuck {
            let why = "the runtime was restarted while it started the container".to_owned();
            self.undo_start(&container, jobs::Unsure { why, asker: None });
        }
    }

    fn compare(&mut self, sandbox: &SandboxId, state: &ContainerState) {
        match state.phase {
            GuestPhase::Exited { exit } => {
                self.move_container(&state.container, &ContainerEvent::Started { at_ns: unix_ns() });
                self.note_exit(&state.container, exit);
            }
            GuestPhase::Running { .. } => {
                self.move_container(&state.container, &ContainerEvent::Started { at_ns: unix_ns() });
                // Whether it was open already makes no difference here.
                let _ = self.reopen_console(sandbox, &state.container);
            }
            GuestPhase::Created => {} // mostly right; `undo_starts` sees to the rest
        }
    }

    /// Opens the stdio of a container again, in a job, unless it is open or there is no guest; whether it does.
    pub(super) fn reopen_console(&mut self, sandbox: &SandboxId, id: &ContainerId) -> bool {
        let vm = self.sandboxes.get(sandbox).and_then(|s| s.vm.clone());
        let (Some(vm), Some(container)) = (vm, self.containers.get_mut(id)) else { return false };
        if container.reopening || container.console.as_ref().is_some_and(|c| !c.is_drained()) {
            return false;
        }
        container.reopening = true;
        let (id, tty) = (id.clone(), container.spec.tty);
        let log = container.log_path.clone().map(|path| LogPlace { roots: self.shared.roots.clone(), path });
        self.jobs.spawn(async move {
            let console = jobs::reopen_stdio(vm, &id, log, tty).await;
            Done::ConsoleBack(id, console)
        });
        true
    }

    /// The stdio is open again, or cannot be: an end that waited for it is told.
    pub(super) fn console_back(&mut self, id: &ContainerId, console: Option<Arc<Console>>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        container.reopening = false;
        container.console = console.or(container.console.take());
        if container.ending.is_some() {
            self.finish_ending(id);
        }
    }
}
