//! SPDY/3.1 as the API server and the kubelet's clients speak it.
//!
//! `frame` reads and writes frames, `connection` keeps streams. Flow control by window updates is read and ignored, as
//! those peers neither send nor expect it: one that waited for them would wait for ever. Instead, what a connection
//! holds is bounded, and TCP's own flow control holds the sender back.

mod connection;
mod frame;

pub use connection::{Connection, Incoming, Writer};
pub use frame::{Encoder, Frame, Headers, Reader};
