//! Writes a volume's files so that a reader sees the old set or the new one, never a mixture.
//!
//! ```text
//! <volume>/..data ─► ..<time>/      the link is replaced by rename
//! <volume>/<name> ─► ..data/<name>  made once for each top-level name
//! ```
//!
//! Called by [`super::Volumes`] alone. Invariants: nothing is written when nothing changed; no path leaves the
//! directory; a write that was cut short anywhere is made whole by the next one.

use super::content::File;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

const DATA: &str = "..data";

/// A container's start and the refresh may come to one volume at once. Writes are short, so one lock serves all volumes.
static WRITING: Mutex<()> = Mutex::new(());

type Failure = (PathBuf, io::Error);

fn at(path: &Path) -> impl FnOnce(io::Error) -> Failure + '_ {
    move |error| (path.to_owned(), error)
}

/// Makes `directory` show exactly `files`. `group` owns them, when the process may say so.
///
/// # Errors
/// The path that could not be written, and why.
pub fn write(directory: &Path, files: &[File], group: Option<u32>) -> Result<(), Failure> {
    for file in files {
        if !file.path.components().all(|c| matches!(c, Component::Normal(_))) || starts_hidden(&file.path) {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "the path leaves its volume");
            return Err((file.path.clone(), error));
        }
    }
    let _alone = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    fs::DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(at(directory))?;
    let link = directory.join(DATA);
    let old = fs::read_link(&link).ok();
    // What a write that was cut short has left takes room that this one may need.
    remove_strays(directory, old.as_deref().unwrap_or(Path::new("")))?;
    let current = match old {
        Some(old) if same(&directory.join(&old), files) => old,
        _ => replace(directory, &link, files, group)?,
    };
    // Also when nothing changed: whoever replaced the files may have come no further.
    names(directory, files)?;
    remove_strays(directory, &current)
}

/// Writes a new set of files and lets the link name it; answers its directory's name.
fn replace(directory: &Path, link: &Path, files: &[File], group: Option<u32>) -> Result<PathBuf, Failure> {
    let stamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let fresh = format!("..{stamp}");
    let target = directory.join(&fresh);
    fs::DirBuilder::new().mode(0o755).create(&target).map_err(at(&target))?;
    if let Err(failure) = files.iter().try_for_each(|file| write_file(&target, file, group)) {
        // Without room for all of them, those that found some take it from others. What stays is a stray.
        let _ = fs::remove_dir_all(&target);
        return Err(failure);
    }
    let staged = directory.join("..data_tmp");
    match fs::remove_file(&staged) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err((staged, error)),
        _ => {}
    }
    symlink(&fresh, &staged).map_err(at(&staged))?;
    // Before the rename, for that is when the runtime takes everything over to the guest.
    names(directory, files)?;
    fs::rename(&staged, link).map_err(at(link))?;
    Ok(fresh.into())
}

/// Removes every set of files but the current one.
fn remove_strays(directory: &Path, current: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(directory).map_err(at(directory))? {
        let entry = entry.map_err(at(directory))?;
        let name = entry.file_name();
        let is_set = name.to_string_lossy().starts_with("..") && entry.file_type().is_ok_and(|t| t.is_dir());
        if is_set && Path::new(&name) != current {
            let path = directory.join(&name);
            fs::remove_dir_all(&path).map_err(at(&path))?;
        }
    }
    Ok(())
}

fn starts_hidden(path: &Path) -> bool {
    path.to_string_lossy().starts_with("..")
}

fn write_file(target: &Path, file: &File, group: Option<u32>) -> Result<(), Failure> {
    let path = target.join(&file.path);
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(at(parent))?;
    }
    fs::write(&path, &file.data).map_err(at(&path))?;
    // The group reads what it owns. Without the right to give files away there is no such owner; every process of
    // the pod has the group, so that letting others read lets in nobody else.
    let may_give = rustix::process::geteuid().is_root();
    let readers = if may_give { 0o440 } else { 0o444 };
    let mode = file.mode | group.map_or(0, |_| readers);
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(at(&path))?;
    if let Some(group) = group.filter(|_| may_give) {
        std::os::unix::fs::chown(&path, None, Some(group)).map_err(at(&path))?;
    }
    Ok(())
}

/// Whether the directory holds exactly these files.
fn same(directory: &Path, files: &[File]) -> bool {
    let holds = |file: &File| fs::read(directory.join(&file.path)).is_ok_and(|data| data == file.data);
    count(directory) == Some(files.len()) && files.iter().all(holds)
}

fn count(directory: &Path) -> Option<usize> {
    let mut files = 0;
    for entry in fs::read_dir(directory).ok()? {
        let entry = entry.ok()?;
        files += if entry.file_type().ok()?.is_dir() { count(&entry.path())? } else { 1 };
    }
    Some(files)
}

/// Makes the top-level names, and removes those that are no more.
fn names(directory: &Path, files: &[File]) -> Result<(), Failure> {
    let wanted: BTreeSet<_> =
        files.iter().filter_map(|f| f.path.components().next()).map(|c| c.as_os_str().to_owned()).collect();
    for name in &wanted {
        let path = directory.join(name);
        if fs::symlink_metadata(&path).is_err() {
            symlink(Path::new(DATA).join(name), &path).map_err(at(&path))?;
        }
    }
    for entry in fs::read_dir(directory).map_err(at(directory))? {
        let name = entry.map_err(at(directory))?.file_name();
        if !name.to_string_lossy().starts_with("..") && !wanted.contains(&name) {
            let path = directory.join(&name);
            fs::remove_file(&path).map_err(at(&path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, data: &str) -> File {
        File { path: path.into(), mode: 0o640, data: data.as_bytes().to_vec() }
    }

    fn listing(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|n| !n.starts_with(".."));
        names.sort();
        names
    }

    #[test]
    fn replaces_everything_at_once_and_only_on_change() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        write(&volume, &[file("a", "1"), file("d/e/f", "2")], None).unwrap();
        assert_eq!(listing(&volume), ["a", "d"]);
        assert_eq!(fs::read_to_string(volume.join("d/e/f")).unwrap(), "2");
        assert_eq!(fs::metadata(volume.join("a")).unwrap().permissions().mode() & 0o777, 0o640);
        let first = fs::read_link(volume.join(DATA)).unwrap();
        write(&volume, &[file("a", "1"), file("d/e/f", "2")], None).unwrap();
        assert_eq!(fs::read_link(volume.join(DATA)).unwrap(), first);
        write(&volume, &[file("a", "3")], None).unwrap();
        assert_eq!(listing(&volume), ["a"]);
        assert_eq!(fs::read_to_string(volume.join("a")).unwrap(), "3");
        assert!(!volume.join(first).exists());
    }

    #[test]
    fn writers_at_once_leave_the_set_of_one_of_them_whole() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        let sets = [vec![file("a", "1")], vec![file("a", "2"), file("b", "2")]];
        std::thread::scope(|scope| {
            for set in &sets {
                scope.spawn(|| (0..200).for_each(|_| write(&volume, set, None).unwrap()));
            }
        });
        let set = if volume.join("b").exists() { &sets[1] } else { &sets[0] };
        assert!(same(&volume.join(DATA), set));
        let sets = fs::read_dir(&volume).unwrap().filter(|e| e.as_ref().unwrap().path().is_dir());
        assert_eq!(sets.filter(|e| !e.as_ref().unwrap().file_type().unwrap().is_symlink()).count(), 1);
    }

    #[test]
    fn write_of_the_same_files_finishes_one_that_was_cut_short() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        let files = [file("a", "1"), file("d/e", "2")];
        write(&volume, &files, None).unwrap();
        let current = fs::read_link(volume.join(DATA)).unwrap();
        fs::remove_file(volume.join("a")).unwrap();
        fs::remove_file(volume.join("d")).unwrap();
        symlink("..data/gone", volume.join("gone")).unwrap();
        fs::create_dir(volume.join("..1")).unwrap();
        fs::write(volume.join("..1/a"), "0").unwrap();
        write(&volume, &files, None).unwrap();
        assert_eq!(listing(&volume), ["a", "d"]);
        assert_eq!(fs::read_to_string(volume.join("d/e")).unwrap(), "2");
        assert_eq!(fs::read_link(volume.join(DATA)).unwrap(), current);
        assert!(!volume.join("..1").exists());
    }

    #[test]
    fn write_that_fails_or_was_cut_short_leaves_no_room_taken() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        let sets = || {
            let entries = fs::read_dir(&volume).unwrap().map(|entry| entry.unwrap());
            entries.filter(|entry| entry.file_type().unwrap().is_dir()).count()
        };
        // What is a file cannot be a directory, too.
        write(&volume, &[file("a", "1"), file("a/b", "2")], None).unwrap_err();
        assert_eq!(sets(), 0);
        write(&volume, &[file("a", "1")], None).unwrap();
        fs::create_dir(volume.join("..1")).unwrap();
        write(&volume, &[file("b", "1"), file("b/c", "2")], None).unwrap_err();
        assert_eq!(sets(), 1, "the one in use");
        assert_eq!(fs::read_to_string(volume.join("a")).unwrap(), "1");
    }

    #[test]
    fn no_path_leaves_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["../x", "/etc/x", "..data/x", "a/../../x"] {
            assert!(write(&dir.path().join("v"), &[file(path, "")], None).is_err(), "{path}");
        }
    }
}
