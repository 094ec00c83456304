//! Notices that a caller is gone without a word: switched off, or behind a cable that was pulled. A follower of a quiet
//! log would otherwise hold its connection, and an exec its process in the container, for ever.

use rustix::net::sockopt;
use std::time::Duration;
use tokio::net::TcpStream;

/// Silence after which the caller's machine is asked whether it is there, and pause before it is asked again.
const ASKED_AFTER: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));
/// Questions without an answer after which it counts as gone.
const QUESTIONS: u32 = 3;
/// The same for what was sent to it and is not confirmed, in milliseconds.
const UNCONFIRMED_MS: u32 = 60_000;

/// Has the kernel watch over a connection. It ends with an error when the caller is gone.
pub(super) fn watch(stream: &TcpStream) -> rustix::io::Result<()> {
    sockopt::set_tcp_keepidle(stream, ASKED_AFTER.0)?;
    sockopt::set_tcp_keepintvl(stream, ASKED_AFTER.1)?;
    sockopt::set_tcp_keepcnt(stream, QUESTIONS)?;
    sockopt::set_tcp_user_timeout(stream, UNCONFIRMED_MS)?;
    sockopt::set_socket_keepalive(stream, true)
}
