//! States of a container. ◇ Pure.
//!
//! ```text
//!            made            start asked           runs
//!  Creating ──────► Created ─────────────► Starting ────► Running
//!     │ failed         │                      │ failed       │ exited, or VM ended
//!     ▼                │ VM ended             ▼              ▼
//!  (forgotten)         └──────────────────► Exited ◄─────────┘ ──remove──► Removing ──► (forgotten)
//!                                                          ◄── failed ──┘
//! ```
//!
//! Called by the service owner. Invariants: `Exited` is final (the first report of an exit counts); removing is possible from
//! every state but `Creating` and `Starting`; one that fails changes nothing.

/// Exit code of a container whose VM ended under it.
pub const CODE_VM_LOST: i32 = 255;
/// Exit code of a container that could not be started, when the guest gave no better one.
pub const CODE_START_FAILED: i32 = 128;
/// Reason of a clean exit.
pub const REASON_COMPLETED: &str = "Completed";
/// Reason of any other exit.
pub const REASON_ERROR: &str = "Error";
/// Reason when the kernel's OOM killer struck.
pub const REASON_OOM: &str = "OOMKilled";

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Exit code.
    pub code: i32,
    /// One word.
    pub reason: String,
    /// For people; mostly empty.
    pub message: String,
    /// Nanoseconds since 1970.
    pub finished_ns: i64,
}

/// Where a container is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerPhase {
    /// Being made in the guest.
    Creating,
    /// Made, never started.
    Created,
    /// Being started.
    Starting,
    /// Runs.
    Running {
        /// Nanoseconds since 1970.
        started_ns: i64,
    },
    /// Ended.
    Exited {
        /// Nanoseconds since 1970; 0 when it never ran.
        started_ns: i64,
        /// How.
        ended: Ended,
    },
    /// Being removed.
    Removing {
        /// Where it is again when that fails.
        before: Box<ContainerPhase>,
    },
}

/// What happens to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerEvent {
    /// The guest has made it.
    Made,
    /// Somebody wants it started.
    StartAsked,
    /// It runs.
    Started {
        /// Nanoseconds since 1970.
        at_ns: i64,
    },
    /// It ended, could not be started, or lost its VM.
    Exited(Ended),
    /// Somebody wants it gone.
    RemoveAsked,
    /// It is still there.
    RemoveFailed,
}

impl ContainerPhase {
    /// The next state; `None` when the event changes nothing here.
    pub fn next(&self, event: &ContainerEvent) -> Option<Self> {
        use ContainerEvent as E;
        use ContainerPhase as P;
        let exited = |started_ns: i64, ended: &Ended| Some(P::Exited { started_ns, ended: ended.clone() });
        match (self, event) {
            (P::Creating, E::Made) => Some(P::Created),
            (P::Created, E::StartAsked) => Some(P::Starting),
            (P::Starting, E::Started { at_ns }) => Some(P::Running { started_ns: *at_ns }),
            // It can end before the answer to the start has arrived.
            (P::Creating | P::Created | P::Starting, E::Exited(ended)) => exited(0, ended),
            (P::Running { started_ns }, E::Exited(ended)) => exited(*started_ns, ended),
            // It ran, and its end was known first.
            (P::Exited { started_ns: 0, ended }, E::Started { at_ns }) => exited(*at_ns, ended),
            (P::Created | P::Running { .. } | P::Exited { .. }, E::RemoveAsked) => {
                Some(P::Removing { before: Box::new(self.clone()) })
            }
            (P::Removing { before }, E::RemoveFailed) => Some((**before).clone()),
            // What the removal ended is known when it fails after that.
            (P::Removing { before }, E::Exited(_)) => {
                Some(P::Removing { before: Box::new(before.next(event)?) })
            }
            (
                _,
                E::Made | E::StartAsked | E::Started { .. } | E::Exited(_) | E::RemoveAsked | E::RemoveFailed,
            ) => None,
        }
    }

    /// Whether a process may be running.
    pub fn is_active(&self) -> bool {
        matches!(self, Self::Starting | Self::Running { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ended(code: i32) -> Ended {
        Ended { code, reason: REASON_ERROR.into(), message: String::new(), finished_ns: 9 }
    }

    fn event() -> impl Strategy<Value = ContainerEvent> {
        prop_oneof![
            Just(ContainerEvent::Made),
            Just(ContainerEvent::StartAsked),
            Just(ContainerEvent::Started { at_ns: 5 }),
            (0..3).prop_map(|code| ContainerEvent::Exited(ended(code))),
            Just(ContainerEvent::RemoveAsked),
            Just(ContainerEvent::RemoveFailed),
        ]
    }

    proptest! {
        #[test]
        fn the_first_exit_counts(events in proptest::collection::vec(event(), 0..30)) {
            let mut phase = ContainerPhase::Creating;
            let mut first: Option<i32> = None;
            for event in events {
                let Some(next) = phase.next(&event) else { continue };
                if let ContainerPhase::Exited { ended, .. } = &next {
                    prop_assert_eq!(*first.get_or_insert(ended.code), ended.code);
                }
                if let ContainerPhase::Removing { before } = &next {
                    let inner = matches!(**before, ContainerPhase::Removing { .. });
                    prop_assert!(!inner, "a removal within a removal");
                }
                phase = next;
            }
        }
    }

    #[test]
    fn a_removal_that_fails_keeps_the_end_and_the_start_time() {
        let exited = ContainerPhase::Exited { started_ns: 5, ended: ended(3) };
        let removing = exited.next(&ContainerEvent::RemoveAsked).unwrap();
        assert_eq!(removing.next(&ContainerEvent::RemoveFailed), Some(exited.clone()));
        // It ran, and ended by the removal that failed then.
        let running = ContainerPhase::Running { started_ns: 5 };
        let removing = running.next(&ContainerEvent::RemoveAsked).unwrap();
        let removing = removing.next(&ContainerEvent::Exited(ended(3))).unwrap();
        assert_eq!(removing.next(&ContainerEvent::RemoveFailed), Some(exited));
    }

    #[test]
    fn an_exit_before_the_answer_to_the_start_keeps_the_start_time() {
        let phase = ContainerPhase::Starting.next(&ContainerEvent::Exited(ended(3))).unwrap();
        let phase = phase.next(&ContainerEvent::Started { at_ns: 5 }).unwrap();
        assert_eq!(phase, ContainerPhase::Exited { started_ns: 5, ended: ended(3) });
    }
}
