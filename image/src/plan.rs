//! What a build will do, as a list that can be read and tested. Pure.

use crate::error::Result;
use crate::layout::{Layout, layout};
use crate::lock::Lock;
use crate::profile::{BOOT_PACKAGE, Profile, TOOL_PACKAGES};
use crate::{guest_kernel, secure_boot};
use std::fmt;

/// One step; the order is the order of execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Have these packages in the cache: name and version.
    Fetch(Vec<String>),
    /// Have the guest kernel with this key in the cache.
    GuestKernel(String),
    /// Unpack the host kernel of this release and choose modules.
    HostKernel {
        /// As `uname -r` says it.
        release: String,
        /// Names before their dependencies are added.
        modules: Vec<String>,
    },
    /// Pack the read-only system tree.
    System {
        /// Debian packages it takes files from.
        packages: Vec<String>,
        /// Atoll's programs in it.
        binaries: Vec<String>,
        /// Atoll's programs that --bin-dir lacks.
        missing: Vec<String>,
        /// Extra services, none in a release.
        services: Vec<String>,
    },
    /// Write the initramfs: init, these modules, the system tree.
    Initramfs(Vec<String>),
    /// Link the unified kernel image.
    Uki {
        /// Result.
        file: String,
        /// Kernel command line.
        command_line: String,
        /// Limit in MiB.
        limit: u64,
    },
    /// Sign the UKI and the boot loader.
    Sign,
    /// Write the disk image.
    Disk {
        /// Result.
        file: String,
        /// Its partitions.
        layout: Layout,
        /// Files on the ESP.
        esp: Vec<String>,
    },
    /// List what is in it, as SPDX.
    Sbom(String),
    /// Write the hashes of all results.
    Checksums(String),
}

/// What the plan depends on beside profile and lock.
pub struct Facts<'a> {
    /// Version of the image.
    pub version: &'a str,
    /// Names in --bin-dir.
    pub available: &'a [String],
    /// Whether a key was given.
    pub signed: bool,
}

/// The path of the first slot's UKI on the ESP; the boot loader counts its tries in the name.
pub fn slot_path(version: &str) -> String {
    format!("EFI/Linux/atoll-{version}+3.efi")
}

/// The steps that make `profile`'s artefacts.
pub fn plan(profile: &Profile, lock: &Lock, facts: &Facts<'_>) -> Result<Vec<Step>> {
    let packages = profile.packages();
    let (kernel, release) = lock.kernel()?;
    let mut fetch = Vec::new();
    let tools = TOOL_PACKAGES.iter().filter(|t| !packages.contains(t)).copied();
    for name in packages.iter().copied().chain(tools).chain([
        BOOT_PACKAGE,
        guest_kernel::SOURCE,
        kernel.name.as_str(),
    ]) {
        let package = lock.get(name)?;
        fetch.push(format!("{} {}", package.name, package.version));
    }
    fetch.sort();
    let wanted = profile.binaries.iter().chain([&profile.guest]).cloned();
    let (binaries, missing) = wanted.partition(|name| facts.available.contains(name));
    let mut steps = vec![
        Step::Fetch(fetch),
        Step::GuestKernel(guest_kernel::key(lock)?),
        Step::HostKernel { release: release.to_string(), modules: profile.modules.clone() },
        Step::System {
            packages: packages.iter().map(|p| p.to_string()).collect(),
            binaries,
            missing,
            services: profile.services.iter().map(|s| s.name.clone()).collect(),
        },
        Step::Initramfs(profile.early_modules.clone()),
        Step::Uki {
            file: "atoll.efi".into(),
            command_line: profile.command_line.clone(),
            limit: profile.largest_uki,
        },
    ];
    if facts.signed {
        steps.push(Step::Sign);
    }
    let mut esp =
        vec!["EFI/BOOT/BOOTX64.EFI".to_string(), "loader/loader.conf".into(), slot_path(facts.version)];
    if facts.signed {
        esp.extend(secure_boot::paths());
    }
    steps.push(Step::Disk { file: "atoll.raw".into(), layout: layout(profile.disk), esp });
    steps.push(Step::Sbom("atoll.spdx.json".into()));
    steps.push(Step::Checksums("SHA256SUMS".into()));
    Ok(steps)
}

impl Step {
    /// Its short name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Fetch(_) => "Debian packages",
            Self::GuestKernel(_) => "guest kernel",
            Self::HostKernel { .. } => "host kernel",
            Self::System { .. } => "system tree",
            Self::Initramfs(_) => "initramfs",
            Self::Uki { .. } => "unified kernel image",
            Self::Sign => "signature",
            Self::Disk { .. } => "disk image",
            Self::Sbom(_) => "list of contents",
            Self::Checksums(_) => "checksums",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fetch(packages) => list(f, "fetch Debian packages", packages),
            Self::GuestKernel(key) => write!(f, "guest kernel {key}"),
            Self::HostKernel { release, modules } => {
                list(f, &format!("host kernel {release} with modules and what they need"), modules)
            }
            Self::System { packages, binaries, missing, services } => {
                list(f, "pack system.erofs from packages", packages)?;
                for (what, names) in
                    [("binaries", binaries), ("missing binaries", missing), ("extra services", services)]
                {
                    if !names.is_empty() {
                        write!(f, "\n  {what}: {}", names.join(" "))?;
                    }
                }
                Ok(())
            }
            Self::Initramfs(early) => {
                list(f, "write the initramfs with system.erofs and early modules", early)
            }
            Self::Uki { file, command_line, limit } => {
                write!(f, "link {file}, at most {limit} MiB\n  command line: {command_line}")
            }
            Self::Sign => write!(f, "sign the UKI and the boot loader with the given key"),
            Self::Disk { file, layout, esp } => {
                write!(f, "write {file}, {} sectors", layout.sectors)?;
                for p in &layout.partitions {
                    write!(f, "\n  {} {}..{} ({} MiB)", p.label, p.first, p.last, p.size() >> 20)?;
                }
                esp.iter().try_for_each(|path| write!(f, "\n  on the ESP: {path}"))
            }
            Self::Sbom(file) => write!(f, "list packages, modules and crates in {file}"),
            Self::Checksums(file) => write!(f, "write hashes to {file}"),
        }
    }
}

/// A heading and words, wrapped.
fn list(f: &mut fmt::Formatter<'_>, heading: &str, words: &[String]) -> fmt::Result {
    write!(f, "{heading}")?;
    let mut column = usize::MAX;
    for (index, word) in words.iter().enumerate() {
        let comma = if index + 1 == words.len() { "" } else { "," };
        if column.saturating_add(word.len()) > 116 {
            write!(f, "\n ")?;
            column = 1;
        }
        write!(f, " {word}{comma}")?;
        column += word.len() + 2;
    }
    Ok(())
}

/// The whole plan as text.
pub fn to_text(steps: &[Step]) -> String {
    steps.iter().enumerate().map(|(i, step)| format!("{}. {step}\n", i + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = include_str!("../tests/golden/debian.lock");

    /// The plan of a profile must be the one in `tests/golden/`; `ATOLL_BLESS=1` rewrites the file.
    fn check(profile: &str, available: &[&str], signed: bool) {
        let available: Vec<String> = available.iter().map(|s| s.to_string()).collect();
        let facts = Facts { version: "1.2.3", available: &available, signed };
        let steps = plan(&Profile::load(profile).unwrap(), &Lock::parse(LOCK).unwrap(), &facts).unwrap();
        let kernel = guest_kernel::key(&Lock::parse(LOCK).unwrap()).unwrap();
        let text = to_text(&steps).replace(&kernel, "KEY");
        let path = format!("{}/tests/golden/{profile}.plan", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("ATOLL_BLESS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap();
        assert!(
            text == golden,
            "the plan of {profile} is not {path} (ATOLL_BLESS=1 rewrites it); it is now:\n{text}"
        );
    }

    #[test]
    fn the_release_plan_is_the_golden_one() {
        check(
            "release",
            &["atoll-init", "atoll-hostd", "atoll-runtime", "atoll-vmm", "atoll-agent", "atoll-guest"],
            true,
        );
    }

    #[test]
    fn the_test_plan_is_the_golden_one() {
        check("test", &["atoll-init", "atoll-test-bridge"], false);
    }

    #[test]
    fn an_unlocked_package_is_named() {
        let lock = Lock::parse(&LOCK.replace("nftables ", "nftablez ")).unwrap();
        let facts = Facts { version: "1", available: &[], signed: false };
        let error = plan(&Profile::load("release").unwrap(), &lock, &facts).unwrap_err().to_string();
        assert!(error.contains("no package nftables in image/debian.lock"), "{error}");
    }
}
