//! SPDY/3.1 as the API server and the kubelet's clients speak it.
//!
//! `frame` reads and writes frames, `connection` keeps streams. Flow control by window updates is read and ignored, as
//! those peers neither send nor expect it; TCP's own holds the sender back.

mod connection;
mod frame;

pub use connection::{Connection, Incoming, Writer};
pub use frame::{Encoder, Frame, Headers, Reader};
