//! The read-only system tree (`system.erofs`) and the initramfs around it.
//!
//! The tree is described first and packed from a tar stream, so its bytes depend on its content alone. It holds
//! no shell and no package manager, and nothing in it is specific to a machine.

use crate::cache::{Cache, Key, sha256_file};
use crate::cpio;
use crate::error::{Error, Result};
use crate::libraries;
use crate::profile::Profile;
use crate::program::Tools;
use crate::tree::{Content, Node, Tree};
use std::fs;
use std::path::{Path, PathBuf};

/// What the tree is made of.
pub struct Inputs<'a> {
    /// The profile.
    pub profile: &'a Profile,
    /// Debian packages merged.
    pub packages: &'a Path,
    /// `lib/modules/<release>` of the chosen modules, indexed.
    pub modules: &'a Path,
    /// The host kernel's release.
    pub release: &'a str,
    /// Atoll's version.
    pub version: &'a str,
    /// Atoll's programs that exist: name and path.
    pub binaries: &'a [(String, PathBuf)],
    /// Guest kernel.
    pub guest_kernel: &'a Path,
    /// Guest initramfs.
    pub guest_initramfs: Vec<u8>,
}

/// Describes the system tree.
pub fn tree(inputs: Inputs<'_>) -> Result<Tree> {
    let mut tree = Tree::default();
    skeleton(&mut tree);
    accounts(&mut tree);
    tree.text("/etc/os-release", os_release(inputs.version));
    for (package, paths) in &inputs.profile.programs {
        for path in paths {
            let from = inputs.packages.join(path.trim_start_matches('/'));
            tree.copy(&from, path).map_err(|_| Error::Missing {
                kind: "file",
                name: path.clone(),
                place: format!("in the package {package}"),
                remedy: "correct its path in the profile".into(),
            })?;
        }
    }
    certificates(&mut tree, inputs.packages)?;
    for (name, path) in inputs.binaries {
        let content = Content::File(path.clone());
        tree.insert(&format!("/usr/bin/{name}"), Node::File(0o755, content));
    }
    tree.copy(inputs.modules, &format!("/usr/lib/modules/{}", inputs.release))?;
    tree.copy(inputs.guest_kernel, "/usr/lib/atoll/guest/vmlinux")?;
    let initramfs = Content::Bytes(inputs.guest_initramfs);
    tree.insert("/usr/lib/atoll/guest/initramfs.cpio", Node::File(0o644, initramfs));
    if !inputs.profile.services.is_empty() {
        let text = serde_json::to_string_pretty(&inputs.profile.services)
            .map_err(|e| Error::format("test-services.json", e.to_string()))?;
        tree.text("/usr/lib/atoll/test-services.json", text + "\n");
    }
    libraries::complete(&mut tree, inputs.packages)?;
    // The loader's path is built into every program.
    tree.symlink("/usr/lib64/ld-linux-x86-64.so.2", "../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
    Ok(tree)
}

fn skeleton(tree: &mut Tree) {
    tree.directory("/", 0o755);
    for mount_point in
        ["/proc", "/sys", "/dev", "/run", "/var", "/esp", "/state", "/data", "/usr/lib/firmware"]
    {
        tree.directory(mount_point, 0o755);
    }
    tree.directory("/tmp", 0o1777);
    tree.directory("/root", 0o700);
    for name in ["bin", "sbin", "lib", "lib64"] {
        tree.symlink(&format!("/{name}"), &format!("usr/{name}"));
    }
    tree.symlink("/etc/resolv.conf", "/run/atoll/net/resolv.conf");
    tree.symlink("/etc/hostname", "/run/atoll/net/hostname");
    tree.symlink("/etc/mtab", "/proc/self/mounts");
}

fn accounts(tree: &mut Tree) {
    tree.text(
        "/etc/passwd",
        "root:x:0:0:root:/root:/usr/sbin/nologin\natoll-agent:x:800:800:Atoll node agent:/:/usr/sbin/nologin\n\
         nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    );
    tree.text("/etc/group", "root:x:0:\natoll-agent:x:800:\natoll-cri:x:801:atoll-agent\nnogroup:x:65534:\n");
    tree.text(
        "/etc/nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
    );
    tree.text("/etc/hosts", "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
}

/// `/etc/os-release`, also in the UKI, where the boot loader reads it.
pub fn os_release(version: &str) -> String {
    format!(
        "ID=atoll\nNAME=Atoll\nPRETTY_NAME=\"Atoll {version}\"\nVERSION={version}\nVERSION_ID={version}\n"
    )
}

/// One file with every authority of ca-certificates, where libraries look for it.
fn certificates(tree: &mut Tree, packages: &Path) -> Result<()> {
    let dir = packages.join("usr/share/ca-certificates/mozilla");
    let mut paths: Vec<PathBuf> =
        fs::read_dir(&dir).map_err(Error::file("read", &dir))?.flatten().map(|e| e.path()).collect();
    paths.sort();
    let mut bundle = Vec::new();
    for path in paths {
        bundle.extend(fs::read(&path).map_err(Error::file("read", &path))?);
    }
    tree.text("/etc/ssl/certs/ca-certificates.crt", bundle);
    Ok(())
}

/// Packs a tree into erofs, once per content. The same content always gives the same bytes.
pub fn pack(cache: &Cache, tools: &Tools, tree: &Tree) -> Result<PathBuf> {
    const OPTIONS: [&str; 6] =
        ["-zlz4hc,level=9", "-C65536", "-T0", "-U00000000-0000-0000-0000-000000000000", "-x-1", "--quiet"];
    let staging = cache.dir("system")?;
    let tar = staging.join(format!("tree.{}.tar", std::process::id()));
    let file = fs::File::create(&tar).map_err(Error::file("write", &tar))?;
    let mut writer = std::io::BufWriter::with_capacity(1 << 20, file);
    tree.write_tar(&mut writer)?;
    std::io::Write::flush(&mut writer).map_err(Error::file("write", &tar))?;
    let key = Key::default()
        .with(sha256_file(&tar)?)
        .with(OPTIONS.join(" "))
        .with(tools.0.to_string_lossy().as_ref())
        .finish();
    let made = cache.entry("system", &key, |dir| {
        tools
            .mkfs_erofs()
            .args(OPTIONS)
            .arg("--tar=f")
            .arg(dir.join("system.erofs"))
            .arg(&tar)
            .run()
            .map(drop)
    });
    fs::remove_file(&tar).map_err(Error::file("remove", &tar))?;
    let made = made?;
    // Other builds may be reading theirs: more are kept than run at once.
    cache.keep_newest("system", 8)?;
    Ok(made.join("system.erofs"))
}

/// The host's initramfs: init, the modules that mount the system tree, and the tree.
pub fn initramfs(init: &[u8], early: &[(String, Vec<u8>)], system: &[u8]) -> Vec<u8> {
    let mut archive = cpio::Archive::default();
    for dir in ["dev", "modules", "proc", "run", "sys", "system"] {
        archive.directory(dir, 0o755);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, init);
    let mut list = String::new();
    for (name, content) in early {
        let path = format!("modules/{name}.ko");
        list.push_str(&format!("/{path}\n"));
        archive.file(&path, 0o644, content);
    }
    archive.file("modules.early", 0o644, list.as_bytes());
    archive.file("system.erofs", 0o444, system);
    archive.finish()
}

/// The guest's initramfs: its first process alone.
pub fn guest_initramfs(guest: &[u8]) -> Vec<u8> {
    let mut archive = cpio::Archive::default();
    for dir in ["dev", "proc", "run", "sys", "tmp"] {
        archive.directory(dir, 0o755);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, guest);
    archive.finish()
}
