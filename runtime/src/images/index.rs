//! The store's records: one JSON file for each image, written whole or not at all.
//!
//! Invariant: a record is on disk only after all its layers are, and is gone before any of them goes. So what
//! [`load`] finds is complete, and what no record names is rubbish.

use super::digest::Digest;
use super::error::ImageError;
use super::{Image, ImageConfig, ImageId, LayerFile};
use atoll_spec::images::Access;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

const IMAGES: &str = "images";
const LAYERS: &str = "layers";

/// One layer of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Names the file.
    pub diff_id: Digest,
    /// Its length.
    pub length: u64,
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: ImageId,
    /// Counts pulls in this store: of two records with the same tag the later one has it.
    pub sequence: u64,
    /// `host/path:tag`.
    pub repo_tags: Vec<String>,
    /// `host/path@digest`.
    pub repo_digests: Vec<String>,
    /// Lowest first.
    pub layers: Vec<Layer>,
    /// How to run it.
    pub config: ImageConfig,
    /// Who has pulled it, by repository; with the rest of the record, so that neither is ever without the other. Empty for
    /// an image that was put here by hand.
    #[serde(default)]
    pub access: BTreeMap<String, Access>,
}

impl Record {
    /// For callers of the store.
    pub fn image(&self) -> Image {
        Image {
            id: self.id.clone(),
            repo_tags: self.repo_tags.clone(),
            repo_digests: self.repo_digests.clone(),
            size: self.layers.iter().map(|layer| layer.length).sum(),
            config: self.config.clone(),
        }
    }
}

/// Where the store keeps things.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Makes the directories.
    pub fn make(root: &Path) -> Result<Self, ImageError> {
        use std::os::unix::fs::DirBuilderExt as _;
        // The helper, another user, passes through to its working directory.
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o711);
        for directory in [root.to_owned(), root.join(IMAGES), root.join(LAYERS)] {
            builder.create(&directory).map_err(ImageError::io("make directory", &directory))?;
        }
        Ok(Self { root: root.to_owned() })
    }

    /// The erofs file of a layer.
    pub fn layer(&self, diff_id: &Digest) -> PathBuf {
        self.root.join(LAYERS).join(format!("{}.erofs", diff_id.hex()))
    }

    fn record(&self, id: &ImageId) -> PathBuf {
        self.root.join(IMAGES).join(format!("{}.json", id.0.hex()))
    }

    /// As the runtime hands it to a VM.
    pub fn layer_file(&self, layer: &Layer) -> LayerFile {
        LayerFile { path: self.layer(&layer.diff_id), diff_id: layer.diff_id.clone(), length: layer.length }
    }

    /// Writes a record: new file, synced, renamed over the old one, directory synced.
    pub fn write(&self, record: &Record) -> Result<(), ImageError> {
        let path = self.record(&record.id);
        let partial = path.with_extension("partial");
        let text = serde_json::to_vec_pretty(record).map_err(|error| ImageError::Malformed {
            what: path.display().to_string(),
            why: error.to_string(),
        })?;
        let write = || {
            let mut file = File::create(&partial)?;
            file.write_all(&text)?;
            file.sync_all()
        };
        if let Err(error) = write() {
            // Half a record is of no use, and where the disk is full its bytes are.
            let _ = std::fs::remove_file(&partial);
            return Err(ImageError::io("write", &partial)(error));
        }
        std::fs::rename(&partial, &path).map_err(ImageError::io("rename to", &path))?;
        sync_directory(&self.root.join(IMAGES))
    }

    /// Deletes a record, for good.
    pub fn delete(&self, id: &ImageId) -> Result<(), ImageError> {
        remove_file(&self.record(id))?;
        sync_directory(&self.root.join(IMAGES))
    }

    /// Moves a synced file to its place as a layer.
    pub fn adopt_layer(&self, file: &Path, diff_id: &Digest) -> Result<(), ImageError> {
        let path = self.layer(diff_id);
        use std::os::unix::fs::PermissionsExt as _;
        // Written by the helper's user; from here on it is ours and nobody's to change.
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(file, Some(0), Some(0)).map_err(ImageError::io("own", file))?;
        }
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o444))
            .map_err(ImageError::io("protect", file))?;
        std::fs::rename(file, &path).map_err(ImageError::io("rename to", &path))?;
        sync_directory(&self.root.join(LAYERS))
    }

    /// Deletes the file of a layer.
    pub fn delete_layer(&self, diff_id: &Digest) -> Result<(), ImageError> {
        remove_file(&self.layer(diff_id))
    }

    /// Length of a layer's file, if it is there.
    pub fn layer_length(&self, diff_id: &Digest) -> Option<u64> {
        std::fs::metadata(self.layer(diff_id)).ok().map(|metadata| metadata.len())
    }

    /// Reads every record and deletes what none of them needs. A record that cannot be read, or whose layers are not
    /// there, is dropped with a warning: the image will be pulled again.
    pub fn load(&self) -> Result<BTreeMap<ImageId, Record>, ImageError> {
        let mut records = BTreeMap::new();
        for path in list(&self.root.join(IMAGES))? {
            match self.read(&path) {
                Ok(record) => drop(records.insert(record.id.clone(), record)),
                Err(why) => {
                    if path.extension().is_some_and(|extension| extension == "json") {
                        tracing::warn!("image record {} is dropped: {why}", path.display());
                    }
                    remove_file(&path)?;
                }
            }
        }
        let needed: std::collections::BTreeSet<PathBuf> = records
            .values()
            .flat_map(|record| &record.layers)
            .map(|layer| self.layer(&layer.diff_id))
            .collect();
        for path in list(&self.root.join(LAYERS))?.into_iter().filter(|path| !needed.contains(path)) {
            remove_file(&path)?;
        }
        settle_tags(&mut records);
        Ok(records)
    }

    fn read(&self, path: &Path) -> Result<Record, String> {
        let text = std::fs::read(path).map_err(|error| error.to_string())?;
        let record: Record = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
        if self.record(&record.id) != path {
            return Err("its name is not its id".into());
        }
        let missing =
            record.layers.iter().find(|layer| self.layer_length(&layer.diff_id) != Some(layer.length));
        match missing {
            Some(layer) => Err(format!("layer {} is missing or has another length", layer.diff_id)),
            None => Ok(record),
        }
    }

    /// Bytes and files of the store.
    pub fn usage(&self) -> Result<(u64, u64), ImageError> {
        use std::os::unix::fs::MetadataExt as _;
        let (mut bytes, mut files) = (0, 0);
        for directory in [IMAGES, LAYERS] {
            for path in list(&self.root.join(directory))? {
                // It may go while we count.
                if let Ok(metadata) = std::fs::metadata(&path) {
                    bytes += metadata.blocks() * 512;
                    files += 1;
                }
            }
        }
        Ok((bytes, files))
    }
}

/// After a crash between two records a tag may stand in both: the later pull has it.
fn settle_tags(records: &mut BTreeMap<ImageId, Record>) {
    let mut owners: BTreeMap<String, (u64, ImageId)> = BTreeMap::new();
    for record in records.values() {
        for tag in &record.repo_tags {
            let owner = owners.entry(tag.clone()).or_insert_with(|| (record.sequence, record.id.clone()));
            if record.sequence > owner.0 {
                *owner = (record.sequence, record.id.clone());
            }
        }
    }
    for record in records.values_mut() {
        let id = &record.id;
        record.repo_tags.retain(|tag| owners.get(tag).is_none_or(|(_, owner)| owner == id));
    }
}

fn list(directory: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let entries = std::fs::read_dir(directory).map_err(ImageError::io("list", directory))?;
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(ImageError::io("list", directory))).collect()
}

fn remove_file(path: &Path) -> Result<(), ImageError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(ImageError::io("delete", path)(error))
        }
        _ => Ok(()),
    }
}

fn sync_directory(path: &Path) -> Result<(), ImageError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(ImageError::io("sync", path))
}
