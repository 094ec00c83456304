//! The power button, as the kernel's input devices tell it.

use crate::sys;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

const DEVICES: &str = "/dev/input";
const KEY_POWER: u16 = 116;
const EV_KEY: u16 = 1;
/// Two 64-bit words of time, type, code, value.
const EVENT: usize = 24;

/// All devices that have a power button.
#[derive(Debug, Default)]
pub struct PowerButtons {
    devices: BTreeMap<PathBuf, File>,
}

impl PowerButtons {
    /// Looks for buttons that are new since the last time.
    pub fn look(&mut self) {
        // No input devices, no buttons: evdev may come later and calls us again.
        let Ok(entries) = std::fs::read_dir(DEVICES) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let is_event = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("event"));
            if !is_event || self.devices.contains_key(&path) {
                continue;
            }
            let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
            let Ok(device) = File::options().read(true).custom_flags(nonblocking).open(&path) else {
                continue;
            };
            if sys::input_device_has_key(device.as_fd(), KEY_POWER) {
                self.devices.insert(path, device);
            }
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.devices.len()
    }

    /// Descriptors to wait on.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.devices.values().map(AsFd::as_fd)
    }

    /// Reads what is there; whether a button was pressed. A device that is gone is let go.
    pub fn pressed(&mut self) -> bool {
        let mut pressed = false;
        self.devices.retain(|_, device| {
            let mut buffer = [0_u8; EVENT * 32];
            loop {
                match device.read(&mut buffer) {
                    Ok(0) => return false,
                    Ok(read) => pressed |= has_press(&buffer[..read]),
                    Err(error) => return error.kind() == ErrorKind::WouldBlock,
                }
            }
        });
        pressed
    }
}

fn has_press(bytes: &[u8]) -> bool {
    bytes.chunks_exact(EVENT).any(|event| {
        let field = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
        field(16) == EV_KEY && field(18) == KEY_POWER && event[20] == 1
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: u8) -> Vec<u8> {
        let mut event = vec![9; 16];
        event.extend(kind.to_ne_bytes());
        event.extend(code.to_ne_bytes());
        event.extend([value, 0, 0, 0]);
        event
    }

    #[test]
    fn only_a_press_of_the_power_key_counts() {
        assert!(has_press(&[event(1, 30, 1), event(1, KEY_POWER, 1)].concat()));
        assert!(!has_press(&event(1, KEY_POWER, 0)));
        assert!(!has_press(&event(1, 30, 1)));
        assert!(!has_press(&event(4, KEY_POWER, 1)));
        assert!(!has_press(&event(1, KEY_POWER, 1)[..20]));
    }
}
