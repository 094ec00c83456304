//! Which device answers at which address. The vCPU threads call it on every exit to user space.
//!
//! Invariant: an access that no device claims does no harm: reads give all ones, writes are dropped. The guest is
//! never told more, and the VMM never fails because of it.

use crate::memory::{MMIO_BASE, MMIO_STEP};
use crate::serial::{self, Console};
use crate::virtio::mmio::Transport;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Command port of the keyboard controller, which resets the machine.
const I8042_COMMAND: u16 = 0x64;
/// Its command "pulse the reset line".
const I8042_RESET: u8 = 0xfe;

/// What the guest asked for by an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Go on.
    None,
    /// The guest reset the machine: it is done.
    Reset,
}

/// All devices.
#[derive(Default)]
pub struct Bus {
    transports: Vec<Mutex<Transport>>,
    console: Option<Mutex<Console>>,
}

/// A poisoned lock means that another thread panicked, and then the process is about to end.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// Devices in the order of their addresses from [`MMIO_BASE`] on.
    pub fn new(transports: Vec<Transport>, console: Option<Console>) -> Self {
        Self {
            transports: transports.into_iter().map(Mutex::new).collect(),
            console: console.map(Mutex::new),
        }
    }

    fn transport(&self, address: u64) -> Option<(&Mutex<Transport>, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let index = usize::try_from(offset / MMIO_STEP).ok()?;
        Some((self.transports.get(index)?, offset % MMIO_STEP))
    }

    /// The guest reads memory that is no RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.transport(address) {
            Some((transport, offset)) => lock(transport).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes memory that is no RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.transport(address) {
            lock(transport).write(offset, data);
        }
    }

    /// The guest reads a port.
    pub fn io_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, &self.console) {
            (serial::PORT..0x400, Some(console)) if data.len() == 1 => data[0] = lock(console).read(port),
            // Ready for a command: `reboot=k` waits for it before it writes one.
            (I8042_COMMAND, _) => data.fill(0),
            _ => {}
        }
    }

    /// The guest writes a port.
    pub fn io_out(&self, port: u16, data: &[u8]) -> Effect {
        match (port, data, &self.console) {
            (I8042_COMMAND, [I8042_RESET], _) => return Effect::Reset,
            // The string form of the instruction gives several bytes to one port.
            (serial::PORT..0x400, bytes, Some(console)) => {
                let mut console = lock(console);
                bytes.iter().for_each(|byte| console.write(port, *byte));
            }
            _ => {}
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_home_reads_ones() {
        let bus = Bus::default();
        for address in [0, MMIO_BASE, MMIO_BASE + 0x10_0000, u64::MAX] {
            let mut data = [0u8; 8];
            bus.mmio_read(address, &mut data);
            assert_eq!(data, [0xff; 8]);
            bus.mmio_write(address, &data);
        }
        let mut byte = [0u8];
        bus.io_in(serial::PORT, &mut byte);
        assert_eq!(byte, [0xff]);
    }

    #[test]
    fn only_the_reset_command_resets() {
        let bus = Bus::default();
        assert_eq!(bus.io_out(I8042_COMMAND, &[I8042_RESET]), Effect::Reset);
        assert_eq!(bus.io_out(I8042_COMMAND, &[0xd1]), Effect::None);
        assert_eq!(bus.io_out(0x60, &[I8042_RESET]), Effect::None);
        let mut status = [0xffu8];
        bus.io_in(I8042_COMMAND, &mut status);
        assert_eq!(status, [0]);
    }
}
