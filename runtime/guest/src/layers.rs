//! Image layers: byte ranges of the layer window, each made a partition and mounted once.
//!
//! The VMM never takes a layer out of the window, so a mounted layer stays mounted for the life of the guest:
//! a restarted container finds it at once, and containers with layers in common share the mount and its page
//! cache.

use crate::error::{Context as _, Failure, Result};
use crate::mount::Detached;
use crate::options::LayerSource;
use crate::sys;
use atoll_spec::guest::Layer;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The mounted layers.
pub struct Layers {
    source: LayerSource,
    directory: PathBuf,
    mounted: Mutex<HashMap<Layer, PathBuf>>,
}

impl Layers {
    /// Mounts go below `directory`.
    pub fn new(source: LayerSource, directory: PathBuf) -> Self {
        Self { source, directory, mounted: Mutex::default() }
    }

    /// Where each layer is mounted, in the order given.
    pub fn mount_all(&self, layers: &[Layer]) -> Result<Vec<PathBuf>> {
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut paths = Vec::with_capacity(layers.len());
        for layer in layers {
            let path = match mounted.get(layer) {
                Some(path) => path.clone(),
                None => {
                    let path = self.mount(*layer, mounted.len() + 1)?;
                    mounted.insert(*layer, path.clone());
                    path
                }
            };
            paths.push(path);
        }
        Ok(paths)
    }

    fn mount(&self, layer: Layer, number: usize) -> Result<PathBuf> {
        let device = match &self.source {
            LayerSource::Directories(base) => return Ok(base.join(layer.offset.to_string())),
            LayerSource::Device(device) => device,
        };
        let number = u8::try_from(number).map_err(|_| {
            Failure::system("the layer window holds 255 layers and all are taken: make a new pod")
        })?;
        let partition = self.partition(device, number, layer)?;
        let target = self.directory.join(number.to_string());
        std::fs::create_dir_all(&target).during(|| format!("make directory {}", target.display()))?;
        let source = partition.to_string_lossy();
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
        Detached::filesystem("erofs", &[("source", &source), ("ro", "")], attributes)
            .during(|| format!("mount the layer at {} in the layer window", layer.offset))?
            .attach_at(&target)?;
        Ok(target)
    }

    fn partition(&self, device: &Path, number: u8, layer: Layer) -> Result<PathBuf> {
        let window = rustix::fs::open(device, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .during(|| format!("open the layer window {}", device.display()))?;
        sys::add_partition(&window, number, layer.offset, layer.length)
            .during(|| format!("make {layer:?} partition {number} of {}", device.display()))?;
        let name = device.to_string_lossy();
        let joint = if name.ends_with(|last: char| last.is_ascii_digit()) { "p" } else { "" };
        Ok(PathBuf::from(format!("{name}{joint}{number}")))
    }
}
