//! The guest's physical address space: where RAM lies, where the VMM puts what the kernel needs at boot, where the
//! devices answer.
//!
//! ```text
//! 0x0000_6000  start info, module list         0x0009_fc00  MP table (end of low memory, 1 KiB)
//! 0x0000_7000  memory map                      0x0010_0000  kernel (1 MiB and up, where the ELF says)
//! 0x0002_0000  command line                    top of low RAM: initramfs
//! 0xc000_0000 … 0xffff_ffff  no RAM: virtio-mmio at 0xd000_0000, IOAPIC, LAPIC, KVM's pages
//! 0x1_0000_0000 …  the rest of RAM
//! ```
//!
//! Invariant: RAM never overlaps the device hole; memory is private, anonymous and not reserved, so what the guest
//! never touches costs the host nothing.

use crate::error::{Error, Result};
use atoll_spec::units::MiB;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Guest RAM.
pub type GuestRam = GuestMemoryMmap<()>;

/// Start info of the PVH boot protocol, the module list behind it.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// Module list of the PVH boot protocol.
pub const MODULES: GuestAddress = GuestAddress(0x6040);
/// Memory map of the PVH boot protocol.
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// Kernel command line, zero-terminated.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest kernel command line, with its zero (`COMMAND_LINE_SIZE` on x86).
pub const CMDLINE_BYTES: usize = 2048;
/// The MP table: Linux looks for it in the last KiB below 640 KiB.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// Room for the MP table.
pub const MP_TABLE_BYTES: usize = 0x400;
/// Where RAM goes on after the legacy hole.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);
/// Start of the device hole.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the device hole.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// First virtio-mmio device.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Distance between, and size of, virtio-mmio devices.
pub const MMIO_STEP: u64 = 0x1000;
/// Three pages that KVM needs on processors of one vendor, inside the hole.
pub const KVM_TSS: usize = 0xfffb_d000;
/// One page of the same kind.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// Least memory a guest may have: the kernel, its initramfs and a little more.
pub const MIN_MEMORY: MiB = MiB(32);
/// Most memory a guest may have (1 TiB).
pub const MAX_MEMORY: MiB = MiB(1 << 20);

/// Where RAM lies, as (start, bytes).
pub fn ram_ranges(memory: MiB) -> Vec<(GuestAddress, usize)> {
    let bytes = memory.bytes();
    let low = bytes.min(HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if bytes > low {
        ranges.push((GuestAddress(HOLE_END), (bytes - low) as usize));
    }
    ranges
}

/// Maps guest memory.
pub fn create(memory: MiB) -> Result<GuestRam> {
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&memory) {
        return Err(Error::Spec(format!("memory of {memory} is not between {MIN_MEMORY} and {MAX_MEMORY}")));
    }
    GuestRam::from_ranges(&ram_ranges(memory))
        .map_err(|error| Error::Memory { mib: memory.0, reason: error.to_string() })
}

/// End of RAM below the device hole.
pub fn low_end(ram: &GuestRam) -> GuestAddress {
    ram.iter()
        .map(|region| region.last_addr().unchecked_add(1))
        .find(|end| end.0 <= HOLE_START)
        .unwrap_or(HIGH_MEMORY)
}

/// Gives guest memory to KVM, one slot per region.
pub fn register(vm: &VmFd, ram: &GuestRam) -> Result<()> {
    for (slot, region) in ram.iter().enumerate() {
        let host = ram
            .get_host_address(region.start_addr())
            .map_err(|error| Error::Memory { mib: (region.len() >> 20) as u32, reason: error.to_string() })?;
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is one mapping made by `create`, and the machine keeps the mapping for as long as the VM
        // descriptor lives (both are dropped together, at process exit).
        unsafe { vm.set_user_memory_region(slot) }.map_err(Error::kvm("give guest memory to KVM"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_device_hole_free() {
        assert_eq!(ram_ranges(MiB(512)), [(GuestAddress(0), 512 << 20)]);
        assert_eq!(ram_ranges(MiB(3072)), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(ram_ranges(MiB(5120)), [(GuestAddress(0), 3 << 30), (GuestAddress(HOLE_END), 2 << 30)]);
    }

    #[test]
    fn low_end_is_below_the_hole() {
        assert_eq!(low_end(&create(MiB(64)).unwrap()), GuestAddress(64 << 20));
        assert_eq!(low_end(&create(MiB(4096)).unwrap()), GuestAddress(HOLE_START));
    }

    #[test]
    fn too_little_or_too_much_memory_is_refused() {
        for mib in [0, 31, (1 << 20) + 1] {
            assert!(create(MiB(mib)).unwrap_err().to_string().contains("memory of"));
        }
    }
}
