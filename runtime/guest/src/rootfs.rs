//! The root file system of a container, as PID 1 stacks it: layers below, a writable directory of the scratch
//! disk on top. What a container sees beside it (`/proc`, `/dev`, volumes) is mounted by its own first process
//! (see `stage::filesystem`), in its own mount namespace.

use crate::error::{Context as _, Result};
use crate::mount::Detached;
use rustix::mount::{MountAttrFlags, UnmountFlags, unmount};
use std::path::{Path, PathBuf};

/// A stacked root.
#[derive(Debug)]
pub struct Root {
    mount_point: PathBuf,
    writable: PathBuf,
}

impl Root {
    /// Stacks `layers` (lowest first). `mount_point` and `writable` are directories of this container alone.
    pub fn stack(layers: &[PathBuf], mount_point: &Path, writable: &Path) -> Result<Self> {
        let (upper, work, empty) = (writable.join("upper"), writable.join("work"), writable.join("empty"));
        for directory in [mount_point, &upper, &work, &empty] {
            std::fs::create_dir_all(directory)
                .during(|| format!("make directory {}", directory.display()))?;
        }
        let mut texts = from_the_top(layers);
        if texts.is_empty() {
            texts.push(empty.to_string_lossy().into_owned());
        }
        let (upper, work) = (upper.to_string_lossy(), work.to_string_lossy());
        let mut options: Vec<(&str, &str)> = texts.iter().map(|path| ("lowerdir+", path.as_str())).collect();
        // What a container writes dies with its VM: `volatile` spares it every sync.
        options.extend([("upperdir", upper.as_ref()), ("workdir", work.as_ref()), ("volatile", "")]);
        Detached::filesystem("overlay", &options, MountAttrFlags::empty())?.attach_at(mount_point)?;
        Ok(Self { mount_point: mount_point.to_owned(), writable: writable.to_owned() })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount_point
    }

    /// What the container wrote.
    pub fn upper(&self) -> PathBuf {
        self.writable.join("upper")
    }

    /// Unmounts it and deletes what was written.
    pub fn remove(&self) -> Result<()> {
        unmount(&self.mount_point, UnmountFlags::DETACH)
            .during(|| format!("unmount {}", self.mount_point.display()))?;
        for directory in [&self.writable, &self.mount_point] {
            std::fs::remove_dir_all(directory).during(|| format!("delete {}", directory.display()))?;
        }
        Ok(())
    }
}

/// Layers as overlayfs takes them: the uppermost first, each once. An image may name a layer twice (the empty one of a
/// build step that changed nothing), which overlayfs refuses; the lower one could add nothing to the upper.
pub fn from_the_top(layers: &[PathBuf]) -> Vec<String> {
    let mut texts: Vec<String> = Vec::with_capacity(layers.len());
    for path in layers.iter().rev() {
        let text = path.to_string_lossy();
        if !texts.iter().any(|known| *known == text) {
            texts.push(text.into_owned());
        }
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_counts_where_it_lies_uppermost() {
        let layers = ["base", "empty", "app", "empty", "base"].map(PathBuf::from);
        assert_eq!(from_the_top(&layers), ["base", "empty", "app"]);
        assert!(from_the_top(&[]).is_empty());
    }
}
