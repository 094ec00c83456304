//! The kernel that runs in every pod: Debian's `linux-source` with `guest-kernel.config` over `allnoconfig`.
//!
//! Built once per source version and configuration and kept in the cache; `guest-kernel/current` there points to
//! the newest, for development. Invariant: every line of the fragment holds in the final configuration, so a
//! renamed or unmet option stops the build instead of going missing.

use crate::cache::{Cache, Key, remove_tree};
use crate::debian::Debian;
use crate::error::{Error, Result};
use crate::lock::Lock;
use crate::program::Program;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The fragment of this checkout, built in.
pub const FRAGMENT: &str = include_str!("../guest-kernel.config");
/// The source package.
pub const SOURCE: &str = "linux-source-6.12";
/// Changes when the recipe below changes what it makes.
const RECIPE: &str = "1";

/// The cache key of a kernel of this lock file and fragment.
pub fn key(lock: &Lock) -> Result<String> {
    let source = lock.get(SOURCE)?;
    Ok(Key::default().with(RECIPE).with(&source.sha256).with(FRAGMENT).finish())
}

/// `vmlinux`, built if the cache does not have it.
pub fn build(cache: &Cache, lock: &Lock) -> Result<PathBuf> {
    let entry = cache.entry("guest-kernel", &key(lock)?, |dir| {
        eprintln!("atoll-image: building the guest kernel (about six minutes on two cores, once)");
        let source = Debian::new(cache).unpack(lock.get(SOURCE)?)?;
        let work = dir.join("work");
        let made = compile(&source.join(format!("usr/src/{SOURCE}.tar.xz")), &work, &dir.join("vmlinux"));
        remove_tree(&work)?;
        made?;
        let config = dir.join("fragment");
        fs::write(&config, FRAGMENT).map_err(Error::file("write", &config))
    })?;
    point_current_at(&entry)?;
    Ok(entry.join("vmlinux"))
}

fn compile(archive: &Path, work: &Path, vmlinux: &Path) -> Result<()> {
    let (source, objects) = (work.join("source"), work.join("objects"));
    for dir in [&source, &objects] {
        fs::create_dir_all(dir).map_err(Error::file("make directory", dir))?;
    }
    let fragment = work.join("fragment");
    fs::write(&fragment, FRAGMENT).map_err(Error::file("write", &fragment))?;
    let tar = Program::host("tar", "unpack the kernel source");
    tar.arg("-C").arg(&source).args(["--strip-components=1", "-xf"]).arg(archive).run()?;
    let make = |purpose: &str| {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let program = Program::host("make", purpose).arg("-s").arg("-C").arg(&source);
        let program = program.arg(format!("O={}", objects.display())).arg(format!("-j{jobs}"));
        // What `uname -v` would otherwise tell of the build machine.
        let program =
            program.env("KBUILD_BUILD_TIMESTAMP", "2026-01-01 00:00:00 UTC").env("KBUILD_BUILD_VERSION", "1");
        program.env("KBUILD_BUILD_USER", "atoll").env("KBUILD_BUILD_HOST", "build")
    };
    let configure = make("configure the guest kernel").env("KCONFIG_ALLCONFIG", &fragment);
    configure.arg("allnoconfig").run()?;
    let config = objects.join(".config");
    let config = fs::read_to_string(&config).map_err(Error::file("read", &config))?;
    check(FRAGMENT, &config)?;
    make("build the guest kernel").arg("vmlinux").run()?;
    let strip = Program::host("strip", "strip the guest kernel").arg("-s").arg("-o").arg(vmlinux);
    strip.arg(objects.join("vmlinux")).run().map(drop)
}

/// Every line of the fragment must hold in the final configuration.
fn check(fragment: &str, config: &str) -> Result<()> {
    let set: std::collections::HashSet<&str> = config.lines().collect();
    let mut lost = Vec::new();
    for line in fragment.lines().filter(|l| l.contains("CONFIG_")) {
        let holds = match line.strip_prefix("# ").and_then(|l| l.strip_suffix(" is not set")) {
            Some(option) => !set.iter().any(|l| l.strip_prefix(option).is_some_and(|r| r.starts_with('='))),
            None => set.contains(line),
        };
        if !holds {
            lost.push(line);
        }
    }
    if lost.is_empty() {
        return Ok(());
    }
    let problem = format!(
        "the kernel's configuration does not keep {}: an option it depends on is off",
        lost.join(", ")
    );
    Err(Error::input("image/guest-kernel.config", problem))
}

/// `guest-kernel/current` → the entry's directory, replaced in one step.
fn point_current_at(entry: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (entry.parent(), entry.file_name()) else { return Ok(()) };
    let (link, new) = (parent.join("current"), parent.join(format!("current.{}", std::process::id())));
    symlink(name, &new).map_err(Error::file("make link", &new))?;
    fs::rename(&new, &link).map_err(Error::file("move into place", &link))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_option_is_named() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\n";
        assert!(check("CONFIG_A=y\n# CONFIG_B is not set\n# CONFIG_ABSENT is not set\n", config).is_ok());
        let error = check("CONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n", config).unwrap_err().to_string();
        assert!(error.contains("CONFIG_B=y, # CONFIG_C is not set"), "{error}");
    }
}
