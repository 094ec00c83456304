//! What of an inventory belongs to nobody. Pure: facts in, lines out.

use super::{Inventory, Process};
use std::collections::BTreeSet;

/// Services of PID 1 in a test image.
const SERVICES: [&str; 4] = ["hostd", "runtime", "agent", "test-bridge"];
/// Prefix of the pods' cgroups.
const PODS: &str = "pods/";

/// Everything that no sandbox and no service accounts for, one line each.
pub fn unaccounted(inventory: &Inventory) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    let known: BTreeSet<&str> = inventory.sandboxes.iter().map(|s| s.id.as_str()).collect();
    let taps: BTreeSet<&str> = inventory.sandboxes.iter().map(|s| s.tap.as_str()).collect();
    for tap in inventory.interfaces.iter().filter(|name| name.starts_with("atoll")) {
        if !taps.contains(tap.as_str()) {
            lines.insert(format!("tap {tap} of no sandbox"));
        }
    }
    for cgroup in inventory.cgroups.iter().filter_map(|path| path.strip_prefix(PODS)) {
        let sandbox = cgroup.split('/').next().unwrap_or_default();
        if !known.contains(sandbox) {
            lines.insert(format!("cgroup {PODS}{cgroup} of no sandbox"));
        }
    }
    for directory in &inventory.sandbox_directories {
        if !known.contains(directory.as_str()) {
            lines.insert(format!("directory of sandbox {directory} without a record"));
        }
    }
    for element in &inventory.filtered {
        let tap = element.split(' ').next().unwrap_or_default();
        if !taps.contains(tap) {
            lines.insert(format!("packet filter lets {element} through, which is no sandbox's"));
        }
    }
    lines.extend(inventory.processes.iter().filter_map(|process| stray(process, &known)));
    lines.extend(inventory.loops.iter().map(|name| format!("loop device {name}")));
    lines.extend(inventory.half_made.iter().map(|name| format!("half-made file {name}")));
    lines.extend(stray_namespaces(inventory));
    lines
}

fn stray(process: &Process, known: &BTreeSet<&str>) -> Option<String> {
    let Process { pid, name, cgroup, .. } = process;
    if process.state == 'Z' {
        return Some(format!("zombie {pid} ({name}), child of {}", process.parent));
    }
    if *pid == 1 {
        return None;
    }
    let accounted = match cgroup.strip_prefix(PODS) {
        Some(rest) => known.contains(rest.split('/').next().unwrap_or_default()),
        None => cgroup
            .strip_prefix("services/")
            .is_some_and(|rest| SERVICES.contains(&rest.split('/').next().unwrap_or_default())),
    };
    (!accounted).then(|| format!("process {pid} ({name}) in cgroup {cgroup}"))
}

/// Namespaces of processes of the host plane beyond those of PID 1 and each service's own mount namespace.
fn stray_namespaces(inventory: &Inventory) -> Vec<String> {
    let Some(init) = inventory.processes.iter().find(|p| p.pid == 1) else { return Vec::new() };
    let strays = inventory.processes.iter().filter(|p| !p.cgroup.starts_with(PODS)).flat_map(|process| {
        process
            .namespaces
            .iter()
            .filter(|name| !name.starts_with("mnt:") && !init.namespaces.contains(*name))
            .map(move |name| {
                format!("namespace {name} of {} ({}), which should have PID 1's", process.pid, process.name)
            })
    });
    strays.collect()
}

/// What `now` has beyond `before`, when both were taken with no pod in the host; memory is not compared.
pub fn beyond(before: &Inventory, now: &Inventory) -> BTreeSet<String> {
    let mut lines = unaccounted(now);
    let sets = [
        ("interface", &before.interfaces, &now.interfaces),
        ("cgroup", &before.cgroups, &now.cgroups),
        ("mount", &before.mounts, &now.mounts),
        ("listener", &before.listeners, &now.listeners),
        ("volume directory", &before.volumes, &now.volumes),
        ("sandbox directory", &before.sandbox_directories, &now.sandbox_directories),
    ];
    for (kind, old, new) in sets {
        lines.extend(new.difference(old).map(|name| format!("{kind} {name}")));
    }
    let count =
        |inventory: &Inventory, name: &str| inventory.processes.iter().filter(|p| p.name == name).count();
    for process in &now.processes {
        let (was, is) = (count(before, &process.name), count(now, &process.name));
        if is > was {
            lines.insert(format!("{is} processes {}, were {was}", process.name));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::Sandbox;

    fn process(pid: i32, name: &str, cgroup: &str) -> Process {
        Process {
            pid,
            parent: 1,
            name: name.into(),
            state: 'S',
            cgroup: cgroup.into(),
            resident_kib: 0,
            private_kib: 0,
            threads: 1,
            descriptors: 3,
            namespaces: BTreeSet::from(["net:[1]".to_owned()]),
        }
    }

    fn healthy() -> Inventory {
        Inventory {
            sandboxes: vec![Sandbox {
                id: "aa".into(),
                pod: "hello".into(),
                phase: "ready".into(),
                tap: "atoll3".into(),
                address: "10.0.0.1".into(),
                containers: vec!["running".into()],
            }],
            sandbox_directories: BTreeSet::from(["aa".into()]),
            processes: vec![
                process(1, "atoll-init", ""),
                process(40, "atoll-runtime", "services/runtime"),
                process(50, "atoll-vmm", "pods/aa"),
            ],
            interfaces: BTreeSet::from(["lo".into(), "eth0".into(), "atoll3".into()]),
            cgroups: BTreeSet::from(["services/runtime".into(), "pods".into(), "pods/aa".into()]),
            filtered: BTreeSet::from(["atoll3 10.0.0.1".into()]),
            ..Inventory::default()
        }
    }

    #[test]
    fn what_a_sandbox_or_service_accounts_for_is_no_leak() {
        assert_eq!(unaccounted(&healthy()), BTreeSet::new());
    }

    #[test]
    fn each_kind_of_leak_has_its_line() {
        let mut host = healthy();
        host.interfaces.insert("atoll9".into());
        host.cgroups.insert("pods/bb".into());
        host.sandbox_directories.insert("cc".into());
        host.filtered.insert("atoll8 10.0.0.9".into());
        host.loops.insert("loop0".into());
        host.half_made.insert("x".into());
        host.processes.push(process(60, "atoll-vmm", "pods/bb"));
        host.processes.push(process(61, "mkfs.erofs", ""));
        host.processes.push(Process { state: 'Z', ..process(62, "nft", "services/runtime") });
        let foreign = BTreeSet::from(["net:[2]".to_owned()]);
        host.processes.push(Process { namespaces: foreign, ..process(63, "nft", "services/runtime") });
        let lines = unaccounted(&host);
        assert_eq!(lines.len(), 10, "{lines:#?}");
    }

    #[test]
    fn beyond_names_what_came_and_stayed() {
        let (before, mut now) = (healthy(), healthy());
        assert_eq!(beyond(&before, &now), BTreeSet::new());
        now.mounts.insert("/data/x".into());
        now.processes.push(process(64, "atoll-runtime", "services/runtime"));
        assert_eq!(beyond(&before, &now).len(), 2);
    }
}
