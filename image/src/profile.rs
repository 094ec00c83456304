//! The declarative input: what goes into an image. Files in `image/profiles/`; `release` and `test` are built in.
//!
//! Only this file knows the YAML; the rest of the crate sees [`Profile`], which is complete and checked.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const RELEASE: &str = include_str!("../profiles/release.yaml");
const TEST: &str = include_str!("../profiles/test.yaml");

/// Packages that every build needs beside those that a profile names: boot files, and tools that run here.
pub const BOOT_PACKAGE: &str = "systemd-boot-efi";
/// Packages whose programs run on the build machine.
pub const TOOL_PACKAGES: &[&str] =
    &["dosfstools", "erofs-utils", "kmod", "mtools", "openssl", "osslsigncode"];

/// What a profile file may say.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Document {
    version: u32,
    name: String,
    #[serde(default)]
    extends: Option<String>,
    #[serde(default)]
    command_line: Vec<String>,
    #[serde(default)]
    early_modules: Vec<String>,
    #[serde(default)]
    modules: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    programs: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    libraries: Vec<String>,
    #[serde(default)]
    binaries: Vec<String>,
    #[serde(default)]
    guest: Option<String>,
    #[serde(default)]
    services: Vec<Service>,
    #[serde(default)]
    disk: Option<Disk>,
    #[serde(default)]
    largest_uki: Option<u64>,
}

/// A service that init runs beside its own; only a test image has any.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Services that must be ready first.
    #[serde(default)]
    pub after: Vec<String>,
    /// Whether it has every capability and 2 GiB of memory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub privileged: bool,
}

/// Sizes of the partitions, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// EFI system partition.
    pub esp: u64,
    /// Small persistent state.
    pub state: u64,
    /// Images and pods; the host grows it to the end of the disk.
    pub data: u64,
}

/// A complete profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Its name.
    pub name: String,
    /// Kernel command line.
    pub command_line: String,
    /// Modules that the initramfs holds, in the order of their loading (their dependencies come between).
    pub early_modules: Vec<String>,
    /// Modules of the system tree.
    pub modules: Vec<String>,
    /// Package → paths out of it.
    pub programs: BTreeMap<String, Vec<String>>,
    /// Packages that give shared libraries.
    pub libraries: Vec<String>,
    /// Atoll's programs.
    pub binaries: Vec<String>,
    /// The guest's first process.
    pub guest: String,
    /// Extra services.
    pub services: Vec<Service>,
    /// Partition sizes.
    pub disk: Disk,
    /// Limit of the UKI's size, in MiB.
    pub largest_uki: u64,
}

impl Profile {
    /// A profile by the name of a built-in one, or by path.
    pub fn load(name_or_path: &str) -> Result<Self> {
        let text = match built_in(name_or_path) {
            Some(text) => text.to_string(),
            None => {
                std::fs::read_to_string(name_or_path).map_err(Error::file("read profile", name_or_path))?
            }
        };
        Self::parse(name_or_path, &text)
    }

    /// A profile from its text; `what` names it in errors.
    pub fn parse(what: &str, text: &str) -> Result<Self> {
        let document = read(what, text)?;
        let base = match document.extends.as_deref() {
            None => None,
            Some(name) => {
                let text = built_in(name).ok_or_else(|| {
                    Error::input(what, format!("extends {name}: only release and test can be extended"))
                })?;
                Some(Self::parse(name, text)?)
            }
        };
        complete(what, document, base)
    }

    /// All Debian packages that are in the image or made into it, without the kernels.
    pub fn packages(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.programs.keys().map(String::as_str).collect();
        names.extend(self.libraries.iter().map(String::as_str));
        names.sort_unstable();
        names.dedup();
        names
    }
}

fn built_in(name: &str) -> Option<&'static str> {
    match name {
        "release" => Some(RELEASE),
        "test" => Some(TEST),
        _ => None,
    }
}

fn read(what: &str, text: &str) -> Result<Document> {
    let document: Document = serde_saphyr::from_str(text).map_err(|e| Error::input(what, e.to_string()))?;
    if document.version != 1 {
        return Err(Error::input(
            what,
            format!("version {}: this builder knows version 1", document.version),
        ));
    }
    Ok(document)
}

/// Adds what the document says to its base; lists grow, single values replace.
fn complete(what: &str, document: Document, base: Option<Profile>) -> Result<Profile> {
    let missing =
        |field: &str| Error::input(what, format!("{field} is missing, and nothing is extended that has it"));
    let base_or = |f: fn(&Profile) -> Vec<String>| base.as_ref().map_or_else(Vec::new, f);
    let join = |mut first: Vec<String>, more: Vec<String>| {
        for item in more {
            if !first.contains(&item) {
                first.push(item);
            }
        }
        first
    };
    let mut modules =
        join(base_or(|b| b.modules.clone()), document.modules.into_values().flatten().collect());
    modules.sort();
    let mut programs = base.as_ref().map_or_else(BTreeMap::new, |b| b.programs.clone());
    programs.extend(document.programs);
    let command_line = base.as_ref().map(|b| b.command_line.clone()).into_iter().chain(document.command_line);
    Ok(Profile {
        command_line: command_line.collect::<Vec<_>>().join(" "),
        early_modules: join(base_or(|b| b.early_modules.clone()), document.early_modules),
        modules,
        programs,
        libraries: join(base_or(|b| b.libraries.clone()), document.libraries),
        binaries: join(base_or(|b| b.binaries.clone()), document.binaries),
        guest: document.guest.or(base.as_ref().map(|b| b.guest.clone())).ok_or_else(|| missing("guest"))?,
        disk: document.disk.or(base.as_ref().map(|b| b.disk)).ok_or_else(|| missing("disk"))?,
        largest_uki: document
            .largest_uki
            .or(base.as_ref().map(|b| b.largest_uki))
            .ok_or_else(|| missing("largest-uki"))?,
        services: base.map_or_else(Vec::new, |b| b.services).into_iter().chain(document.services).collect(),
        name: document.name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_profile_is_the_release_and_one_service() {
        let (release, test) = (Profile::load("release").unwrap(), Profile::load("test").unwrap());
        assert!(release.services.is_empty());
        assert_eq!(test.services.len(), 1);
        assert_eq!(test.modules, release.modules);
        assert_eq!(test.command_line, release.command_line);
        assert_eq!(test.binaries.len(), release.binaries.len() + 1);
        assert!(release.command_line.starts_with("rootfstype=ramfs "));
    }

    #[test]
    fn the_release_finds_disks_partitions_and_watchdogs_of_servers() {
        let release = Profile::load("release").unwrap();
        for module in ["vmd", "lpc_ich", "i2c_i801"] {
            assert!(release.modules.iter().any(|name| name == module), "{module}");
        }
        assert!(release.command_line.split(' ').any(|word| word == "gpt"), "{}", release.command_line);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| Profile::parse("p.yaml", text).unwrap_err().to_string();
        assert!(error("version: 2\nname: x\n").contains("version 2"));
        assert!(error("version: 1\nname: x\n").contains("guest is missing"));
        assert!(error("version: 1\nname: x\nmodule: []\n").contains("module"));
        assert!(error("version: 1\nname: x\nextends: other\n").contains("other"));
    }
}
