//! A fault of QEMU's emulation, as a host's console shows it.
//!
//! Emulating several processors, QEMU 7.2 does not always see in time that one of them rewrites code that another runs
//! (the kernel does so when it turns a jump label): a stray breakpoint, and the kernel dies of `Oops: int3`. Where this was
//! seen it depended on nothing that Atoll does; a host that is not emulated has no such excuse.

use crate::machine::Accelerator;
use anyhow::Context;
use std::path::Path;

/// The lines of all consoles below `lab` that tell of such a fault, with the host's directory; none where there is no
/// emulation.
///
/// # Errors
/// When the directory cannot be read.
pub fn of_the_emulation(lab: &Path) -> anyhow::Result<Vec<String>> {
    if Accelerator::detect() != Accelerator::Tcg {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(lab).with_context(|| format!("cannot list {}", lab.display()))? {
        let directory = entry?.path();
        // Not every directory is a host's, and not every host got as far as a console.
        let Ok(console) = std::fs::read(directory.join("serial.log")) else { continue };
        let host = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let console = String::from_utf8_lossy(&console);
        found.extend(told(&console).map(|line| format!("{host}: {line}")));
    }
    found.sort();
    Ok(found)
}

fn told(console: &str) -> impl Iterator<Item = &str> {
    console.lines().filter(|line| line.contains("Oops: int3: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_emulations_own_fault_counts() {
        let console = "[  4.014228] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\r
[  5.0] Oops: general protection fault: 0000 [#1]\r
runtime: [ 96.9s] ERROR a virtual machine ended by itself: see vmm.log in its directory sandbox=f2 status=2\r\n";
        assert_eq!(told(console).count(), 1);
    }
}
