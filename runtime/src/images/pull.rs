//! Pulling: manifest, config, layers, each verified; layers side by side; progress in the log.

use super::StoreOptions;
use super::digest::Digest;
use super::error::ImageError;
use super::manifest::{self, Config, Descriptor, Document, Manifest};
use super::reference::ImageRef;
use super::registry::{Body, HttpError, SharedRegistry, next_chunk};
use super::room;
use super::scratch::Scratch;
use http::{Response, StatusCode};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// An index may point to an index, hardly more.
const MAX_INDEXES: usize = 3;
/// How often a broken download is taken up again without a byte gained in between.
const MAX_BREAKS: u32 = 4;
/// Largest compressed layer.
const MAX_BLOB: u64 = 32 << 30;

/// What the registry says an image is.
pub struct Resolved {
    /// Digest of what the reference named: the index, where there is one.
    pub digest: Digest,
    /// Its layers.
    pub manifest: Manifest,
    /// Its config.
    pub config: Config,
}

/// Finds out what a reference means, without its layers.
pub async fn resolve(registry: &SharedRegistry, reference: &ImageRef) -> Result<Resolved, ImageError> {
    let name = reference.to_string();
    let mut wanted = reference.wanted().to_owned();
    let mut expected = reference.digest().cloned();
    let mut top = None;
    for _ in 0..=MAX_INDEXES {
        let what = format!("the manifest of {name}");
        let response = registry.manifest(&wanted).await?;
        let bytes = registry.read(response, manifest::MAX_MANIFEST, &what).await?;
        let digest = Digest::of(&bytes);
        check(&what, expected.as_ref(), &digest)?;
        let top = top.get_or_insert(digest).clone();
        match manifest::parse(&bytes, &what)? {
            Document::Index(index) => {
                let chosen = manifest::choose(&index, &name)?;
                wanted = chosen.digest.to_string();
                expected = Some(chosen.digest.clone());
            }
            Document::Manifest(found) => {
                let config = fetch_config(registry, &found, &name).await?;
                return Ok(Resolved { digest: top, manifest: found, config });
            }
        }
    }
    Err(ImageError::Malformed { what: name, why: "its index leads to index after index".into() })
}

fn check(what: &str, expected: Option<&Digest>, actual: &Digest) -> Result<(), ImageError> {
    match expected {
        Some(expected) if expected != actual => Err(ImageError::DigestMismatch {
            what: what.to_owned(),
            expected: expected.clone(),
            actual: actual.clone(),
        }),
        _ => Ok(()),
    }
}

async fn fetch_config(registry: &SharedRegistry, found: &Manifest, name: &str) -> Result<Config, ImageError> {
    let what = format!("the config of {name}");
    if found.config.size > manifest::MAX_CONFIG {
        return Err(ImageError::TooLarge { what, limit: manifest::MAX_CONFIG });
    }
    let response = registry.blob(&found.config.digest, 0).await?;
    let bytes = registry.read(response, manifest::MAX_CONFIG, &what).await?;
    check(&what, Some(&found.config.digest), &Digest::of(&bytes))?;
    manifest::parse_config(&bytes, name, found.layers.len())
}

/// How far a pull is, for the log.
pub struct Progress {
    name: String,
    total: AtomicU64,
    done: AtomicU64,
    started: Instant,
}

impl Progress {
    /// At the start; `total` is the compressed size of what is missing.
    pub fn new(name: String, total: u64) -> Arc<Self> {
        Arc::new(Self {
            name,
            total: AtomicU64::new(total),
            done: AtomicU64::new(0),
            started: Instant::now(),
        })
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// One line.
    pub fn report(&self) {
        let mib = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed) as f64 / f64::from(1 << 20);
        let seconds = self.started.elapsed().as_secs();
        tracing::info!(
            "pulling {}: {:.1} of {:.1} MiB after {seconds} s",
            self.name,
            mib(&self.done),
            mib(&self.total)
        );
    }
}

/// Downloads one layer into a file and verifies it.
pub async fn download(
    registry: &SharedRegistry,
    options: &StoreOptions,
    layer: &Descriptor,
    progress: &Progress,
) -> Result<Scratch, ImageError> {
    if layer.size > MAX_BLOB {
        return Err(ImageError::TooLarge { what: format!("layer {}", layer.digest), limit: MAX_BLOB });
    }
    room::for_up_to(options, &format!("layer {}", layer.digest), layer.size)?;
    let (scratch, file) = Scratch::file(&options.root, "blob")?;
    let mut download =
        Download { layer, options, scratch, file, hasher: Sha256::new(), received: 0, progress };
    let mut breaks = 0;
    while download.received < layer.size {
        let before = download.received;
        // Asking has its own tries; what is tried again here is a body that broke off.
        let response = registry.blob(&layer.digest, before).await?;
        match download.go_on(registry, response).await {
            Ok(()) => {}
            Err(error) if error.is_transient() => {
                breaks = if download.received > before { 1 } else { breaks + 1 };
                if breaks > MAX_BREAKS {
                    return Err(error);
                }
                tracing::info!("{error}; going on from byte {}", download.received);
            }
            Err(error) => return Err(error),
        }
    }
    let actual = Digest::finish(download.hasher);
    check(&format!("layer {}", layer.digest), Some(&layer.digest), &actual)?;
    Ok(download.scratch)
}

struct Download<'a> {
    layer: &'a Descriptor,
    options: &'a StoreOptions,
    scratch: Scratch,
    file: File,
    hasher: Sha256,
    received: u64,
    progress: &'a Progress,
}

impl Download<'_> {
    /// Reads until the end of the blob or a break.
    async fn go_on(&mut self, registry: &SharedRegistry, response: Response<Body>) -> Result<(), ImageError> {
        let what = format!("layer {}", self.layer.digest);
        if self.received > 0 && response.status() != StatusCode::PARTIAL_CONTENT {
            self.start_over()?;
        }
        let mut body = response.into_body();
        let broken = |error: HttpError| registry.error(&what, error);
        while let Some(chunk) = next_chunk(&mut body, self.options.patience.silence).await.map_err(broken)? {
            let length = chunk.len() as u64;
            if self.received + length > self.layer.size {
                return Err(ImageError::TooLarge { what, limit: self.layer.size });
            }
            // Into the page cache: short enough for this thread.
            self.file.write_all(&chunk).map_err(ImageError::io("write", self.scratch.path()))?;
            self.hasher.update(&chunk);
            self.received += length;
            self.progress.advance(length);
        }
        if self.received < self.layer.size {
            let why = format!("it ended after {} of {} bytes", self.received, self.layer.size);
            return Err(registry.error(&what, why));
        }
        Ok(())
    }

    /// The registry does not do ranges.
    fn start_over(&mut self) -> Result<(), ImageError> {
        let rewound = self.file.set_len(0).and_then(|()| self.file.rewind());
        rewound.map_err(ImageError::io("start over", self.scratch.path()))?;
        self.progress.done.fetch_sub(self.received, Ordering::Relaxed);
        self.hasher = Sha256::new();
        self.received = 0;
        Ok(())
    }
}
