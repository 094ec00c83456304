//! What a pod may keep on disk, and which of its limits it exceeds ◇.
//!
//! Called by `storage_watch`, and by `sandbox_config` for the size of the pod's disk. The limits, their order and the
//! sentences are those of other node agents, so that who reads a pod's status finds what they know.

use super::desired::{Container, Desired, Role};
use super::resources;
use k8s_openapi::api::core::v1 as api;
use std::collections::BTreeMap;

const STORAGE: &str = "ephemeral-storage";

/// Bytes on disk.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// By container: what it wrote beside its volumes, and its log.
    pub containers: BTreeMap<String, u64>,
    /// By volume.
    pub volumes: BTreeMap<String, u64>,
}

fn of_container(container: &Container) -> Option<u64> {
    resources::limit(&container.spec, STORAGE).and_then(|bytes| u64::try_from(bytes).ok())
}

/// Size limit of a volume on disk. One in memory is held by its file system.
fn of_volume(volume: &api::Volume) -> Option<u64> {
    let source = volume.empty_dir.as_ref().filter(|s| s.medium.as_deref() != Some("Memory"))?;
    resources::units(source.size_limit.as_ref()?).and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0)
}

/// What the whole pod may keep on disk: the sum of the limits that its containers have, or more when those that run
/// before them have more. `None`: no container has one.
pub fn of_pod(desired: &Desired) -> Option<u64> {
    let of = |container: &Container| of_container(container).unwrap_or(0);
    let mains: u64 = desired.of_role(Role::Main).map(of).fold(0, u64::saturating_add);
    let (mut sidecars, mut most) = (0_u64, 0_u64);
    for container in desired.before_main() {
        let own = of(container);
        if container.role == Role::Sidecar {
            sidecars = sidecars.saturating_add(own);
            most = most.max(sidecars);
        } else {
            most = most.max(sidecars.saturating_add(own));
        }
    }
    Some(most.max(mains.saturating_add(sidecars))).filter(|total| *total > 0)
}

/// Whether it has any limit.
pub fn any(desired: &Desired) -> bool {
    of_pod(desired).is_some() || desired.spec().volumes.iter().flatten().any(|v| of_volume(v).is_some())
}

/// Which limit is exceeded, in the sentence that the pod's status gets.
pub fn exceeded(desired: &Desired, usage: &Usage) -> Option<String> {
    let over = |used: Option<&u64>, limit: u64| used.is_some_and(|used| *used > limit);
    for volume in desired.spec().volumes.iter().flatten() {
        if let Some(limit) = of_volume(volume).filter(|limit| over(usage.volumes.get(&volume.name), *limit)) {
            let (name, limit) = (&volume.name, quantity(limit));
            return Some(format!("Usage of EmptyDir volume \"{name}\" exceeds the limit \"{limit}\"."));
        }
    }
    let on_disk = |name: &String| {
        let volume = desired.spec().volumes.iter().flatten().find(|v| v.name == *name);
        let source = volume.and_then(|v| v.empty_dir.as_ref());
        source.is_some_and(|source| source.medium.as_deref() != Some("Memory"))
    };
    let volumes = usage.volumes.iter().filter(|(name, _)| on_disk(name)).map(|(_, bytes)| bytes);
    let total = usage.containers.values().chain(volumes).fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
    if let Some(limit) = of_pod(desired).filter(|limit| total > *limit) {
        return Some(format!(
            "Pod ephemeral local storage usage exceeds the total limit of containers {}.",
            quantity(limit)
        ));
    }
    let mut containers = desired.containers.iter();
    containers.find_map(|container| {
        let limit = of_container(container).filter(|l| over(usage.containers.get(&container.name), *l))?;
        let (name, limit) = (&container.name, quantity(limit));
        Some(format!("Container {name} exceeded its local ephemeral storage limit \"{limit}\"."))
    })
}

/// Bytes as Kubernetes writes them: `64Mi`, `1000`.
fn quantity(bytes: u64) -> String {
    let units = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut rest = bytes;
    let mut unit = 0;
    while rest > 0 && rest.is_multiple_of(1024) && unit + 1 < units.len() {
        rest /= 1024;
        unit += 1;
    }
    format!("{rest}{}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::pod;

    const MIB: u64 = 1 << 20;

    fn usage(containers: &[(&str, u64)], volumes: &[(&str, u64)]) -> Usage {
        let map = |list: &[(&str, u64)]| list.iter().map(|(n, mib)| ((*n).to_owned(), mib * MIB)).collect();
        Usage { containers: map(containers), volumes: map(volumes) }
    }

    fn two(first: &str, second: &str) -> Desired {
        let limit = |text: &str| {
            if text.is_empty() {
                String::new()
            } else {
                format!(", resources: {{limits: {{ephemeral-storage: {text}}}}}")
            }
        };
        pod(&format!(
            "{{containers: [{{name: a, image: i{}}}, {{name: b, image: i{}}}],
               volumes: [{{name: disk, emptyDir: {{sizeLimit: 10Mi}}}}, {{name: open, emptyDir: {{}}}},
                         {{name: memory, emptyDir: {{medium: Memory, sizeLimit: 1Mi}}}}]}}",
            limit(first),
            limit(second)
        ))
    }

    #[test]
    fn what_is_within_its_limits_stays() {
        let full = usage(&[("a", 64), ("b", 22)], &[("disk", 10), ("memory", 100)]);
        assert_eq!(exceeded(&two("64Mi", "32Mi"), &full), None);
        assert_eq!(exceeded(&two("", ""), &usage(&[("a", 1 << 20)], &[("open", 1 << 20)])), None);
        assert_eq!(exceeded(&two("1Mi", ""), &Usage::default()), None);
    }

    #[test]
    fn each_limit_has_its_sentence() {
        let desired = two("64Mi", "32Mi");
        let volume = usage(&[("a", 1000)], &[("disk", 11)]);
        assert_eq!(
            exceeded(&desired, &volume).unwrap(),
            "Usage of EmptyDir volume \"disk\" exceeds the limit \"10Mi\"."
        );
        let together = usage(&[("a", 60), ("b", 30)], &[("open", 7)]);
        assert_eq!(
            exceeded(&desired, &together).unwrap(),
            "Pod ephemeral local storage usage exceeds the total limit of containers 96Mi."
        );
        assert_eq!(
            exceeded(&desired, &usage(&[("b", 33)], &[])).unwrap(),
            "Container b exceeded its local ephemeral storage limit \"32Mi\"."
        );
    }

    #[test]
    fn an_init_container_may_need_more_than_the_others_together() {
        let limits = |init: &str| {
            let resources = |text: &str| format!("resources: {{limits: {{ephemeral-storage: {text}}}}}");
            of_pod(&pod(&format!(
                "{{initContainers: [{{name: s, image: i, restartPolicy: Always, {}}}, {{name: i, image: i, {}}}],
                   containers: [{{name: a, image: i, {}}}, {{name: b, image: i}}]}}",
                resources("1Mi"),
                resources(init),
                resources("10Mi")
            )))
        };
        assert_eq!(limits("2Mi"), Some(11 * MIB));
        assert_eq!(limits("20Mi"), Some(21 * MIB));
        assert_eq!(of_pod(&pod("{containers: [{name: a, image: i}]}")), None);
    }

    #[test]
    fn quantities_are_written_as_people_wrote_them() {
        for (bytes, text) in
            [(64 * MIB, "64Mi"), (1 << 30, "1Gi"), (1000, "1000"), (1536 * MIB, "1536Mi"), (0, "0")]
        {
            assert_eq!(quantity(bytes), text);
        }
    }
}
