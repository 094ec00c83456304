//! Builds what a lab needs and says where it is. Everything expensive is kept by content hash under
//! `${XDG_CACHE_HOME:-~/.cache}/atoll`; what is new goes to `out/` in the checkout.
//!
//! Called before a lab enters its namespaces, because package registries are out of reach from inside.

use crate::process::{Background, tail};
use crate::progress::Progress;
use anyhow::{Context, bail};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Longest time any single build step may take.
const BUILD_DEADLINE: Duration = Duration::from_secs(40 * 60);

/// Release of upstream Kubernetes that the Supervisor is built from; its go.mod names the same.
const KUBERNETES_VERSION: &str = "v1.37.1";

/// Target triple of the static binaries.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";
/// The profile that static programs are built by.
const STATIC_PROFILE: &str = "static";

/// Crates whose binaries are static, because nothing else exists where they run.
const STATIC: [&str; 4] = ["atoll-init", "atoll-vmm", "atoll-guest", "atollctl"];

/// Crates whose binaries run in the system tree, beside Debian's C library.
const DYNAMIC: [&str; 4] = ["atoll-hostd", "atoll-runtime", "atoll-agent", "atoll-image"];

/// How a program has its C library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Linked {
    Dynamically,
    Statically,
}

/// Which image of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// What people flash.
    Release,
    /// The same and the bridge that carries the CRI socket onto the test network.
    Test,
    /// The release and the bench that measures it from inside.
    Bench,
}

impl Profile {
    /// Name of the profile, its file and its output directory.
    pub fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Test => "test",
            Self::Bench => "bench",
        }
    }
}

/// Paths of a checkout and its caches.
#[derive(Debug, Clone)]
pub struct Artifacts {
    root: PathBuf,
    cache: PathBuf,
}

impl Artifacts {
    /// The checkout this program was built from, or the one that `ATOLL_ROOT` names.
    ///
    /// # Errors
    /// When neither `XDG_CACHE_HOME` nor `HOME` is set.
    pub fn locate() -> anyhow::Result<Self> {
        let root = std::env::var_os("ATOLL_ROOT").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default(),
            PathBuf::from,
        );
        let cache = match std::env::var_os("XDG_CACHE_HOME") {
            Some(cache) => PathBuf::from(cache),
            None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
        };
        Ok(Self { root, cache: cache.join("atoll") })
    }

    /// Root of the checkout.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where new artefacts and logs go.
    pub fn out(&self) -> PathBuf {
        self.root.join("out")
    }

    /// The disk image of a profile.
    pub fn image(&self, profile: Profile) -> PathBuf {
        self.out().join(profile.name()).join("atoll.raw")
    }

    /// The unified kernel image of a profile.
    pub fn uki(&self, profile: Profile) -> PathBuf {
        self.out().join(profile.name()).join("atoll.efi")
    }

    /// The Supervisor's binary for the sources as they are.
    ///
    /// # Errors
    /// When its sources cannot be read.
    pub fn supervisor(&self) -> anyhow::Result<PathBuf> {
        Ok(self.cache.join("supervisor").join(self.supervisor_hash()?).join("atoll-supervisor"))
    }

    /// A release binary of ours.
    pub fn binary(&self, name: &str) -> PathBuf {
        self.out().join("bin").join(name)
    }

    /// Cargo's target directory: the one that its own variable names (the justfile sets it), else cargo's own choice.
    fn target(&self) -> PathBuf {
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.root.join("target"), PathBuf::from)
    }

    fn supervisor_hash(&self) -> anyhow::Result<String> {
        let directory = self.root.join("supervisor");
        let mut files: Vec<PathBuf> = std::fs::read_dir(&directory)
            .with_context(|| format!("cannot list {}", directory.display()))?
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .filter(|path| {
                let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
                (name.ends_with(".go") && !name.ends_with("_test.go")) || name == "go.mod" || name == "go.sum"
            })
            .collect();
        files.sort();
        let mut hash = Sha256::new();
        hash.update(KUBERNETES_VERSION);
        for file in files {
            hash.update(std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?);
        }
        Ok(hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect())
    }

    /// Builds everything a lab with this profile needs.
    ///
    /// # Errors
    /// With the end of the log of the step that failed.
    pub fn build(&self, progress: &mut Progress, profiles: &[Profile]) -> anyhow::Result<()> {
        progress.step("build the Supervisor", || self.build_supervisor())?;
        progress.step("build the host's programs", || self.build_binaries())?;
        for profile in profiles {
            progress.step(&format!("build the {} image", profile.name()), || self.build_image(*profile))?;
        }
        Ok(())
    }

    /// Builds the Supervisor unless the cache has it.
    ///
    /// # Errors
    /// With the end of Go's log.
    pub fn build_supervisor(&self) -> anyhow::Result<()> {
        let binary = self.supervisor()?;
        if binary.exists() {
            return self.place_supervisor(&binary);
        }
        let parent = binary.parent().context("the cache has no parent directory")?;
        std::fs::create_dir_all(parent)?;
        let partial = parent.join("partial");
        let flags = format!(
            "-s -w -X k8s.io/component-base/version.gitVersion={KUBERNETES_VERSION} -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37 -X k8s.io/client-go/pkg/version.gitVersion={KUBERNETES_VERSION}"
        );
        let mut command = Command::new("go");
        command
            .current_dir(self.root.join("supervisor"))
            .env("CGO_ENABLED", "0")
            .args(["build", "-trimpath", "-ldflags", &flags, "-o"])
            .arg(&partial)
            .arg(".");
        self.run("supervisor", &mut command)?;
        std::fs::rename(&partial, &binary).with_context(|| format!("cannot place {}", binary.display()))?;
        self.place_supervisor(&binary)
    }

    /// Puts the Supervisor beside the other programs, for people: the lab takes it from the cache.
    fn place_supervisor(&self, binary: &Path) -> anyhow::Result<()> {
        let bin = self.out().join("bin");
        std::fs::create_dir_all(&bin)?;
        let to = bin.join("atoll-supervisor");
        // Of the last build, or not there.
        let _ = std::fs::remove_file(&to);
        // The cache may lie on another file system.
        std::fs::hard_link(binary, &to)
            .or_else(|_| std::fs::copy(binary, &to).map(drop))
            .with_context(|| format!("cannot place {}", to.display()))
    }

    /// Builds every Rust program of the host and collects them in `out/bin`.
    ///
    /// # Errors
    /// With the end of Cargo's log.
    pub fn build_binaries(&self) -> anyhow::Result<()> {
        let mut dynamic = self.cargo();
        dynamic.args([
            "build",
            "--release",
            "--locked",
            "-p",
            "atoll-qemu-test",
            "--bin",
            "atoll-test-bridge",
        ]);
        for name in DYNAMIC {
            dynamic.args(["-p", name, "--bin", name]);
        }
        self.run("programs", &mut dynamic)?;
        self.run("static-programs", &mut self.static_build(&STATIC.map(|name| (name, name))))?;
        let dynamic = DYNAMIC.iter().chain(&["atoll-test-bridge"]).map(|name| (*name, Linked::Dynamically));
        self.collect(dynamic.chain(STATIC.iter().map(|name| (*name, Linked::Statically))))
    }

    /// Builds the programs of the bench image that are not the host's. Apart from those, which must not get other features
    /// of their libraries for it.
    ///
    /// # Errors
    /// With the end of Cargo's log.
    pub fn build_bench(&self) -> anyhow::Result<()> {
        let mut dynamic = self.cargo();
        dynamic.args(["build", "--release", "--locked", "-p", "atoll-bench", "--bin", "atoll-bench-host"]);
        self.run("bench-host", &mut dynamic)?;
        self.run("bench-pod", &mut self.static_build(&[("atoll-bench-pod", "atoll-bench-pod")]))?;
        self.collect([("atoll-bench-host", Linked::Dynamically), ("atoll-bench-pod", Linked::Statically)])
    }

    /// Builds (package, program) pairs as static binaries.
    fn static_build(&self, programs: &[(&str, &str)]) -> Command {
        let mut command = self.cargo();
        command.env("RUSTFLAGS", "-C target-feature=+crt-static").args([
            "build",
            "--profile",
            STATIC_PROFILE,
            "--locked",
            "--target",
            STATIC_TARGET,
        ]);
        for (package, program) in programs {
            command.args(["-p", package, "--bin", program]);
        }
        command
    }

    /// Copies release binaries to `out/bin`.
    fn collect<'a>(&self, programs: impl IntoIterator<Item = (&'a str, Linked)>) -> anyhow::Result<()> {
        let bin = self.out().join("bin");
        std::fs::create_dir_all(&bin)?;
        for (name, linked) in programs {
            let directory = match linked {
                Linked::Dynamically => self.target().join("release"),
                Linked::Statically => self.target().join(STATIC_TARGET).join(STATIC_PROFILE),
            };
            let from = directory.join(name);
            std::fs::copy(&from, bin.join(name))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
        Ok(())
    }

    /// Builds the image of a profile from `out/bin`.
    ///
    /// # Errors
    /// With the end of the builder's log.
    pub fn build_image(&self, profile: Profile) -> anyhow::Result<()> {
        let mut command = Command::new(self.binary("atoll-image"));
        command
            .current_dir(&self.root)
            .args(["build", "--profile"])
            .arg(self.root.join("image/profiles").join(format!("{}.yaml", profile.name())))
            .arg("--bin-dir")
            .arg(self.out().join("bin"))
            .arg("--out")
            .arg(self.out().join(profile.name()))
            // Signed with a key of this machine's own, as a lab that enrols it would.
            .args(["--complete", "--test-key"]);
        self.run(&format!("image-{}", profile.name()), &mut command)
    }

    /// `cargo` in the checkout with the shared target directory.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new("cargo");
        command.current_dir(&self.root).env("CARGO_TARGET_DIR", self.target());
        command
    }

    fn run(&self, log: &str, command: &mut Command) -> anyhow::Result<()> {
        let log = self.out().join("log").join(format!("build-{log}.log"));
        let _ = std::fs::remove_file(&log); // Absent the first time.
        let mut child = Background::spawn(&format!("{:?}", command.get_program()), command, &log)?;
        let status = child.wait(BUILD_DEADLINE)?;
        if !status.success() {
            bail!("{command:?} ended with {status}; end of {}:\n{}", log.display(), tail(&log, 25));
        }
        Ok(())
    }
}
