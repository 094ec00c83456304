//! Fetches pinned Debian 13 packages into the cache with the machine's own apt and mirror, and unpacks them.
//!
//! apt runs in a private root: its own sources, lists and downloads, an empty dpkg status, the machine's proxy
//! settings. apt checks the archive's signature against Debian's keyring; the lock file's hash is checked after
//! that, and again nothing else is ever unpacked. Packages are unpacked, never installed.

use crate::apt_sources;
use crate::cache::{Cache, Key, remove_tree, sha256_file};
use crate::error::{Error, Result};
use crate::lock::{Lock, Package};
use crate::program::Program;
use std::fs;
use std::path::{Path, PathBuf};

/// Stands for the package that the metapackage of the host kernel depends on.
pub const KERNEL: &str = "linux-image-amd64*";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Debian packages, by way of the cache.
pub struct Debian<'a> {
    cache: &'a Cache,
}

impl<'a> Debian<'a> {
    /// Packages kept in this cache.
    pub fn new(cache: &'a Cache) -> Self {
        Self { cache }
    }

    /// The .deb files of `packages`, downloaded where the cache lacks them.
    pub fn fetch(&self, packages: &[&Package]) -> Result<Vec<PathBuf>> {
        let store = self.cache.dir("debian")?;
        let place = |p: &Package| store.join(format!("{}.deb", p.sha256));
        if packages.iter().any(|p| !place(p).is_file()) {
            let _held = self.cache.lock("debian/fetch")?;
            let missing: Vec<&Package> = packages.iter().copied().filter(|p| !place(p).is_file()).collect();
            self.download(&missing, &store)?;
        }
        Ok(packages.iter().map(|p| place(p)).collect())
    }

    fn download(&self, missing: &[&Package], store: &Path) -> Result<()> {
        if missing.is_empty() {
            return Ok(());
        }
        eprintln!("atoll-image: fetching {} Debian packages", missing.len());
        let apt = Apt::prepare(self.cache)?;
        let incoming = store.join("incoming");
        let names: Vec<String> = missing.iter().map(|p| format!("{}={}", p.name, p.version)).collect();
        remove_tree(&incoming)?;
        fs::create_dir_all(&incoming).map_err(Error::file("make directory", &incoming))?;
        if !apt.has_lists() || apt.download(&names, &incoming).is_err() {
            apt.update()?;
            apt.download(&names, &incoming)?;
        }
        for package in missing {
            let file = downloaded(&incoming, package)?;
            let found = sha256_file(&file)?;
            if found != package.sha256 {
                return Err(Error::Digest {
                    name: package.name.clone(),
                    found,
                    wanted: package.sha256.clone(),
                });
            }
            let place = store.join(format!("{}.deb", package.sha256));
            fs::rename(&file, &place).map_err(Error::file("move into place", &place))?;
        }
        remove_tree(&incoming)
    }

    /// The unpacked tree of one package.
    pub fn unpack(&self, package: &Package) -> Result<PathBuf> {
        let deb = self.fetch(&[package])?.remove(0);
        self.cache.entry("unpacked", &package.sha256, |dir| {
            let purpose = format!("unpack {}", package.name);
            Program::host("dpkg-deb", purpose).arg("--extract").arg(&deb).arg(dir).run().map(drop)
        })
    }

    /// Several packages unpacked into one tree.
    pub fn merge(&self, packages: &[&Package]) -> Result<PathBuf> {
        let debs = self.fetch(packages)?;
        let key = packages.iter().fold(Key::default(), |key, p| key.with(&p.sha256)).finish();
        self.cache.entry("merged", &key, |dir| {
            for (deb, package) in debs.iter().zip(packages) {
                let purpose = format!("unpack {}", package.name);
                Program::host("dpkg-deb", purpose).arg("--extract").arg(deb).arg(dir).run()?;
            }
            Ok(())
        })
    }

    /// Pins the newest versions of `names` that the mirror has; a name that ends in `*` follows the dependency of
    /// the metapackage before it (`linux-image-amd64*` is the kernel that `linux-image-amd64` depends on).
    pub fn resolve(&self, names: &[String]) -> Result<Lock> {
        let _held = self.cache.lock("debian/fetch")?;
        let apt = Apt::prepare(self.cache)?;
        apt.update()?;
        apt.newest(names).map(Lock::new)
    }

    /// The lock to build from: `pinned`, or where the mirror no longer has a version and the cache neither, with the
    /// mirror's own in its place. Mirrors keep only the newest version of each package, so that a checkout could
    /// otherwise be built until the next security update and no longer. What was taken is said once, kept for the
    /// next builds from the same `pinned`, and stands in the image's list of contents.
    ///
    /// With `strict` a version that is gone is an error.
    pub fn effective(&self, pinned: &Lock, strict: bool) -> Result<Lock> {
        let kept = self
            .cache
            .dir("debian")?
            .join(format!("{}.lock", Key::default().with(pinned.to_text()).finish()));
        let missing: Vec<&Package> = pinned.packages().iter().filter(|p| !self.has(p)).collect();
        if missing.is_empty() {
            return Ok(pinned.clone());
        }
        if !strict && let Ok(text) = fs::read_to_string(&kept) {
            let lock = Lock::parse(&text)?;
            // What it names may be gone by now too.
            if lock.packages().iter().all(|p| self.has(p)) {
                return Ok(lock);
            }
        }
        let _held = self.cache.lock("debian/fetch")?;
        let apt = Apt::prepare(self.cache)?;
        apt.update()?;
        let gone: Vec<&Package> = missing.into_iter().filter(|p| !apt.has(p)).collect();
        if gone.is_empty() {
            return Ok(pinned.clone());
        }
        let words: Vec<String> = gone.iter().map(|p| format!("{} {}", p.name, p.version)).collect();
        if strict {
            return Err(Error::Missing {
                kind: "packages",
                name: words.join(", "),
                place: "on the mirror, although image/debian.lock names them".into(),
                remedy: "build without --locked to take the mirror's newest, or run `atoll-image lock`"
                    .into(),
            });
        }
        let names: Vec<String> = gone.iter().map(|p| successor(&p.name).to_owned()).collect();
        let newer = apt.newest(&names)?;
        for (old, new) in words.iter().zip(&newer) {
            eprintln!("atoll-image: the mirror no longer has {old}: taking {} {}", new.name, new.version);
        }
        let lock = pinned.with(&gone, newer);
        let filling = kept.with_extension("filling");
        fs::write(&filling, lock.to_text()).map_err(Error::file("write", &filling))?;
        fs::rename(&filling, &kept).map_err(Error::file("move into place", &kept))?;
        Ok(lock)
    }

    fn has(&self, package: &Package) -> bool {
        self.cache.dir("debian").is_ok_and(|store| store.join(format!("{}.deb", package.sha256)).is_file())
    }
}

/// Under which name to look for the successor of a package: a kernel's name carries its version.
fn successor(name: &str) -> &str {
    if name.starts_with("linux-image-") { KERNEL } else { name }
}

/// The file that `apt-get download` made of a package.
fn downloaded(dir: &Path, package: &Package) -> Result<PathBuf> {
    let start = format!("{}_", package.name);
    let entries = fs::read_dir(dir).map_err(Error::file("read", dir))?;
    let found = entries.flatten().map(|e| e.path()).find(|p| {
        p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(&start) && n.ends_with(".deb"))
    });
    found.ok_or_else(|| Error::Missing {
        kind: "package",
        name: format!("{} {}", package.name, package.version),
        place: "on the mirror".into(),
        remedy: "run `atoll-image lock` to pin the versions it has".into(),
    })
}

/// A field of an apt record.
fn field(record: &str, key: &str, package: &str) -> Result<String> {
    let found = record.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
    found
        .map(str::to_string)
        .ok_or_else(|| Error::format(format!("apt's record of {package}"), format!("no {key}")))
}

/// apt in its private root.
struct Apt {
    root: PathBuf,
}

impl Apt {
    fn prepare(cache: &Cache) -> Result<Self> {
        let root = cache.dir("apt")?;
        for dir in ["sources.d", "state/lists/partial", "cache/archives/partial", "preferences.d"] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).map_err(Error::file("make directory", &dir))?;
        }
        let (lists, deb822) = host_sources()?;
        let sources = apt_sources::for_release(&lists, &deb822, KEYRING).ok_or_else(|| Error::Missing {
            kind: "Debian mirror",
            name: "(main component)".into(),
            place: "in /etc/apt/sources.list and /etc/apt/sources.list.d".into(),
            remedy: "configure one; its packages are only unpacked, never installed".into(),
        })?;
        let write = |name: &str, text: &str| {
            let path = root.join(name);
            fs::write(&path, text).map_err(Error::file("write", &path))
        };
        write("sources.d/debian.sources", &sources)?;
        write("status", "")?;
        write("apt.conf", &configuration(&root))?;
        Ok(Self { root })
    }

    fn program(&self, name: &str, purpose: &str) -> Program {
        Program::host(name, purpose).arg("-c").arg(self.root.join("apt.conf"))
    }

    fn has_lists(&self) -> bool {
        let entries = fs::read_dir(self.root.join("state/lists"));
        entries.is_ok_and(|entries| {
            entries.flatten().any(|e| e.file_name().to_string_lossy().contains("_Packages"))
        })
    }

    fn update(&self) -> Result<()> {
        self.program("apt-get", "read the mirror's lists of Debian 13").args(["-q", "update"]).run().map(drop)
    }

    fn download(&self, names: &[String], dir: &Path) -> Result<()> {
        let program = self.program("apt-get", "fetch Debian packages").args(["-q", "download"]);
        program.args(names).current_dir(dir).run().map(drop)
    }

    /// Whether the mirror has just this version with just this content.
    fn has(&self, package: &Package) -> bool {
        let name = format!("{}={}", package.name, package.version);
        self.show(&name)
            .is_ok_and(|record| field(&record, "SHA256", &name).is_ok_and(|sha| sha == package.sha256))
    }

    /// The newest version of each of `names`, in their order; see [`Debian::resolve`] for those that end in `*`.
    fn newest(&self, names: &[String]) -> Result<Vec<Package>> {
        let mut packages = Vec::new();
        for name in names {
            let record = match name.strip_suffix('*') {
                None => self.show(name)?,
                Some(meta) => {
                    let depends = field(&self.show(meta)?, "Depends", meta)?;
                    let target = depends.split([' ', ',']).next().unwrap_or_default().to_string();
                    self.show(&target)?
                }
            };
            packages.push(Package {
                name: field(&record, "Package", name)?,
                version: field(&record, "Version", name)?,
                architecture: field(&record, "Architecture", name)?,
                sha256: field(&record, "SHA256", name)?,
            });
        }
        Ok(packages)
    }

    fn show(&self, name: &str) -> Result<String> {
        let program = self.program("apt-cache", &format!("find the package {name}"));
        let output = program.args(["show", "--no-all-versions", name]).run()?;
        Ok(String::from_utf8_lossy(&output).into_owned())
    }
}

/// What differs from the machine's apt: everything that touches its state, and nothing of how it reaches mirrors.
fn configuration(root: &Path) -> String {
    let root = root.display();
    format!(
        "Dir::Etc::SourceList \"/dev/null\";\nDir::Etc::SourceParts \"{root}/sources.d\";\n\
         Dir::Etc::Preferences \"/dev/null\";\nDir::Etc::PreferencesParts \"{root}/preferences.d\";\n\
         Dir::State \"{root}/state\";\nDir::State::status \"{root}/status\";\nDir::Cache \"{root}/cache\";\n\
         APT::Architecture \"amd64\";\nAPT::Architectures \"amd64\";\nAPT::Sandbox::User \"root\";\n\
         APT::Update::Error-Mode \"any\";\nAcquire::Languages \"none\";\n\
         #clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n\
         #clear Acquire::IndexTargets::deb::DEP-11;\n"
    )
}

/// Texts of the machine's `.list` and `.sources` files.
fn host_sources() -> Result<(Vec<String>, Vec<String>)> {
    let read = |path: &Path| fs::read_to_string(path).map_err(Error::file("read", path));
    let (mut lists, mut deb822) = (Vec::new(), Vec::new());
    let main = Path::new("/etc/apt/sources.list");
    if main.exists() {
        lists.push(read(main)?);
    }
    let parts = Path::new("/etc/apt/sources.list.d");
    let mut paths: Vec<PathBuf> = match fs::read_dir(parts) {
        Ok(entries) => entries.flatten().map(|e| e.path()).collect(),
        Err(_) => Vec::new(), // a machine without the directory has its sources in the one file
    };
    paths.sort();
    for path in paths {
        match path.extension().and_then(|e| e.to_str()) {
            Some("list") => lists.push(read(&path)?),
            Some("sources") => deb822.push(read(&path)?),
            _ => {}
        }
    }
    Ok((lists, deb822))
}
