//! What of a container may hold what a Secret says: its command, arguments and environment, as the agent resolved them.
//!
//! Invariant: none of it reaches a disk. `state.json` lies on one, for it has to tell after a power cut which containers
//! there were. These words are of use only while the VM lives, so they are kept in memory, which loses them with it.
//! Called by `recover` alone.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::spec::ContainerSpec;
use atoll_spec::guest::Process;
use atoll_spec::ids::{ContainerId, SandboxId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;

/// The words of a sandbox's containers.
pub(super) type Words = BTreeMap<ContainerId, Confidential>;

/// The words of one container.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Confidential {
    command: Vec<String>,
    args: Vec<String>,
    envs: Vec<(String, String)>,
    process: Option<Process>,
}

impl Confidential {
    /// Takes them out of what will be written to the disk.
    pub(super) fn take(spec: &mut ContainerSpec, process: &mut Option<Process>) -> Self {
        Self {
            command: std::mem::take(&mut spec.command),
            args: std::mem::take(&mut spec.args),
            envs: std::mem::take(&mut spec.envs),
            process: process.take(),
        }
    }

    /// Puts them back.
    pub(super) fn put(self, spec: &mut ContainerSpec, process: &mut Option<Process>) {
        (spec.command, spec.args, spec.envs) = (self.command, self.args, self.envs);
        *process = self.process;
    }
}

fn directory(config: &Config) -> PathBuf {
    config.run.join("confidential")
}

fn path(config: &Config, sandbox: &SandboxId) -> PathBuf {
    directory(config).join(sandbox.as_str())
}

/// Keeps the words of a sandbox.
pub(super) fn keep(config: &Config, sandbox: &SandboxId, words: &Words) -> Result<()> {
    let path = path(config, sandbox);
    let json = serde_json::to_vec(words).map_err(|e| Error::Invalid(e.to_string()))?;
    if fs::read(&path).is_ok_and(|old| old == json) {
        return Ok(());
    }
    let new = path.with_extension("new");
    let write = || {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory(config))?;
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&json)?;
        fs::rename(&new, &path)
    };
    write().map_err(Error::io("write", &new))
}

/// What was kept of a sandbox; nothing after a boot.
pub(super) fn recall(config: &Config, sandbox: &SandboxId) -> Words {
    let path = path(config, sandbox);
    let words = match fs::read(&path) {
        Ok(json) => serde_json::from_slice(&json).map_err(io::Error::from),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Words::new(),
        Err(error) => Err(error),
    };
    words.unwrap_or_else(|error| {
        tracing::warn!(%sandbox, path = %path.display(), %error, "the commands of its containers are lost");
        Words::new()
    })
}

/// Forgets sandboxes that are no more: one may have been removed while its last words were being written.
pub(super) fn forget_strays(config: &Config) -> Result<()> {
    for entry in fs::read_dir(directory(config)).into_iter().flatten().flatten() {
        if !config.sandboxes().join(entry.file_name()).is_dir() {
            fs::remove_file(entry.path()).map_err(Error::io("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// Forgets a sandbox.
pub(super) fn forget(config: &Config, sandbox: &SandboxId) -> Result<()> {
    let path = path(config, sandbox);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path)(error)),
        _ => Ok(()),
    }
}
