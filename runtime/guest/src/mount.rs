//! Mounts by descriptor: made detached, given their attributes, then attached onto an opened directory or file.
//!
//! No path is resolved twice, so nothing a container does to its tree between the check and the mount can
//! redirect it.

use crate::error::{Context as _, Result};
use crate::sys::{self, MountAttributes};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// A mount that is not in the tree yet.
pub struct Detached(OwnedFd);

impl Detached {
    /// A new file system of a kind with options `key=value`, or bare flags where the value is empty.
    pub fn filesystem(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> Result<Self> {
        let make = || -> rustix::io::Result<OwnedFd> {
            let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
            for (key, value) in options {
                if value.is_empty() {
                    fsconfig_set_flag(&context, *key)?;
                } else {
                    fsconfig_set_string(&context, *key, *value)?;
                }
            }
            fsconfig_create(&context)?;
            fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        };
        make().map(Self).during(|| format!("make a {kind} file system ({options:?})"))
    }

    /// What is at a path, with all mounts below it.
    pub fn bind(path: &Path) -> Result<Self> {
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        open_tree(CWD, path, flags).map(Self).during(|| format!("clone the mount of {}", path.display()))
    }

    /// What an opened file or directory is, with all mounts below it.
    pub fn bind_fd(fd: impl AsFd) -> Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE;
        open_tree(fd, "", flags).map(Self).during(|| "clone the mount of a descriptor".into())
    }

    /// Sets attributes on it and all mounts below.
    pub fn with(self, attributes: u64) -> Result<Self> {
        if attributes != 0 {
            sys::set_mount_attributes(&self.0, MountAttributes(attributes), true)
                .during(|| "set attributes of a mount".into())?;
        }
        Ok(self)
    }

    /// Puts it on top of what `target` stands for.
    pub fn attach(self, target: impl AsFd) -> Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&self.0, "", target, "", flags).during(|| "attach a mount".into())
    }

    /// Puts it on top of a path.
    pub fn attach_at(self, target: &Path) -> Result<()> {
        let opened = rustix::fs::open(target, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .during(|| format!("open {}", target.display()))?;
        self.attach(opened).during(|| format!("mount on {}", target.display()))
    }
}
