//! States of a sandbox. ◇ Pure.
//!
//! ```text
//!              launched                 stop asked
//!  Launching ───────────► Ready ──────────────────► Stopping
//!      │                    │  VMM ended                │ VMM ended
//!      │ failed             ▼                           ▼
//!      └──► (forgotten)   NotReady ◄────────────────────┘ ──remove──► Removing ──► (forgotten)
//! ```
//!
//! Called by the service owner. Invariant: a sandbox that has left `Ready` never comes back to it; CRI says SANDBOX_READY
//! in `Ready` alone.

/// Where a sandbox is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SandboxPhase {
    /// Its VM is being launched.
    Launching,
    /// Its guest serves.
    Ready,
    /// Its VM is being taken down.
    Stopping,
    /// It has no VM any more.
    NotReady {
        /// Why, for people.
        reason: String,
    },
    /// Its files are being removed.
    Removing,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SandboxEvent {
    /// The guest is configured.
    Launched,
    /// Somebody wants it stopped.
    StopAsked,
    /// The VMM process is gone.
    VmEnded {
        /// Why, for people.
        reason: String,
    },
    /// Somebody wants it removed, and it has no VM.
    RemoveAsked,
}

impl SandboxPhase {
    /// The next state; `None` when the event changes nothing here.
    pub fn next(&self, event: &SandboxEvent) -> Option<Self> {
        use SandboxEvent as E;
        use SandboxPhase as P;
        match (self, event) {
            (P::Launching, E::Launched) => Some(P::Ready),
            (P::Launching | P::Ready, E::StopAsked) => Some(P::Stopping),
            (P::Launching | P::Ready | P::Stopping, E::VmEnded { reason }) => {
                Some(P::NotReady { reason: reason.clone() })
            }
            (P::NotReady { .. }, E::RemoveAsked) => Some(P::Removing),
            (P::Ready | P::Stopping | P::NotReady { .. } | P::Removing, E::Launched)
            | (P::Stopping | P::NotReady { .. } | P::Removing, E::StopAsked)
            | (P::NotReady { .. } | P::Removing, E::VmEnded { .. })
            | (P::Launching | P::Ready | P::Stopping | P::Removing, E::RemoveAsked) => None,
        }
    }

    /// Whether a VM may be running.
    pub fn has_vm(&self) -> bool {
        matches!(self, Self::Launching | Self::Ready | Self::Stopping)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event() -> impl Strategy<Value = SandboxEvent> {
        prop_oneof![
            Just(SandboxEvent::Launched),
            Just(SandboxEvent::StopAsked),
            Just(SandboxEvent::VmEnded { reason: "x".into() }),
            Just(SandboxEvent::RemoveAsked),
        ]
    }

    proptest! {
        #[test]
        fn ready_is_never_reached_twice(events in proptest::collection::vec(event(), 0..30)) {
            let mut phase = SandboxPhase::Launching;
            let mut left = false;
            for event in events {
                let Some(next) = phase.next(&event) else { continue };
                left |= phase == SandboxPhase::Ready && next != SandboxPhase::Ready;
                prop_assert!(!(left && next == SandboxPhase::Ready));
                prop_assert!(phase != SandboxPhase::Removing, "nothing follows Removing");
                phase = next;
            }
        }
    }
}
