//! Tells init how it goes: the readiness protocol over `$NOTIFY_SOCKET`.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::Duration;

/// The connection to init; does nothing where there is none.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<(UnixDatagram, PathBuf)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Takes the socket's path from the environment.
    pub fn from_environment() -> Self {
        let path = std::env::var_os("NOTIFY_SOCKET").map(PathBuf::from);
        let socket = UnixDatagram::unbound().and_then(|s| s.set_nonblocking(true).map(|()| s));
        let watchdog = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
        Self { socket: socket.ok().zip(path), watchdog: watchdog.map(Duration::from_micros) }
    }

    /// How often to give a sign of life: three times in the time that init allows. `None` when it wants none.
    pub fn alive_every(&self) -> Option<Duration> {
        self.watchdog.map(|within| within / 3)
    }

    /// A sign of life. Only the loop that does hostd's work may give it: init restarts what is silent.
    pub fn alive(&self) {
        if self.watchdog.is_some() {
            self.send("WATCHDOG=1");
        }
    }

    /// Says what hostd is doing.
    pub fn status(&self, text: &str) {
        self.send(&format!("STATUS={}", text.replace('\n', " ")));
    }

    /// Says that the host can be used.
    pub fn ready(&self, text: &str) {
        self.send(&format!("READY=1\nSTATUS={}", text.replace('\n', " ")));
    }

    /// Says that it will take this much longer until the host can be used.
    pub fn takes_longer(&self, within: Duration) {
        self.send(&format!("EXTEND_TIMEOUT_USEC={}", within.as_micros()));
    }

    fn send(&self, message: &str) {
        if let Some((socket, path)) = &self.socket
            && let Err(error) = socket.send_to(message.as_bytes(), path)
        {
            tracing::warn!(path = %path.display(), %error, "init was not told");
        }
    }
}
