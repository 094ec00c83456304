//! The real registry of a lab: Debian's docker-registry, plain HTTP on the lab's network.

use crate::oci::Image;
use crate::process::{Background, wait_for};
use anyhow::{Context, ensure};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A running registry.
#[derive(Debug)]
pub struct Registry {
    process: Background,
    host: String,
}

impl Registry {
    /// Starts it on port 5000 of `address` and waits until it answers.
    ///
    /// # Errors
    /// When it cannot be started or does not answer within 20 s.
    pub fn start(address: &str, directory: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let host = format!("{address}:5000");
        let config = directory.join("config.yml");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\nhttp:\n  addr: {host}\n",
                directory.join("data").display()
            ),
        )?;
        let process = Background::spawn(
            "docker-registry",
            Command::new("docker-registry").arg("serve").arg(&config),
            &directory.join("registry.log"),
        )?;
        let mut registry = Self { process, host };
        wait_for("the registry to answer", Duration::from_secs(20), || {
            registry.process.check_alive()?;
            Ok(ureq::get(format!("http://{}/v2/", registry.host)).call().is_ok().then_some(()))
        })?;
        Ok(registry)
    }

    /// `host:port`, as it stands in image names.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Pushes an image and returns its full name.
    ///
    /// # Errors
    /// When the registry refuses a part.
    pub fn push(&self, repository: &str, tag: &str, image: &Image) -> anyhow::Result<String> {
        for blob in image.blobs() {
            self.push_blob(repository, &blob.digest, &blob.bytes)?;
        }
        let manifest = image.manifest();
        let url = format!("http://{}/v2/{repository}/manifests/{tag}", self.host);
        ureq::put(&url)
            .header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
            .send(&manifest[..])
            .with_context(|| format!("cannot push manifest to {url}"))?;
        Ok(format!("{}/{repository}:{tag}", self.host))
    }

    fn push_blob(&self, repository: &str, digest: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let start = format!("http://{}/v2/{repository}/blobs/uploads/", self.host);
        let answer =
            ureq::post(&start).send_empty().with_context(|| format!("cannot start an upload at {start}"))?;
        let location = answer
            .headers()
            .get("location")
            .and_then(|value| value.to_str().ok())
            .context("the registry's upload answer has no location")?
            .to_owned();
        let joint = if location.contains('?') { '&' } else { '?' };
        let answer = ureq::put(format!("{location}{joint}digest={digest}"))
            .header("Content-Type", "application/octet-stream")
            .send(bytes)
            .with_context(|| format!("cannot upload {digest}"))?;
        ensure!(answer.status().as_u16() == 201, "upload of {digest} answered {}", answer.status());
        Ok(())
    }
}
