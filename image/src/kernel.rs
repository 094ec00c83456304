//! The host kernel: Debian's signed image, and the modules that the profile chooses, unpacked and indexed.
//!
//! Modules keep Debian's signatures: they are decompressed, never stripped.

use crate::cache::{Cache, Key};
use crate::debian::Debian;
use crate::error::{Error, Result};
use crate::lock::Lock;
use crate::modules::{Index, name_of};
use crate::profile::Profile;
use crate::program::{Program, Tools};
use std::fs;
use std::path::{Path, PathBuf};

/// The host kernel of an image.
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// The kernel itself, an EFI program.
    pub image: PathBuf,
    /// The directory that becomes `/usr/lib/modules/<release>`.
    pub modules: PathBuf,
    /// Names and files of the early modules, in loading order.
    pub early: Vec<(String, PathBuf)>,
}

/// Unpacks the kernel and makes the directory of its chosen modules.
pub fn prepare(cache: &Cache, lock: &Lock, tools: &Tools, profile: &Profile) -> Result<Kernel> {
    let (package, release) = lock.kernel()?;
    let unpacked = Debian::new(cache).unpack(package)?;
    let all = unpacked.join("usr/lib/modules").join(release);
    let index = index(cache, tools, &unpacked, release, &package.sha256)?;
    let early = index.closure(&profile.early_modules)?;
    let mut names = profile.early_modules.clone();
    names.extend(profile.modules.iter().cloned());
    let chosen = index.closure(&names)?;
    let key =
        Key::default().with(&package.sha256).with(chosen.join("\n")).with(&lock.get("kmod")?.sha256).finish();
    let dir = cache.entry("modules", &key, |dir| {
        let target = dir.join("lib/modules").join(release);
        for path in &chosen {
            decompress(&all.join(path), &target.join(path.trim_end_matches(".xz")))?;
        }
        for list in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
            let to = target.join(list);
            fs::copy(all.join(list), &to).map_err(Error::file("copy", &to))?;
        }
        tools.depmod().arg("-b").arg(dir).arg(release).run().map(drop)
    })?;
    let modules = dir.join("lib/modules").join(release);
    let early =
        early.iter().map(|path| (name_of(path), modules.join(path.trim_end_matches(".xz")))).collect();
    let image = unpacked.join(format!("boot/vmlinuz-{release}"));
    Ok(Kernel { release: release.to_string(), image, modules, early })
}

/// The index of all modules of the package.
fn index(cache: &Cache, tools: &Tools, unpacked: &Path, release: &str, key: &str) -> Result<Index> {
    let dir = cache.entry("module-index", key, |dir| {
        // depmod looks for lib/modules under its base directory.
        tools.depmod().arg("-b").arg(unpacked.join("usr")).arg("-o").arg(dir).arg(release).run().map(drop)
    })?;
    let made = dir.join("lib/modules").join(release);
    let read = |path: PathBuf| fs::read_to_string(&path).map_err(Error::file("read", &path));
    let builtin = read(unpacked.join("usr/lib/modules").join(release).join("modules.builtin"))?;
    let (dep, soft) = (read(made.join("modules.dep"))?, read(made.join("modules.softdep"))?);
    Ok(Index::new(&dep, &soft, &read(made.join("modules.alias"))?, &builtin))
}

fn decompress(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(Error::file("make directory", parent))?;
    }
    let bytes = Program::host("xz", "decompress a kernel module").arg("-dc").arg(from).run()?;
    fs::write(to, bytes).map_err(Error::file("write", to))
}
