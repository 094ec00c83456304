//! The documents of a registry: index, manifest, image config. OCI's and Docker's schema 2 are read alike. ◇
//!
//! Pure: bytes in, values out. Sizes and counts are bounded here, digests were checked by the caller.

use super::digest::Digest;
use super::error::ImageError;
use super::{ImageConfig, ImageId};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Largest manifest or index.
pub const MAX_MANIFEST: u64 = 4 << 20;
/// Largest image config.
pub const MAX_CONFIG: u64 = 4 << 20;
/// Most layers of one image: what overlayfs takes, with room for the writable one.
const MAX_LAYERS: usize = 127;

/// What to accept when asking for a manifest.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// A reference from one document to another or to a layer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Kind of what is referred to.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

/// An image's parts.
#[derive(Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The config document.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Descriptor>,
}

/// What a manifest request gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Document {
    /// Variants by platform.
    Index(Vec<Descriptor>),
    /// One image.
    Manifest(Manifest),
}

fn malformed(what: &str, why: impl Into<String>) -> ImageError {
    ImageError::Malformed { what: what.to_owned(), why: why.into() }
}

/// Reads an index or a manifest.
pub fn parse(bytes: &[u8], what: &str) -> Result<Document, ImageError> {
    let raw: RawManifest =
        serde_json::from_slice(bytes).map_err(|error| malformed(what, error.to_string()))?;
    if raw.schema_version == 1 {
        return Err(malformed(
            what,
            "it has the withdrawn schema 1: push the image again with a current tool",
        ));
    }
    if let Some(manifests) = raw.manifests {
        return Ok(Document::Index(manifests));
    }
    let config = raw.config.ok_or_else(|| malformed(what, "it is neither an index nor an image manifest"))?;
    if raw.layers.len() > MAX_LAYERS {
        return Err(malformed(what, format!("it has {} layers, more than {MAX_LAYERS}", raw.layers.len())));
    }
    if let Some(odd) = raw.layers.iter().find(|layer| !is_layer(&layer.media_type)) {
        return Err(malformed(what, format!("it has a layer of type '{}'", odd.media_type)));
    }
    Ok(Document::Manifest(Manifest { config, layers: raw.layers }))
}

/// Types of layers that are tar archives held by the registry. How one is compressed is seen in its first bytes.
fn is_layer(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.oci.image.layer.v1.tar")
        || media_type.starts_with("application/vnd.docker.image.rootfs.diff.tar")
}

/// The variant for this machine: linux/amd64, the plainest one.
pub fn choose<'a>(index: &'a [Descriptor], image: &str) -> Result<&'a Descriptor, ImageError> {
    let fits = |descriptor: &&Descriptor| {
        descriptor.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == "amd64")
    };
    let plainest = |descriptor: &&Descriptor| descriptor.platform.as_ref().map(|p| p.variant.clone());
    if let Some(chosen) = index.iter().filter(fits).min_by_key(plainest) {
        return Ok(chosen);
    }
    // An index of one variant without a platform means just that.
    if let [only] = index
        && only.platform.is_none()
    {
        return Ok(only);
    }
    let known = |p: &Platform| (p.os != "unknown").then(|| format!("{}/{}", p.os, p.architecture));
    let mut available: Vec<String> =
        index.iter().filter_map(|descriptor| descriptor.platform.as_ref().and_then(known)).take(20).collect();
    available.sort();
    available.dedup();
    let available = if available.is_empty() { "nothing".to_owned() } else { available.join(", ") };
    Err(ImageError::NoPlatform { image: image.to_owned(), available })
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    config: Option<RawRun>,
    #[serde(default)]
    rootfs: RawRootfs,
}

#[derive(Default, Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

/// Every field may be missing or null.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawRun {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    volumes: Option<BTreeMap<String, serde_json::Value>>,
}

/// What a config document says.
#[derive(Debug)]
pub struct Config {
    /// The image's id.
    pub id: ImageId,
    /// How to run it.
    pub run: ImageConfig,
    /// Digests of the layers' tars, lowest first.
    pub diff_ids: Vec<Digest>,
}

/// Reads an image config; `layers` is how many the manifest has.
pub fn parse_config(bytes: &[u8], image: &str, layers: usize) -> Result<Config, ImageError> {
    let what = format!("the config of {image}");
    let raw: RawConfig =
        serde_json::from_slice(bytes).map_err(|error| malformed(&what, error.to_string()))?;
    if raw.os != "linux" || raw.architecture != "amd64" {
        let available = format!("{}/{}", raw.os, raw.architecture);
        return Err(ImageError::NoPlatform { image: image.to_owned(), available });
    }
    let diff_ids = raw.rootfs.diff_ids;
    if diff_ids.len() != layers {
        return Err(malformed(&what, format!("it names {} layers, the manifest {layers}", diff_ids.len())));
    }
    let run = raw.config.unwrap_or_default();
    let run = ImageConfig {
        user: run.user.unwrap_or_default(),
        env: run.env.unwrap_or_default(),
        entrypoint: run.entrypoint.unwrap_or_default(),
        cmd: run.cmd.unwrap_or_default(),
        working_dir: run.working_dir.unwrap_or_default(),
        stop_signal: run.stop_signal.unwrap_or_default(),
        labels: run.labels.unwrap_or_default(),
        volumes: run.volumes.unwrap_or_default().into_keys().collect(),
    };
    Ok(Config { id: ImageId(Digest::of(bytes)), run, diff_ids })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(byte: u8) -> Digest {
        Digest::of(&[byte])
    }

    #[test]
    fn both_families_are_read_alike() {
        for (config, layer) in [
            ("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar+zstd"),
            (
                "application/vnd.docker.container.image.v1+json",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
            ),
        ] {
            let text = format!(
                r#"{{"schemaVersion":2,"config":{{"mediaType":"{config}","digest":"{}","size":1}},
                "layers":[{{"mediaType":"{layer}","digest":"{}","size":2}}]}}"#,
                digest(1),
                digest(2)
            );
            let Document::Manifest(manifest) = parse(text.as_bytes(), "x").unwrap() else {
                panic!("an index")
            };
            assert_eq!((manifest.layers.len(), manifest.layers[0].size), (1, 2));
        }
    }

    #[test]
    fn the_variant_of_this_machine_is_chosen() {
        let variant = |os: &str, arch: &str, variant: &str, byte| Descriptor {
            media_type: String::new(),
            digest: digest(byte),
            size: 1,
            platform: Some(Platform { os: os.into(), architecture: arch.into(), variant: variant.into() }),
        };
        let mut index = vec![
            variant("linux", "arm64", "v8", 1),
            variant("linux", "amd64", "v3", 2),
            variant("linux", "amd64", "", 3),
            variant("unknown", "unknown", "", 4),
        ];
        assert_eq!(choose(&index, "x").unwrap().digest, digest(3));
        index.truncate(1);
        assert_eq!(
            choose(&index, "r/x:1").unwrap_err().to_string(),
            "r/x:1 has no variant for linux/amd64 (it has linux/arm64): build or choose one that has"
        );
    }

    #[test]
    fn bad_documents_are_refused() {
        for bad in
            ["", "[]", "{}", r#"{"schemaVersion":1,"fsLayers":[]}"#, r#"{"config":{"digest":"x","size":1}}"#]
        {
            assert!(parse(bad.as_bytes(), "x").is_err(), "{bad}");
        }
        let foreign = format!(
            r#"{{"config":{{"digest":"{0}","size":1}},"layers":[{{"mediaType":"application/vnd.oci.artifact","digest":"{0}","size":2}}]}}"#,
            digest(1)
        );
        assert!(
            parse(foreign.as_bytes(), "x").unwrap_err().to_string().contains("application/vnd.oci.artifact")
        );
    }

    #[test]
    fn configs_with_nulls() {
        let text = format!(
            r#"{{"os":"linux","architecture":"amd64","config":{{"Env":null,"Cmd":["sh"],"Volumes":{{"/data":{{}}}},"User":"web"}},
            "rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
            digest(1)
        );
        let config = parse_config(text.as_bytes(), "x", 1).unwrap();
        assert_eq!((config.run.cmd, config.run.user.as_str()), (vec!["sh".to_owned()], "web"));
        assert!(config.run.volumes.contains("/data"));
        assert!(parse_config(text.as_bytes(), "x", 2).is_err());
        assert!(parse_config(br#"{"os":"windows","architecture":"amd64"}"#, "x", 0).is_err());
    }
}
