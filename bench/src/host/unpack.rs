//! A large image, pulled and unpacked: processor time for each byte, and the most memory that the runtime took.

use super::control::Runtime;
use super::registry::Registry;
use crate::figure::{Figure, Unit};
use anyhow::Context;
use atoll_qemu_test::oci::{Image, Layer, noise};
use serde_json::json;
use std::time::Instant;

/// Layers of the image.
const LAYERS: u64 = 20;
/// Mebibytes in each.
const MIB: usize = 5;
/// The runtime's cgroup, with its helpers.
const CGROUP: &str = "/sys/fs/cgroup/atoll/services/runtime";

/// Measures it.
///
/// # Errors
/// When the image cannot be made or pulled.
pub async fn measure(runtime: &mut Runtime, registry: &Registry) -> anyhow::Result<Vec<Figure>> {
    let layers = (0..LAYERS)
        .map(|seed| {
            // Half of it compresses, as programs do.
            let mut content = noise(MIB / 2, seed);
            content.resize(MIB << 20, b' ');
            Layer::default().file(&format!("file-{seed}"), 0o644, &content)
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let image = registry.push("large", &Image::new(layers, json!({ "Cmd": ["/x"] }))?);
    let peak = format!("{CGROUP}/memory.peak");
    let before: f64 = read(&format!("{CGROUP}/memory.current"))?;
    // Since Linux 6.12 a peak can be begun anew through a descriptor; that reader then sees its own.
    let watch = peak_from_now(&peak)?;
    let begun = Instant::now();
    runtime.pull(&image).await?;
    let bytes = (LAYERS as usize * (MIB << 20)) as f64;
    let per_byte = begun.elapsed().as_nanos() as f64 / bytes;
    let most = watch.read()?;
    Ok(vec![
        Figure::new("pull.per-byte", per_byte, Unit::PerByte),
        Figure::new("pull.peak-memory", (most - before) / (1024.0 * 1024.0), Unit::Mib),
    ])
}

fn read(path: &str) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    text.trim().parse().with_context(|| format!("{path} has no number"))
}

/// A peak since it was begun.
struct Peak(std::fs::File);

fn peak_from_now(path: &str) -> anyhow::Result<Peak> {
    use std::io::Write;
    let mut file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {path}"))?;
    file.write_all(b"0").with_context(|| format!("cannot begin {path} anew"))?;
    Ok(Peak(file))
}

impl Peak {
    fn read(&self) -> anyhow::Result<f64> {
        use std::os::unix::fs::FileExt;
        let mut text = [0_u8; 32];
        let length = self.0.read_at(&mut text, 0).context("cannot read the peak")?;
        String::from_utf8_lossy(&text[..length]).trim().parse().context("the peak is no number")
    }
}
