//! Executes a plan. Every result is written beside its place and renamed, so that `--out` never holds half a file.

use crate::cache::{Cache, remove_tree, sha256_file};
use crate::debian::Debian;
use crate::error::{Error, Result};
use crate::kernel::{self, Kernel};
use crate::layout::{Layout, SECTOR};
use crate::lock::{Lock, Package};
use crate::plan::{Step, slot_path};
use crate::profile::{BOOT_PACKAGE, Profile, TOOL_PACKAGES};
use crate::program::Tools;
use crate::sign::Signer;
use crate::uki::Section;
use crate::{esp, gpt, guest_kernel, libraries, sbom, secure_boot, system, uki};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Boot menu: none, unless a key is held; no editing of the command line.
const LOADER_CONF: &str = "timeout 0\neditor no\nconsole-mode keep\n";

/// What a build works on.
pub struct Build<'a> {
    /// The cache.
    pub cache: &'a Cache,
    /// Pinned packages.
    pub lock: &'a Lock,
    /// What to build.
    pub profile: &'a Profile,
    /// Atoll's version.
    pub version: &'a str,
    /// Where Atoll's programs are.
    pub bin_dir: &'a Path,
    /// Where results go.
    pub out: &'a Path,
    /// Key for Secure Boot.
    pub signer: Option<&'a Signer>,
    /// The workspace's Cargo.toml, for the list of crates.
    pub manifest: &'a Path,
}

/// What earlier steps leave for later ones.
#[derive(Default)]
struct Made {
    packages: PathBuf,
    tools: Option<Tools>,
    boot: PathBuf,
    guest_kernel: PathBuf,
    kernel: Option<Kernel>,
    binaries: Vec<(String, PathBuf)>,
    system: PathBuf,
    initramfs: Vec<u8>,
    sizes: Vec<(String, u64)>,
    uki: PathBuf,
    results: Vec<String>,
}

impl Build<'_> {
    /// Runs the steps; prints one line for each, with its time.
    pub fn run(&self, steps: &[Step]) -> Result<()> {
        fs::create_dir_all(self.out).map_err(Error::file("make directory", self.out))?;
        let mut made = Made::default();
        for step in steps {
            let start = Instant::now();
            self.step(step, &mut made)?;
            eprintln!("atoll-image: {:<20} {:>6.1} s", step.name(), start.elapsed().as_secs_f64());
        }
        eprint!("{}", size_table(&made.sizes));
        Ok(())
    }

    fn step(&self, step: &Step, made: &mut Made) -> Result<()> {
        match step {
            Step::Fetch(_) => self.fetch(made),
            Step::GuestKernel(_) => {
                made.guest_kernel = guest_kernel::build(self.cache, self.lock)?;
                Ok(())
            }
            Step::HostKernel { .. } => {
                made.kernel = Some(kernel::prepare(self.cache, self.lock, tools(made)?, self.profile)?);
                Ok(())
            }
            Step::System { binaries, missing, .. } => self.system(binaries, missing, made),
            Step::Initramfs(_) => self.initramfs(made),
            Step::Uki { file, limit, .. } => self.uki(file, *limit, made),
            Step::Sign => self.sign(made),
            Step::Disk { file, layout, .. } => self.disk(file, layout, made),
            Step::Sbom(file) => self.sbom(file, made),
            Step::Checksums(file) => self.checksums(file, made),
        }
    }

    fn packages(&self, names: &[&str]) -> Result<Vec<&Package>> {
        names.iter().map(|name| self.lock.get(name)).collect()
    }

    /// Packages of the system tree and of the tools; the tools' libraries are those of the system.
    fn fetch(&self, made: &mut Made) -> Result<()> {
        let debian = Debian::new(self.cache);
        let system = self.profile.packages();
        let mut tools = system.clone();
        tools.extend(TOOL_PACKAGES.iter().filter(|t| !system.contains(t)));
        let (kernel, _) = self.lock.kernel()?;
        let mut all = self.packages(&tools)?;
        all.extend([kernel, self.lock.get(BOOT_PACKAGE)?]);
        debian.fetch(&all)?;
        made.packages = debian.merge(&self.packages(&system)?)?;
        made.tools = Some(Tools(debian.merge(&self.packages(&tools)?)?));
        let boot = debian.unpack(self.lock.get(BOOT_PACKAGE)?)?;
        made.boot = boot.join("usr/lib/systemd/boot/efi");
        Ok(())
    }

    fn system(&self, binaries: &[String], missing: &[String], made: &mut Made) -> Result<()> {
        if !missing.is_empty() {
            let dir = self.bin_dir.display();
            eprintln!("atoll-image: WARNING: not in {dir}, so not in this image: {}", missing.join(" "));
        }
        let path = |name: &String| (name.clone(), self.bin_dir.join(name));
        made.binaries = binaries.iter().filter(|name| **name != self.profile.guest).map(path).collect();
        let guest = self.bin_dir.join(&self.profile.guest);
        let guest_initramfs = match binaries.contains(&self.profile.guest) {
            true => system::guest_initramfs(&static_program(&guest, "the first process of every pod")?),
            false => Vec::new(),
        };
        let kernel = host_kernel(made)?;
        let tree = system::tree(system::Inputs {
            profile: self.profile,
            packages: &made.packages,
            modules: &kernel.modules,
            release: &kernel.release,
            version: self.version,
            binaries: &made.binaries,
            guest_kernel: &made.guest_kernel,
            guest_initramfs,
        })?;
        let packed = system::pack(self.cache, tools(made)?, &tree)?;
        made.sizes.extend(tree.sizes()?);
        made.system = packed;
        Ok(())
    }

    fn initramfs(&self, made: &mut Made) -> Result<()> {
        let init = static_program(
            &self.bin_dir.join("atoll-init"),
            "the host's first process, which runs before any library is there",
        )?;
        let read = |path: &Path| fs::read(path).map_err(Error::file("read", path));
        let early = host_kernel(made)?.early.iter();
        let early = early.map(|(name, path)| Ok((name.clone(), read(path)?))).collect::<Result<Vec<_>>>()?;
        made.initramfs = system::initramfs(&init, &early, &read(&made.system)?);
        Ok(())
    }

    fn uki(&self, file: &str, limit: u64, made: &mut Made) -> Result<()> {
        let read = |path: &Path| fs::read(path).map_err(Error::file("read", path));
        let kernel = host_kernel(made)?;
        let (stub, linux) = (read(&made.boot.join("linuxx64.efi.stub"))?, read(&kernel.image)?);
        let (os_release, command_line) =
            (system::os_release(self.version), self.profile.command_line.as_bytes());
        let sections = [
            Section { name: ".osrel", content: os_release.as_bytes() },
            Section { name: ".cmdline", content: command_line },
            Section { name: ".uname", content: kernel.release.as_bytes() },
            Section { name: ".initrd", content: &made.initramfs },
            Section { name: ".linux", content: &linux },
        ];
        let image = uki::link(&stub, &sections)?;
        let size = image.len() as u64;
        for (what, bytes) in [
            ("host kernel", linux.len()),
            ("initramfs, packed", made.initramfs.len()),
            ("atoll.efi", image.len()),
        ] {
            made.sizes.push((what.into(), bytes as u64));
        }
        made.initramfs = Vec::new();
        if size > limit << 20 {
            eprint!("{}", size_table(&made.sizes));
            return Err(Error::TooLarge { what: file.into(), size, limit: limit << 20 });
        }
        self.publish(file, made, |path| fs::write(path, &image).map_err(Error::file("write", path)))?;
        made.uki = self.out.join(file);
        Ok(())
    }

    fn sign(&self, made: &mut Made) -> Result<()> {
        let Some(signer) = self.signer else { return Ok(()) };
        let signed = self.out.join("atoll.efi.signed");
        signer.sign(tools(made)?, &made.uki, &signed)?;
        fs::rename(&signed, &made.uki).map_err(Error::file("move into place", &made.uki))
    }

    fn disk(&self, file: &str, layout: &Layout, made: &mut Made) -> Result<()> {
        let work = self.out.join("esp.work");
        remove_tree(&work)?;
        fs::create_dir(&work).map_err(Error::file("make directory", &work))?;
        let files = self.esp_files(&work, made)?;
        let esp = layout.partitions[0];
        esp::make(tools(made)?, &work.join("esp"), esp.size(), &files)?;
        self.publish(file, made, |path| {
            let failed = |e| Error::file("write", path)(e);
            let mut disk = File::create(path).map_err(failed)?;
            disk.set_len(layout.sectors * SECTOR).map_err(failed)?;
            gpt::write(&mut disk, layout).map_err(failed)?;
            esp::embed(&work.join("esp"), &mut disk, esp.offset()).map_err(failed)
        })?;
        remove_tree(&work)
    }

    /// The ESP's files: path there and path here.
    fn esp_files(&self, work: &Path, made: &Made) -> Result<Vec<(String, PathBuf)>> {
        let configuration = work.join("loader.conf");
        fs::write(&configuration, LOADER_CONF).map_err(Error::file("write", &configuration))?;
        let mut loader = made.boot.join("systemd-bootx64.efi");
        let mut keys = Vec::new();
        if let Some(signer) = self.signer {
            let signed = work.join("bootx64.efi");
            signer.sign(tools(made)?, &loader, &signed)?;
            loader = signed;
            let updates = secure_boot::updates(tools(made)?, signer, work)?;
            keys.extend(secure_boot::paths().into_iter().zip(updates));
        }
        let mut files = vec![
            ("EFI/BOOT/BOOTX64.EFI".to_string(), loader),
            ("loader/loader.conf".into(), configuration),
            (slot_path(self.version), made.uki.clone()),
        ];
        files.extend(keys);
        Ok(files)
    }

    fn sbom(&self, file: &str, made: &mut Made) -> Result<()> {
        let mut names = self.profile.packages();
        let (kernel, _) = self.lock.kernel()?;
        names.extend([kernel.name.as_str(), guest_kernel::SOURCE, BOOT_PACKAGE]);
        let debian = Debian::new(self.cache);
        let (host, boot) = (debian.unpack(kernel)?, debian.unpack(self.lock.get(BOOT_PACKAGE)?)?);
        let mut components =
            sbom::debian(&self.packages(&names)?, &kernel.name, &[&made.packages, &host, &boot]);
        let kernel = host_kernel(made)?;
        components.extend(sbom::modules(&kernel.modules, &kernel.release)?);
        let mut programs = self.profile.binaries.clone();
        programs.push(self.profile.guest.clone());
        components.extend(sbom::crates(self.manifest, &programs)?);
        let text = sbom::document(&format!("atoll-{}-{}", self.profile.name, self.version), &components)?;
        self.publish(file, made, |path| fs::write(path, &text).map_err(Error::file("write", path)))
    }

    fn checksums(&self, file: &str, made: &mut Made) -> Result<()> {
        let mut text = String::new();
        for result in &made.results {
            text.push_str(&format!("{}  {result}\n", sha256_file(&self.out.join(result))?));
        }
        self.publish(file, made, |path| fs::write(path, &text).map_err(Error::file("write", path)))
    }

    fn publish(&self, file: &str, made: &mut Made, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (new, place) = (self.out.join(format!("{file}.new")), self.out.join(file));
        write(&new)?;
        fs::rename(&new, &place).map_err(Error::file("move into place", &place))?;
        made.results.push(file.to_string());
        Ok(())
    }
}

/// A program that must not need the dynamic loader.
fn static_program(path: &Path, role: &str) -> Result<Vec<u8>> {
    let bytes = fs::read(path).map_err(Error::file("read", path))?;
    if libraries::needs(path)?.loader.is_some() {
        let problem = format!(
            "needs shared libraries, but it is {role}: build it static (target x86_64-unknown-linux-musl)"
        );
        return Err(Error::format(path.display().to_string(), problem));
    }
    Ok(bytes)
}

fn tools(made: &Made) -> Result<&Tools> {
    made.tools.as_ref().ok_or_else(|| Error::format("plan", "packages are used before they are fetched"))
}

fn host_kernel(made: &Made) -> Result<&Kernel> {
    made.kernel.as_ref().ok_or_else(|| Error::format("plan", "the host kernel is used before it is unpacked"))
}

fn size_table(sizes: &[(String, u64)]) -> String {
    let line = |(what, bytes): &(String, u64)| {
        format!("  {what:<36} {:>9.2} MiB\n", *bytes as f64 / f64::from(1 << 20))
    };
    sizes.iter().map(line).collect()
}
