//! Volumes: how a host path reaches a container in a VM without a file-sharing daemon.
//!
//! The host keeps the source of truth and the runtime copies: a read-only directory becomes a *tree* that is sent again
//! when its `..data` link changes, a file is copied in (and back, when writable), a directory of the pod's own lives in
//! the guest. [`classify`] decides, and refuses what cannot be given honestly. Called by the job that creates a
//! container. Invariant: nothing is shared that the container could write to behind the host's back.

pub mod tree;
pub mod watch;

use crate::error::{Error, Result};
use crate::roots::{Found, Roots};
use crate::spec::{MountSpec, ScratchVolume};
use atoll_spec::guest::{MAX_FILE, MountSource};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::{FileType, OFlags};
use sha2::{Digest, Sha256};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::sync::Arc;

/// How a mount will be served.
#[derive(Debug)]
pub enum Served {
    /// A directory of the guest.
    Scratch(MountSource),
    /// A tree, to be published first.
    Tree {
        /// Its name in the guest.
        name: String,
        /// Its directory on the host.
        directory: Arc<Found>,
    },
    /// A copy of a file.
    File {
        /// The file on the host.
        file: Found,
        /// Copy it back when the container exits.
        copy_back: bool,
    },
    /// An image.
    Image {
        /// Its name or id.
        image: String,
    },
}

/// Decides how to serve a mount.
pub fn classify(mount: &MountSpec, scratch: &[ScratchVolume], roots: &Roots) -> Result<Served> {
    if !mount.container_path.starts_with('/') {
        return Err(Error::Invalid(format!(
            "mount path '{}' in the container is not absolute",
            mount.container_path
        )));
    }
    if !mount.image.is_empty() {
        return image(mount);
    }
    let path = Path::new(&mount.host_path);
    if !path.is_absolute() || path.components().any(|c| matches!(c, std::path::Component::ParentDir)) {
        return Err(Error::Invalid(format!(
            "host path '{}' must be absolute, without '..'",
            mount.host_path
        )));
    }
    if let Some(source) = scratch_source(path, scratch) {
        return Ok(Served::Scratch(source));
    }
    let found = roots.volume(path)?;
    let kind = found.kind();
    if kind == FileType::Directory && mount.read_only {
        return Ok(Served::Tree { name: tree_name(path), directory: Arc::new(found) });
    }
    if kind == FileType::RegularFile {
        return Ok(Served::File { file: found, copy_back: !mount.read_only });
    }
    Err(Error::Refused(if kind == FileType::Directory {
        format!(
            "host directory {} cannot be mounted read-write: a pod is a virtual machine and shares no files with the host; \
             mount it read-only, or use an emptyDir",
            path.display()
        )
    } else {
        format!("{} is a socket or device of the host, which a virtual machine cannot use", path.display())
    }))
}

fn image(mount: &MountSpec) -> Result<Served> {
    if !mount.image_sub_path.is_empty() {
        return Err(Error::Refused(format!(
            "image volume at {}: a sub-path is not supported yet, mount the whole image",
            mount.container_path
        )));
    }
    if !mount.read_only {
        return Err(Error::Refused(format!(
            "image volume at {} can only be read-only",
            mount.container_path
        )));
    }
    Ok(Served::Image { image: mount.image.clone() })
}

fn scratch_source(path: &Path, scratch: &[ScratchVolume]) -> Option<MountSource> {
    let volume = scratch.iter().find(|v| path.starts_with(&v.path))?;
    let sub_path = path.strip_prefix(&volume.path).ok()?.to_string_lossy().into_owned();
    Some(MountSource::Scratch {
        volume: scratch_name(volume),
        sub_path,
        memory: volume.medium == "Memory",
        size_bytes: volume.size_limit_bytes,
    })
}

/// Name in the guest of a volume that is kept there.
pub fn scratch_name(volume: &ScratchVolume) -> String {
    format!("v-{}", name_of(Path::new(&volume.path)))
}

/// Name of a tree in the guest: the same for every mount of the directory.
pub fn tree_name(directory: &Path) -> String {
    format!("t-{}", name_of(directory))
}

fn name_of(path: &Path) -> String {
    let digest = Sha256::digest(path.as_os_str().as_encoded_bytes());
    digest[..12].iter().map(|b| format!("{b:02x}")).collect()
}

/// The content of a file, as the guest takes it.
pub fn read_file(file: &Found) -> Result<MountSource> {
    let mut opened = file.open(OFlags::RDONLY).map_err(Error::io("read", file.path()))?;
    let content = read_all(&mut opened).map_err(Error::io("read", file.path()))?;
    if content.len() > MAX_FILE {
        return Err(Error::Refused(format!(
            "{} has {} bytes: a single file of at most {MAX_FILE} bytes can be mounted, mount its directory instead",
            file.path().display(),
            file.length().max(content.len() as u64)
        )));
    }
    Ok(MountSource::File { base64: STANDARD.encode(content), mode: file.mode() })
}

/// At most a byte more than can be mounted.
fn read_all(file: &mut std::fs::File) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(MAX_FILE as u64 + 1).read_to_end(&mut content)?;
    Ok(content)
}

/// Writes back what a container made of a file; the file stays the same file, for whoever has it open. It is found anew,
/// under the same rules as at first, for the runtime may have been restarted in between.
pub fn write_back(roots: &Roots, path: &Path, base64: &str) -> Result<()> {
    let content = STANDARD.decode(base64).map_err(|e| {
        Error::Invalid(format!("the guest sent an unreadable copy of {}: {e}", path.display()))
    })?;
    let found = roots.volume(path)?;
    if found.kind() != FileType::RegularFile {
        return Err(Error::Refused(format!("{} is a file no more", path.display())));
    }
    let write = || {
        let mut file = found.open(OFlags::RDWR)?;
        if read_all(&mut file)? == content {
            return Ok(());
        }
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(&content)
    };
    write().map_err(Error::io("write back", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn mount(host_path: &Path, read_only: bool) -> MountSpec {
        MountSpec {
            container_path: "/x".into(),
            host_path: host_path.display().to_string(),
            image: String::new(),
            image_sub_path: String::new(),
            read_only,
        }
    }

    #[test]
    fn each_kind_of_host_path_is_served_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "text").unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let volume =
            ScratchVolume { path: "/pods/1/v".into(), medium: "Memory".into(), size_limit_bytes: Some(9) };
        let roots = Roots::below(dir.path(), dir.path());
        let check =
            |path: &Path, read_only| classify(&mount(path, read_only), std::slice::from_ref(&volume), &roots);

        assert!(matches!(check(dir.path(), true), Ok(Served::Tree { .. })));
        assert!(matches!(check(dir.path(), false), Err(Error::Refused(_))));
        assert!(matches!(check(&file, false), Ok(Served::File { copy_back: true, .. })));
        assert!(matches!(check(&file, true), Ok(Served::File { copy_back: false, .. })));
        assert!(matches!(check(&socket, true), Err(Error::Refused(_))));
        assert!(matches!(check(&dir.path().join("missing"), true), Err(Error::Io { .. })));
        assert!(matches!(check(Path::new("relative"), true), Err(Error::Invalid(_))));
        assert!(matches!(check(Path::new("/pods/1/v/../../etc"), true), Err(Error::Invalid(_))));
        let Ok(Served::Scratch(MountSource::Scratch { sub_path, memory, size_bytes, .. })) =
            check(Path::new("/pods/1/v/sub/dir"), false)
        else {
            panic!("not scratch");
        };
        assert_eq!((sub_path.as_str(), memory, size_bytes), ("sub/dir", true, Some(9)));
    }

    #[test]
    fn files_are_copied_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "one").unwrap();
        let roots = Roots::below(dir.path(), dir.path());
        let read = || read_file(&roots.volume(&file).unwrap());
        let MountSource::File { base64, .. } = read().unwrap() else { panic!("not a file") };
        fs::write(&file, "two and more").unwrap();
        write_back(&roots, &file, &base64).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "one");
        fs::write(&file, vec![0; MAX_FILE + 1]).unwrap();
        assert!(matches!(read(), Err(Error::Refused(_))));
    }
}
