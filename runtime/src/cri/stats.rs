//! Statistics RPCs: containers from the guest's cgroups, sandboxes from the host's, so that what the VM itself takes is in
//! the sandbox's numbers and not in its containers'.

use super::sandbox::{matches_labels, metadata};
use super::{Cri, status};
use crate::service::{Command, ContainerView, SandboxView};
use crate::spec::ScratchVolume;
use crate::vm::host::HostUsage;
use crate::vm::launch::unix_ns;
use crate::vm::pod::PodVm;
use crate::volumes;
use atoll_cri::v1::{
    ContainerAttributes, ContainerMetadata, ContainerStats, ContainerStatsFilter, ContainerStatsResponse,
    CpuUsage, FilesystemIdentifier, FilesystemUsage, LinuxPodSandboxStats, MemoryUsage, Metric,
    MetricDescriptor, MetricType, NetworkInterfaceUsage, NetworkUsage, PodSandboxAttributes,
    PodSandboxMetrics, PodSandboxStats, PodSandboxStatsFilter, PodSandboxStatsResponse, ProcessUsage,
    UInt64Value,
};
use atoll_spec::guest::{GuestStats, Usage};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tonic::Status;

/// Annotation of a sandbox's statistics: bytes in each volume that the guest keeps on its disk, by host path, as JSON.
const USAGE_ANNOTATION: &str = "atoll.dev/scratch-usage";

fn number(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

impl Cri {
    pub(super) async fn vm_of(&self, sandbox: &str) -> Result<Arc<PodVm>, Status> {
        let id = sandbox.to_owned();
        self.service.ask(|reply| Command::UseSandbox(id, reply)).await.map(|s| s.vm).map_err(status)
    }

    pub(super) async fn stats_of(&self, id: &str) -> Result<ContainerStatsResponse, Status> {
        let name = id.to_owned();
        let view = self.service.ask(|reply| Command::ContainerStatus(name, reply)).await.map_err(status)?;
        let guest = match self.vm_of(view.sandbox.as_str()).await {
            Ok(vm) => vm.guest_stats().await.map_err(status)?,
            Err(_) => GuestStats::default(), // without a VM there is nothing it could take
        };
        Ok(ContainerStatsResponse { stats: Some(container_stats(&view, &guest)) })
    }

    pub(super) async fn all_container_stats(
        &self,
        filter: Option<ContainerStatsFilter>,
    ) -> Result<Vec<ContainerStats>, Status> {
        let filter = filter.unwrap_or_default();
        let views = self.service.ask(Command::ListContainers).await.map_err(status)?;
        let wanted = |v: &&ContainerView| {
            (filter.id.is_empty() || v.id.as_str().starts_with(&filter.id))
                && (filter.pod_sandbox_id.is_empty()
                    || v.sandbox.as_str().starts_with(&filter.pod_sandbox_id))
                && matches_labels(&v.spec.labels, &filter.label_selector)
                && v.phase.is_active()
        };
        let views: Vec<&ContainerView> = views.iter().filter(wanted).collect();
        let mut sandboxes: Vec<&str> = views.iter().map(|v| v.sandbox.as_str()).collect();
        sandboxes.dedup();
        let guests = self.guests(sandboxes.into_iter()).await;
        let stats = |v: &&ContainerView| Some(container_stats(v, guests.get(v.sandbox.as_str())?));
        Ok(views.iter().filter_map(stats).collect())
    }

    /// Counters of several guests, asked at the same time; one that does not answer is left out.
    async fn guests(&self, sandboxes: impl Iterator<Item = &str>) -> BTreeMap<String, GuestStats> {
        let asked = sandboxes.map(|id| async move {
            let vm = self.vm_of(id).await.ok()?;
            Some((id.to_owned(), vm.guest_stats().await.ok()?))
        });
        futures_util::future::join_all(asked).await.into_iter().flatten().collect()
    }

    pub(super) async fn sandbox_stats(&self, id: &str) -> Result<PodSandboxStatsResponse, Status> {
        let name = id.to_owned();
        let (view, containers) =
            self.service.ask(|reply| Command::SandboxStatus(name, reply)).await.map_err(status)?;
        Ok(PodSandboxStatsResponse { stats: Some(self.one_sandbox(&view, &containers).await) })
    }

    pub(super) async fn all_sandbox_stats(
        &self,
        filter: Option<PodSandboxStatsFilter>,
    ) -> Result<Vec<PodSandboxStats>, Status> {
        let filter = filter.unwrap_or_default();
        let views = self.service.ask(Command::ListSandboxes).await.map_err(status)?;
        let containers = self.service.ask(Command::ListContainers).await.map_err(status)?;
        let wanted = |v: &&SandboxView| {
            (filter.id.is_empty() || v.id.as_str().starts_with(&filter.id))
                && matches_labels(&v.spec.labels, &filter.label_selector)
        };
        let asked = views.iter().filter(wanted).map(|v| self.one_sandbox(v, &containers));
        Ok(futures_util::future::join_all(asked).await)
    }

    async fn one_sandbox(&self, view: &SandboxView, containers: &[ContainerView]) -> PodSandboxStats {
        let vm = self.vm_of(view.id.as_str()).await.ok();
        let host = vm.as_ref().map(|vm| vm.host_usage()).unwrap_or_default();
        let guest = match &vm {
            Some(vm) => vm.guest_stats().await.unwrap_or_default(),
            None => GuestStats::default(),
        };
        let own = containers.iter().filter(|c| c.sandbox == view.id && c.phase.is_active());
        PodSandboxStats {
            attributes: Some(PodSandboxAttributes {
                id: view.id.to_string(),
                metadata: Some(metadata(&view.spec.name)),
                labels: view.spec.labels.clone().into_iter().collect(),
                annotations: annotations(view, &guest),
            }),
            linux: Some(linux_stats(&host, &guest, own.map(|c| container_stats(c, &guest)).collect())),
            windows: None,
        }
    }

    pub(super) async fn all_metrics(&self) -> Result<Vec<PodSandboxMetrics>, Status> {
        let views = self.service.ask(Command::ListSandboxes).await.map_err(status)?;
        let asked = views.iter().map(|view| async move {
            let vm = self.vm_of(view.id.as_str()).await.ok()?;
            let guest = vm.guest_stats().await.unwrap_or_default();
            let exits = vm.vmm_stats().await.map(|s| s.exits.values().sum()).unwrap_or(0);
            let metrics = metrics(&view.spec.name.name, &vm.host_usage(), &guest, exits);
            Some(PodSandboxMetrics {
                pod_sandbox_id: view.id.to_string(),
                metrics,
                container_metrics: vec![],
            })
        });
        Ok(futures_util::future::join_all(asked).await.into_iter().flatten().collect())
    }
}

/// The sandbox's own, and what is in each of its volumes, for which CRI has no field.
fn annotations(view: &SandboxView, guest: &GuestStats) -> HashMap<String, String> {
    let volumes = view.spec.scratch_volumes.iter();
    let used = |volume: &ScratchVolume| {
        Some((volume.path.clone(), *guest.volumes.get(&volumes::scratch_name(volume))?))
    };
    let used: BTreeMap<String, u64> = volumes.filter_map(used).collect();
    let mut annotations: HashMap<String, String> = view.spec.annotations.clone().into_iter().collect();
    annotations.insert(USAGE_ANNOTATION.to_owned(), serde_json::json!(used).to_string());
    annotations
}

fn cpu(ns: u64) -> CpuUsage {
    CpuUsage { timestamp: unix_ns(), usage_core_nano_seconds: number(ns), ..CpuUsage::default() }
}

fn memory(usage: &Usage) -> MemoryUsage {
    MemoryUsage {
        timestamp: unix_ns(),
        working_set_bytes: number(usage.working_set_bytes),
        available_bytes: None,
        usage_bytes: number(usage.memory_bytes),
        rss_bytes: number(usage.rss_bytes),
        page_faults: number(usage.page_faults),
        major_page_faults: number(usage.major_page_faults),
        psi: None,
    }
}

fn container_stats(view: &ContainerView, guest: &GuestStats) -> ContainerStats {
    let usage = guest.containers.get(view.id.as_str()).copied().unwrap_or_default();
    ContainerStats {
        attributes: Some(ContainerAttributes {
            id: view.id.to_string(),
            metadata: Some(ContainerMetadata { name: view.spec.name.clone(), attempt: view.spec.attempt }),
            labels: view.spec.labels.clone().into_iter().collect(),
            annotations: view.spec.annotations.clone().into_iter().collect(),
        }),
        cpu: Some(cpu(usage.cpu_ns)),
        memory: Some(memory(&usage)),
        writable_layer: Some(FilesystemUsage {
            timestamp: unix_ns(),
            fs_id: Some(FilesystemIdentifier {
                mountpoint: format!("scratch disk of sandbox {}", view.sandbox),
            }),
            used_bytes: number(usage.writable_bytes),
            inodes_used: number(usage.writable_inodes),
        }),
        swap: None,
        io: None,
    }
}

fn linux_stats(
    host: &HostUsage,
    guest: &GuestStats,
    containers: Vec<ContainerStats>,
) -> LinuxPodSandboxStats {
    let interface = NetworkInterfaceUsage {
        name: "eth0".to_owned(),
        rx_bytes: number(guest.network.rx_bytes),
        rx_errors: number(guest.network.rx_errors),
        tx_bytes: number(guest.network.tx_bytes),
        tx_errors: number(guest.network.tx_errors),
    };
    let host_memory =
        Usage { memory_bytes: host.memory_bytes, working_set_bytes: host.memory_bytes, ..Usage::default() };
    LinuxPodSandboxStats {
        cpu: Some(cpu(host.cpu_ns)),
        memory: Some(memory(&host_memory)),
        network: Some(NetworkUsage {
            timestamp: unix_ns(),
            default_interface: Some(interface),
            interfaces: vec![],
        }),
        process: Some(ProcessUsage { timestamp: unix_ns(), process_count: number(guest.total.pids) }),
        containers,
        io: None,
    }
}

type Source = fn(&HostUsage, &GuestStats, u64) -> u64;

/// Name, help, kind, and where the number comes from.
const METRICS: [(&str, &str, MetricType, Source); 6] = [
    (
        "atoll_sandbox_cpu_nanoseconds_total",
        "CPU time of the VMM, the guest's included",
        MetricType::Counter,
        |h, _, _| h.cpu_ns,
    ),
    (
        "atoll_sandbox_memory_bytes",
        "Host memory of the VMM, the guest's included",
        MetricType::Gauge,
        |h, _, _| h.memory_bytes,
    ),
    ("atoll_guest_memory_bytes", "Memory in use inside the guest", MetricType::Gauge, |_, g, _| {
        g.total.memory_bytes
    }),
    (
        "atoll_guest_cpu_nanoseconds_total",
        "CPU time as the guest counts it",
        MetricType::Counter,
        |_, g, _| g.total.cpu_ns,
    ),
    ("atoll_network_receive_bytes_total", "Bytes that the pod received", MetricType::Counter, |_, g, _| {
        g.network.rx_bytes
    }),
    ("atoll_vm_exits_total", "Exits of the virtual processors to the VMM", MetricType::Counter, |_, _, e| e),
];

pub(super) fn descriptors() -> Vec<MetricDescriptor> {
    let descriptor = |(name, help, _, _): &(&str, &str, MetricType, Source)| MetricDescriptor {
        name: (*name).to_owned(),
        help: (*help).to_owned(),
        label_keys: vec!["pod".to_owned()],
    };
    METRICS.iter().map(descriptor).collect()
}

fn metrics(pod: &str, host: &HostUsage, guest: &GuestStats, exits: u64) -> Vec<Metric> {
    let metric = |(name, _, kind, source): &(&str, &str, MetricType, Source)| Metric {
        name: (*name).to_owned(),
        timestamp: unix_ns(),
        metric_type: (*kind).into(),
        label_values: vec![pod.to_owned()],
        value: number(source(host, guest, exits)),
    };
    METRICS.iter().map(metric).collect()
}
