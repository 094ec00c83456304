//! What the rest of the guest hands to the thread that moves a process's bytes.

use super::kept::Counts;
use super::packet::packet;
use crate::transport::Connection;
use atoll_spec::guest::Channel;
use std::io::Write as _;

/// A stream to the runtime, and its number.
pub struct Stream {
    /// The connection.
    pub connection: Connection,
    /// What the runtime asked for it by.
    pub number: u64,
}

/// What the thread finds when it looks next.
#[derive(Default)]
pub struct Inbox {
    /// A stream, in place of the one it has.
    pub stream: Option<Stream>,
    /// What the runtime has of the stream of this number.
    pub acknowledged: Option<(u64, Counts)>,
    /// Nobody wants the rest.
    pub closed: bool,
    /// The thread has said all there is, and looks no more.
    pub finished: bool,
}

/// Tells a stream that came too late that there is nothing more.
pub fn say_ended(mut stream: Stream) {
    let mut text = packet(Channel::Stdout, &[]);
    text.extend(packet(Channel::Stderr, &[]));
    // The runtime may have gone again; then it asks again.
    let _ = stream.connection.write_all(&text);
}
