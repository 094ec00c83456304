//! Facts → NodeStatus. Pure: transition times come from the status before.

use super::capacity::Capacity;
use super::facts::Facts;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeStatus,
    NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Kubernetes release whose node agent this one behaves like.
const KUBERNETES: &str = "v1.37.1";
/// Below this much available memory the node is under pressure, in bytes.
const LEAST_MEMORY: u64 = 100 << 20;
/// Of every hundred processes that the kernel allows, more than this many are pressure.
const MOST_PROCESSES_PERCENT: u64 = 95;

/// Computes the whole status.
pub(super) fn compute(facts: &Facts, before: &NodeStatus, now: Timestamp) -> NodeStatus {
    let capacity = facts.capacity.as_ref();
    NodeStatus {
        addresses: Some(addresses(facts)),
        capacity: capacity.map(|c| resources(c.cpu_millis, c.memory_bytes, c.storage_bytes, c.pods)),
        allocatable: capacity.map(allocatable),
        conditions: Some(conditions(facts, before, now)),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(facts.port) }),
        }),
        images: Some(
            facts
                .images
                .iter()
                .map(|(names, size)| ContainerImage {
                    names: Some(names.clone()),
                    size_bytes: i64::try_from(*size).ok(),
                })
                .collect(),
        ),
        node_info: Some(NodeSystemInfo {
            architecture: "amd64".into(),
            boot_id: facts.boot_id.clone(),
            container_runtime_version: facts
                .runtime
                .version
                .clone()
                .unwrap_or_else(|| "unknown://unknown".into()),
            kernel_version: facts.kernel.clone(),
            kube_proxy_version: String::new(),
            kubelet_version: format!("{KUBERNETES}+atoll.{}", env!("CARGO_PKG_VERSION")),
            machine_id: facts.machine_id.clone(),
            operating_system: "linux".into(),
            os_image: facts.os_image.clone(),
            system_uuid: facts.machine_id.clone(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn allocatable(c: &Capacity) -> BTreeMap<String, Quantity> {
    resources(c.allocatable_cpu_millis(), c.allocatable_memory_bytes(), c.allocatable_storage_bytes(), c.pods)
}

fn resources(cpu_millis: u64, memory: u64, storage: u64, pods: u32) -> BTreeMap<String, Quantity> {
    let cpu = if cpu_millis.is_multiple_of(1000) {
        (cpu_millis / 1000).to_string()
    } else {
        format!("{cpu_millis}m")
    };
    [
        ("cpu", cpu),
        ("memory", format!("{}Ki", memory >> 10)),
        ("ephemeral-storage", format!("{}Ki", storage >> 10)),
        ("hugepages-1Gi", "0".into()),
        ("hugepages-2Mi", "0".into()),
        ("pods", pods.to_string()),
    ]
    .into_iter()
    .map(|(name, quantity)| (name.to_owned(), Quantity(quantity)))
    .collect()
}

fn addresses(facts: &Facts) -> Vec<NodeAddress> {
    let internal =
        facts.addresses.iter().map(|a| NodeAddress { type_: "InternalIP".into(), address: a.to_string() });
    let host = NodeAddress { type_: "Hostname".into(), address: facts.node_name.clone() };
    internal.chain([host]).collect()
}

/// Type, status, reason, message.
type Judgement = (&'static str, Option<bool>, &'static str, String);

fn judge(facts: &Facts) -> [Judgement; 4] {
    let memory = facts.memory_available.map(|bytes| bytes < LEAST_MEMORY);
    let reserved = facts.capacity.map_or(0, |c| c.reserved_storage_bytes);
    let disk = facts.storage.map(|(_, free)| free < reserved);
    let pids = facts.processes.map(|(now, most)| now * 100 > most * MOST_PROCESSES_PERCENT);
    let pressure = |name, under: Option<bool>, yes: (&'static str, &str), no: (&'static str, &str)| {
        let (reason, message) = match under {
            Some(true) => yes,
            Some(false) => no,
            None => ("Unknown", "cannot be measured"),
        };
        (name, under, reason, message.to_owned())
    };
    let mut problems = facts.runtime.problems.clone();
    if !facts.pod_cidr_known {
        problems.push("the cluster has not given this node a pod network yet".into());
    }
    let ready = match problems.is_empty() {
        true => ("Ready", Some(true), "KubeletReady", "atoll-agent is posting ready status".to_owned()),
        false => ("Ready", Some(false), "KubeletNotReady", problems.join("; ")),
    };
    [
        pressure(
            "MemoryPressure",
            memory,
            ("KubeletHasInsufficientMemory", "less than 100 MiB of memory is available"),
            ("KubeletHasSufficientMemory", "the host has sufficient memory available"),
        ),
        pressure(
            "DiskPressure",
            disk,
            ("KubeletHasDiskPressure", "less than 10 % of the DATA partition is free"),
            ("KubeletHasNoDiskPressure", "the host has no disk pressure"),
        ),
        pressure(
            "PIDPressure",
            pids,
            ("KubeletHasInsufficientPID", "nearly all process numbers are in use"),
            ("KubeletHasSufficientPID", "the host has sufficient process numbers available"),
        ),
        ready,
    ]
}

fn conditions(facts: &Facts, before: &NodeStatus, now: Timestamp) -> Vec<NodeCondition> {
    judge(facts)
        .into_iter()
        .map(|(name, holds, reason, message)| {
            let status = holds.map_or("Unknown", |holds| if holds { "True" } else { "False" });
            let old = before.conditions.iter().flatten().find(|c| c.type_ == name && c.status == status);
            NodeCondition {
                type_: name.into(),
                status: status.into(),
                reason: Some(reason.into()),
                message: Some(message),
                last_heartbeat_time: Some(Time(now)),
                last_transition_time: old.and_then(|c| c.last_transition_time.clone()).or(Some(Time(now))),
            }
        })
        .collect()
}

/// Whether the status says Ready.
pub(super) fn is_ready(status: &NodeStatus) -> bool {
    status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Whether the API server's status has each condition of `computed` as it is. It need not, though nothing changed here: the
/// node controller sets them to Unknown when the lease was not renewed in time.
pub(super) fn is_known(computed: &NodeStatus, server: &NodeStatus) -> bool {
    let theirs = |name: &str| server.conditions.iter().flatten().find(|c| c.type_ == name);
    computed.conditions.iter().flatten().all(|own| theirs(&own.type_).is_some_and(|c| c.status == own.status))
}

/// The status without what changes at every computation, to compare.
pub(super) fn without_heartbeats(status: &NodeStatus) -> NodeStatus {
    let mut status = status.clone();
    for condition in status.conditions.iter_mut().flatten() {
        condition.last_heartbeat_time = None;
        condition.last_transition_time = None;
    }
    status
}

/// A strategic merge patch: conditions of others stay, addresses are replaced as a whole (their merge key is the
/// type, which several share).
pub(super) fn patch(status: &NodeStatus) -> Value {
    let mut value = json!({ "status": status });
    if let Some(addresses) = value.pointer_mut("/status/addresses").and_then(Value::as_array_mut) {
        addresses.push(json!({ "$patch": "replace" }));
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> Facts {
        Facts {
            node_name: "n".into(),
            addresses: vec!["192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap()],
            pod_cidr_known: true,
            memory_available: Some(1 << 30),
            storage: Some((10 << 30, 5 << 30)),
            processes: Some((100, 32768)),
            runtime: super::super::facts::Runtime { version: Some("atoll://0.1.0".into()), problems: vec![] },
            ..Default::default()
        }
    }

    fn condition<'a>(status: &'a NodeStatus, name: &str) -> &'a NodeCondition {
        status.conditions.as_ref().unwrap().iter().find(|c| c.type_ == name).unwrap()
    }

    #[test]
    fn healthy_host_is_ready_and_not_under_pressure() {
        let status = compute(&healthy(), &NodeStatus::default(), Timestamp::UNIX_EPOCH);
        assert!(is_ready(&status));
        for name in ["MemoryPressure", "DiskPressure", "PIDPressure"] {
            assert_eq!(condition(&status, name).status, "False");
        }
    }

    #[test]
    fn problems_of_the_runtime_are_the_reason() {
        let mut facts = healthy();
        facts
            .runtime
            .problems
            .push("RuntimeReady: cannot open /dev/kvm: enable virtualisation in the firmware".into());
        let status = compute(&facts, &NodeStatus::default(), Timestamp::UNIX_EPOCH);
        assert!(!is_ready(&status));
        assert!(condition(&status, "Ready").message.as_ref().unwrap().contains("/dev/kvm"));
    }

    #[test]
    fn transition_time_moves_only_with_the_status() {
        let later = Timestamp::from_second(100).unwrap();
        let first = compute(&healthy(), &NodeStatus::default(), Timestamp::UNIX_EPOCH);
        let second = compute(&healthy(), &first, later);
        assert_eq!(condition(&second, "Ready").last_transition_time, Some(Time(Timestamp::UNIX_EPOCH)));
        assert_eq!(condition(&second, "Ready").last_heartbeat_time, Some(Time(later)));
        let mut sick = healthy();
        sick.pod_cidr_known = false;
        let third = compute(&sick, &second, later);
        assert_eq!(condition(&third, "Ready").last_transition_time, Some(Time(later)));
    }

    #[test]
    fn status_that_the_node_controller_set_to_unknown_is_not_the_one_that_is_known() {
        let posted = compute(&healthy(), &NodeStatus::default(), Timestamp::UNIX_EPOCH);
        assert!(is_known(&posted, &posted));
        let mut server = posted.clone();
        for condition in server.conditions.iter_mut().flatten() {
            condition.status = "Unknown".into();
            condition.reason = Some("NodeStatusUnknown".into());
        }
        assert!(!is_known(&compute(&healthy(), &server, Timestamp::UNIX_EPOCH), &server));
        assert!(!is_known(&posted, &NodeStatus::default()));
    }

    #[test]
    fn addresses_are_replaced_as_a_whole() {
        let status = compute(&healthy(), &NodeStatus::default(), Timestamp::UNIX_EPOCH);
        let patch = patch(&status);
        let addresses = patch["status"]["addresses"].as_array().unwrap();
        assert_eq!(addresses.len(), 4);
        assert_eq!(addresses[3], json!({ "$patch": "replace" }));
    }
}
