//! What the guest's processors say about themselves: KVM's supported set, with topology filled in and what a pod has
//! no use for (nested virtualization, performance counters) taken out. `vcpu.rs` sets the result on each processor.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;
const SVM: u32 = 1 << 2;

/// What of the machine the processors must tell the same story about.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// Number of processors, each a core of its own in one package.
    pub vcpus: u8,
    /// KVM's local APIC can be told a deadline by TSC.
    pub tsc_deadline: bool,
}

impl Topology {
    /// Bits of an APIC id that number the cores.
    fn core_bits(self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

/// The entries for processor `cpu`, from what KVM supports.
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], cpu: u8, topology: Topology) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026))
        .copied()
        .map(|mut entry| {
            adjust(&mut entry, cpu, topology);
            entry
        })
        .collect();
    entries.extend(topology_leaf(cpu, topology));
    entries
}

/// The entries as KVM takes them; `None` when there are more than its interface allows.
pub fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Option<CpuId> {
    CpuId::from_entries(entries).ok()
}

fn adjust(entry: &mut kvm_cpuid_entry2, cpu: u8, topology: Topology) {
    let id = u32::from(cpu);
    let cores = u32::from(topology.vcpus);
    match entry.function {
        1 => {
            entry.ecx = (entry.ecx & !VMX) | HYPERVISOR;
            if topology.tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.ebx = (entry.ebx & 0xffff) | (cores.next_power_of_two() << 16) | (id << 24);
            entry.edx = if cores > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        // Deterministic cache parameters: caches of levels 1 and 2 belong to one core, level 3 to all.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { cores - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
            if entry.function == 4 {
                entry.eax |= (cores.next_power_of_two() - 1) << 26;
            }
        }
        // No performance counters: nothing virtualizes them here.
        0xa | 0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => entry.ecx &= !SVM,
        0x8000_0008 => entry.ecx = (topology.core_bits() << 12) | (cores - 1),
        // Secure virtual machine, and encrypted memory.
        0x8000_000a | 0x8000_001f => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Leaf 0xb: one thread per core, `vcpus` cores.
fn topology_leaf(cpu: u8, topology: Topology) -> [kvm_cpuid_entry2; 2] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: (kind << 8) | index,
        edx: u32::from(cpu),
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, topology.core_bits(), u32::from(topology.vcpus), 2)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: !0, ebx: !0, ecx: !0, edx: !0, ..Default::default() }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn nested_virtualization_and_counters_are_hidden() {
        let all = [leaf(1, 0), leaf(0xa, 0), leaf(0x8000_0001, 0), leaf(0x8000_000a, 0)];
        let seen = for_vcpu(&all, 0, Topology { vcpus: 1, tsc_deadline: true });
        assert_eq!(find(&seen, 1, 0).ecx & VMX, 0);
        assert_eq!(find(&seen, 0x8000_0001, 0).ecx & SVM, 0);
        assert_eq!(find(&seen, 0xa, 0).eax, 0);
        assert_eq!(find(&seen, 0x8000_000a, 0).edx, 0);
    }

    #[test]
    fn every_processor_has_its_own_id() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (32, 5)] {
            for cpu in 0..vcpus {
                let topology = Topology { vcpus, tsc_deadline: false };
                let seen = for_vcpu(&[leaf(1, 0), leaf(0xb, 0), leaf(0x8000_0008, 0)], cpu, topology);
                assert_eq!(find(&seen, 1, 0).ebx >> 24, u32::from(cpu));
                assert_eq!(find(&seen, 0xb, 1).edx, u32::from(cpu));
                assert_eq!(find(&seen, 0xb, 1).eax, bits);
                assert_eq!(find(&seen, 0x8000_0008, 0).ecx & 0xff, u32::from(vcpus) - 1);
                assert_eq!(seen.iter().filter(|e| e.function == 0xb).count(), 2);
            }
        }
    }

    #[test]
    fn deadline_timer_is_offered_only_when_kvm_has_it() {
        let base = kvm_cpuid_entry2 { function: 1, ..Default::default() };
        for tsc_deadline in [false, true] {
            let seen = for_vcpu(&[base], 0, Topology { vcpus: 1, tsc_deadline });
            assert_eq!(find(&seen, 1, 0).ecx & TSC_DEADLINE != 0, tsc_deadline);
        }
    }
}
