//! Registries for the tests: Debian's `docker-registry` on loopback, images put into it, mkfs.erofs to unpack with.

pub mod scripted;

use atoll_image::cache::Cache;
use atoll_image::debian::Debian;
use atoll_image::lock::{self, Lock};
use atoll_image::profile::{Profile, TOOL_PACKAGES};
use atoll_runtime::images::{Digest, StoreOptions};
use flate2::Compression;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(20);

/// What `docker-registry` wants to be told, by its settings.
#[derive(Default)]
pub struct Settings {
    pub tls: Option<(PathBuf, PathBuf)>,
    pub htpasswd: Option<PathBuf>,
}

/// An address of loopback that nobody listens on. Not one that the kernel chooses: those it gives to everybody who asks
/// for any, also in the moment until the registry takes it.
fn free_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = std::process::id() as u16 % 150 * 64;
    let ports = || 20_000 + first + NEXT.fetch_add(1, Ordering::Relaxed) % 64;
    let address = std::iter::repeat_with(ports).map(|port| format!("127.0.0.1:{port}"));
    address.take(64).find(|address| TcpListener::bind(address).is_ok()).expect("one of 64 ports is free")
}

/// A running registry.
pub struct Registry {
    child: Child,
    pub address: String,
}

impl Registry {
    /// Over the given storage directory.
    pub fn start(storage: &Path, settings: &Settings) -> Self {
        let address = free_address();
        let mut text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\nhttp:\n  addr: {address}\n",
            storage.display()
        );
        if let Some((certificate, key)) = &settings.tls {
            text += &format!("  tls: {{certificate: {}, key: {}}}\n", certificate.display(), key.display());
        }
        if let Some(htpasswd) = &settings.htpasswd {
            text += &format!("auth:\n  htpasswd: {{realm: test, path: {}}}\n", htpasswd.display());
        }
        let config = storage.join(format!("config-{}.yml", address.replace(':', "-")));
        std::fs::write(&config, text).unwrap();
        let child = Command::new("/usr/bin/docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("Debian's docker-registry runs (`./just setup` installs it)");
        let registry = Self { child, address };
        let until = Instant::now() + DEADLINE;
        while TcpStream::connect(&registry.address).is_err() {
            assert!(Instant::now() < until, "docker-registry does not listen on {}", registry.address);
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    /// Sends a request over plain HTTP; gives status and headers.
    fn request(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let text = String::from_utf8_lossy(&answer).into_owned();
        (text.split(' ').nth(1).unwrap().parse().unwrap(), text)
    }

    pub fn put_blob(&self, repository: &str, blob: &[u8]) -> Digest {
        let digest = Digest::of(blob);
        let (status, head) = self.request("POST", &format!("/v2/{repository}/blobs/uploads/"), "", &[]);
        assert_eq!(status, 202, "{head}");
        let location = head.lines().find_map(|line| line.strip_prefix("Location: ")).unwrap().trim();
        let path = location.strip_prefix(&format!("http://{}", self.address)).unwrap_or(location);
        let (status, head) =
            self.request("PUT", &format!("{path}&digest={digest}"), "application/octet-stream", blob);
        assert_eq!(status, 201, "{head}");
        digest
    }

    pub fn put_manifest(&self, repository: &str, tag: &str, kind: &str, text: &str) -> Digest {
        let (status, head) =
            self.request("PUT", &format!("/v2/{repository}/manifests/{tag}"), kind, text.as_bytes());
        assert_eq!(status, 201, "{head}");
        Digest::of(text.as_bytes())
    }

    /// Puts an image there; gives the manifest's digest and length.
    pub fn put_image(&self, repository: &str, tag: &str, image: &TestImage) -> (Digest, usize) {
        let text = image.manifest(|blob| self.put_blob(repository, blob));
        (self.put_manifest(repository, tag, image.family.manifest(), &text), text.len())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Ours, and nothing of it is to be kept.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Clone, Copy)]
pub enum Family {
    Oci,
    Docker,
}

impl Family {
    fn manifest(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.manifest.v1+json",
            Self::Docker => "application/vnd.docker.distribution.manifest.v2+json",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.config.v1+json",
            Self::Docker => "application/vnd.docker.container.image.v1+json",
        }
    }

    fn layer(self, packing: Packing) -> &'static str {
        match (self, packing) {
            (Self::Docker, _) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (Self::Oci, Packing::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (Self::Oci, Packing::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Self::Oci, Packing::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

#[derive(Clone, Copy)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

pub fn pack(tar: &[u8], packing: Packing) -> Vec<u8> {
    match packing {
        Packing::Plain => tar.to_vec(),
        Packing::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
        Packing::Zstd => zstd::encode_all(tar, 1).unwrap(),
    }
}

/// An image to be.
pub struct TestImage {
    pub family: Family,
    pub architecture: &'static str,
    pub layers: Vec<(Vec<u8>, Packing)>,
    /// Instead of the layers' own digests.
    pub diff_ids: Option<Vec<Digest>>,
}

impl TestImage {
    pub fn new(family: Family, layers: Vec<(Vec<u8>, Packing)>) -> Self {
        Self { family, architecture: "amd64", layers, diff_ids: None }
    }

    pub fn config(&self) -> String {
        let own = || self.layers.iter().map(|(tar, _)| Digest::of(tar)).collect();
        let diff_ids: Vec<String> =
            self.diff_ids.clone().unwrap_or_else(own).iter().map(ToString::to_string).collect();
        serde_json::json!({
            "os": "linux", "architecture": self.architecture,
            "config": {"User": "web", "Env": ["A=1"], "Cmd": ["/bin/sh"], "WorkingDir": "/srv"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string()
    }

    /// The manifest, after `put` has taken the blobs.
    pub fn manifest(&self, put: impl Fn(&[u8]) -> Digest) -> String {
        let config = self.config();
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|(tar, packing)| {
                let blob = pack(tar, *packing);
                serde_json::json!({"mediaType": self.family.layer(*packing), "digest": put(&blob).as_str(), "size": blob.len()})
            })
            .collect();
        serde_json::json!({
            "schemaVersion": 2, "mediaType": self.family.manifest(),
            "config": {"mediaType": self.family.config(), "digest": put(config.as_bytes()).as_str(), "size": config.len()},
            "layers": layers,
        })
        .to_string()
    }
}

/// A tar with files (name, content).
pub fn layer(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o640);
        header.set_uid(33);
        header.set_gid(44);
        header.set_mtime(1_000_000_000);
        builder.append_data(&mut header, name, content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Debian 13's mkfs.erofs, from the packages that images are built with, copied with its libraries to where every user
/// can read it.
pub fn mkfs_erofs(directory: &Path) -> PathBuf {
    let root = debian_tools().unwrap_or_else(|error| {
        panic!("these tests need Debian 13's erofs-utils, which `./just build` fetches as well: {error}")
    });
    copy_program(&root.join("usr/bin/mkfs.erofs"), &root, directory)
        .expect("mkfs.erofs is among the packages that images are built with")
}

/// The same directory of the build cache that the image builder makes.
fn debian_tools() -> atoll_image::error::Result<PathBuf> {
    let cache = Cache::from_env()?;
    let debian = Debian::new(&cache);
    let lock = debian.effective(&Lock::parse(lock::BUILT_IN)?, false)?;
    let profile = Profile::load("release")?;
    let mut names = profile.packages();
    let more: Vec<&str> = TOOL_PACKAGES.iter().copied().filter(|name| !names.contains(name)).collect();
    names.extend(more);
    let packages =
        names.into_iter().map(|name| lock.get(name)).collect::<atoll_image::error::Result<Vec<_>>>()?;
    debian.merge(&packages)
}

fn copy_program(program: &Path, root: &Path, directory: &Path) -> Option<PathBuf> {
    let loader = root.join("usr/lib64/ld-linux-x86-64.so.2");
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let listed = Command::new(&loader)
        .arg("--library-path")
        .arg(&libraries)
        .arg("--list")
        .arg(program)
        .output()
        .ok()?;
    let listed = String::from_utf8(listed.stdout).ok()?;
    let target = directory.join("erofs");
    std::fs::create_dir(&target).ok()?;
    for path in listed.lines().filter_map(|line| line.split("=> ").nth(1)?.split(' ').next()) {
        std::fs::copy(path, target.join(Path::new(path).file_name()?)).ok()?;
    }
    std::fs::copy(&loader, target.join("loader")).ok()?;
    std::fs::copy(program, target.join("program")).ok()?;
    let at = target.display();
    let script = format!("#!/bin/sh\nexec {at}/loader --library-path {at} {at}/program \"$@\"\n");
    let wrapper = target.join("mkfs.erofs");
    std::fs::write(&wrapper, script).ok()?;
    for name in ["mkfs.erofs", "loader", "program"] {
        std::fs::set_permissions(target.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .ok()?;
    }
    Some(wrapper)
}

/// Options of a store in `directory`, as on a host. Only root can make the unpack helper's jail.
pub fn options(directory: &Path) -> StoreOptions {
    assert!(rustix::process::geteuid().is_root(), "these tests need root: the unpack helper gives it up");
    std::fs::set_permissions(directory, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let mkfs_erofs = mkfs_erofs(directory);
    // As on a host, where the store is root's alone: the helper's user cannot walk to it.
    let closed = directory.join("closed");
    std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&closed).unwrap();
    StoreOptions {
        registries: directory.join("registries.json"),
        mkfs_erofs,
        helper: env!("CARGO_BIN_EXE_atoll-runtime").into(),
        helper_uid: Some(65534),
        ..StoreOptions::new(closed.join("store"))
    }
}
