//! The cache outside the checkout: `${XDG_CACHE_HOME:-~/.cache}/atoll`, every entry named by the hash of what it
//! was made from.
//!
//! Invariant: an entry's directory exists only when it is complete. It is filled beside its place under a lock
//! and renamed in, so a killed build leaves no half entry and two builds at once make it once.

use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The cache's root directory.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache that the environment names, made if need be.
    pub fn from_env() -> Result<Self> {
        let base = match std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()) {
            Some(dir) => PathBuf::from(dir),
            None => match std::env::var_os("HOME") {
                Some(home) => PathBuf::from(home).join(".cache"),
                None => {
                    return Err(Error::input(
                        "environment",
                        "neither XDG_CACHE_HOME nor HOME is set: set one",
                    ));
                }
            },
        };
        Self::at(base.join("atoll"))
    }

    /// A cache at a given place.
    pub fn at(root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root).map_err(Error::file("make directory", &root))?;
        Ok(Self { root })
    }

    /// A directory of the cache, made if need be.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root.join(name);
        fs::create_dir_all(&dir).map_err(Error::file("make directory", &dir))?;
        Ok(dir)
    }

    /// Holds `<name>.lock` until the returned file is dropped; waits for another builder.
    pub fn lock(&self, name: &str) -> Result<File> {
        let path = self.root.join(format!("{name}.lock"));
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::file("make directory", parent))?;
        }
        let file = File::create(&path).map_err(Error::file("make lock file", &path))?;
        file.lock().map_err(Error::file("lock", &path))?;
        Ok(file)
    }

    /// The directory `kind/key`; `fill` makes its content when it is not there yet.
    pub fn entry(&self, kind: &str, key: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let place = self.dir(kind)?.join(key);
        if place.is_dir() {
            return Ok(place);
        }
        let _held = self.lock(&format!("{kind}/{key}"))?;
        if place.is_dir() {
            return Ok(place);
        }
        let filling = place.with_extension("filling");
        remove_tree(&filling)?;
        fs::create_dir(&filling).map_err(Error::file("make directory", &filling))?;
        fill(&filling)?;
        fs::rename(&filling, &place).map_err(Error::file("move into place", &place))?;
        Ok(place)
    }

    /// Removes all but the newest `count` entries of a kind: for what changes with every build.
    pub fn keep_newest(&self, kind: &str, count: usize) -> Result<()> {
        let dir = self.dir(kind)?;
        let mut entries = Vec::new();
        for entry in fs::read_dir(&dir).map_err(Error::file("read", &dir))?.flatten() {
            let path = entry.path();
            // Entries have no extension; locks and what is being filled have one.
            if path.is_dir() && path.extension().is_none() {
                let made = entry.metadata().and_then(|meta| meta.modified());
                entries.push((made.map_err(Error::file("read", &path))?, path));
            }
        }
        entries.sort();
        entries.reverse();
        for (_, path) in entries.iter().skip(count) {
            remove_tree(path)?;
            let lock = path.with_extension("lock");
            // It may never have been made.
            let _ = fs::remove_file(lock);
        }
        Ok(())
    }
}

/// Removes a directory and all in it, if it is there.
pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::file("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Collects what an entry is made from into its key.
#[derive(Default)]
pub struct Key(Sha256);

impl Key {
    /// Adds one input; its length goes in too, so that neighbours cannot run together.
    #[must_use]
    pub fn with(mut self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// The key: 32 hexadecimal digits.
    pub fn finish(self) -> String {
        let mut text = hex(&self.0.finalize());
        text.truncate(32);
        text
    }
}

/// Hexadecimal digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Sha256 of a file, in hexadecimal.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::file("open", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = std::io::Read::read(&mut file, &mut buffer).map_err(Error::file("read", path))?;
        if n == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_filled_once_and_only_when_complete() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().into()).unwrap();
        let failed = cache.entry("kind", "key", |d| {
            fs::write(d.join("half"), b"x").unwrap();
            Err(Error::format("test", "stop"))
        });
        assert!(failed.is_err() && !dir.path().join("kind/key").exists());
        let place =
            cache.entry("kind", "key", |d| fs::write(d.join("whole"), b"x").map_err(Error::file("write", d)));
        assert!(place.unwrap().join("whole").exists());
        let again = cache.entry("kind", "key", |_| Err(Error::format("test", "must not run"))).unwrap();
        assert!(!again.join("half").exists());
    }

    #[test]
    fn only_the_newest_entries_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().into()).unwrap();
        for (age, key) in [(3, "old"), (2, "mid"), (1, "new")] {
            let place = cache.entry("kind", key, |_| Ok(())).unwrap();
            let time = std::time::SystemTime::now() - std::time::Duration::from_secs(age * 100);
            File::open(place).unwrap().set_modified(time).unwrap();
        }
        cache.keep_newest("kind", 2).unwrap();
        let left = |key: &str| dir.path().join("kind").join(key).exists();
        assert!(!left("old") && left("mid") && left("new") && left("new.lock"));
    }

    #[test]
    fn keys_keep_inputs_apart() {
        assert_ne!(
            Key::default().with("ab").with("c").finish(),
            Key::default().with("a").with("bc").finish()
        );
    }
}
