//! Whether a request may go ahead: go, nothing to do, or no, with the reason. ◇ Pure.
//!
//! Called by the service owner before anything else. Invariant: repeating a stop or a removal is never an error, and
//! neither is stopping or removing what is not there.

use crate::error::Error;
use crate::service::container::ContainerPhase;
use crate::service::sandbox::SandboxPhase;

/// What becomes of a request.
#[derive(Debug)]
pub enum Admission {
    /// Do it.
    Go,
    /// It is done already, or on its way: wait for that.
    Join,
    /// Nothing to do: answer success.
    Done,
    /// Answer this error.
    Deny(Error),
}

fn deny(why: String) -> Admission {
    Admission::Deny(Error::State(why))
}

/// StopPodSandbox.
pub fn stop_sandbox(phase: Option<&SandboxPhase>) -> Admission {
    match phase {
        Some(SandboxPhase::Launching | SandboxPhase::Ready) => Admission::Go,
        Some(SandboxPhase::Stopping) => Admission::Join,
        None | Some(SandboxPhase::NotReady { .. } | SandboxPhase::Removing) => Admission::Done,
    }
}

/// RemovePodSandbox. A sandbox that still runs is stopped first.
pub fn remove_sandbox(phase: Option<&SandboxPhase>) -> Admission {
    match phase {
        None => Admission::Done,
        Some(SandboxPhase::Removing) => Admission::Join,
        Some(
            SandboxPhase::Launching
            | SandboxPhase::Ready
            | SandboxPhase::Stopping
            | SandboxPhase::NotReady { .. },
        ) => Admission::Go,
    }
}

/// CreateContainer, by the phase of the sandbox.
pub fn create_container(id: &str, phase: Option<&SandboxPhase>) -> Admission {
    match phase {
        None => Admission::Deny(Error::no_sandbox(id)),
        Some(SandboxPhase::Ready) => Admission::Go,
        Some(SandboxPhase::Launching) => deny(format!("sandbox {id} is still being launched")),
        Some(SandboxPhase::Stopping | SandboxPhase::NotReady { .. } | SandboxPhase::Removing) => {
            deny(format!("sandbox {id} is not ready: run a new one"))
        }
    }
}

/// StartContainer.
pub fn start_container(id: &str, phase: Option<&ContainerPhase>) -> Admission {
    match phase {
        None => Admission::Deny(Error::no_container(id)),
        Some(ContainerPhase::Created) => Admission::Go,
        Some(ContainerPhase::Creating) => deny(format!("container {id} is still being created")),
        Some(ContainerPhase::Starting | ContainerPhase::Running { .. }) => {
            deny(format!("container {id} was started already"))
        }
        Some(ContainerPhase::Exited { .. } | ContainerPhase::Removing { .. }) => {
            deny(format!("container {id} has exited: a container runs once, create a new one"))
        }
    }
}

/// StopContainer.
pub fn stop_container(phase: Option<&ContainerPhase>) -> Admission {
    match phase {
        Some(ContainerPhase::Starting | ContainerPhase::Running { .. }) => Admission::Go,
        None
        | Some(
            ContainerPhase::Creating
            | ContainerPhase::Created
            | ContainerPhase::Exited { .. }
            | ContainerPhase::Removing { .. },
        ) => Admission::Done,
    }
}

/// RemoveContainer.
pub fn remove_container(id: &str, phase: Option<&ContainerPhase>) -> Admission {
    match phase {
        None => Admission::Done,
        Some(ContainerPhase::Removing { .. }) => Admission::Join,
        Some(ContainerPhase::Creating | ContainerPhase::Starting) => {
            deny(format!("container {id} is being created or started: try again when that has ended"))
        }
        Some(ContainerPhase::Created | ContainerPhase::Running { .. } | ContainerPhase::Exited { .. }) => {
            Admission::Go
        }
    }
}

/// Exec, attach, and what else needs a running container.
pub fn use_container(id: &str, phase: Option<&ContainerPhase>) -> Admission {
    match phase {
        None => Admission::Deny(Error::no_container(id)),
        Some(ContainerPhase::Running { .. }) => Admission::Go,
        Some(ContainerPhase::Creating | ContainerPhase::Created | ContainerPhase::Starting) => {
            deny(format!("container {id} is not running yet"))
        }
        Some(ContainerPhase::Exited { .. } | ContainerPhase::Removing { .. }) => {
            deny(format!("container {id} is not running: it has exited"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeating_a_stop_or_a_removal_is_never_an_error() {
        let gone = SandboxPhase::NotReady { reason: String::new() };
        for phase in [None, Some(&gone), Some(&SandboxPhase::Stopping), Some(&SandboxPhase::Removing)] {
            assert!(!matches!(stop_sandbox(phase), Admission::Deny(_)));
            assert!(!matches!(remove_sandbox(phase), Admission::Deny(_)));
        }
        assert!(matches!(stop_container(None), Admission::Done));
        assert!(matches!(remove_container("x", None), Admission::Done));
        let removing = ContainerPhase::Removing { before: Box::new(ContainerPhase::Created) };
        assert!(matches!(remove_container("x", Some(&removing)), Admission::Join));
    }

    #[test]
    fn what_needs_something_that_is_not_there_says_so() {
        assert!(matches!(create_container("x", None), Admission::Deny(Error::NotFound { .. })));
        assert!(matches!(start_container("x", None), Admission::Deny(Error::NotFound { .. })));
        assert!(matches!(
            use_container("x", Some(&ContainerPhase::Created)),
            Admission::Deny(Error::State(_))
        ));
    }
}
