//! Tells init how far the agent is (the `sd_notify` protocol). Without `$NOTIFY_SOCKET` nobody listens.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

/// Sends a state such as `READY=1`.
pub fn notify(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = UnixDatagram::unbound().and_then(|datagram| datagram.send_to(state.as_bytes(), &socket));
    if let Err(error) = sent {
        tracing::warn!("cannot notify init at {}: {error}", socket.display());
    }
}

/// Gives signs of life for ever. To be polled by the task that everything else hangs from: when that is blocked, or the
/// whole process stopped, init takes it for hung and starts it again.
pub async fn stay_alive() {
    let Some(pause) = alive_every() else { return std::future::pending().await };
    loop {
        notify("WATCHDOG=1");
        tokio::time::sleep(pause).await;
    }
}

/// How often to give a sign of life: three times in the time that init allows. `None` when it wants none.
fn alive_every() -> Option<Duration> {
    let within: u64 = std::env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
    Some(Duration::from_micros(within) / 3)
}
