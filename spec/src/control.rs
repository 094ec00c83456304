//! Messages between init and hostd, carried over D-Bus on a private socket, and the few files init leaves behind.
//!
//! The socket is peer to peer: no bus daemon, no names. A client connects to [`BUS_SOCKET`], which admits uid 0
//! alone, and calls [`INTERFACE`] at [`OBJECT_PATH`]:
//!
//! | member | in | out |
//! |---|---|---|
//! | `ListServices` | | `Vec<`[`ServiceStatus`]`>`, in start order |
//! | `StartService`, `StopService`, `RestartService` | name | nothing; returns once accepted, the signal tells the rest |
//! | `Logs` | name (`init` for its own), lines (0: all that is kept) | `Vec<`[`LogLine`]`>`, oldest first |
//! | `Reboot`, `PowerOff` | reason | nothing; the shutdown then begins |
//! | `BootPhases` | | `Vec<`[`BootPhase`]`>`, in order |
//! | signal `ServiceChanged` | | [`ServiceStatus`] |
//!
//! An unknown service answers `org.freedesktop.DBus.Error.InvalidArgs` and names those there are.
//! With the feature `dbus` the types know their D-Bus signature.

use serde::{Deserialize, Serialize};

/// Socket of the control interface; root only.
pub const BUS_SOCKET: &str = "/run/atoll/init/bus.sock";
/// Object of the control interface.
pub const OBJECT_PATH: &str = "/dev/atoll/Init";
/// Name of the control interface.
pub const INTERFACE: &str = "dev.atoll.Init1";
/// Datagram socket of the readiness protocol (`READY=1`, `STATUS=…`, `WATCHDOG=1`); services get it as `NOTIFY_SOCKET`.
/// One that finds `WATCHDOG_USEC` in its environment must send `WATCHDOG=1` at least that often once it is ready, or it
/// is taken for hung and killed.
pub const NOTIFY_SOCKET: &str = "/run/atoll/init/notify.sock";
/// The host's machine id: 32 hexadecimal digits and a newline.
pub const MACHINE_ID_FILE: &str = "/run/atoll/machine-id";
/// Why the machine went down last time, as [`RebootCause`]. Written when a shutdown begins; hostd shows it at the
/// next boot and removes it, so that its absence means the machine went down by itself.
pub const REBOOT_CAUSE_FILE: &str = "/state/reboot-cause.json";
/// Cgroup of the services, one child each.
pub const SERVICES_CGROUP: &str = "/sys/fs/cgroup/atoll/services";
/// Cgroup of the pods, one child each, made by the runtime.
pub const PODS_CGROUP: &str = "/sys/fs/cgroup/atoll/pods";

/// Where a service is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "dbus", derive(zbus::Type), zbus(signature = "s"))]
#[serde(rename_all = "kebab-case")]
pub enum ServiceState {
    /// Not running and not meant to.
    Stopped,
    /// Meant to run; a service it needs is not ready.
    Waiting,
    /// Running, not ready.
    Starting,
    /// Running and ready.
    Ready,
    /// Asked to stop.
    Stopping,
    /// Ended by itself; started again when its back-off is over.
    BackingOff,
}

impl std::fmt::Display for ServiceState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped",
            Self::Waiting => "waiting",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::BackingOff => "backing off",
        })
    }
}

/// A service as init sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "dbus", derive(zbus::Type))]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub state: ServiceState,
    /// Its process; 0 when it has none.
    pub pid: u32,
    /// Milliseconds since boot at which it came into this state.
    pub since_ms: u64,
    /// How often it was started again after it ended by itself.
    pub restarts: u32,
    /// What it last said of itself (`STATUS=`); may be empty.
    pub status: String,
    /// How it last ended or why it could not start; empty when it never did.
    pub last_failure: String,
}

/// One line of a service's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "dbus", derive(zbus::Type))]
pub struct LogLine {
    /// Milliseconds since boot.
    pub at_ms: u64,
    /// The line, without its end.
    pub text: String,
}

/// One phase of the boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "dbus", derive(zbus::Type))]
pub struct BootPhase {
    /// Its name.
    pub name: String,
    /// Milliseconds since boot at which it began.
    pub started_ms: u64,
    /// How long it took.
    pub took_ms: u64,
    /// What went wrong though the boot went on; empty when nothing did.
    pub problem: String,
}

/// What becomes of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownAction {
    /// It boots again.
    Reboot,
    /// It stays off.
    PowerOff,
}

impl std::fmt::Display for ShutdownAction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Reboot => "reboot",
            Self::PowerOff => "power-off",
        })
    }
}

/// Why a machine was shut down: the content of [`REBOOT_CAUSE_FILE`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RebootCause {
    /// What was asked for.
    pub action: ShutdownAction,
    /// Who asked: `power-button`, `signal`, `control`, `init`.
    pub source: String,
    /// Why, in words.
    pub reason: String,
    /// Seconds the machine had been up.
    pub uptime_s: u64,
    /// Seconds since 1970 by the machine's clock at that time.
    pub unix_time_s: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_words_on_the_wire() {
        assert_eq!(serde_json::to_string(&ServiceState::BackingOff).unwrap(), "\"backing-off\"");
        assert_eq!(serde_json::to_string(&ShutdownAction::PowerOff).unwrap(), "\"power-off\"");
    }
}
