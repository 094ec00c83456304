//! Partitions and volumes: from what the disks hold to the steps that make them the host's storage. ◇
//!
//! Invariant: nothing is formatted unless its first megabyte is nothing but zeros, as flashing leaves it, and only a
//! partition that carries our label on the disk the host booted from is touched at all.

use atoll_spec::places::AGENT_UID;
use std::fmt;
use std::path::PathBuf;

/// Space behind DATA that is worth growing into, in bytes.
const WORTH_GROWING: u64 = 4 << 20;

/// A disk as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disk {
    /// Its device.
    pub device: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Whether it can be pulled out.
    pub removable: bool,
    /// Whether its primary partition table is not whole, so that the backup counts.
    pub by_backup: bool,
    /// Whether it still has ids that every disk has which was flashed with the same image.
    pub ids_of_the_image: bool,
    /// Its partitions.
    pub partitions: Vec<Partition>,
}

/// A partition as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Partition {
    /// Its device.
    pub device: PathBuf,
    /// Its number.
    pub number: u32,
    /// Its GPT label.
    pub label: String,
    /// Its unique id, lower case, when it is known.
    pub uuid: Option<String>,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its size.
    pub bytes: u64,
    /// What is on it.
    pub content: Content,
}

/// What the beginning of a partition looks like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeros.
    #[default]
    Blank,
    /// An ext4 file system of this many bytes.
    Ext4(u64),
    /// An ext4 file system of ours whose beginning is damaged: a backup of its superblock carries our label.
    Damaged,
    /// A FAT file system.
    Fat,
    /// Something else, by name.
    Other(&'static str),
    /// Not empty, and nothing that is known.
    Unknown,
    /// It could not be read.
    Unreadable(String),
}

/// What hostd saw of the host's storage.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The disks.
    pub disks: Vec<Disk>,
    /// The partition the firmware loaded the system from, lower case, by the id that it has now; `None` when the firmware
    /// does not say.
    pub boot_partition: Option<String>,
    /// Where something is mounted.
    pub mounted: Vec<PathBuf>,
    /// What is mounted there: devices, and names of what is none.
    pub sources: Vec<PathBuf>,
}

/// Where things belong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Targets {
    /// The EFI system partition.
    pub esp: PathBuf,
    /// STATE.
    pub state: PathBuf,
    /// DATA.
    pub data: PathBuf,
    /// Where the ids are written down that partitions had when the firmware saw them, if they have others now.
    pub changed_ids: PathBuf,
}

/// How a file system is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mounting {
    /// FAT, read-only, nothing executable.
    Esp,
    /// ext4, writable.
    Ext4,
}

/// A step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make the primary partition table anew from its backup.
    RestoreTable {
        /// The disk.
        disk: PathBuf,
    },
    /// Give a disk and its partitions ids that no other disk has.
    OwnIds {
        /// The disk.
        disk: PathBuf,
        /// Where it is written down which ids became which: the firmware named the old one at this boot.
        changed_ids: PathBuf,
    },
    /// Make a partition reach the end of its disk.
    GrowPartition {
        /// The disk.
        disk: PathBuf,
        /// The partition's number.
        number: u32,
    },
    /// Make an ext4 file system on a blank partition.
    Format {
        /// The partition.
        device: PathBuf,
        /// Its label.
        label: &'static str,
    },
    /// Check and mend a file system.
    Check {
        /// The partition.
        device: PathBuf,
        /// All of it, even when it says that it is clean: growing needs that.
        whole: bool,
    },
    /// Mount a partition.
    Mount {
        /// The partition.
        device: PathBuf,
        /// Where.
        target: PathBuf,
        /// How.
        how: Mounting,
    },
    /// Make a file system fill its partition. Before it is mounted: while it is, the kernel wants a capability that
    /// hostd has no other use for.
    GrowFilesystem {
        /// The partition.
        device: PathBuf,
    },
    /// Use memory where there is no disk.
    MountMemory {
        /// Where.
        target: PathBuf,
        /// Share of the memory.
        percent: u8,
    },
    /// Make a directory, with this owner and mode.
    Directory {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// Its owner and group.
        owner: u32,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RestoreTable { disk } => {
                write!(f, "restore the partition table of {} from its backup", disk.display())
            }
            Self::OwnIds { disk, .. } => {
                write!(f, "give {} and its partitions ids of their own", disk.display())
            }
            Self::GrowPartition { disk, number } => {
                write!(f, "grow partition {number} to the end of {}", disk.display())
            }
            Self::Format { device, label } => write!(f, "format {} as {label} (ext4)", device.display()),
            Self::Check { device, whole: false } => write!(f, "check {}", device.display()),
            Self::Check { device, whole: true } => write!(f, "check all of {}", device.display()),
            Self::Mount { device, target, how: Mounting::Esp } => {
                write!(f, "mount {} at {} read-only", device.display(), target.display())
            }
            Self::Mount { device, target, how: Mounting::Ext4 } => {
                write!(f, "mount {} at {}", device.display(), target.display())
            }
            Self::GrowFilesystem { device } => write!(f, "grow the file system on {}", device.display()),
            Self::MountMemory { target, percent } => {
                write!(f, "use up to {percent} % of memory at {}", target.display())
            }
            Self::Directory { path, mode, owner } => {
                write!(f, "directory {} mode {mode:04o} owner {owner}", path.display())
            }
        }
    }
}

/// What to do, and what to tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
    /// What a person should know; empty when all is as it should be.
    pub notes: Vec<String>,
    /// Whether what is stored survives a reboot.
    pub persistent: bool,
}

/// Which disk the host booted from, if any has our partitions and can be it.
///
/// Danger: a disk has the ids of its image until its first boot, as every disk that was flashed with it and never booted,
/// so the firmware's word may fit more than one. To take any of them would grow, format and mount what may be another
/// host's.
pub fn boot_disk(observed: &Observed) -> Result<Option<&Disk>, String> {
    let mut ours: Vec<&Disk> = observed.disks.iter().filter(|disk| is_ours(disk)).collect();
    // Decided before hostd was started again: a disk that was put in since changes nothing.
    let in_use = |d: &&&Disk| d.partitions.iter().any(|p| observed.sources.contains(&p.device));
    if let Some(disk) = ours.iter().find(in_use) {
        return Ok(Some(disk));
    }
    if let Some(uuid) = &observed.boot_partition {
        // Absent: to take another disk of ours when this one is only late.
        ours.retain(|d| d.partitions.iter().any(|p| p.uuid.as_ref() == Some(uuid)));
    } else if ours.iter().any(|d| !d.removable) {
        ours.retain(|d| !d.removable);
    }
    match ours[..] {
        [] => Ok(None),
        [disk] => Ok(Some(disk)),
        _ if observed.boot_partition.is_some() => Err(format!(
            "{} are flashed with the same image and never booted, or are copies of one another, so nothing tells which of \
             them booted, and none is touched: remove all but one",
            names(&ours)
        )),
        _ => Err(format!(
            "{} all have partitions STATE and DATA and the firmware does not say which of them booted: remove all but \
             one",
            names(&ours)
        )),
    }
}

fn is_ours(disk: &Disk) -> bool {
    let has = |label: &str| disk.partitions.iter().any(|p| p.label == label);
    has("STATE") && has("DATA")
}

fn names(disks: &[&Disk]) -> String {
    let names: Vec<String> = disks.iter().map(|d| d.device.display().to_string()).collect();
    names.join(", ")
}

/// The steps that make the host's storage.
pub fn plan(observed: &Observed, targets: &Targets) -> Result<Plan, String> {
    let mut plan = Plan::default();
    match boot_disk(observed)? {
        Some(disk) => {
            plan.persistent = true;
            plan_disk(disk, observed, targets, &mut plan)?;
        }
        None if lacks_boot_disk(observed) => {
            return Err("the disk that the firmware booted from is not there, or its partition table is not readable: \
                        check its cable and controller, or flash it again"
                .into());
        }
        None if observed.disks.iter().any(is_ours) => {
            let ours: Vec<&Disk> = observed.disks.iter().filter(|disk| is_ours(disk)).collect();
            return Err(format!(
                "the firmware booted from a disk without partitions STATE and DATA, and those of {} are not touched: \
                 boot from that disk, or remove it to run from memory",
                names(&ours)
            ));
        }
        None => {
            for (target, percent) in [(&targets.state, 5), (&targets.data, 50)] {
                if !observed.mounted.contains(target) {
                    plan.steps.push(Step::MountMemory { target: target.clone(), percent });
                }
            }
            plan.notes.push(
                "no disk with partitions STATE and DATA: running from memory, nothing is kept; flash a disk with \
                 atoll.raw"
                    .into(),
            );
        }
    }
    directories(targets, &mut plan);
    Ok(plan)
}

/// Whether the firmware booted from a partition that the kernel does not see. A host that has a disk must not become
/// another one that runs from memory because the disk is late or damaged.
fn lacks_boot_disk(observed: &Observed) -> bool {
    let mut partitions = observed.disks.iter().flat_map(|d| &d.partitions);
    observed.boot_partition.as_ref().is_some_and(|uuid| !partitions.any(|p| p.uuid.as_ref() == Some(uuid)))
}

fn plan_disk(disk: &Disk, observed: &Observed, targets: &Targets, plan: &mut Plan) -> Result<(), String> {
    let find = |label: &str| disk.partitions.iter().find(|p| p.label == label);
    if disk.by_backup {
        plan.steps.push(Step::RestoreTable { disk: disk.device.clone() });
    }
    if disk.ids_of_the_image {
        plan.steps.push(Step::OwnIds { disk: disk.device.clone(), changed_ids: targets.changed_ids.clone() });
    }
    if let Some(esp) = find("ESP")
        && !observed.mounted.contains(&targets.esp)
    {
        plan.steps.push(Step::Mount {
            device: esp.device.clone(),
            target: targets.esp.clone(),
            how: Mounting::Esp,
        });
    }
    for (label, target) in [("STATE", &targets.state), ("DATA", &targets.data)] {
        let Some(partition) = find(label) else { continue };
        if observed.mounted.contains(target) {
            continue;
        }
        let grow = label == "DATA" && room_behind(disk, partition) >= WORTH_GROWING;
        if grow {
            plan.steps.push(Step::GrowPartition { disk: disk.device.clone(), number: partition.number });
        }
        plan_volume(partition, label, target, grow, plan)?;
    }
    let content = |label: &str| find(label).map(|partition| &partition.content);
    let stored = matches!(content("DATA"), Some(Content::Ext4(_) | Content::Damaged));
    if content("STATE") == Some(&Content::Blank) && stored {
        plan.notes.push(LOST_IDENTITY.into());
    }
    Ok(())
}

/// Bytes between the end of the partition, when it is the last, and the backup table at the end of the disk.
fn room_behind(disk: &Disk, partition: &Partition) -> u64 {
    let last = disk.partitions.iter().all(|p| p.start <= partition.start);
    let end = partition.start + partition.bytes;
    if last { disk.bytes.saturating_sub(end) } else { 0 }
}

fn plan_volume(
    partition: &Partition,
    label: &'static str,
    target: &std::path::Path,
    grown: bool,
    plan: &mut Plan,
) -> Result<(), String> {
    let device = partition.device.clone();
    match &partition.content {
        Content::Blank => plan.steps.push(Step::Format { device: device.clone(), label }),
        Content::Ext4(bytes) => {
            let smaller = grown || bytes + WORTH_GROWING < partition.bytes;
            plan.steps.push(Step::Check { device: device.clone(), whole: smaller });
            if smaller {
                plan.steps.push(Step::GrowFilesystem { device: device.clone() });
            }
        }
        Content::Damaged => {
            plan.notes.push(format!(
                "the superblock of {} ({label}) was damaged and is repaired from its backup; files that lost their name \
                 are in lost+found",
                device.display()
            ));
            plan.steps.push(Step::Check { device: device.clone(), whole: true });
            plan.steps.push(Step::GrowFilesystem { device: device.clone() });
        }
        Content::Unknown => return Err(foreign(partition, label, "something unknown")),
        Content::Fat => return Err(foreign(partition, label, "a FAT file system")),
        Content::Other(what) => return Err(foreign(partition, label, what)),
        Content::Unreadable(why) => return Err(format!("cannot read {} ({label}): {why}", device.display())),
    }
    plan.steps.push(Step::Mount { device, target: target.to_owned(), how: Mounting::Ext4 });
    Ok(())
}

/// What the console says when STATE was empty on a disk that is not new.
const LOST_IDENTITY: &str = "STATE was empty and was made anew, though DATA is not: this host has lost its identity and \
    joins again only with a token in 'join' of machine.yaml";

fn foreign(partition: &Partition, label: &str, what: &str) -> String {
    let device = partition.device.display();
    format!(
        "{device} ({label}) holds {what}, not ext4, and is left as it is: save what is on it, then clear its first \
         megabyte or flash the disk again, and boot again"
    )
}

fn directories(targets: &Targets, plan: &mut Plan) {
    let all = [
        (targets.state.join("machine"), 0o700, 0),
        (targets.state.join("agent"), 0o700, AGENT_UID),
        (targets.data.join("images"), 0o700, 0),
        (targets.data.join("sandboxes"), 0o700, 0),
        (targets.data.join("pods"), 0o750, AGENT_UID),
        (targets.data.join("log"), 0o750, AGENT_UID),
    ];
    plan.steps.extend(all.map(|(path, mode, owner)| Step::Directory { path, mode, owner }));
}

/// Bytes at the beginning of a partition that must be zeros for it to count as empty. All signatures are in them.
pub const BEGINNING: u64 = 1 << 20;

/// Where ext4 keeps the first backup of its superblock: the second block group, for each size of blocks.
pub const BACKUPS: [u64; 3] = [8193 << 10, 16384 << 11, 32768 << 12];

/// Whether these bytes, from one of [`BACKUPS`], are a backup of the superblock of our volume of this label.
pub fn is_backup(bytes: &[u8], label: &str) -> bool {
    let group = bytes.get(90..92).unwrap_or_default();
    let name = bytes.get(120..136).unwrap_or_default();
    bytes.get(56..58) == Some(&[0x53, 0xef])
        && group == [1, 0]
        && name.strip_prefix(label.as_bytes()).is_some_and(|rest| rest.iter().all(|byte| *byte == 0))
}

/// What the first bytes of a partition say is on it.
pub fn content(start: &[u8]) -> Content {
    let at = |offset: usize, magic: &[u8]| start.get(offset..offset + magic.len()) == Some(magic);
    if at(1080, &[0x53, 0xef]) {
        let word = |o: usize| start.get(o..o + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let blocks = u64::from(word(1028)) | u64::from(word(1024 + 0x150)) << 32;
        let block_size = 1024u64.checked_shl(word(1048)).unwrap_or(0);
        return Content::Ext4(blocks.saturating_mul(block_size));
    }
    if at(510, &[0x55, 0xaa]) && (at(82, b"FAT32") || at(54, b"FAT1")) {
        return Content::Fat;
    }
    let known: [(usize, &[u8], &'static str); 13] = [
        (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
        (0, b"XFSB", "an XFS file system"),
        (0, b"hsqs", "a squashfs file system"),
        (1024, &[0xe2, 0xe1, 0xf5, 0xe0], "an erofs file system"),
        (1024, &[0x10, 0x20, 0xf5, 0xf2], "an F2FS file system"),
        (512, b"LABELONE", "an LVM volume"),
        (4086, b"SWAPSPACE2", "swap space"),
        (4096, &[0xfc, 0x4e, 0x2b, 0xa9], "a RAID member"),
        (65600, b"_BHRfS_M", "a btrfs file system"),
        (3, b"NTFS    ", "an NTFS file system"),
        (3, b"EXFAT   ", "an exFAT file system"),
        (512, b"EFI PART", "a partition table"),
        (32769, b"CD001", "a CD image"),
    ];
    let found = known.iter().find(|(offset, magic, _)| at(*offset, magic));
    let unknown = if start.iter().all(|byte| *byte == 0) { Content::Blank } else { Content::Unknown };
    found.map_or(unknown, |(_, _, name)| Content::Other(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn targets() -> Targets {
        Targets {
            esp: "/esp".into(),
            state: "/state".into(),
            data: "/data".into(),
            changed_ids: "/changed-ids".into(),
        }
    }

    fn disk(name: &str, contents: [Content; 2]) -> Disk {
        let partition = |number: u32, label: &str, start: u64, bytes: u64, content| Partition {
            device: format!("/dev/{name}{number}").into(),
            number,
            label: label.into(),
            uuid: Some(format!("{name}-{number}")),
            start: start << 20,
            bytes: bytes << 20,
            content,
        };
        let [state, data] = contents;
        Disk {
            device: format!("/dev/{name}").into(),
            bytes: 1 << 30,
            removable: false,
            by_backup: false,
            ids_of_the_image: false,
            partitions: vec![
                partition(1, "ESP", 1, 300, Content::Fat),
                partition(2, "STATE", 301, 64, state),
                partition(3, "DATA", 365, 64, data),
            ],
        }
    }

    fn steps(observed: &Observed) -> Vec<String> {
        let plan = plan(observed, &targets()).unwrap();
        plan.steps.iter().map(ToString::to_string).filter(|s| !s.starts_with("directory")).collect()
    }

    #[test]
    fn the_first_boot_grows_formats_and_mounts() {
        let observed =
            Observed { disks: vec![disk("vda", [Content::Blank, Content::Blank])], ..Default::default() };
        assert_eq!(
            steps(&observed),
            [
                "mount /dev/vda1 at /esp read-only",
                "format /dev/vda2 as STATE (ext4)",
                "mount /dev/vda2 at /state",
                "grow partition 3 to the end of /dev/vda",
                "format /dev/vda3 as DATA (ext4)",
                "mount /dev/vda3 at /data",
            ]
        );
    }

    #[test]
    fn later_boots_check_and_mount_and_a_grown_disk_is_used() {
        let mut vda = disk("vda", [Content::Ext4(64 << 20), Content::Ext4(64 << 20)]);
        vda.bytes = (430 << 20) + 1024;
        let mut observed = Observed { disks: vec![vda], ..Default::default() };
        let usual = [
            "mount /dev/vda1 at /esp read-only",
            "check /dev/vda2",
            "mount /dev/vda2 at /state",
            "check /dev/vda3",
            "mount /dev/vda3 at /data",
        ];
        assert_eq!(steps(&observed), usual);
        observed.disks[0].bytes = 2 << 30;
        let grown = steps(&observed);
        assert_eq!(
            grown[3..],
            [
                "grow partition 3 to the end of /dev/vda",
                "check all of /dev/vda3",
                "grow the file system on /dev/vda3",
                "mount /dev/vda3 at /data",
            ]
        );
        observed.disks[0].by_backup = true;
        assert_eq!(steps(&observed)[0], "restore the partition table of /dev/vda from its backup");
        observed.disks[0].by_backup = false;
        observed.mounted = vec!["/esp".into(), "/state".into(), "/data".into()];
        assert_eq!(steps(&observed), [""; 0]);
    }

    #[test]
    fn foreign_data_is_never_formatted() {
        let luks = disk("vda", [Content::Ext4(0), Content::Other("an encrypted volume (LUKS)")]);
        let error = plan(&Observed { disks: vec![luks], ..Default::default() }, &targets()).unwrap_err();
        assert!(error.starts_with("/dev/vda3 (DATA) holds an encrypted volume"), "{error}");
        let unknown = disk("vda", [Content::Ext4(0), Content::Unknown]);
        let error = plan(&Observed { disks: vec![unknown], ..Default::default() }, &targets()).unwrap_err();
        assert!(error.starts_with("/dev/vda3 (DATA) holds something unknown"), "{error}");
        assert_eq!(content(&[0; 4096]), Content::Blank);
        let mut scrap = [0; 4096];
        scrap[4095] = 1;
        assert_eq!(content(&scrap), Content::Unknown, "one byte that is not zero may be somebody's");
    }

    #[test]
    fn a_damaged_volume_of_ours_is_repaired_and_never_formatted() {
        let vda = disk("vda", [Content::Ext4(64 << 20), Content::Damaged]);
        let found = plan(&Observed { disks: vec![vda], ..Default::default() }, &targets()).unwrap();
        let steps: Vec<String> = found.steps.iter().map(ToString::to_string).collect();
        assert!(steps.contains(&"check all of /dev/vda3".to_owned()), "{steps:?}");
        assert!(!steps.iter().any(|step| step.starts_with("format")), "{steps:?}");
        assert!(found.notes[0].contains("/dev/vda3 (DATA) was damaged"), "{:?}", found.notes);
    }

    #[test]
    fn a_wiped_state_beside_data_is_told() {
        let notes = |state, data| {
            let observed = Observed { disks: vec![disk("vda", [state, data])], ..Default::default() };
            plan(&observed, &targets()).unwrap().notes
        };
        assert_eq!(notes(Content::Blank, Content::Ext4(64 << 20)), [LOST_IDENTITY]);
        assert_eq!(notes(Content::Blank, Content::Blank), [""; 0], "a new disk has lost nothing");
        assert_eq!(notes(Content::Ext4(64 << 20), Content::Ext4(64 << 20)), [""; 0]);
    }

    #[test]
    fn the_disk_that_booted_is_taken() {
        let blank = || [Content::Blank, Content::Blank];
        let mut observed =
            Observed { disks: vec![disk("sda", blank()), disk("sdb", blank())], ..Default::default() };
        assert!(plan(&observed, &targets()).unwrap_err().contains("/dev/sda, /dev/sdb"));
        observed.boot_partition = Some("sdb-1".into());
        assert_eq!(steps(&observed)[0], "mount /dev/sdb1 at /esp read-only");
        observed.boot_partition = None;
        observed.disks[0].removable = true;
        assert_eq!(steps(&observed)[0], "mount /dev/sdb1 at /esp read-only");
    }

    #[test]
    fn of_several_disks_of_the_same_image_none_is_touched() {
        let mut observed = Observed { boot_partition: Some("vda-1".into()), ..Observed::default() };
        for name in ["/dev/sda", "/dev/sdb"] {
            let mut flashed = disk("vda", [Content::Blank, Content::Blank]);
            flashed.device = name.into();
            flashed.partitions.iter_mut().for_each(|p| p.device = format!("{name}{}", p.number).into());
            observed.disks.push(flashed);
        }
        // Which of them the firmware booted does not follow from one being a stick.
        for removable in [false, true] {
            observed.disks[1].removable = removable;
            let error = plan(&observed, &targets()).unwrap_err();
            assert!(error.starts_with("/dev/sda, /dev/sdb are flashed with the same image"), "{error}");
            assert!(error.contains("copies of one another"), "{error}");
            assert!(error.ends_with("remove all but one"), "{error}");
        }
        let mut restarted = observed.clone();
        restarted.mounted = vec!["/esp".into(), "/state".into()];
        restarted.sources = vec!["/dev/sdb1".into(), "/dev/sdb2".into()];
        assert_eq!(steps(&restarted)[0], "grow partition 3 to the end of /dev/sdb", "one is in use already");
        observed.disks.remove(0);
        assert_eq!(steps(&observed)[0], "mount /dev/sdb1 at /esp read-only");
    }

    #[test]
    fn a_flashed_disk_gets_ids_of_its_own_before_anything_else_and_no_other_disk_does() {
        let mut observed = Observed { boot_partition: Some("sda-1".into()), ..Observed::default() };
        observed.disks = ["sda", "sdb"].map(|name| disk(name, [Content::Blank, Content::Blank])).into();
        assert!(!steps(&observed).iter().any(|step| step.contains("ids of their own")), "it has them");
        observed.disks.iter_mut().for_each(|disk| disk.ids_of_the_image = true);
        let steps = steps(&observed);
        assert_eq!(steps[0], "give /dev/sda and its partitions ids of their own");
        assert!(!steps[1..].iter().any(|step| step.contains("ids of their own")), "{steps:?}");
    }

    #[test]
    fn another_disk_is_not_taken_for_the_one_that_booted() {
        let other = disk("sda", [Content::Blank, Content::Blank]);
        let mut observed =
            Observed { boot_partition: Some("sdb-1".into()), disks: vec![other], ..Observed::default() };
        assert_eq!(boot_disk(&observed), Ok(None), "it may be late");
        assert!(plan(&observed, &targets()).unwrap_err().contains("is not there"));
        let mut stick = disk("sdb", [Content::Blank, Content::Blank]);
        stick.partitions.truncate(1);
        observed.disks.push(stick);
        let error = plan(&observed, &targets()).unwrap_err();
        assert!(error.contains("those of /dev/sda are not touched: boot from that disk"), "{error}");
    }

    #[test]
    fn without_a_disk_it_runs_from_memory_and_says_so() {
        let found = plan(&Observed::default(), &targets()).unwrap();
        assert!(!found.persistent && found.notes[0].contains("nothing is kept"));
        assert_eq!(found.steps[0].to_string(), "use up to 5 % of memory at /state");
        let booted = Observed { boot_partition: Some("gone".into()), ..Observed::default() };
        assert!(plan(&booted, &targets()).unwrap_err().contains("is not there"), "it booted from a disk");
        let mut stick = disk("sda", [Content::Blank, Content::Blank]);
        stick.partitions.truncate(1);
        let live =
            Observed { boot_partition: Some("sda-1".into()), disks: vec![stick], ..Observed::default() };
        assert!(!plan(&live, &targets()).unwrap().persistent, "a medium without STATE");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let _ = content(&bytes);
            is_backup(&bytes, "DATA");
        }
    }
}
