//! The serial console, for debugging: an 8250 whose output goes to the descriptor the runtime passed, up to a bound.
//! Without that descriptor there is no port at all.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::{self, Write};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// First I/O port of the serial port, eight in all.
pub const PORT: u16 = 0x3f8;
/// Its interrupt line.
pub const IRQ: u32 = 4;
/// Most bytes ever written to the console: a guest must not fill the host's disk.
pub const MAX_OUTPUT: u64 = 1 << 20;

/// Raises the line through KVM.
pub struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// A writer that swallows what comes after the bound, so that the guest sees a port that goes on working.
pub struct Bounded<W> {
    inner: W,
    left: u64,
}

impl<W: Write> Write for Bounded<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let take = (self.left.min(bytes.len() as u64)) as usize;
        if take > 0 {
            // A console that cannot be written to (full, gone) must not stop the guest.
            self.left -= self.inner.write(&bytes[..take]).unwrap_or(0) as u64;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port.
pub struct Console(Serial<Line, vm_superio::serial::NoEvents, Bounded<File>>);

impl Console {
    /// Makes the port and the event that must become the irqfd of [`IRQ`].
    pub fn new(output: File) -> Result<(Self, EventFd)> {
        let event =
            EventFd::new(EFD_NONBLOCK).map_err(Error::system("make the console's interrupt event"))?;
        let line = event.try_clone().map_err(Error::system("copy the console's interrupt event"))?;
        Ok((Self(Serial::new(Line(line), Bounded { inner: output, left: MAX_OUTPUT })), event))
    }

    /// Register read.
    pub fn read(&mut self, port: u16) -> u8 {
        self.0.read((port - PORT) as u8)
    }

    /// Register write. What fails is a lost byte of debug output.
    pub fn write(&mut self, port: u16, value: u8) {
        drop(self.0.write((port - PORT) as u8, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_stops_at_the_bound_without_an_error() {
        let mut bounded = Bounded { inner: Vec::new(), left: 5 };
        assert_eq!(bounded.write(b"abc").unwrap(), 3);
        assert_eq!(bounded.write(b"defg").unwrap(), 4);
        assert_eq!(bounded.write(b"h").unwrap(), 1);
        assert_eq!(bounded.inner, b"abcde");
    }

    #[test]
    fn bytes_reach_the_descriptor() {
        use std::io::{Read, Seek};
        let mut file = tempfile::tempfile().unwrap();
        let (mut console, _event) = Console::new(file.try_clone().unwrap()).unwrap();
        for byte in b"hello" {
            console.write(PORT, *byte);
        }
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }
}
