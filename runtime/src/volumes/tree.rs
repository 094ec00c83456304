//! A published tree: a host directory as a tar.
//!
//! Called when a container with such a mount is created, and by `watch` when the directory changed. Invariant: only
//! directories, regular files and symbolic links go in, links as links; the archive is bounded by [`MAX_TREE`].

use crate::error::{Error, Result, within};
use crate::vm::guest::GuestLink;
use atoll_spec::guest::Call;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

/// Largest tree, in bytes of tar.
pub const MAX_TREE: usize = 64 << 20;
/// Deadline of sending one tree.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(60);

/// Sends `directory` to the guest as tree `name`; answers when the guest shows it.
pub async fn publish(link: &GuestLink, name: &str, directory: &Path) -> Result<()> {
    let path = directory.to_owned();
    let archive = tokio::task::spawn_blocking(move || archive(&path));
    let archive = archive.await.map_err(|e| Error::Invalid(e.to_string()))?;
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
fn archive(directory: &Path) -> io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Bounded(Vec::new()));
    builder.mode(tar::HeaderMode::Complete);
    builder.follow_symlinks(false);
    builder.sparse(false);
    builder.append_dir(".", directory)?;
    append(&mut builder, directory, Path::new(""))?;
    builder.finish()?;
    Ok(builder.into_inner()?.0)
}

fn append(builder: &mut tar::Builder<Bounded>, directory: &Path, inside: &Path) -> io::Result<()> {
    let mut names =
        fs::read_dir(directory)?.map(|e| e.map(|e| e.file_name())).collect::<io::Result<Vec<_>>>()?;
    names.sort();
    for name in names {
        let (path, relative) = (directory.join(&name), inside.join(&name));
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            // A new version replaced the old meanwhile; the change is seen and the tree is sent again.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        let kind = metadata.file_type();
        if kind.is_dir() {
            builder.append_dir(&relative, &path)?;
            append(builder, &path, &relative)?;
        } else if kind.is_file() {
            builder.append_file(&relative, &mut File::open(&path)?)?;
        } else if kind.is_symlink() {
            let mut header = tar::Header::new_gnu();
            header.set_metadata(&metadata);
            header.set_size(0);
            builder.append_link(&mut header, &relative, fs::read_link(&path)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_links_and_the_size_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("..1")).unwrap();
        fs::write(dir.path().join("..1/key"), "value").unwrap();
        std::os::unix::fs::symlink("..1", dir.path().join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/key", dir.path().join("key")).unwrap();
        let bytes = archive(dir.path()).unwrap();
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
        assert_eq!(archive(dir.path()).err().map(|e| e.kind()), Some(io::ErrorKind::FileTooLarge));
    }
}
