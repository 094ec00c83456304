//! Gathers what the node's status is computed from: the host, the runtime, its images. The only reader in `node`.

use super::measure;
use crate::app::Shared;
use crate::cri::Cri;
use atoll_cri::v1;
use std::path::Path;
use std::time::Duration;

/// Most images named in the status, the largest first; as the kubelet.
const MAX_IMAGES: usize = 50;
/// Deadline of a question to the runtime.
const ASK: Duration = Duration::from_secs(10);

/// Everything that the status depends on.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Facts {
    pub node_name: String,
    pub addresses: Vec<std::net::IpAddr>,
    pub port: u16,
    pub machine_id: String,
    pub boot_id: String,
    pub kernel: String,
    pub os_image: String,
    pub capacity: Option<super::capacity::Capacity>,
    pub pod_cidr_known: bool,
    pub memory_available: Option<u64>,
    pub storage: Option<(u64, u64)>,
    pub processes: Option<(u64, u64)>,
    pub runtime: Runtime,
    pub images: Vec<(Vec<String>, u64)>,
}

/// What the runtime says of itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Runtime {
    /// `name://version`.
    pub version: Option<String>,
    /// Why it is not ready, one sentence each; empty when it is.
    pub problems: Vec<String>,
}

/// Reads all of it; what cannot be read is absent, and the status says so.
pub(super) async fn gather(shared: &Shared, cri: &Cri) -> Facts {
    let config = shared.config.borrow().clone();
    let (runtime, images) = tokio::join!(runtime(cri), images(cri));
    let line = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let reported = |result: crate::Result<(u64, u64)>| match result {
        Ok(pair) => Some(pair),
        Err(error) => {
            tracing::warn!("{}", crate::error::chain(&error));
            None
        }
    };
    Facts {
        node_name: config.node_name.clone(),
        addresses: config.addresses.clone(),
        port: shared.options.listen.port(),
        machine_id: config.machine_id.clone(),
        boot_id: line("/proc/sys/kernel/random/boot_id"),
        kernel: line("/proc/sys/kernel/osrelease"),
        os_image: config.os_image.clone(),
        capacity: Some(*shared.capacity),
        pod_cidr_known: shared
            .node
            .borrow()
            .as_ref()
            .is_some_and(|n| n.spec.as_ref().is_some_and(|s| s.pod_cidr.is_some())),
        memory_available: reported(measure::memory()).map(|(_, available)| available),
        storage: reported(measure::storage(existing(&shared.options.pods))),
        processes: measure::processes(),
        runtime,
        images,
    }
}

/// The path or the nearest directory above it that is there.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

async fn runtime(cri: &Cri) -> Runtime {
    let version = match cri.version().await {
        Ok(version) => format!("{}://{}", version.runtime_name, version.runtime_version),
        Err(error) => {
            return Runtime { version: None, problems: vec![format!("container runtime is down: {error}")] };
        }
    };
    let mut client = cri.runtime();
    let asked = tokio::time::timeout(ASK, client.status(v1::StatusRequest { verbose: false })).await;
    let problems = match asked {
        Ok(Ok(answer)) => answer
            .into_inner()
            .status
            .unwrap_or_default()
            .conditions
            .into_iter()
            .filter(|condition| !condition.status)
            .map(|condition| format!("{}: {}", condition.r#type, condition.message))
            .collect(),
        Ok(Err(status)) => vec![format!("container runtime status: {}", status.message())],
        Err(_) => vec![format!("container runtime status: no answer within {} s", ASK.as_secs())],
    };
    Runtime { version: Some(version), problems }
}

async fn images(cri: &Cri) -> Vec<(Vec<String>, u64)> {
    let mut client = cri.images();
    let asked = tokio::time::timeout(ASK, client.list_images(v1::ListImagesRequest { filter: None })).await;
    // A runtime that is down is reported by its condition; the list is only a help for the scheduler.
    let Ok(Ok(answer)) = asked else { return Vec::new() };
    let mut images: Vec<(Vec<String>, u64)> = answer
        .into_inner()
        .images
        .into_iter()
        .map(|image| (image.repo_digests.into_iter().chain(image.repo_tags).take(5).collect(), image.size))
        .collect();
    images.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    images.truncate(MAX_IMAGES);
    images
}
