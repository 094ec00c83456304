//! Why the machine booted: what init wrote down when it went down, or that it went down by itself.

use crate::files::{self, Durability};
use atoll_spec::control::RebootCause;
use std::path::Path;

/// Reads the cause, and takes it away so that the next boot does not see it again.
///
/// A marker on STATE tells a machine that never ran from one that went down without a word (power, panic, watchdog).
pub fn read(state: &Path) -> String {
    let file = state.join("reboot-cause.json");
    let marker = state.join("machine/started");
    // On a tmpfs that outlives hostd, the marker of this boot says that only hostd was started again.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let before = files::read(&marker, 4096).ok().flatten();
    let cause = files::read(&file, 64 * 1024).ok().flatten();
    let text = match (&cause, &before) {
        (_, Some(id)) if id == boot.as_bytes() => "this boot; hostd was started again".into(),
        (Some(bytes), _) => match serde_json::from_slice::<RebootCause>(bytes) {
            Ok(cause) => {
                format!(
                    "after {} ({}): {}, up for {} s",
                    cause.action, cause.source, cause.reason, cause.uptime_s
                )
            }
            Err(_) => "after a shutdown whose cause is not readable".into(),
        },
        (None, Some(_)) => "after it went down by itself: power cut, reset, panic or watchdog".into(),
        (None, None) => "for the first time".into(),
    };
    if let Err(error) = files::keep(&marker, boot.as_bytes(), 0o644, None, Durability::Durable) {
        tracing::warn!("{}", crate::error::chain(&error));
    }
    if cause.is_some()
        && let Err(error) = std::fs::remove_file(&file)
    {
        tracing::warn!(%error, "the reboot cause stays: the next boot will show it again");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_spec::control::ShutdownAction;

    #[test]
    fn every_boot_is_explained() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path();
        std::fs::create_dir(state.join("machine")).unwrap();
        assert_eq!(read(state), "for the first time");
        assert!(read(state).contains("hostd was started again"));
        std::fs::write(state.join("machine/started"), "another boot\n").unwrap();
        assert!(read(state).contains("by itself"));
        std::fs::write(state.join("machine/started"), "another boot\n").unwrap();
        let cause = RebootCause {
            action: ShutdownAction::Reboot,
            source: "control".into(),
            reason: "update".into(),
            uptime_s: 60,
            unix_time_s: 0,
        };
        std::fs::write(state.join("reboot-cause.json"), serde_json::to_vec(&cause).unwrap()).unwrap();
        assert_eq!(read(state), "after reboot (control): update, up for 60 s");
        assert!(!state.join("reboot-cause.json").exists());
    }
}
