//! What guests say unasked, and what is asked of them when they come back.
//!
//! Called by the owner's loop. Invariants: a guest speaks of its own containers only; whatever it says, and however
//! often, at most one acknowledgement and one comparison of each guest are under way, so a guest that floods the runtime
//! delays nobody but itself. The end of a container is acknowledged once it is on disk for good, and not before: until then
//! the guest keeps it for the next runtime.

use crate::error::{Error, Result};
use crate::logs::LogPlace;
use crate::service::container::{ContainerEvent, ContainerPhase};
use crate::service::jobs;
use crate::service::owner::{Container, Done, Owner};
use crate::service::sandbox::SandboxPhase;
use crate::vm::launch::unix_ns;
use atoll_spec::guest::{ContainerPhase as GuestPhase, ContainerState, Event};
use atoll_spec::ids::{ContainerId, SandboxId};
use std::collections::BTreeSet;
use std::time::Duration;

/// Most containers that one comparison removes from a guest: more than a restart can leave there.
const MOST_DISCARDED: usize = 64;

/// How often a guest that is connected is asked again for its containers, or for the output of one: a minute and a half.
const MOST_FAILURES: u32 = 10;
/// The same for the output of a container that has ended, whose end waits for it: eight seconds.
const MOST_FAILURES_AT_THE_END: u32 = 6;
/// First pause before something is tried again; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The pause after so many failures.
fn pause(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_PAUSE)
}

/// What is being asked of a guest, and what is to be asked next.
#[derive(Debug, Default)]
pub(super) struct Attention {
    acknowledging: bool,
    /// The last event that has not been acknowledged yet.
    seen: Option<u64>,
    /// Containers whose end the guest has told, and which is not on disk for good.
    unkept: BTreeSet<ContainerId>,
    keeping: bool,
    keep_failures: u32,
    comparing: bool,
    compare_again: bool,
    compare_failures: u32,
}

impl Owner {
    /// Something happened in a guest.
    pub(super) fn guest_event(&mut self, sandbox: &SandboxId, sequence: u64, event: Event) {
        let Event::Exited { container, exit } = event;
        let known = self.is_in(&container, sandbox);
        if known {
            self.note_exit(&container, exit);
        }
        if let Some(sandbox) = self.sandboxes.get_mut(sandbox) {
            sandbox.attention.seen = Some(sequence);
            if known {
                sandbox.attention.unkept.insert(container);
            }
        }
        self.keep_exits(sandbox);
    }

    /// Brings ends that were told to disk, then acknowledges them.
    pub(super) fn keep_exits(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        if sandbox.attention.keeping {
            return; // `exits_kept` goes on
        }
        let containers = &self.containers;
        let matters = |c: &Container| !c.kept && !matches!(c.phase, ContainerPhase::Removing { .. });
        sandbox.attention.unkept.retain(|id| containers.get(id).is_some_and(matters));
        let has_ended = |id: &&ContainerId| {
            containers.get(*id).is_some_and(|c| matches!(c.phase, ContainerPhase::Exited { .. }))
        };
        let ended: Vec<ContainerId> = sandbox.attention.unkept.iter().filter(has_ended).cloned().collect();
        if ended.is_empty() {
            return self.acknowledge(id);
        }
        sandbox.attention.keeping = true;
        if !sandbox.saved {
            self.save(id);
        }
        if self.sandboxes.get(id).is_some_and(|sandbox| sandbox.saved) {
            let (root, id) = (self.shared.config.sandboxes(), id.clone());
            self.jobs.spawn_blocking(move || jobs::keep(&root, id, ended));
        } else {
            self.exits_kept(id, &[], Err(Error::State("the record cannot be written".to_owned())));
        }
    }

    /// The ends of these containers are on disk for good; or they are not, and it is tried again for as long as there is
    /// the sandbox: the guest keeps them.
    pub(super) fn exits_kept(&mut self, id: &SandboxId, ended: &[ContainerId], result: Result<()>) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let attention = &mut sandbox.attention;
        attention.keeping = false;
        if let Err(error) = result {
            attention.keep_failures += 1;
            let failures = attention.keep_failures;
            tracing::warn!(sandbox = %id, %error, failures, "the end of a container is not on disk yet");
            return self.later(pause(failures), Done::KeepExitsAgain(id.clone()));
        }
        attention.keep_failures = 0;
        for container in ended {
            if let Some(container) = self.containers.get_mut(container) {
                container.kept = true;
            }
        }
        self.keep_exits(id);
    }

    fn is_in(&self, container: &ContainerId, sandbox: &SandboxId) -> bool {
        self.containers.get(container).is_some_and(|known| known.sandbox == *sandbox)
    }

    fn acknowledge(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        if let (false, Some(vm)) = (sandbox.attention.acknowledging, &sandbox.vm)
            && sandbox.attention.unkept.is_empty()
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
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.attention.compare_failures = 0;
        }
        self.compare_with_guest(id);
    }

    pub(super) fn compare_with_guest(&mut self, id: &SandboxId) {
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
                self.compare_with_guest(id);
            } else if states.is_none() {
                self.compare_later(id);
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

    /// A guest that did not say what it has is asked again: what ended, or runs without a log, would stay so.
    fn compare_later(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.attention.compare_failures += 1;
        let failures = sandbox.attention.compare_failures;
        if sandbox.phase != SandboxPhase::Ready {
            return;
        }
        if failures < MOST_FAILURES {
            self.later(pause(failures), Done::CompareAgain(id.clone()));
        } else {
            tracing::error!(sandbox = %id, failures, "its guest does not say what it has: asked again when it connects anew");
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

    /// The stdio is open again, or is tried again, or cannot be had: an end that waited for it is told.
    pub(super) fn console_back(&mut self, id: &ContainerId, reopened: jobs::Reopened) {
        let Some(container) = self.containers.get_mut(id) else { return };
        match reopened {
            jobs::Reopened::Open(console) => {
                container.console = Some(console);
                container.reopen_failures = 0;
            }
            jobs::Reopened::Failed => {
                container.reopen_failures += 1;
                let failures = container.reopen_failures;
                let most = if container.ending.is_some() { MOST_FAILURES_AT_THE_END } else { MOST_FAILURES };
                if failures < most {
                    return self.later(pause(failures), Done::ReopenAgain(id.clone()));
                }
                container.reopen_failures = 0;
                tracing::error!(container = %id, failures, "its output cannot be had: what it says is in no log");
            }
            jobs::Reopened::Gone => {}
        }
        container.reopening = false;
        if container.ending.is_some() {
            self.finish_ending(id);
        }
    }

    /// The next try. Without a guest there is no more to be had.
    pub(super) fn reopen_again(&mut self, id: &ContainerId) {
        let Some(container) = self.containers.get_mut(id) else { return };
        container.reopening = false;
        let sandbox = container.sandbox.clone();
        let ends = container.ending.is_some();
        if !self.reopen_console(&sandbox, id) && ends {
            self.finish_ending(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_have_an_end() {
        let all = |most| (1..most).map(pause).sum::<Duration>();
        assert_eq!(pause(1), FIRST_PAUSE);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
        assert!(all(MOST_FAILURES_AT_THE_END) < Duration::from_secs(8));
        assert!(all(MOST_FAILURES) < Duration::from_secs(100));
    }
}
