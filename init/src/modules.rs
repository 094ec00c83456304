//! Kernel modules: the few that the system tree's file system needs, loaded by hand, and then everything that the
//! machine's devices ask for (*coldplug*), loaded by modprobe in few large calls, each with a deadline.

use crate::error::{Error, Result};
use crate::process;
use crate::sys::Syscalls;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::time::Duration;

/// The tree of all devices.
pub const DEVICES: &str = "/sys/devices";
const EARLY_LIST: &str = "/modules.early";
const MODPROBE: &str = "/usr/sbin/modprobe";
const BATCH: usize = 256;
const BATCH_DEADLINE: Duration = Duration::from_secs(20);
/// Drivers find buses, whose devices ask for more drivers; deeper than this nothing is known to go.
const ROUNDS: usize = 5;

/// Modules that no device asks for and that the host needs.
const NEEDED: [&str; 6] = ["tun", "vhost_net", "vhost_vsock", "nf_tables", "ext4", "vfat"];

/// Loads the modules of the initramfs, in the order of its list.
///
/// # Errors
/// At the first one that does not load.
pub fn early(sys: &dyn Syscalls) -> Result<()> {
    let list = sys.read(EARLY_LIST).map_err(Error::file("read", EARLY_LIST))?;
    for path in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
        match sys.load_module(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::Module { path: path.to_owned(), source: error });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Loads what the devices ask for, round by round until none asks for anything new, then what no device asks for.
///
/// # Errors
/// When modprobe cannot run or overruns, or a needed module is not there afterwards.
pub fn coldplug(sys: &dyn Syscalls) -> Result<usize> {
    let mut asked = BTreeSet::new();
    for _ in 0..ROUNDS {
        let found = aliases(Path::new(DEVICES));
        let new: Vec<String> = found.difference(&asked).cloned().collect();
        if new.is_empty() {
            break;
        }
        for batch in new.chunks(BATCH) {
            load(batch)?;
        }
        asked.extend(new);
    }
    load(&NEEDED.map(str::to_owned))?;
    let missing: Vec<&str> = NEEDED.into_iter().filter(|name| !is_present(sys, name)).collect();
    if missing.is_empty() {
        Ok(asked.len())
    } else {
        Err(Error::ModulesMissing { names: missing.join(", ") })
    }
}

/// Loads modules by names or aliases. Names that no module of the image answers to are not an error: most devices
/// of a machine need no driver of ours.
///
/// # Errors
/// When modprobe cannot run or overruns.
pub fn load(names: &[String]) -> Result<()> {
    process::run(&modprobe(names), BATCH_DEADLINE).map(drop)
}

/// The command that [`load`] runs, for those who wait for it themselves.
pub fn modprobe(names: &[String]) -> Vec<String> {
    [MODPROBE, "-a", "-b", "-q", "--"]
        .iter()
        .map(|word| (*word).to_owned())
        .chain(names.iter().cloned())
        .collect()
}

fn is_present(sys: &dyn Syscalls, name: &str) -> bool {
    // A module that is built in has no directory unless it has parameters; file systems are listed otherwise.
    sys.exists(&format!("/sys/module/{name}"))
        || sys.read("/proc/filesystems").is_ok_and(|list| list.split_whitespace().any(|word| word == name))
}

/// What the devices below a directory of that tree ask for.
pub fn aliases(root: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        // Devices come and go while we look: what cannot be read is gone.
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                pending.push(entry.path());
            } else if kind.is_file()
                && entry.file_name() == "modalias"
                && let Ok(text) = std::fs::read_to_string(entry.path())
            {
                found.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_are_found_at_any_depth_and_once() {
        let root = tempfile::tempdir().unwrap();
        for (directory, text) in [("a/b", "pci:1\n"), ("a/c/d", "pci:1\n"), ("e", "acpi:X:\n\n")] {
            std::fs::create_dir_all(root.path().join(directory)).unwrap();
            std::fs::write(root.path().join(directory).join("modalias"), text).unwrap();
        }
        std::os::unix::fs::symlink("..", root.path().join("a/loop")).unwrap();
        assert_eq!(aliases(root.path()).into_iter().collect::<Vec<_>>(), ["acpi:X:", "pci:1"]);
    }
}
