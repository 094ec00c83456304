//! Quantities, QoS classes, and resources in the runtime's units ◇.

use super::desired::{Container, Desired, Role};
use atoll_cri::v1;
use k8s_openapi::api::core::v1 as api;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Length of a CPU accounting period, in microseconds.
const CPU_PERIOD: i64 = 100_000;

/// Thousandths of a quantity, rounded up; `None` when it is not one.
pub fn millis(quantity: &Quantity) -> Option<i64> {
    let text = quantity.0.trim();
    let digits_end = text
        .char_indices()
        .find(|(at, c)| !(c.is_ascii_digit() || *c == '.' || (*at == 0 && (*c == '-' || *c == '+'))))
        .map_or(text.len(), |(at, _)| at);
    let (number, suffix) = text.split_at(digits_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let negative = whole.starts_with('-');
    let digits = format!("{}{fraction}", whole.trim_start_matches(['-', '+']));
    let mut value: i128 = digits.parse().ok()?;
    let (factor, power): (i128, i32) = match suffix {
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "" => (1, 0),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        exponent => (1, exponent.strip_prefix(['e', 'E'])?.parse().ok()?),
    };
    value = value.checked_mul(factor)?;
    let scale = power + 3 - i32::try_from(fraction.len()).ok()?;
    let ten = |n: i32| 10i128.checked_pow(n.unsigned_abs());
    value = if scale >= 0 {
        value.checked_mul(ten(scale)?)?
    } else {
        let divisor = ten(scale)?;
        (value + divisor - 1) / divisor
    };
    i64::try_from(if negative { -value } else { value }).ok()
}

/// Units of a quantity, rounded up.
pub fn units(quantity: &Quantity) -> Option<i64> {
    millis(quantity).map(|m| m / 1000 + i64::from(m % 1000 > 0)).or_else(|| {
        // Beyond what fits in thousandths: whole numbers of bytes still do.
        quantity.0.parse().ok()
    })
}

type List = Option<std::collections::BTreeMap<String, Quantity>>;

fn find<'a>(list: &'a List, name: &str) -> Option<&'a Quantity> {
    list.as_ref()?.get(name)
}

/// A container's limit in thousandths (`cpu`) or units (anything else); 0 counts as none.
pub fn limit(container: &api::Container, name: &str) -> Option<i64> {
    let quantity = find(&container.resources.as_ref()?.limits, name)?;
    if name == "cpu" { millis(quantity) } else { units(quantity) }.filter(|n| *n > 0)
}

/// A container's request, or its limit when it has none.
pub fn request(container: &api::Container, name: &str) -> Option<i64> {
    let resources = container.resources.as_ref()?;
    match find(&resources.requests, name) {
        Some(quantity) if name == "cpu" => millis(quantity),
        Some(quantity) => units(quantity),
        None => limit(container, name),
    }
}

/// QoS class of a pod.
pub fn qos(spec: &api::PodSpec) -> &'static str {
    let containers: Vec<_> = spec.containers.iter().chain(spec.init_containers.iter().flatten()).collect();
    let positive = |list: &List, name: &str| find(list, name).and_then(millis).filter(|n| *n > 0);
    let mut any = false;
    let mut guaranteed = true;
    for container in containers {
        let resources = container.resources.clone().unwrap_or_default();
        for name in ["cpu", "memory"] {
            let (limit, request) = (positive(&resources.limits, name), positive(&resources.requests, name));
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && request.unwrap_or(limit.unwrap_or(0)) == limit.unwrap_or(0);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

fn shares(cpu_millis: i64) -> i64 {
    (cpu_millis * 1024 / 1000).clamp(2, 262_144)
}

/// A container's resources as the runtime takes them.
pub fn of_container(container: &Container, qos: &str, node_memory: u64) -> v1::LinuxContainerResources {
    let spec = &container.spec;
    let cpu_limit = limit(spec, "cpu");
    v1::LinuxContainerResources {
        cpu_period: cpu_limit.map_or(0, |_| CPU_PERIOD),
        cpu_quota: cpu_limit.map_or(0, |m| (m * CPU_PERIOD / 1000).max(1000)),
        cpu_shares: shares(request(spec, "cpu").unwrap_or(0)),
        memory_limit_in_bytes: limit(spec, "memory").unwrap_or(0),
        oom_score_adj: oom_score(spec, qos, node_memory),
        ..Default::default()
    }
}

/// Who is killed first when memory runs out: best effort before burstable before guaranteed.
fn oom_score(spec: &api::Container, qos: &str, node_memory: u64) -> i64 {
    match qos {
        "Guaranteed" => -997,
        "BestEffort" => 1000,
        _ => {
            let requested = request(spec, "memory").unwrap_or(0);
            let node = i64::try_from(node_memory).unwrap_or(i64::MAX).max(1);
            let kept = i128::from(requested) * 1000 / i128::from(node);
            (1000 - i64::try_from(kept).unwrap_or(1000)).clamp(3, 999)
        }
    }
}

/// What the whole pod may use: the sum of its containers, or an init container when that is more. A limit that one
/// of them lacks is a limit that the pod lacks.
pub fn of_pod(desired: &Desired) -> v1::LinuxContainerResources {
    let total = |name: &str| -> Option<i64> {
        let of = |c: &Container| limit(&c.spec, name);
        let pod_level = desired.spec().resources.as_ref().and_then(|r| find(&r.limits, name));
        if let Some(quantity) = pod_level {
            return if name == "cpu" { millis(quantity) } else { units(quantity) };
        }
        let mains: i64 = desired.of_role(Role::Main).map(of).sum::<Option<i64>>()?;
        let (mut sidecars, mut most) = (0i64, 0i64);
        for container in desired.before_main() {
            let own = of(container)?;
            if container.role == Role::Sidecar {
                sidecars += own;
                most = most.max(sidecars);
            } else {
                most = most.max(sidecars + own);
            }
        }
        Some(most.max(mains + sidecars))
    };
    let requests: i64 = desired
        .containers
        .iter()
        .filter(|c| c.role != Role::Init)
        .map(|c| request(&c.spec, "cpu").unwrap_or(0))
        .sum();
    let cpu_limit = total("cpu");
    v1::LinuxContainerResources {
        cpu_period: cpu_limit.map_or(0, |_| CPU_PERIOD),
        cpu_quota: cpu_limit.map_or(0, |m| m * CPU_PERIOD / 1000),
        cpu_shares: shares(requests),
        memory_limit_in_bytes: total("memory").unwrap_or(0),
        ..Default::default()
    }
}

/// The pod's overhead, as its runtime class says.
pub fn overhead(spec: &api::PodSpec) -> v1::LinuxContainerResources {
    let cpu = find(&spec.overhead, "cpu").and_then(millis);
    v1::LinuxContainerResources {
        cpu_period: cpu.map_or(0, |_| CPU_PERIOD),
        cpu_quota: cpu.map_or(0, |m| m * CPU_PERIOD / 1000),
        memory_limit_in_bytes: find(&spec.overhead, "memory").and_then(units).unwrap_or(0),
        ..Default::default()
    }
}

/// The value of a `resourceFieldRef`, as a string. What is not limited is limited by the node.
///
/// # Errors
/// When the resource has no such field.
pub fn field(
    container: &api::Container,
    resource: &str,
    divisor: Option<&Quantity>,
    node: impl Fn(&str) -> i64,
) -> Result<String, String> {
    let (kind, name) =
        resource.split_once('.').ok_or_else(|| format!("resource '{resource}' is not a field"))?;
    let known = matches!(name, "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-");
    if !known {
        return Err(format!("resource '{resource}' is not supported"));
    }
    let own = match kind {
        "limits" => Some(limit(container, name).unwrap_or_else(|| node(name))),
        "requests" => request(container, name),
        _ => return Err(format!("resource '{resource}' is not supported")),
    };
    let own = i128::from(own.unwrap_or(0)) * if name == "cpu" { 1 } else { 1000 };
    // The API server's default divisor is "0", which means 1.
    let divisor = divisor.and_then(millis).filter(|d| *d > 0).unwrap_or(1000);
    let divisor = i128::from(divisor);
    Ok(((own + divisor - 1) / divisor).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::testing::pod;

    #[test]
    fn quantities() {
        let table = [
            ("1", 1000),
            ("250m", 250),
            ("0.5", 500),
            ("1.5Gi", 1_610_612_736_000),
            ("100M", 100_000_000_000),
            ("1e3", 1_000_000),
            ("1E3", 1_000_000),
            ("1u", 1),
            ("0", 0),
        ];
        for (text, want) in table {
            assert_eq!(millis(&Quantity(text.into())), Some(want), "{text}");
        }
        assert_eq!(millis(&Quantity("12x".into())), None);
        assert_eq!(units(&Quantity("100m".into())), Some(1));
        assert_eq!(units(&Quantity("64Mi".into())), Some(64 << 20));
    }

    #[test]
    fn qos_classes() {
        let class = |resources: &str| {
            let desired = pod(&format!("{{containers: [{{name: a, image: i, resources: {resources}}}]}}"));
            qos(desired.spec())
        };
        assert_eq!(class("{}"), "BestEffort");
        assert_eq!(class("{requests: {cpu: 1}}"), "Burstable");
        assert_eq!(class("{limits: {cpu: 1, memory: 1Gi}}"), "Guaranteed");
        assert_eq!(class("{limits: {cpu: 1, memory: 1Gi}, requests: {cpu: 500m, memory: 1Gi}}"), "Burstable");
    }

    #[test]
    fn container_and_pod_resources() {
        let desired = pod(
            "{containers: [{name: a, image: i, resources: {limits: {cpu: 500m, memory: 64Mi}, requests: {cpu: 250m}}},
                           {name: b, image: i, resources: {limits: {cpu: 1, memory: 64Mi}}}]}",
        );
        let a = of_container(&desired.containers[0], "Burstable", 1 << 30);
        assert_eq!(
            (a.cpu_quota, a.cpu_period, a.cpu_shares, a.memory_limit_in_bytes),
            (50_000, 100_000, 256, 64 << 20)
        );
        let all = of_pod(&desired);
        assert_eq!((all.cpu_quota, all.memory_limit_in_bytes), (150_000, 128 << 20));
        let open = pod(
            "{containers: [{name: a, image: i, resources: {limits: {memory: 64Mi}}}, {name: b, image: i}]}",
        );
        assert_eq!(of_pod(&open).memory_limit_in_bytes, 0);
    }

    #[test]
    fn resource_fields() {
        let desired =
            pod("{containers: [{name: a, image: i, resources: {limits: {cpu: 1500m, memory: 64Mi}}}]}");
        let c = &desired.containers[0].spec;
        let get = |resource: &str, divisor: &str| {
            field(c, resource, Some(&Quantity(divisor.into())), |_| 7).unwrap()
        };
        assert_eq!(get("limits.cpu", "0"), "2");
        assert_eq!(get("limits.cpu", "1m"), "1500");
        assert_eq!(get("limits.memory", "1Mi"), "64");
        assert_eq!(get("requests.memory", "1"), (64 << 20).to_string());
        assert_eq!(get("limits.ephemeral-storage", "1"), "7");
        assert_eq!(get("requests.ephemeral-storage", "1"), "0");
    }
}
