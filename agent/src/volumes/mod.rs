//! Volumes of pods, as directories on the host: emptyDir, configMap, secret, downwardAPI, projected.
//!
//! ```text
//! prepare: fetch what is named ─► content (pure) ─► atomic write ─► path for the mounts
//! refresh: the same again; only what changed is written, and `..data` moves to it
//! teardown: the pod's directory is removed
//! ```
//!
//! Called by `pods::worker`. The host keeps the truth; the runtime copies it into the pod's virtual machine. An
//! emptyDir's directory here only stands for it: what a pod writes stays in its machine.
//!
//! Invariant: what comes from the API server is written below [`Directories::volumes`] alone, which a host has in memory:
//! nothing of a Secret reaches a disk. A restart of the agent finds it there; one of the host loses it with the pods'
//! machines, and each pod gets it anew from the API server, without which it would not be started either.

pub mod atomic;
pub mod content;
pub mod objects;
pub mod token;

use crate::pods::desired::Desired;
use crate::pods::env::Facts;
use crate::pods::sandbox_config::Directories;
use k8s_openapi::api::core::v1 as api;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Why a volume cannot be made ready.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// What it shows is not there, or not yet.
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {reason}")]
    Content {
        /// Which.
        volume: String,
        /// Why.
        reason: String,
    },
    /// The host's file system refused.
    #[error("volume \"{volume}\": cannot write {}: {source}", path.display())]
    Write {
        /// Which.
        volume: String,
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A write task ended by itself.
    #[error("volume \"{volume}\": the write was interrupted")]
    Interrupted {
        /// Which.
        volume: String,
    },
}

/// Where volumes are and whether containers may write to them, by name.
pub type Places = BTreeMap<String, (PathBuf, bool)>;

/// Makes and unmakes volumes.
pub struct Volumes {
    /// ConfigMaps and Secrets; for environments too.
    pub objects: objects::Reader,
    dirs: Directories,
    tokens: token::Tokens,
}

impl Volumes {
    /// Volumes below `dirs`.
    pub fn new(client: kube::Client, dirs: Directories) -> Self {
        Self { tokens: token::Tokens::new(client.clone()), objects: objects::Reader::new(client), dirs }
    }

    /// Makes every volume of a pod ready, or brings it up to date.
    ///
    /// # Errors
    /// The first volume that cannot be.
    pub async fn prepare(&self, desired: &Desired, facts: &Facts) -> Result<Places, VolumeError> {
        let mut places = Places::new();
        let uid = &desired.key.uid;
        // Nobody else on the host looks in.
        private(&self.dirs.pod(uid))?;
        if Self::changes(desired) {
            private(&self.dirs.in_memory(uid))?;
        }
        // One that cannot be written keeps no other from being brought up to date: a token among them runs out.
        let mut failed = None;
        for volume in desired.spec().volumes.iter().flatten() {
            let place = match kind(volume) {
                None => {
                    let path = self.dirs.empty_dir(uid, &volume.name);
                    empty_dir(&volume.name, &path)?;
                    (path, true)
                }
                Some(kind) => {
                    let path = self.dirs.volume(uid, kind, &volume.name);
                    if let Err(error) = self.write(desired, facts, volume, &path).await {
                        failed.get_or_insert(error);
                    }
                    (path, false)
                }
            };
            places.insert(volume.name.clone(), place);
        }
        failed.map_or(Ok(places), Err)
    }

    /// Whether a pod has volumes whose content may change.
    pub fn changes(desired: &Desired) -> bool {
        desired.spec().volumes.iter().flatten().any(|v| kind(v).is_some())
    }

    async fn write(
        &self,
        desired: &Desired,
        facts: &Facts,
        volume: &api::Volume,
        path: &Path,
    ) -> Result<(), VolumeError> {
        let name = volume.name.clone();
        let wrong = |reason| VolumeError::Content { volume: name.clone(), reason };
        let wanted = content::needs(volume);
        let key = &desired.key;
        let objects = self
            .objects
            .fetch(&key.namespace, &key.uid, &wanted.config_maps, &wanted.secrets)
            .await
            .map_err(&wrong)?;
        let mut tokens = Vec::new();
        for source in &wanted.tokens {
            tokens.push(self.tokens.get(desired, &name, source).await.map_err(&wrong)?);
        }
        let files = content::files(desired, volume, &objects, &tokens, facts).map_err(&wrong)?;
        let (target, group) = (path.to_owned(), fs_group(desired));
        let written = tokio::task::spawn_blocking(move || atomic::write(&target, &files, group)).await;
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err((path, source))) => Err(VolumeError::Write { volume: name, path, source }),
            Err(_) => Err(VolumeError::Interrupted { volume: name }),
        }
    }

    /// Forgets and removes everything of a pod.
    ///
    /// # Errors
    /// When the directory cannot be removed.
    pub async fn teardown(&self, uid: &str) -> std::io::Result<()> {
        self.tokens.forget(uid);
        self.objects.forget(uid);
        for directory in [self.dirs.in_memory(uid), self.dirs.pod(uid)] {
            match tokio::fs::remove_dir_all(directory).await {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

fn fs_group(desired: &Desired) -> Option<u32> {
    desired.spec().security_context.as_ref()?.fs_group.and_then(|g| u32::try_from(g).ok())
}

/// Directory name of the kind of a volume with content; `None` for an emptyDir, to which containers write.
fn kind(volume: &api::Volume) -> Option<&'static str> {
    if volume.empty_dir.is_some() {
        None
    } else if volume.config_map.is_some() {
        Some("configmap")
    } else if volume.secret.is_some() {
        Some("secret")
    } else if volume.downward_api.is_some() {
        Some("downward-api")
    } else {
        Some("projected")
    }
}

fn private(path: &Path) -> Result<(), VolumeError> {
    let failed = |source| VolumeError::Write { volume: "of the pod".into(), path: path.to_owned(), source };
    std::fs::create_dir_all(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(failed)
}

fn empty_dir(volume: &str, path: &Path) -> Result<(), VolumeError> {
    let failed = |source| VolumeError::Write { volume: volume.to_owned(), path: path.to_owned(), source };
    std::fs::create_dir_all(path).map_err(failed)?;
    // Any user of the pod may write to it.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).map_err(failed)
}
