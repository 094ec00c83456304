//! Makes small OCI images for tests out of files of this machine, without a container engine.

use anyhow::Context;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::Path;

/// Content with its digest.
#[derive(Debug, Clone)]
pub struct Blob {
    /// `sha256:<hex>`.
    pub digest: String,
    /// The content.
    pub bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        Self { digest: digest(&bytes), bytes }
    }
}

/// `sha256:<hex>` of `bytes`.
pub fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    format!("sha256:{}", hash.iter().map(|b| format!("{b:02x}")).collect::<String>())
}

/// One layer under construction.
pub struct Layer {
    tar: tar::Builder<Vec<u8>>,
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Layer")
    }
}

impl Default for Layer {
    fn default() -> Self {
        Self { tar: tar::Builder::new(Vec::new()) }
    }
}

impl Layer {
    fn append(
        mut self,
        kind: tar::EntryType,
        path: &str,
        mode: u32,
        link: Option<&str>,
        bytes: &[u8],
    ) -> anyhow::Result<Self> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(bytes.len() as u64);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        match link {
            Some(target) => self.tar.append_link(&mut header, path, target),
            None => self.tar.append_data(&mut header, path, bytes),
        }
        .with_context(|| format!("cannot add {path} to a layer"))?;
        Ok(self)
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// When the path cannot stand in a tar.
    pub fn directory(self, path: &str, mode: u32) -> anyhow::Result<Self> {
        self.append(tar::EntryType::Directory, path, mode, None, &[])
    }

    /// Adds a file.
    ///
    /// # Errors
    /// When the path cannot stand in a tar.
    pub fn file(self, path: &str, mode: u32, bytes: &[u8]) -> anyhow::Result<Self> {
        self.append(tar::EntryType::Regular, path, mode, None, bytes)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// When the path cannot stand in a tar.
    pub fn symlink(self, path: &str, target: &str) -> anyhow::Result<Self> {
        self.append(tar::EntryType::Symlink, path, 0o777, Some(target), &[])
    }

    fn finish(self) -> anyhow::Result<Vec<u8>> {
        self.tar.into_inner().context("cannot finish a layer")
    }
}

/// A whole image.
#[derive(Debug)]
pub struct Image {
    config: Blob,
    layers: Vec<Blob>,
}

impl Image {
    /// Packs layers (lowest first) and the `config` section of the image configuration.
    ///
    /// # Errors
    /// When a layer cannot be packed.
    pub fn new(layers: Vec<Layer>, config: Value) -> anyhow::Result<Self> {
        let archives = layers.into_iter().map(Layer::finish).collect::<anyhow::Result<Vec<_>>>()?;
        Self::of_archives(&archives, config)
    }

    /// The same of archives that are tars already, or pretend to be.
    ///
    /// # Errors
    /// When one cannot be packed.
    pub fn of_archives(archives: &[Vec<u8>], config: Value) -> anyhow::Result<Self> {
        let mut blobs = Vec::new();
        let mut diff_ids = Vec::new();
        for tar in archives {
            diff_ids.push(digest(tar));
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(tar)?;
            blobs.push(Blob::new(gzip.finish()?));
        }
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        Ok(Self { config: Blob::new(serde_json::to_vec(&config)?), layers: blobs })
    }

    /// Debian's static busybox with a link for each of its commands, and the users root and app (1000).
    ///
    /// # Errors
    /// When busybox-static is not installed.
    pub fn busybox() -> anyhow::Result<Self> {
        Self::new(vec![busybox_layer()?], Self::busybox_config())
    }

    /// The same under more layers, lowest first.
    ///
    /// # Errors
    /// When busybox-static is not installed.
    pub fn busybox_under(archives: Vec<Vec<u8>>) -> anyhow::Result<Self> {
        let archives = [vec![busybox_layer()?.finish()?], archives].concat();
        Self::of_archives(&archives, Self::busybox_config())
    }

    /// The same under a file `/noise` of so many MiB that does not compress; another seed, another file.
    ///
    /// # Errors
    /// When busybox-static is not installed.
    pub fn busybox_with_noise(mib: usize, seed: u64) -> anyhow::Result<Self> {
        let filling = Layer::default().file("noise", 0o644, &noise(mib, seed))?;
        Self::new(vec![busybox_layer()?, filling], Self::busybox_config())
    }

    fn busybox_config() -> Value {
        json!({ "Env": ["PATH=/bin"], "Cmd": ["/bin/sh"] })
    }

    /// Everything that is pushed before the manifest.
    pub fn blobs(&self) -> impl Iterator<Item = &Blob> {
        self.layers.iter().chain([&self.config])
    }

    /// The layers, lowest first.
    pub fn layers(&self) -> &[Blob] {
        &self.layers
    }

    /// The manifest.
    pub fn manifest(&self) -> Vec<u8> {
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|blob| json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": blob.digest, "size": blob.bytes.len() }))
            .collect();
        json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": self.config.digest, "size": self.config.bytes.len() },
            "layers": layers,
        })
        .to_string()
        .into_bytes()
    }
}

/// So many MiB that do not compress; another seed, others.
pub fn noise(mib: usize, seed: u64) -> Vec<u8> {
    let mut noise = vec![0_u8; mib << 20];
    // A linear congruential generator (Knuth's MMIX): enough for gzip to find nothing.
    let mut state = seed | 1;
    for byte in &mut noise {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (state >> 56) as u8;
    }
    noise
}

fn busybox_layer() -> anyhow::Result<Layer> {
    let path = Path::new("/bin/busybox");
    let binary =
        std::fs::read(path).context("cannot read /bin/busybox: install the package busybox-static")?;
    let list = crate::process::run_ok(
        std::process::Command::new(path).arg("--list"),
        std::time::Duration::from_secs(10),
    )?;
    let mut layer = Layer::default()
        .directory("bin", 0o755)?
        .directory("etc", 0o755)?
        .directory("tmp", 0o1777)?
        .directory("root", 0o700)?
        .file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/tmp:/bin/sh\n")?
        .file("etc/group", 0o644, b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n")?
        .file("bin/busybox", 0o755, &binary)?;
    for applet in list.lines().filter(|name| *name != "busybox") {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    Ok(layer)
}
