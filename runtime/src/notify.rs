//! Readiness, told to init by the sd_notify protocol.
//!
//! Called by `main`. Without `NOTIFY_SOCKET` (a development machine) nothing is told.

use std::os::unix::net::UnixDatagram;

/// Sends a state such as `READY=1`.
pub fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(state.as_bytes(), &path));
    if let Err(error) = sent {
        tracing::warn!(%error, state, "cannot tell init");
    }
}
