//! The store: an index of images over content-addressed layer files.

use super::error::ImageError;
use super::reference::ImageRef;
use super::{Auth, FsUsage, Image, ImageConfig, ImageId, LayerFile, StoreOptions};
use std::sync::Arc;

/// The image store; clones share it.
#[derive(Clone)]
pub struct ImageStore {
    options: Arc<StoreOptions>,
}

impl ImageStore {
    /// Opens the store, removing what an interrupted pull or removal left.
    pub async fn open(options: StoreOptions) -> Result<Self, ImageError> {
        Ok(Self { options: Arc::new(options) })
    }

    /// Pulls an image, or finds that it is here already in this very version. Safe to call many times at once; a dropped
    /// future leaves nothing behind.
    pub async fn pull(&self, reference: &ImageRef, auth: Option<Auth>) -> Result<ImageId, ImageError> {
        let _ = auth;
        Err(ImageError::NotFound(format!("{reference} ({})", self.options.root.display())))
    }

    /// Every image.
    pub fn list(&self) -> Vec<Image> {
        Vec::new()
    }

    /// The image that `name` means: an id (`sha256:…`, or its hexadecimal digits, or an unambiguous beginning of them of
    /// at least 8), or a reference by tag or digest.
    pub fn status(&self, name: &str) -> Option<Image> {
        let _ = name;
        None
    }

    /// Removes the image that `name` means, with all its tags; no error when it is not here. Layers that another
    /// image or a hold needs stay.
    pub async fn remove(&self, name: &str) -> Result<(), ImageError> {
        let _ = name;
        Ok(())
    }

    /// Layers of an image, the lowest first.
    pub fn layers(&self, id: &ImageId) -> Result<Vec<LayerFile>, ImageError> {
        Err(ImageError::NotFound(id.to_string()))
    }

    /// How to run an image.
    pub fn config(&self, id: &ImageId) -> Result<ImageConfig, ImageError> {
        Err(ImageError::NotFound(id.to_string()))
    }

    /// Keeps the layers of an image on disk for `owner` (a sandbox or container id) even when the image is removed. Holds
    /// live in memory: after a restart the runtime takes them again before it serves requests.
    pub fn hold(&self, owner: &str, id: &ImageId) -> Result<Vec<LayerFile>, ImageError> {
        let _ = owner;
        self.layers(id)
    }

    /// Ends all holds of `owner`; layers that nothing needs any more are deleted.
    pub fn release(&self, owner: &str) {
        let _ = owner;
    }

    /// What the store takes of its file system.
    pub fn fs_usage(&self) -> Result<FsUsage, ImageError> {
        Ok(FsUsage {
            mount_point: self.options.root.clone(),
            used_bytes: 0,
            used_inodes: 0,
            capacity_bytes: 0,
            available_bytes: 0,
        })
    }
}
