//! Readiness, told to init by the sd_notify protocol.
//!
//! Called by `main`. Without `NOTIFY_SOCKET` (a development machine) nothing is told.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

/// Sends a state such as `READY=1`.
pub fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(state.as_bytes(), &path));
    if let Err(error) = sent {
        tracing::warn!(%error, state, "cannot tell init");
    }
}

/// How often to give a sign of life: three times in the time that init allows. `None` when it wants none.
pub fn alive_every() -> Option<Duration> {
    let within: u64 = std::env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
    Some(Duration::from_micros(within) / 3)
}
