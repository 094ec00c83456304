//! Who a process is: user, groups, capabilities, limits. Everything here can only take rights away.

use crate::error::{Context as _, Failure, Result};
use crate::user::{self, Identity};
use atoll_spec::guest::{Process, User};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};
use std::io::Read as _;
use std::os::fd::OwnedFd;

/// Longest `/etc/passwd` or `/etc/group` that is read.
const MAX_DATABASE: u64 = 4 << 20;
/// Open files of a container: soft and hard.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// Finds the user in the root that this process has by now.
pub fn look_up(user: &User) -> Result<Identity> {
    user::look_up(user, &read_database("/etc/passwd"), &read_database("/etc/group")).map_err(Failure::invalid)
}

/// A missing or odd file is an empty one: an image need not have it.
fn read_database(path: &str) -> String {
    let mut text = Vec::new();
    // Without blocking: an image may have put a pipe there.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(path, flags, Mode::empty()) {
        let file = std::fs::File::from(file);
        if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            // What could be read is used; the rest is as good as missing.
            let _ = file.take(MAX_DATABASE).read_to_end(&mut text);
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Before anything is dropped: lowering the score needs a capability.
pub fn set_oom_score(adjustment: i32) -> Result<()> {
    if adjustment == 0 {
        return Ok(());
    }
    std::fs::write("/proc/self/oom_score_adj", adjustment.to_string())
        .during(|| format!("set the oom score adjustment {adjustment}"))
}

/// The limits that programs expect of a container host; where the hard one cannot be raised it stays.
pub fn limit_resources() -> Result<()> {
    let (soft, hard) = OPEN_FILES;
    let set =
        |hard| rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum: hard });
    set(Some(hard))
        .or_else(|_| set(rustix::process::getrlimit(Resource::Nofile).maximum))
        .during(|| "limit open files".into())
}

/// Pipes and the terminal belong to the user, so that `/dev/stdout` can be opened.
pub fn own_stdio(stdio: &[OwnedFd], uid: u32) -> Result<()> {
    for fd in stdio {
        let stat = rustix::fs::fstat(fd).during(|| "look at a standard descriptor".into())?;
        // A device with number 1:3 is /dev/null, which belongs to everybody.
        let null = stat.st_rdev == rustix::fs::makedev(1, 3);
        if !null && stat.st_uid != uid {
            rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), None)
                .during(|| "give the standard descriptors to the user".into())?;
        }
    }
    Ok(())
}

/// Becomes the user with the capabilities of the process.
pub fn assume(who: &Identity, process: &Process) -> Result<()> {
    let wanted = parse_capabilities(&process.capabilities)?;
    for capability in CapabilitySet::all().difference(wanted).iter() {
        drop_bounding(capability)?;
    }
    let groups: Vec<Gid> = who.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    rustix::thread::set_thread_groups(&groups).during(|| format!("set the groups {:?}", who.groups))?;
    let (uid, gid) = (Uid::from_raw(who.uid), Gid::from_raw(who.gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid).during(|| format!("set the group {}", who.gid))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).during(|| format!("set the user {}", who.uid))?;
    if who.uid == 0 {
        set_capabilities(wanted)?;
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).during(|| "set no_new_privs".into())?;
    }
    Ok(())
}

fn drop_bounding(capability: CapabilitySet) -> Result<()> {
    match rustix::thread::remove_capability_from_bounding_set(capability) {
        // Newer than this kernel: it cannot be had either.
        Err(rustix::io::Errno::INVAL) => Ok(()),
        other => other.during(|| format!("drop {capability:?}")),
    }
}

fn set_capabilities(set: CapabilitySet) -> Result<()> {
    let sets = CapabilitySets { effective: set, permitted: set, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).during(|| format!("set the capabilities {set:?}"))
}

/// For a process that only holds a namespace open.
pub fn drop_everything() -> rustix::io::Result<()> {
    let (nobody, nogroup) = (Uid::from_raw(65534), Gid::from_raw(65534));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(nogroup, nogroup, nogroup)?;
    rustix::thread::set_thread_res_uid(nobody, nobody, nobody)?;
    rustix::thread::set_no_new_privs(true)
}

/// Names with or without `CAP_`, in any case; `ALL` is all that this kernel has.
fn parse_capabilities(names: &[String]) -> Result<CapabilitySet> {
    let mut set = CapabilitySet::empty();
    for name in names {
        let upper = name.to_ascii_uppercase();
        let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if short == "ALL" {
            return Ok(supported());
        }
        let flag = CapabilitySet::from_name(short)
            .ok_or_else(|| Failure::invalid(format!("'{name}' is not a capability")))?;
        set |= flag;
    }
    Ok(set & supported())
}

/// Capabilities that this kernel knows: those still in the bounding set of PID 1.
fn supported() -> CapabilitySet {
    CapabilitySet::all()
        .iter()
        .filter(|capability| rustix::thread::capability_is_in_bounding_set(*capability).unwrap_or(false))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_names() {
        let parse =
            |names: &[&str]| parse_capabilities(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        let set = parse(&["CAP_CHOWN", "net_bind_service"]).unwrap();
        assert_eq!(set & CapabilitySet::SYS_ADMIN, CapabilitySet::empty());
        assert!(parse(&["CAP_NOPE"]).is_err());
    }
}
