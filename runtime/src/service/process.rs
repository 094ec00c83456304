//! What a container runs: the image's config and the pod's wishes, combined. ◇ Pure.
//!
//! Called by the job that creates a container, and for exec. Invariant: the rules are those of Kubernetes: a command
//! replaces the image's entry point *and* its arguments; arguments alone replace only the image's arguments.

use crate::error::Error;
use crate::images::ImageConfig;
use crate::spec::{ContainerSpec, UserSpec};
use atoll_spec::guest::{Process, User};

/// SIGTERM.
pub const SIGTERM: i32 = 15;
/// SIGKILL.
pub const SIGKILL: i32 = 9;

/// Capabilities of a container that asks for nothing.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Every capability of Linux 6.12.
const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

/// The first process of a container.
pub fn container_process(
    spec: &ContainerSpec,
    image: &ImageConfig,
    hostname: &str,
) -> Result<Process, Error> {
    let args: Vec<String> = if spec.command.is_empty() {
        let tail = if spec.args.is_empty() { &image.cmd } else { &spec.args };
        image.entrypoint.iter().chain(tail).cloned().collect()
    } else {
        spec.command.iter().chain(&spec.args).cloned().collect()
    };
    if args.is_empty() {
        return Err(Error::Invalid(format!(
            "container {} has nothing to run: the image {} names no command, give one",
            spec.name, spec.image
        )));
    }
    let working_dir = [&spec.working_dir, &image.working_dir].into_iter().find(|d| !d.is_empty());
    let cwd = working_dir.cloned().unwrap_or_else(|| "/".to_owned());
    if !cwd.starts_with('/') {
        return Err(Error::Invalid(format!("working directory '{cwd}' is not absolute")));
    }
    Ok(Process {
        args,
        env: environment(spec, image, hostname),
        cwd,
        user: user(&spec.user, &image.user)?,
        tty: spec.tty,
        capabilities: capabilities(&spec.add_capabilities, &spec.drop_capabilities)?,
        no_new_privileges: spec.no_new_privileges,
        system_calls: spec.system_calls,
        oom_score_adj: spec.resources.oom_score_adj.clamp(-1000, 1000) as i32,
    })
}

/// A process beside it: same user, directory and capabilities; the guest adds the container's environment.
pub fn exec_process(container: &Process, args: Vec<String>, tty: bool) -> Process {
    let env = if tty { with_term(container.env.clone()) } else { Vec::new() };
    Process { args, tty, env, ..container.clone() }
}

fn with_term(mut env: Vec<String>) -> Vec<String> {
    if !env.iter().any(|e| e.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    env
}

fn environment(spec: &ContainerSpec, image: &ImageConfig, hostname: &str) -> Vec<String> {
    let mut env: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: &str| match env.iter_mut().find(|(n, _)| n == name) {
        Some((_, old)) => *old = value.to_owned(),
        None => env.push((name.to_owned(), value.to_owned())),
    };
    set("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    set("HOSTNAME", hostname);
    if spec.tty {
        set("TERM", "xterm");
    }
    for entry in &image.env {
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        set(name, value);
    }
    for (name, value) in &spec.envs {
        set(name, value);
    }
    env.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}

fn user(wish: &UserSpec, image: &str) -> Result<User, Error> {
    let groups = wish.groups.clone();
    match (wish.uid, wish.name.is_empty()) {
        (Some(_), false) => {
            Err(Error::Invalid("run_as_user and run_as_username exclude each other".to_owned()))
        }
        (Some(uid), true) => Ok(User::Ids { uid, gid: wish.gid, groups }),
        (None, false) => {
            let name = match wish.gid {
                Some(gid) => format!("{}:{gid}", wish.name),
                None => wish.name.clone(),
            };
            Ok(User::Name { name, groups })
        }
        (None, true) if wish.gid.is_some() => {
            Err(Error::Invalid("run_as_group needs run_as_user or run_as_username".to_owned()))
        }
        (None, true) if image.is_empty() => Ok(User::Ids { uid: 0, gid: None, groups }),
        (None, true) => Ok(User::Name { name: image.to_owned(), groups }),
    }
}

/// The default set, changed as asked for; what is added wins over `ALL` dropped, what is dropped over `ALL` added.
fn capabilities(add: &[String], drop: &[String]) -> Result<Vec<String>, Error> {
    let known = |list: &[String]| -> Result<Vec<&'static str>, Error> {
        let mut names = Vec::new();
        for name in list.iter().filter(|n| !is_all(n)) {
            let upper = name.to_ascii_uppercase();
            let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
            let found = ALL_CAPABILITIES.iter().copied().find(|c| *c == full);
            names.push(found.ok_or_else(|| Error::Invalid(format!("unknown capability '{name}'")))?);
        }
        Ok(names)
    };
    let (added, dropped) = (known(add)?, known(drop)?);
    let base: &[&str] = if add.iter().any(|n| is_all(n)) {
        &ALL_CAPABILITIES
    } else if drop.iter().any(|n| is_all(n)) {
        &[]
    } else {
        &DEFAULT_CAPABILITIES
    };
    let mut set: Vec<&str> = base.iter().copied().chain(added).collect();
    set.retain(|c| !dropped.contains(c));
    set.sort_unstable();
    set.dedup();
    Ok(set.into_iter().map(str::to_owned).collect())
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL")
}

/// Number of a signal by name (`SIGTERM`, `TERM`, `SIGRTMIN+3`) or number.
pub fn signal_number(name: &str) -> Option<i32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    const RTMIN: i32 = 34;
    const RTMAX: i32 = 64;
    if let Ok(number) = name.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(position) = NAMES.iter().position(|n| *n == short) {
        return i32::try_from(position).ok().map(|p| p + 1);
    }
    let number = match short {
        "IOT" => 6,
        "POLL" => 29,
        "CLD" => 17,
        "RTMIN" => RTMIN,
        "RTMAX" => RTMAX,
        _ => {
            let above = short.strip_prefix("RTMIN+").and_then(|n| n.parse::<i32>().ok()).map(|n| RTMIN + n);
            let below = short.strip_prefix("RTMAX-").and_then(|n| n.parse::<i32>().ok()).map(|n| RTMAX - n);
            above.or(below).filter(|n| (RTMIN..=RTMAX).contains(n))?
        }
    };
    Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    #[test]
    fn a_command_replaces_entry_point_and_arguments() {
        let image = ImageConfig { entrypoint: list(&["e"]), cmd: list(&["c"]), ..ImageConfig::default() };
        let check = |command: &[&str], args: &[&str], expect: &[&str]| {
            let spec = ContainerSpec {
                command: list(command),
                args: list(args),
                ..crate::service::tests::container_spec()
            };
            assert_eq!(container_process(&spec, &image, "h").unwrap().args, list(expect));
        };
        check(&[], &[], &["e", "c"]);
        check(&[], &["a"], &["e", "a"]);
        check(&["k"], &[], &["k"]);
        check(&["k"], &["a"], &["k", "a"]);
    }

    #[test]
    fn later_environment_wins_and_order_stays() {
        let image = ImageConfig { env: list(&["PATH=/x", "A=1"]), ..ImageConfig::default() };
        let envs = vec![("A".to_owned(), "2".to_owned()), ("B".to_owned(), "3=4".to_owned())];
        let spec = ContainerSpec { envs, ..crate::service::tests::container_spec() };
        assert_eq!(environment(&spec, &image, "h"), list(&["PATH=/x", "HOSTNAME=h", "A=2", "B=3=4"]));
    }

    #[test]
    fn capabilities_are_added_and_dropped() {
        let count = |add: &[&str], drop: &[&str]| capabilities(&list(add), &list(drop)).unwrap().len();
        assert_eq!((count(&[], &[]), count(&["ALL"], &[]), count(&[], &["ALL"])), (14, 41, 0));
        assert_eq!(capabilities(&list(&["net_admin"]), &list(&["ALL"])).unwrap(), list(&["CAP_NET_ADMIN"]));
        assert_eq!((count(&["ALL"], &["SYS_ADMIN"]), count(&[], &["KILL"])), (40, 13));
        assert!(capabilities(&list(&["FLY"]), &[]).is_err());
    }

    #[test]
    fn users_come_from_the_pod_or_the_image() {
        let wish = UserSpec { uid: Some(5), gid: Some(6), ..UserSpec::default() };
        assert_eq!(user(&wish, "www").unwrap(), User::Ids { uid: 5, gid: Some(6), groups: vec![] });
        assert_eq!(
            user(&UserSpec::default(), "www").unwrap(),
            User::Name { name: "www".into(), groups: vec![] }
        );
        assert!(user(&UserSpec { gid: Some(6), ..UserSpec::default() }, "").is_err());
    }

    #[test]
    fn signals_by_name_and_number() {
        for (name, number) in
            [("SIGTERM", 15), ("kill", 9), ("SIGSYS", 31), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX-1", 63)]
        {
            assert_eq!(signal_number(name), Some(number), "{name}");
        }
        for bad in ["", "SIG", "0", "65", "RTMIN+31", "RTMAX-31"] {
            assert_eq!(signal_number(bad), None, "{bad}");
        }
    }
}
