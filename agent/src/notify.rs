//! Tells init how far the agent is (the `sd_notify` protocol). Without `$NOTIFY_SOCKET` nobody listens.

use std::os::unix::net::UnixDatagram;

/// Sends a state such as `READY=1`.
pub fn notify(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = UnixDatagram::unbound().and_then(|datagram| datagram.send_to(state.as_bytes(), &socket));
    if let Err(error) = sent {
        tracing::warn!("cannot notify init at {}: {error}", socket.display());
    }
}
