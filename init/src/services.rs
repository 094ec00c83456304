//! The fixed table of services: what the host runs, as whom, with which rights and limits. A test image may add
//! more from a file that a release image does not have.

use crate::error::{Error, Result};
use crate::process::{Confinement, User};
use crate::sys::Syscalls;
use atoll_spec::places::AGENT_UID;
use serde::Deserialize;
use std::time::Duration;

/// Extra services, in test images only.
pub const TEST_SERVICES: &str = "/usr/lib/atoll/test-services.json";

/// A service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name, also of its cgroup.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Services that must be ready before it starts.
    pub after: Vec<String>,
    /// Whether it says when it is ready. Otherwise it is as soon as it runs.
    pub notifies: bool,
    /// How long it may take to be ready.
    pub start_deadline: Duration,
    /// How long it may take to stop when asked.
    pub stop_deadline: Duration,
    /// Longest time between two signs of life (`WATCHDOG=1`) once it is ready; `None` when it gives none.
    pub watchdog: Option<Duration>,
    /// What it may do.
    pub confinement: Confinement,
    /// Its share of the machine.
    pub limits: Limits,
}

/// Cgroup limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Memory that is never taken from it, in MiB.
    pub memory_min_mib: u64,
    /// Memory it can never exceed, in MiB.
    pub memory_max_mib: u64,
    /// Most processes and threads.
    pub processes: u32,
}

/// Capability numbers, as the kernel has them.
mod capability {
    pub(super) const CHOWN: u64 = 1 << 0;
    pub(super) const DAC_OVERRIDE: u64 = 1 << 1;
    pub(super) const FOWNER: u64 = 1 << 3;
    pub(super) const KILL: u64 = 1 << 5;
    pub(super) const SETGID: u64 = 1 << 6;
    pub(super) const SETUID: u64 = 1 << 7;
    pub(super) const SETPCAP: u64 = 1 << 8;
    pub(super) const NET_BIND_SERVICE: u64 = 1 << 10;
    pub(super) const NET_ADMIN: u64 = 1 << 12;
    pub(super) const NET_RAW: u64 = 1 << 13;
    pub(super) const SYS_CHROOT: u64 = 1 << 18;
    pub(super) const SYS_PTRACE: u64 = 1 << 19;
    pub(super) const SYS_ADMIN: u64 = 1 << 21;
    pub(super) const SYS_RESOURCE: u64 = 1 << 24;
    pub(super) const SYS_TIME: u64 = 1 << 25;
    pub(super) const MKNOD: u64 = 1 << 27;
    pub(super) const SETFCAP: u64 = 1 << 31;
}

/// Network, disks, clock; files of other users it writes for them.
const HOSTD: u64 = capability::NET_ADMIN
    | capability::NET_RAW
    | capability::NET_BIND_SERVICE
    | capability::SYS_ADMIN
    | capability::SYS_TIME
    | capability::DAC_OVERRIDE
    | capability::CHOWN
    | capability::FOWNER;

/// Jails: namespaces, roots, users, devices, cgroups; files of image layers with their owners and attributes.
const RUNTIME: u64 = capability::SYS_ADMIN
    | capability::NET_ADMIN
    | capability::SETUID
    | capability::SETGID
    | capability::SETPCAP
    | capability::SETFCAP
    | capability::SYS_CHROOT
    | capability::SYS_PTRACE
    | capability::SYS_RESOURCE
    | capability::CHOWN
    | capability::DAC_OVERRIDE
    | capability::FOWNER
    | capability::KILL
    | capability::MKNOD;

/// Carries one socket onto the network; looks at every process and the packet filter, and signals services.
const TEST: u64 = capability::NET_BIND_SERVICE
    | capability::NET_ADMIN
    | capability::DAC_OVERRIDE
    | capability::SYS_PTRACE
    | capability::KILL;

/// A service that hangs is noticed after this long. Longer than any disk that works makes one wait.
const WATCHDOG: Duration = Duration::from_secs(30);

const ROOT: User = User { uid: 0, gid: 0, groups: Vec::new() };

/// Below this nothing of the host plane is ever chosen when memory runs out. Not −1000: a service that leaks must
/// still be able to die instead of the kernel.
const OOM_HOST_PLANE: i16 = -900;

/// The services of every host, in start order.
pub fn table() -> Vec<Service> {
    vec![
        Service {
            name: "hostd".into(),
            command: vec!["/usr/bin/atoll-hostd".into()],
            after: Vec::new(),
            notifies: true,
            // Its own deadline for the network is 30 s; checking and growing a large disk takes longer.
            start_deadline: Duration::from_secs(240),
            stop_deadline: Duration::from_secs(10),
            watchdog: Some(WATCHDOG),
            confinement: confinement(ROOT, HOSTD, 4096),
            limits: Limits { memory_min_mib: 32, memory_max_mib: 512, processes: 256 },
        },
        Service {
            name: "runtime".into(),
            command: vec!["/usr/bin/atoll-runtime".into()],
            after: vec!["hostd".into()],
            notifies: true,
            start_deadline: Duration::from_secs(90),
            stop_deadline: Duration::from_secs(15),
            watchdog: Some(WATCHDOG),
            confinement: confinement(ROOT, RUNTIME, 65536),
            // Helpers that unpack image layers live in here too.
            limits: Limits { memory_min_mib: 64, memory_max_mib: 1536, processes: 4096 },
        },
        Service {
            name: "agent".into(),
            command: vec!["/usr/bin/atoll-agent".into()],
            after: vec!["hostd".into(), "runtime".into()],
            notifies: true,
            start_deadline: Duration::from_secs(90),
            stop_deadline: Duration::from_secs(20),
            watchdog: Some(WATCHDOG),
            confinement: Confinement {
                hidden: vec!["/esp".into()],
                ..confinement(User { uid: AGENT_UID, gid: AGENT_UID, groups: vec![801] }, 0, 65536)
            },
            // 256 MiB of it for volumes in memory, see `mounts`.
            limits: Limits { memory_min_mib: 64, memory_max_mib: 1024, processes: 512 },
        },
    ]
}

fn confinement(user: User, capabilities: u64, open_files: u64) -> Confinement {
    Confinement { user, capabilities, open_files, oom_score_adj: OOM_HOST_PLANE, hidden: Vec::new() }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TestService {
    name: String,
    command: Vec<String>,
    #[serde(default)]
    after: Vec<String>,
    /// All capabilities, and memory for virtual machines of its own.
    #[serde(default)]
    privileged: bool,
}

/// The table and, in a test image, the services of its file.
///
/// # Errors
/// When there is such a file and it makes no sense.
pub fn with_tests(sys: &dyn Syscalls) -> Result<Vec<Service>> {
    let mut services = table();
    if !sys.exists(TEST_SERVICES) {
        return Ok(services);
    }
    let text = sys.read(TEST_SERVICES).map_err(Error::file("read", TEST_SERVICES))?;
    let malformed = |what: String| Error::Malformed { path: TEST_SERVICES.into(), what };
    let extra: Vec<TestService> = serde_json::from_str(&text).map_err(|e| malformed(e.to_string()))?;
    for service in extra {
        if services.iter().any(|other| other.name == service.name) {
            return Err(malformed(format!("there are two services {}", service.name)));
        }
        let unknown = service.after.iter().find(|name| !services.iter().any(|other| other.name == **name));
        if let Some(unknown) = unknown {
            return Err(malformed(format!(
                "{} comes after {unknown}, which does not exist before it",
                service.name
            )));
        }
        services.push(Service {
            name: service.name,
            command: service.command,
            after: service.after,
            notifies: false,
            start_deadline: Duration::from_secs(30),
            stop_deadline: Duration::from_secs(3),
            watchdog: None,
            confinement: confinement(ROOT, if service.privileged { TEST | RUNTIME } else { TEST }, 4096),
            limits: Limits {
                memory_min_mib: 0,
                memory_max_mib: if service.privileged { 2048 } else { 256 },
                processes: 256,
            },
        });
    }
    Ok(services)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fake::Fake;

    #[test]
    fn dependencies_stand_before_their_dependents() {
        let services = table();
        for (position, service) in services.iter().enumerate() {
            for name in &service.after {
                let before = services.iter().position(|other| other.name == *name).unwrap();
                assert!(before < position, "{} after {name}", service.name);
            }
        }
    }

    #[test]
    fn the_agent_has_no_rights_and_nobody_is_out_of_reach_of_the_oom_killer() {
        for service in table() {
            assert!(service.confinement.oom_score_adj > -1000);
            if service.name == "agent" {
                assert_eq!((service.confinement.user.uid, service.confinement.capabilities), (800, 0));
            }
        }
    }

    #[test]
    fn a_test_image_adds_services() {
        let fake = Fake::default();
        assert_eq!(with_tests(&fake).unwrap(), table());
        fake.file(TEST_SERVICES, r#"[{"name":"bridge","command":["/usr/bin/bridge"],"after":["runtime"]}]"#);
        assert_eq!(with_tests(&fake).unwrap().last().unwrap().name, "bridge");
        for (text, what) in [
            (r#"[{"name":"hostd","command":["/x"]}]"#, "two services hostd"),
            (r#"[{"name":"a","command":["/x"],"after":["b"]}]"#, "a comes after b"),
            ("{}", "malformed"),
        ] {
            fake.file(TEST_SERVICES, text);
            let error = with_tests(&fake).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
