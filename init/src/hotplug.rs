//! Devices that appear after the boot: the kernel tells of each, and their drivers are loaded in batches.

use crate::error::{Error, Result};
use crate::modules;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};
use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// How long a burst is gathered before drivers are loaded.
const GATHER: Duration = Duration::from_millis(200);
/// The kernel's own messages, not those of a device manager.
const GROUP_KERNEL: u32 = 1;

/// The kernel's messages about devices, and what they ask for.
#[derive(Debug)]
pub struct Hotplug {
    socket: OwnedFd,
    asked: BTreeSet<String>,
    due: Option<Duration>,
    seen_input: bool,
}

impl Hotplug {
    /// Starts to listen.
    ///
    /// # Errors
    /// When the kernel does not let us.
    pub fn open() -> Result<Self> {
        let failed = || Error::system::<rustix::io::Errno>("listen for new devices");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let kind = Some(netlink::KOBJECT_UEVENT);
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, kind)
            .map_err(failed())?;
        rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, GROUP_KERNEL)).map_err(failed())?;
        Ok(Self { socket, asked: BTreeSet::new(), due: None, seen_input: false })
    }

    /// Reads what the kernel has to tell.
    pub fn read(&mut self, now: Duration) {
        let mut buffer = vec![0_u8; 16 * 1024];
        loop {
            match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((read, _)) => self.take(now, &buffer[..read.min(16 * 1024)]),
                Err(rustix::io::Errno::NOBUFS) => {
                    // A burst was too large and messages are lost: ask for the drivers of all there is.
                    self.asked.extend(modules::aliases(Path::new(modules::DEVICES)));
                    self.seen_input = true;
                    self.due.get_or_insert(now + GATHER);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Takes one message of the kernel.
    pub fn take(&mut self, now: Duration, message: &[u8]) {
        let mut fields = message.split(|byte| *byte == 0).filter_map(|field| std::str::from_utf8(field).ok());
        if !fields.next().is_some_and(|head| head.starts_with("add@")) {
            return;
        }
        for field in fields {
            match field.split_once('=') {
                Some(("MODALIAS", alias)) => {
                    self.asked.insert(alias.to_owned());
                    self.due.get_or_insert(now + GATHER);
                }
                Some(("SUBSYSTEM", "input")) => self.seen_input = true,
                _ => {}
            }
        }
    }

    /// When [`Hotplug::take_due`] has something.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.due
    }

    /// Aliases to load drivers for, once they have been gathered; the rest of more than `most` stays due.
    pub fn take_due(&mut self, now: Duration, most: usize) -> Vec<String> {
        if self.due.is_none_or(|due| due > now) {
            return Vec::new();
        }
        let batch = std::iter::from_fn(|| self.asked.pop_first()).take(most).collect();
        if self.asked.is_empty() {
            self.due = None;
        }
        batch
    }

    /// Whether an input device came since the last call.
    pub fn take_seen_input(&mut self) -> bool {
        std::mem::take(&mut self.seen_input)
    }
}

impl AsFd for Hotplug {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathers_aliases_of_new_devices() {
        // Listening needs no rights.
        let Ok(mut hotplug) = Hotplug::open() else { return };
        let now = Duration::from_secs(5);
        hotplug.take(now, b"add@/devices/a\0ACTION=add\0SUBSYSTEM=usb\0MODALIAS=usb:1\0");
        hotplug.take(now, b"remove@/devices/b\0MODALIAS=usb:2\0");
        hotplug.take(now, b"add@/devices/c\0SUBSYSTEM=input\0MODALIAS=usb:1\0");
        assert!(hotplug.take_due(now, 2).is_empty());
        assert_eq!(hotplug.next_deadline(), Some(now + GATHER));
        assert_eq!(hotplug.take_due(now + GATHER, 2), ["usb:1"]);
        assert!(hotplug.take_due(now + GATHER, 2).is_empty());
        assert!(hotplug.take_seen_input() && !hotplug.take_seen_input());
    }

    #[test]
    fn what_is_more_than_a_batch_stays_due() {
        let Ok(mut hotplug) = Hotplug::open() else { return };
        let now = Duration::from_secs(5);
        for number in 0..3 {
            hotplug.take(now, format!("add@/devices/a\0MODALIAS=usb:{number}\0").as_bytes());
        }
        assert_eq!(hotplug.take_due(now + GATHER, 2), ["usb:0", "usb:1"]);
        assert_eq!(hotplug.next_deadline(), Some(now + GATHER));
        assert_eq!(hotplug.take_due(now + GATHER, 2), ["usb:2"]);
        assert_eq!(hotplug.next_deadline(), None);
    }
}
