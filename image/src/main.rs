//! `atoll-image`: the command line of the image builder.

use atoll_image::cache::Cache;
use atoll_image::debian::{self, Debian};
use atoll_image::error::{Error, Result};
use atoll_image::lock::{self, Lock};
use atoll_image::plan::{self, Facts, Step};
use atoll_image::profile::{BOOT_PACKAGE, Profile, TOOL_PACKAGES};
use atoll_image::program::Tools;
use atoll_image::sign::{self, Signer};
use atoll_image::write::Build;
use atoll_image::{configure, guest_kernel};
use clap::{Args, Parser, Subcommand};
use std::path::{Path, PathBuf};

#[derive(Parser)]
#[command(name = "atoll-image", version, about = "Builds Atoll's disk image and boot file")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build atoll.raw, atoll.efi and their lists.
    Build(BuildArguments),
    /// Print what `build` would do.
    Plan(Selection),
    /// Write a machine config into the ESP of an image or of the disk it was copied to.
    Config {
        /// atoll.raw, or the whole disk (/dev/sdX).
        target: PathBuf,
        /// The machine config.
        #[arg(long)]
        config: PathBuf,
    },
    /// Write the list of what an image holds (SPDX 2.3) without building the image.
    Sbom(BuildArguments),
    /// Build the guest kernel and print its path.
    GuestKernel {
        /// See `build`.
        #[arg(long)]
        locked: bool,
    },
    /// Pin the newest Debian 13 packages that the mirror has, in image/debian.lock.
    Lock {
        /// The lock file.
        #[arg(long, default_value = "image/debian.lock")]
        file: PathBuf,
    },
}

#[derive(Args)]
struct Selection {
    /// release, test, or the path of a profile.
    #[arg(long, default_value = "release")]
    profile: String,
    /// Directory with the atoll-* programs.
    #[arg(long, default_value = "target/release")]
    bin_dir: PathBuf,
    /// Private key (PEM) that signs the boot files for Secure Boot.
    #[arg(long, requires = "cert")]
    key: Option<PathBuf>,
    /// Its certificate (PEM).
    #[arg(long, requires = "key")]
    cert: Option<PathBuf>,
    /// Sign with a key made for tests, kept in the cache.
    #[arg(long, conflicts_with = "key")]
    test_key: bool,
    /// Fail when the mirror no longer has a version that image/debian.lock names, instead of taking its newest.
    #[arg(long)]
    locked: bool,
}

#[derive(Args)]
struct BuildArguments {
    #[command(flatten)]
    selection: Selection,
    /// Where the results go.
    #[arg(long)]
    out: PathBuf,
    /// Print the plan and stop.
    #[arg(long)]
    dry_run: bool,
    /// Fail when --bin-dir lacks a program of the profile.
    #[arg(long)]
    complete: bool,
    /// The workspace's Cargo.toml, for the list of crates.
    #[arg(long, default_value = "Cargo.toml")]
    manifest: PathBuf,
}

fn main() -> std::process::ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("atoll-image: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(error) = source {
                eprintln!("  because: {error}");
                source = error.source();
            }
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Build(arguments) => build(&arguments, |_| true),
        Command::Sbom(arguments) => {
            build(&arguments, |step| matches!(step, Step::Fetch(_) | Step::HostKernel { .. } | Step::Sbom(_)))
        }
        Command::Plan(selection) => {
            let (_, steps) = planned(&selection, &Lock::parse(lock::BUILT_IN)?)?;
            print!("{}", plan::to_text(&steps));
            Ok(())
        }
        Command::Config { target, config } => write_config(&target, &config),
        Command::GuestKernel { locked } => {
            let cache = Cache::from_env()?;
            let lock = Debian::new(&cache).effective(&Lock::parse(lock::BUILT_IN)?, locked)?;
            let path = guest_kernel::build(&cache, &lock)?;
            println!("{}", path.display());
            Ok(())
        }
        Command::Lock { file } => pin(&file),
    }
}

fn planned(selection: &Selection, lock: &Lock) -> Result<(Profile, Vec<Step>)> {
    let profile = Profile::load(&selection.profile)?;
    let dir = &selection.bin_dir;
    let wanted = profile.binaries.iter().chain([&profile.guest]);
    let available: Vec<String> = wanted.filter(|name| dir.join(name).is_file()).cloned().collect();
    let facts = Facts {
        version: env!("CARGO_PKG_VERSION"),
        available: &available,
        signed: selection.key.is_some() || selection.test_key,
    };
    let steps = plan::plan(&profile, lock, &facts)?;
    Ok((profile, steps))
}

/// Runs the steps that are `wanted`.
fn build(arguments: &BuildArguments, wanted: impl Fn(&Step) -> bool) -> Result<()> {
    let pinned = Lock::parse(lock::BUILT_IN)?;
    let cache = Cache::from_env()?;
    let lock = match arguments.dry_run {
        true => pinned,
        false => Debian::new(&cache).effective(&pinned, arguments.selection.locked)?,
    };
    let (profile, mut steps) = planned(&arguments.selection, &lock)?;
    steps.retain(wanted);
    if arguments.dry_run {
        print!("{}", plan::to_text(&steps));
        return Ok(());
    }
    let missing = steps.iter().find_map(|step| match step {
        Step::System { missing, .. } if !missing.is_empty() => Some(missing.join(" ")),
        _ => None,
    });
    if let Some(missing) = missing.filter(|_| arguments.complete) {
        let place = arguments.selection.bin_dir.display().to_string();
        return Err(Error::input(place, format!("lacks {missing}: build them first")));
    }
    let signer = signer(&arguments.selection, &cache, &lock, &profile)?;
    let build = Build {
        cache: &cache,
        lock: &lock,
        profile: &profile,
        version: env!("CARGO_PKG_VERSION"),
        bin_dir: &arguments.selection.bin_dir,
        out: &arguments.out,
        signer: signer.as_ref(),
        manifest: &arguments.manifest,
    };
    build.run(&steps)
}

fn signer(selection: &Selection, cache: &Cache, lock: &Lock, profile: &Profile) -> Result<Option<Signer>> {
    if let (Some(key), Some(certificate)) = (&selection.key, &selection.cert) {
        return Ok(Some(Signer { key: key.clone(), certificate: certificate.clone() }));
    }
    if !selection.test_key {
        return Ok(None);
    }
    let names = profile.libraries.iter().map(String::as_str).chain(["openssl"]);
    let packages = names.map(|name| lock.get(name)).collect::<Result<Vec<_>>>()?;
    let tools = Tools(Debian::new(cache).merge(&packages)?);
    sign::test_signer(cache, &tools).map(Some)
}

fn write_config(target: &Path, config: &Path) -> Result<()> {
    let bytes = std::fs::read(config).map_err(Error::file("read", config))?;
    configure::write(target, &bytes)?;
    println!("machine.yaml written to {}", target.display());
    Ok(())
}

fn pin(file: &Path) -> Result<()> {
    let profile = Profile::load("release")?;
    let names = profile.packages().into_iter().chain(TOOL_PACKAGES.iter().copied());
    let mut names: Vec<String> =
        names.chain([BOOT_PACKAGE, guest_kernel::SOURCE, debian::KERNEL]).map(str::to_string).collect();
    names.sort();
    names.dedup();
    let lock = Debian::new(&Cache::from_env()?).resolve(&names)?;
    std::fs::write(file, lock.to_text()).map_err(Error::file("write", file))?;
    println!("{} packages pinned in {}", lock.packages().len(), file.display());
    Ok(())
}
