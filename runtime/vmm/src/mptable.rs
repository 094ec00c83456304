//! The MP table: tells the guest kernel about its processors, the IOAPIC and the interrupt lines, in a machine that
//! has no ACPI (MultiProcessor Specification 1.4). `builder.rs` writes it once, before the guest runs.
//!
//! Every line is wired straight through (line n to IOAPIC pin n), edge-triggered and active-high as on an ISA bus:
//! an irqfd gives edges, so no line has to be lowered again.

use crate::error::{Error, Result};
use crate::memory::{GuestRam, MP_TABLE, MP_TABLE_BYTES};
use vm_memory::Bytes;

const LAPIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
/// Integrated APIC.
const APIC_VERSION: u8 = 0x14;
/// Interrupt lines described; the IOAPIC of KVM has 24 pins.
pub const LINES: u8 = 24;

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// The whole table for `vcpus` processors: floating pointer (16 bytes), header, entries.
pub fn build(vcpus: u8) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut push = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for cpu in 0..vcpus {
        let enabled_and_boot = 1 | (u8::from(cpu == 0) << 1);
        let mut entry = [0u8; 20];
        entry[..4].copy_from_slice(&[PROCESSOR, cpu, APIC_VERSION, enabled_and_boot]);
        // Signature and features; Linux takes both from CPUID instead.
        entry[4..8].copy_from_slice(&0x0600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x0201u32.to_le_bytes());
        push(&entry);
    }
    push(&[BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = IOAPIC.to_le_bytes();
    push(&[IO_APIC, ioapic_id, APIC_VERSION, 1, a, b, c, d]);
    for line in 0..LINES {
        push(&[INTERRUPT, INT, 0, 0, 0, line, ioapic_id, line]);
    }
    push(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, 0, 0]);
    push(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut header = Vec::with_capacity(44);
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    header.extend_from_slice(&[4, 0]);
    header.extend_from_slice(b"ATOLL   MICROVM     ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&LAPIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header[7] = checksum(header.iter().chain(&entries));

    let mut pointer = Vec::with_capacity(16);
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&(MP_TABLE.0 as u32 + 16).to_le_bytes());
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(pointer.iter());

    [pointer, header, entries].concat()
}

/// The byte that makes the sum of all bytes zero.
fn checksum<'a>(bytes: impl Iterator<Item = &'a u8>) -> u8 {
    bytes.fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// Writes the table into guest memory.
pub fn write(ram: &GuestRam, vcpus: u8) -> Result<()> {
    let table = build(vcpus);
    if table.len() > MP_TABLE_BYTES {
        return Err(Error::Spec(format!(
            "{vcpus} processors are too many for the MP table; ask for at most 32"
        )));
    }
    ram.write_slice(&table, MP_TABLE).map_err(|error| Error::GuestWrite {
        what: "the MP table",
        address: MP_TABLE.0,
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_zero_and_the_table_fits() {
        for vcpus in [1, 2, 32] {
            let table = build(vcpus);
            assert!(table.len() <= MP_TABLE_BYTES, "{vcpus}: {}", table.len());
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum(&table[..16]), 0);
            assert_eq!(sum(&table[16..]), 0);
            let length = u16::from_le_bytes([table[20], table[21]]);
            assert_eq!(usize::from(length), table.len() - 16);
            let count = u16::from_le_bytes([table[16 + 34], table[16 + 35]]);
            assert_eq!(count, u16::from(vcpus) + 2 + u16::from(LINES) + 2);
        }
    }
}
