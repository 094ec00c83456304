//! What the kernel said before it crashed: taken from pstore, where it survives in the firmware, to STATE.
//!
//! Invariant: a record is removed from pstore only once its text is safely in a file, and is always removed then: what
//! stays fills the firmware's variables, of which some boards have so few that they do not boot any more. Files are
//! bounded in number and size; the oldest go first.

use crate::error::{Context, Result};
use crate::files::{self, Durability};
use std::cmp::Reverse;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Most files that are kept.
const KEPT: usize = 8;
/// Most bytes of one file. A kernel's log has 256 KiB, and firmware keeps less.
const LONGEST: usize = 512 * 1024;
/// Most records that are taken at once; the others have their turn at the next boot.
const RECORDS: usize = 1024;

/// A crash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crash {
    /// The kernel's own words for it.
    pub words: String,
    /// Whether the kernel ended with it; it goes on after an oops.
    pub ended: bool,
    /// Where all that it said is.
    pub log: PathBuf,
}

struct Record {
    path: PathBuf,
    text: String,
    seconds: u64,
}

impl Record {
    /// A record is a piece of the log: its first line says of which dump, and how many from the end it is.
    fn place(&self) -> (u64, Reverse<u64>) {
        let (dump, part) = self.head().unwrap_or_default();
        (dump, Reverse(part))
    }

    /// `Panic#2 Part1`
    fn head(&self) -> Option<(u64, u64)> {
        let (dump, part) = self.text.lines().next()?.split_once('#')?.1.split_once(" Part")?;
        Some((dump.parse().ok()?, part.trim().parse().ok()?))
    }
}

/// Saves the records of `pstore` in `directory` and removes them; `None` when there are none, or none of a crash.
pub fn save(pstore: &Path, directory: &Path) -> Result<Option<Crash>> {
    let mut records = records(pstore)?;
    let Some(seconds) = records.iter().map(|record| record.seconds).max() else { return Ok(None) };
    records.sort_by_key(|record| (record.place(), record.path.clone()));
    let text: String = records.iter().flat_map(|record| [record.text.as_str(), "\n"]).collect();
    // The end says what happened.
    let mut from = text.len().saturating_sub(LONGEST);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    let log = keep(directory, seconds, &text.as_bytes()[from..])?;
    for record in &records {
        fs::remove_file(&record.path).context("remove", record.path.display())?;
    }
    Ok(words(&text).map(|(ended, words)| Crash { words, ended, log }))
}

fn records(pstore: &Path) -> Result<Vec<Record>> {
    let entries = match fs::read_dir(pstore) {
        Ok(entries) => entries,
        // Not every firmware keeps records.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("list", pstore.display()),
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.truncate(RECORDS);
    let mut records = Vec::new();
    for path in paths {
        let file = fs::File::open(&path).context("open", path.display())?;
        let modified = file.metadata().and_then(|meta| meta.modified());
        let since = modified.ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let mut bytes = Vec::new();
        file.take(LONGEST as u64).read_to_end(&mut bytes).context("read", path.display())?;
        records.push(Record {
            path,
            text: String::from_utf8_lossy(&bytes).into_owned(),
            seconds: since.map_or(0, |since| since.as_secs()),
        });
    }
    Ok(records)
}

/// Writes a file that no older one is lost for, and removes the oldest ones.
fn keep(directory: &Path, seconds: u64, text: &[u8]) -> Result<PathBuf> {
    fs::create_dir_all(directory).context("create", directory.display())?;
    let entries = fs::read_dir(directory).context("list", directory.display())?;
    let mut kept: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    kept.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("kernel-")));
    kept.sort();
    // One with the same text is of this crash: the machine went down again before the records were removed.
    let same =
        |path: &&PathBuf| files::read(path, LONGEST as u64).ok().flatten().is_some_and(|old| old == text);
    if let Some(path) = kept.iter().rfind(same) {
        return Ok(path.clone());
    }
    let name = |n: u32| directory.join(format!("kernel-{seconds:011}-{n:03}.log"));
    let path =
        (0..1000).rev().map(name).take_while(|path| !kept.contains(path)).last().unwrap_or_else(|| name(999));
    files::replace(&path, text, 0o600, None, Durability::Durable)?;
    for old in kept.iter().take((kept.len() + 1).saturating_sub(KEPT)).filter(|old| **old != path) {
        fs::remove_file(old).context("remove", old.display())?;
    }
    Ok(path)
}

/// The line in which the kernel says what befell it, and whether that was its end. Records are of other things too.
fn words(text: &str) -> Option<(bool, String)> {
    let line = |marks: &[&str]| {
        let found = text.lines().rev().find_map(|line| {
            let at = marks.iter().filter_map(|mark| line.find(mark)).min()?;
            Some(line[at..].trim())
        })?;
        Some(found.chars().filter(|c| !c.is_control()).take(200).collect::<String>())
    };
    let panic = line(&["Kernel panic - not syncing"]).map(|words| (true, words));
    panic.or_else(|| Some((false, line(&["BUG: ", "Oops: ", "general protection fault", "kernel BUG at "])?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(pstore: &Path, name: &str, text: &str) {
        fs::create_dir_all(pstore).unwrap();
        fs::write(pstore.join(name), text).unwrap();
    }

    #[test]
    fn a_crash_is_saved_in_order_and_its_records_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let (pstore, kept) = (root.path().join("pstore"), root.path().join("state/crashes"));
        assert_eq!(save(&pstore, &kept).unwrap(), None, "no pstore");
        write(
            &pstore,
            "dmesg-efi_pstore-170000000001002",
            "Panic#2 Part1\n<0>[ 9.1] Kernel panic - not syncing: Fatal\n",
        );
        write(&pstore, "dmesg-efi_pstore-170000000002002", "Panic#2 Part2\n<1>[ 9.0] before it\n");
        write(
            &pstore,
            "dmesg-efi_pstore-170000000001001",
            "Oops#1 Part1\n<1>[ 8.0] BUG: kernel NULL pointer\n",
        );
        let crash = save(&pstore, &kept).unwrap().unwrap();
        assert_eq!((crash.ended, crash.words.as_str()), (true, "Kernel panic - not syncing: Fatal"));
        let text = fs::read_to_string(&crash.log).unwrap();
        let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("{what} in {text}"));
        assert!(at("NULL pointer") < at("before it") && at("before it") < at("panic - not"), "{text}");
        assert_eq!(fs::read_dir(&pstore).unwrap().count(), 0);
        assert_eq!(save(&pstore, &kept).unwrap(), None, "once");
        write(&pstore, "dmesg-efi_pstore-1", "Oops#1 Part1\n<1>[ 8.0] BUG: kernel NULL pointer\n");
        assert!(!save(&pstore, &kept).unwrap().unwrap().ended, "it went on");
        write(&pstore, "mce-erst-1", "nothing that is known");
        assert_eq!(save(&pstore, &kept).unwrap(), None);
        assert_eq!(fs::read_dir(&kept).unwrap().count(), 3, "saved all the same");
    }

    #[test]
    fn what_cannot_be_saved_stays_in_pstore_and_what_was_saved_is_not_saved_twice() {
        let root = tempfile::tempdir().unwrap();
        let (pstore, kept) = (root.path().join("pstore"), root.path().join("crashes"));
        let panic = "Panic#1 Part1\nKernel panic - not syncing: x\n";
        write(&pstore, "dmesg-efi_pstore-1", panic);
        fs::write(&kept, "in the way").unwrap();
        save(&pstore, &kept).unwrap_err();
        assert_eq!(fs::read_dir(&pstore).unwrap().count(), 1);
        fs::remove_file(&kept).unwrap();
        let time = fs::metadata(pstore.join("dmesg-efi_pstore-1")).unwrap().modified().unwrap();
        let again = || {
            write(&pstore, "dmesg-efi_pstore-1", panic);
            fs::File::options()
                .write(true)
                .open(pstore.join("dmesg-efi_pstore-1"))
                .unwrap()
                .set_modified(time)
                .unwrap();
            save(&pstore, &kept).unwrap().unwrap().log
        };
        assert_eq!(again(), again(), "the power was cut before the record was removed");
        write(&pstore, "dmesg-efi_pstore-0", "Panic#1 Part2\nmore\n");
        assert_ne!(again(), again(), "more of it: the first is not lost for the second");
    }

    #[test]
    fn files_are_bounded_in_number_and_size() {
        let root = tempfile::tempdir().unwrap();
        let (pstore, kept) = (root.path().join("pstore"), root.path().join("crashes"));
        fs::create_dir_all(&kept).unwrap();
        fs::write(kept.join("other"), "not ours").unwrap();
        let mut last = PathBuf::new();
        for n in 0..12 {
            for part in 1..4 {
                let long = "é".repeat(LONGEST / 4);
                let text =
                    format!("Panic#1 Part{part}\n{long}é\nKernel panic - not syncing: {part} of {n}\n");
                write(&pstore, &format!("dmesg-efi_pstore-{part}"), &text);
            }
            last = save(&pstore, &kept).unwrap().unwrap().log;
        }
        let names: Vec<PathBuf> = fs::read_dir(&kept).unwrap().flatten().map(|e| e.path()).collect();
        assert_eq!(names.len(), KEPT + 1, "{names:?}");
        assert!(names.iter().all(|path| fs::metadata(path).unwrap().len() <= LONGEST as u64));
        assert!(fs::read_to_string(&last).unwrap().ends_with(": 1 of 11\n\n"), "the newest, to its end");
    }
}
