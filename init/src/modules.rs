//! Kernel modules: the few that the system tree's file system needs, loaded by hand, and then everything that the
//! machine's devices ask for (*coldplug*), loaded by modprobe in few large calls, which share the deadline of the boot
//! phase. A modprobe that is late is never killed: its signal would reach the driver's probe, which then fails, and some
//! controllers take minutes.

use crate::clock;
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
/// Most names for one run of modprobe.
pub const BATCH: usize = 256;
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

/// Loads what no device asks for, then what the devices ask for, round by round until none asks for anything new.
/// Gives back how many kinds of devices asked, and what was not loaded by that time of the machine: one driver that
/// fails or hangs keeps no other from being asked for.
pub fn coldplug(sys: &dyn Syscalls, until: Duration) -> (usize, Result<()>) {
    coldplug_with(sys, || aliases(Path::new(DEVICES)), |names| load(names, until))
}

fn coldplug_with(
    sys: &dyn Syscalls,
    find: impl Fn() -> BTreeSet<String>,
    load: impl Fn(&[String]) -> Result<()>,
) -> (usize, Result<()>) {
    // They wait for no device, and a driver that hangs would leave them no time.
    let mut failures: Vec<Error> = ask(&load, &NEEDED.map(str::to_owned)).into_iter().collect();
    let mut asked = BTreeSet::new();
    for _ in 0..ROUNDS {
        let found = find();
        let new: Vec<String> = found.difference(&asked).cloned().collect();
        if new.is_empty() {
            break;
        }
        failures.extend(new.chunks(BATCH).filter_map(|batch| ask(&load, batch)));
        asked.extend(new);
    }
    let missing: Vec<&str> = NEEDED.into_iter().filter(|name| !is_present(sys, name)).collect();
    if !missing.is_empty() {
        failures.push(Error::ModulesMissing { names: missing.join(", ") });
    }
    (asked.len(), Error::all(failures))
}

fn ask(load: &impl Fn(&[String]) -> Result<()>, names: &[String]) -> Option<Error> {
    let source = Box::new(load(names).err()?);
    let first = names.first().cloned().unwrap_or_default();
    Some(Error::Drivers { first, more: names.len().saturating_sub(1), source })
}

/// Loads modules by names or aliases. Names that no module of the image answers to are not an error: most devices
/// of a machine need no driver of ours. When there is no time left it is started all the same.
fn load(names: &[String], until: Duration) -> Result<()> {
    process::run(&modprobe(names), until.saturating_sub(clock::uptime())).map(drop)
}

/// The command that loads modules by names or aliases, for those who wait for it themselves.
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
    use crate::sys::fake::Fake;
    use std::cell::RefCell;

    fn machine_with(modules: &[&str]) -> Fake {
        let fake = Fake::default();
        modules.iter().for_each(|name| fake.file(&format!("/sys/module/{name}"), ""));
        fake
    }

    #[test]
    fn a_batch_that_fails_keeps_neither_the_others_nor_what_the_host_needs_from_being_asked_for() {
        let devices: BTreeSet<String> = (0..=2 * BATCH).map(|number| format!("pci:{number:04}")).collect();
        let asked = RefCell::new(BTreeSet::new());
        let load = |names: &[String]| {
            asked.borrow_mut().extend(names.iter().cloned());
            match names[0].as_str() {
                "pci:0000" => {
                    Err(Error::Overrun { program: "modprobe".into(), deadline: Duration::from_secs(9) })
                }
                "pci:0512" => Err(Error::system("start it")(io::Error::other("no memory"))),
                _ => Ok(()),
            }
        };
        let (found, outcome) = coldplug_with(&machine_with(&NEEDED), || devices.clone(), load);
        assert_eq!(found, devices.len());
        let asked = asked.into_inner();
        assert!(devices.is_subset(&asked), "{:?}", devices.difference(&asked).next());
        assert!(NEEDED.iter().all(|name| asked.contains(*name)), "{asked:?}");
        let text = crate::error::chain(&outcome.unwrap_err());
        assert!(text.contains("pci:0000 and 255 more: modprobe had not ended after 9 s"), "{text}");
        assert!(text.contains("pci:0512 and 0 more: cannot start it: no memory"), "{text}");
    }

    #[test]
    fn what_the_host_needs_is_asked_for_before_a_driver_can_take_the_time() {
        let first = RefCell::new(None);
        let load = |names: &[String]| {
            first.borrow_mut().get_or_insert(names[0].clone());
            Ok(())
        };
        let (found, outcome) =
            coldplug_with(&machine_with(&NEEDED[1..]), || ["pci:1".to_owned()].into(), load);
        assert_eq!((found, first.into_inner().as_deref()), (1, Some("tun")));
        assert!(outcome.unwrap_err().to_string().contains("modules tun did not load"));
    }

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
