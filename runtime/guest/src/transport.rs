//! How the guest reaches the runtime: vsock in a machine, a unix socket in a rehearsal.

use crate::sys;
use atoll_spec::guest::{HOST_PORT, Hello, MAX_FRAME};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// Vsock address of the host.
const HOST_CID: u32 = 2;
/// Longest wait for the peer to take a frame.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);

/// Who is dialled.
#[derive(Debug, Clone)]
pub enum Peer {
    /// The host, port [`HOST_PORT`].
    Host,
    /// A listening unix socket.
    Socket(PathBuf),
}

/// A connected stream socket. `UnixStream` serves for vsock too: it only ever sends, receives and shuts down.
pub type Connection = UnixStream;

impl Peer {
    /// Connects and says hello.
    pub fn dial(&self, hello: &Hello) -> io::Result<Connection> {
        let mut connection = match self {
            Self::Host => UnixStream::from(sys::connect_vsock(HOST_CID, HOST_PORT)?),
            Self::Socket(path) => UnixStream::connect(path)?,
        };
        connection.set_write_timeout(Some(WRITE_DEADLINE))?;
        write_frame(&mut connection, hello)?;
        Ok(connection)
    }
}

/// Writes one frame.
pub fn write_frame(to: &mut impl Write, message: &impl serde::Serialize) -> io::Result<()> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() - 4;
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes is too long"),
        ));
    }
    // At most MAX_FRAME, so it fits.
    frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
    to.write_all(&frame)
}

/// Reads one frame; `None` at a clean end.
pub fn read_frame(from: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut header = [0; 4];
    match from.read(&mut header[..1])? {
        0 => return Ok(None),
        _ => from.read_exact(&mut header[1..])?,
    }
    let length = usize::try_from(u32::from_le_bytes(header)).unwrap_or(usize::MAX);
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes is too long"),
        ));
    }
    let mut frame = vec![0; length];
    from.read_exact(&mut frame)?;
    Ok(Some(frame))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire_and_long_ones_are_refused() {
        let mut wire = Vec::new();
        write_frame(&mut wire, &Hello::Stream { stream: 7 }).unwrap();
        let frame = read_frame(&mut wire.as_slice()).unwrap().unwrap();
        assert_eq!(serde_json::from_slice::<Hello>(&frame).unwrap(), Hello::Stream { stream: 7 });
        assert!(read_frame(&mut [].as_slice()).unwrap().is_none());
        assert!(read_frame(&mut [0xff, 0xff, 0xff, 0xff].as_slice()).is_err());
        assert!(read_frame(&mut [5, 0, 0, 0, 1].as_slice()).is_err(), "cut short");
    }
}
