//! A published tree: a host directory as a tar.
//!
//! Called when a container with such a mount is created, and by `watch` when the directory changed. Invariant: only
//! directories, regular files and symbolic links go in, links as links, and all of them belong to the directory's owner;
//! the archive is bounded by [`MAX_TREE`]. The tree is walked by descriptors, so that it is one tree whatever is renamed.

use crate::error::{Error, Result, within};
use crate::roots::{Found, reopen};
use crate::vm::guest::GuestLink;
use atoll_spec::guest::Call;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

/// Largest tree, in bytes of tar.
pub const MAX_TREE: usize = 64 << 20;
/// Deadline of sending one tree.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(60);
/// Deepest directory: each holds a descriptor and a piece of the stack while it is read.
const MAX_DEPTH: usize = 64;

/// Sends `directory` to the guest as tree `name`; answers when the guest shows it.
pub async fn publish(link: &GuestLink, name: &str, tree: &Arc<Found>) -> Result<()> {
    let found = tree.clone();
    let archive = tokio::task::spawn_blocking(move || archive(&found));
    let archive = archive.await.map_err(|e| Error::Invalid(e.to_string()))?;
    let directory = tree.path();
    let archive = archive.map_err(Error::io("read tree", directory))?;

    let (number, stream) = link.expect_stream();
    let call = link.call(Call::PublishTree { tree: name.to_owned(), stream: number }, PUBLISH_DEADLINE);
    let send = async {
        let mut stream = stream.take().await?;
        let write = async {
            stream.write_all(&archive).await?;
            stream.shutdown().await?;
            // The guest closes its side when it has read everything.
            let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut [0u8; 1]).await;
            io::Result::Ok(())
        };
        let what = || format!("sending tree {}", directory.display());
        within(PUBLISH_DEADLINE, what, write).await?.map_err(Error::io("send tree", directory))
    };
    // The guest may answer before or after it has read the tar: both go on at once, and the first error ends both.
    tokio::try_join!(call, send).map(|_| ())
}

struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.0.len() + data.len() > MAX_TREE {
            let why =
                format!("it holds more than {} MiB, the most that can be copied into a pod", MAX_TREE >> 20);
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
        }
        self.0.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The directory as a tar, entries sorted, names relative.
fn archive(tree: &Found) -> io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Bounded(Vec::new()));
    let root = tree.open(OFlags::RDONLY | OFlags::DIRECTORY)?;
    append_head(&mut builder, Path::new("."), &root.metadata()?)?;
    append(&mut builder, &root, Path::new(""), tree.owner(), MAX_DEPTH)?;
    builder.finish()?;
    Ok(builder.into_inner()?.0)
}

fn append_head(builder: &mut tar::Builder<Bounded>, name: &Path, metadata: &Metadata) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_metadata(metadata);
    builder.append_data(&mut header, name, io::empty())
}

fn append(
    builder: &mut tar::Builder<Bounded>,
    directory: &File,
    inside: &Path,
    owner: u32,
    depth: usize,
) -> io::Result<()> {
    if depth == 0 {
        return Err(io::Error::other(format!("its directories are more than {MAX_DEPTH} deep")));
    }
    for name in names(directory)? {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let place = match rustix::fs::openat(directory, &name, flags, Mode::empty()) {
            Ok(place) => File::from(place),
            // A new version replaced the old meanwhile; the change is seen and the tree is sent again.
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        let (metadata, relative) = (place.metadata()?, inside.join(&name));
        if metadata.uid() != owner {
            let why = format!("{} belongs to another user than the tree", relative.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let kind = metadata.file_type();
        if kind.is_dir() {
            append_head(builder, &relative, &metadata)?;
            let directory = reopen(place.as_fd(), OFlags::RDONLY | OFlags::DIRECTORY)?;
            append(builder, &directory, &relative, owner, depth - 1)?;
        } else if kind.is_file() {
            append_file(builder, &relative, &metadata, reopen(place.as_fd(), OFlags::RDONLY)?)?;
        } else if kind.is_symlink() {
            let mut header = tar::Header::new_gnu();
            header.set_metadata(&metadata);
            header.set_size(0);
            let target = rustix::fs::readlinkat(&place, "", Vec::new())?;
            builder.append_link(
                &mut header,
                &relative,
                PathBuf::from(OsString::from_vec(target.into_bytes())),
            )?;
        }
    }
    Ok(())
}

/// What is in a directory, sorted.
fn names(directory: &File) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    names.sort();
    Ok(names)
}

/// The length is that of what was read: the file may grow meanwhile.
fn append_file(
    builder: &mut tar::Builder<Bounded>,
    name: &Path,
    metadata: &Metadata,
    file: File,
) -> io::Result<()> {
    let mut content = Vec::new();
    file.take(MAX_TREE as u64 + 1).read_to_end(&mut content)?;
    let mut header = tar::Header::new_gnu();
    header.set_metadata(metadata);
    header.set_size(content.len() as u64);
    builder.append_data(&mut header, name, &content[..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roots::Roots;
    use std::fs;

    fn archived(directory: &Path) -> io::Result<Vec<u8>> {
        archive(&Roots::below(directory, directory).volume(directory).unwrap())
    }

    #[test]
    fn links_stay_links_and_the_size_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("..1")).unwrap();
        fs::write(dir.path().join("..1/key"), "value").unwrap();
        std::os::unix::fs::symlink("..1", dir.path().join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/key", dir.path().join("key")).unwrap();
        let bytes = archived(dir.path()).unwrap();
        let mut archive_read = tar::Archive::new(&bytes[..]);
        let entries: Vec<(String, tar::EntryType)> = archive_read
            .entries()
            .unwrap()
            .map(|e| e.unwrap())
            .map(|e| (e.path().unwrap().display().to_string(), e.header().entry_type()))
            .collect();
        let names: Vec<&str> = entries.iter().map(|(n, _)| n.trim_end_matches('/')).collect();
        assert_eq!(names, [".", "..1", "..1/key", "..data", "key"]);
        assert_eq!(entries[4].1, tar::EntryType::Symlink);

        let big = File::create(dir.path().join("big")).unwrap();
        big.set_len(MAX_TREE as u64 + 1).unwrap();
        assert_eq!(archived(dir.path()).err().map(|e| e.kind()), Some(io::ErrorKind::FileTooLarge));
    }

    #[test]
    fn a_tree_is_read_by_its_descriptor_whatever_its_path_means_by_then() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(elsewhere.path().join("secret"), "of another").unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("key"), "value").unwrap();
        let found = Roots::below(dir.path(), dir.path()).volume(&tree).unwrap();
        fs::rename(&tree, dir.path().join("moved")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), &tree).unwrap();
        let bytes = archive(&found).unwrap();
        let mut read = tar::Archive::new(&bytes[..]);
        let names: Vec<PathBuf> =
            read.entries().unwrap().map(|e| e.unwrap().path().unwrap().into_owned()).collect();
        assert_eq!(names.last().unwrap(), Path::new("key"), "{names:?}");
        assert_eq!(names.len(), 2, "{names:?}");
    }

    #[test]
    fn the_file_of_another_is_in_no_tree_and_no_tree_is_deeper_than_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("linked");
        fs::write(&file, "x").unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&file, Some(1234), None).unwrap();
            let error = archived(dir.path()).unwrap_err();
            assert!(error.to_string().contains("linked belongs to another user"), "{error}");
        }
        fs::remove_file(&file).unwrap();
        let deep: PathBuf = std::iter::once(dir.path().to_owned())
            .chain((0..=MAX_DEPTH).map(|_| PathBuf::from("d")))
            .collect();
        fs::create_dir_all(deep).unwrap();
        assert!(archived(dir.path()).unwrap_err().to_string().contains("64 deep"));
    }
}
