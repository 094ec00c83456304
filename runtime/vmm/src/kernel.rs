//! Direct boot: the kernel's ELF segments, the initramfs, the command line and the PVH start info go straight into
//! guest memory; there is no firmware and no boot loader. `builder.rs` calls it before the processors are made.

use crate::error::{Error, Result};
use crate::memory::{
    self, CMDLINE, CMDLINE_BYTES, GuestRam, HIGH_MEMORY, HOLE_START, MEMORY_MAP, MMIO_STEP, MODULES,
    MP_TABLE, START_INFO,
};
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, load_cmdline};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// A virtio-mmio device as the kernel must hear of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlot {
    /// Guest physical address of its registers.
    pub address: u64,
    /// Its interrupt line.
    pub irq: u32,
}

/// Where the boot processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First instruction: 32-bit protected mode, no paging.
    pub address: GuestAddress,
}

/// Loads everything and says where to start.
pub fn load(ram: &GuestRam, kernel: &mut File, initramfs: &mut File, cmdline: &Cmdline) -> Result<Entry> {
    let (entry, kernel_end) = load_kernel(ram, kernel)?;
    let module = load_initramfs(ram, initramfs, kernel_end)?;
    load_cmdline(ram, CMDLINE, cmdline).map_err(|error| Error::Cmdline(error.to_string()))?;
    write_start_info(ram, module)?;
    Ok(Entry { address: entry })
}

fn load_kernel(ram: &GuestRam, kernel: &mut File) -> Result<(GuestAddress, u64)> {
    let loaded =
        Elf::load(ram, None, kernel, Some(HIGH_MEMORY)).map_err(|error| Error::Kernel(error.to_string()))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(Error::Kernel("it has no PVH entry point".into()));
    };
    let low_end = memory::low_end(ram).0;
    if loaded.kernel_end > low_end || entry.0 >= loaded.kernel_end {
        return Err(Error::Kernel(format!(
            "it ends at {:#x} and starts at {:#x}, but the guest's memory ends at {low_end:#x}",
            loaded.kernel_end, entry.0
        )));
    }
    Ok((entry, loaded.kernel_end))
}

/// Puts the initramfs at the top of low RAM: far from where the kernel allocates first, and below 4 GiB because the
/// start info's consumer keeps its address in 32 bits.
fn load_initramfs(ram: &GuestRam, initramfs: &mut File, kernel_end: u64) -> Result<hvm_modlist_entry> {
    let size = initramfs.seek(SeekFrom::End(0)).map_err(Error::system("find the size of the initramfs"))?;
    initramfs.rewind().map_err(Error::system("rewind the initramfs"))?;
    let low_end = memory::low_end(ram).0;
    let address = low_end
        .checked_sub(size)
        .map(|address| address & !0xfff)
        .filter(|address| *address >= kernel_end)
        .ok_or_else(|| {
            Error::Spec(format!("an initramfs of {size} bytes does not fit; give the guest more memory"))
        })?;
    ram.read_exact_volatile_from(GuestAddress(address), initramfs, size as usize)
        .map_err(|error| Error::GuestWrite { what: "the initramfs", address, reason: error.to_string() })?;
    Ok(hvm_modlist_entry { paddr: address, size, ..Default::default() })
}

fn write_start_info(ram: &GuestRam, module: hvm_modlist_entry) -> Result<()> {
    let map = memory_map(ram);
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: 1,
        modlist_paddr: MODULES.0,
        cmdline_paddr: CMDLINE.0,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let failed = |what, at: GuestAddress| {
        move |error: vm_memory::GuestMemoryError| Error::GuestWrite {
            what,
            address: at.0,
            reason: error.to_string(),
        }
    };
    ram.write_obj(info, START_INFO).map_err(failed("the start info", START_INFO))?;
    ram.write_obj(module, MODULES).map_err(failed("the module list", MODULES))?;
    let mut at = MEMORY_MAP;
    for entry in map {
        ram.write_obj(entry, at).map_err(failed("the memory map", at))?;
        at = GuestAddress(at.0 + size_of::<hvm_memmap_table_entry>() as u64);
    }
    Ok(())
}

/// What of the address space is RAM. The MP table's page end and the legacy hole are not.
fn memory_map(ram: &GuestRam) -> Vec<hvm_memmap_table_entry> {
    let entry = |addr: u64, end: u64, type_: u32| hvm_memmap_table_entry {
        addr,
        size: end - addr,
        type_,
        reserved: 0,
    };
    let mut map = vec![
        entry(0, MP_TABLE.0, XEN_HVM_MEMMAP_TYPE_RAM),
        entry(MP_TABLE.0, HIGH_MEMORY.0, XEN_HVM_MEMMAP_TYPE_RESERVED),
        entry(HIGH_MEMORY.0, memory::low_end(ram).0, XEN_HVM_MEMMAP_TYPE_RAM),
    ];
    for region in ram.iter().filter(|region| region.start_addr().0 >= HOLE_START) {
        let start = region.start_addr().0;
        map.push(entry(start, start + region.len(), XEN_HVM_MEMMAP_TYPE_RAM));
    }
    map
}

/// The command line: what the runtime asked for, then the devices.
pub fn cmdline(requested: &str, console: bool, devices: &[DeviceSlot]) -> Result<Cmdline> {
    let failed = |error: linux_loader::cmdline::Error| Error::Cmdline(error.to_string());
    let mut line = Cmdline::new(CMDLINE_BYTES).map_err(failed)?;
    if !requested.trim().is_empty() {
        line.insert_str(requested).map_err(failed)?;
    }
    // Without a console there is no port either: keep the driver from probing for one.
    line.insert_str(if console { "console=ttyS0" } else { "8250.nr_uarts=0" }).map_err(failed)?;
    for device in devices {
        line.add_virtio_mmio_device(MMIO_STEP, GuestAddress(device.address), device.irq, None)
            .map_err(failed)?;
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_spec::units::MiB;
    use std::io::Write;

    fn text(line: &Cmdline) -> String {
        line.as_cstring().unwrap().into_string().unwrap()
    }

    #[test]
    fn command_line_declares_every_device() {
        let devices =
            [DeviceSlot { address: 0xd000_0000, irq: 5 }, DeviceSlot { address: 0xd000_1000, irq: 6 }];
        assert_eq!(
            text(&cmdline("quiet reboot=k", false, &devices).unwrap()),
            "quiet reboot=k 8250.nr_uarts=0 virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"
        );
        assert_eq!(text(&cmdline("", true, &[]).unwrap()), "console=ttyS0");
    }

    #[test]
    fn a_command_line_that_is_too_long_is_refused() {
        let error = cmdline(&"x".repeat(CMDLINE_BYTES), false, &[]).unwrap_err();
        assert!(error.to_string().starts_with("cannot use the kernel command line"), "{error}");
    }

    #[test]
    fn memory_map_names_ram_and_only_ram() {
        let ram = memory::create(MiB(4096)).unwrap();
        let map = memory_map(&ram);
        let ram_bytes: u64 = map.iter().filter(|e| e.type_ == XEN_HVM_MEMMAP_TYPE_RAM).map(|e| e.size).sum();
        assert_eq!(ram_bytes, (4096u64 << 20) - (HIGH_MEMORY.0 - MP_TABLE.0));
        assert!(map.windows(2).all(|pair| pair[0].addr + pair[0].size <= pair[1].addr));
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let ram = memory::create(MiB(64)).unwrap();
        for content in [&b""[..], b"#!/bin/sh\n", &[0u8; 4096]] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(content).unwrap();
            let error = load_kernel(&ram, &mut file).unwrap_err();
            assert!(error.to_string().contains("CONFIG_PVH"), "{error}");
        }
    }

    #[test]
    fn initramfs_lies_page_aligned_at_the_top() {
        let ram = memory::create(MiB(64)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7u8; 5000]).unwrap();
        let module = load_initramfs(&ram, &mut file, 0x200_0000).unwrap();
        assert_eq!((module.paddr, module.size), ((64 << 20) - 8192, 5000));
        assert_eq!(ram.read_obj::<u8>(GuestAddress(module.paddr + 4999)).unwrap(), 7);
        assert!(load_initramfs(&ram, &mut file, (64 << 20) - 4096).is_err());
    }
}
