//! The answering side, inside a booted host of the test image: reads /proc, /sys and the runtime's records.
//!
//! Called by the test bridge. What vanishes while it is being read is passed over: a process that ended is no error.

use super::{Inventory, LINE_LIMIT, Process, Reply, Request, Sandbox, Step, Target, search};
use anyhow::{Context, bail};
use rustix::process::{Pid, Signal};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const CGROUPS: &str = "/sys/fs/cgroup/atoll";
const SANDBOXES: &str = "/data/sandboxes";
const HALF_MADE: &str = "/data/images/tmp";
const VOLUMES: [&str; 2] = ["/data/pods", "/run/atoll/volumes"];
/// What of sandboxes is kept in memory alone, by their names.
const CONFIDENTIAL: &str = "/run/atoll/runtime/confidential";
const FILLER: &str = "/data/filler";
/// How often [`Request::At`] looks: a container is made and started within a few of these.
const LOOK: Duration = Duration::from_millis(2);
/// Most of a file that is sent.
const FILE_LIMIT: u64 = 256 << 10;
/// Longest a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers every connection in a thread of its own, for ever.
pub fn serve(listener: &TcpListener) {
    for client in listener.incoming().flatten() {
        std::thread::spawn(move || {
            if let Err(error) = converse(&client) {
                eprintln!("inspector: {error:#}");
            }
        });
    }
}

fn converse(client: &TcpStream) -> anyhow::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(client.take(LINE_LIMIT)).read_line(&mut line)?;
    let reply = serde_json::from_str(&line)
        .context("that is no request")
        .and_then(|request| answer(&request))
        .unwrap_or_else(|error| Reply::Failed(format!("{error:#}")));
    let mut text = serde_json::to_string(&reply)?;
    text.push('\n');
    let mut client = client;
    client.write_all(text.as_bytes()).context("cannot answer")
}

fn answer(request: &Request) -> anyhow::Result<Reply> {
    Ok(match request {
        Request::Inventory => Reply::Inventory(Box::new(inventory()?)),
        Request::Signal { target, signal } => {
            send(target, *signal)?;
            Reply::Done(now_ms())
        }
        Request::At { pod, step, deadline_ms, then } => {
            wait_at(pod, *step, Duration::from_millis(*deadline_ms), then.as_ref())?;
            Reply::Done(now_ms())
        }
        Request::Read { path } => Reply::Text(end_of(path)?),
        Request::Sizes { directory } => {
            let size = |name: String| Some((fs::metadata(format!("{directory}/{name}")).ok()?.len(), name));
            Reply::Sizes(
                names_in(directory).into_iter().filter_map(size).map(|(size, name)| (name, size)).collect(),
            )
        }
        Request::Holders { directory, text } => {
            let found = search::holders(directory.as_ref(), text.as_bytes())?;
            Reply::Text(found.iter().map(|path| format!("{}\n", path.display())).collect())
        }
        Request::Fill { leave } => {
            fill(*leave)?;
            Reply::Done(now_ms())
        }
    })
}

fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec * 1000 + now.tv_nsec / 1_000_000).unwrap_or(0)
}

fn end_of(path: &str) -> anyhow::Result<String> {
    let mut file = fs::File::open(path).with_context(|| format!("cannot open {path}"))?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(FILE_LIMIT)))?;
    let mut bytes = Vec::new();
    file.take(FILE_LIMIT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn fill(leave: u64) -> anyhow::Result<()> {
    match fs::remove_file(FILLER) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context("cannot remove the filler");
        }
        _ => {}
    }
    if leave == 0 {
        return Ok(());
    }
    let size = data_free()?.saturating_sub(leave);
    let file = fs::File::create(FILLER).context("cannot make the filler")?;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size)
        .with_context(|| format!("cannot fill {size} bytes"))
}

fn data_free() -> anyhow::Result<u64> {
    let stat = rustix::fs::statvfs("/data").context("cannot look at /data")?;
    Ok(stat.f_bavail * stat.f_frsize)
}

// --- signals and steps ---

fn send(target: &Target, signal: i32) -> anyhow::Result<()> {
    let pid = match target {
        Target::Service(name) => service_pid(name)?,
        Target::Vmm(pod) => {
            let sandbox = newest(pod).with_context(|| format!("no sandbox of pod {pod}"))?;
            let group = format!("{CGROUPS}/pods/{}", sandbox.id);
            *pids_of(&group).first().with_context(|| format!("no process in {group}"))?
        }
    };
    let pid = Pid::from_raw(pid).context("no process number")?;
    let signal = Signal::from_named_raw(signal).with_context(|| format!("no signal {signal}"))?;
    rustix::process::kill_process(pid, signal).with_context(|| format!("cannot signal {target:?}"))
}

/// A service's main process: the one that PID 1 started.
fn service_pid(name: &str) -> anyhow::Result<i32> {
    let group = format!("{CGROUPS}/services/{name}");
    let main = pids_of(&group).into_iter().find(|pid| parent_of(*pid) == Some(1));
    main.with_context(|| format!("service {name} does not run"))
}

fn pids_of(group: &str) -> Vec<i32> {
    let text = fs::read_to_string(format!("{group}/cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn parent_of(pid: i32) -> Option<i32> {
    stat_of(pid).map(|(_, parent, _)| parent)
}

/// State, parent and name of a process.
fn stat_of(pid: i32) -> Option<(char, i32, String)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (start, end) = (text.find('(')?, text.rfind(')')?);
    let mut rest = text[end + 1..].split_whitespace();
    let state = rest.next()?.chars().next()?;
    Some((state, rest.next()?.parse().ok()?, text[start + 1..end].to_owned()))
}

/// Waits for the step and for the target, which may be between two of its lives, and signals it.
fn wait_at(pod: &str, step: Step, deadline: Duration, then: Option<&(Target, i32)>) -> anyhow::Result<()> {
    let started = Instant::now();
    loop {
        if is_at(pod, step) {
            match then.map(|(target, signal)| send(target, *signal)) {
                None | Some(Ok(())) => return Ok(()),
                Some(Err(error)) if started.elapsed() > deadline => return Err(error),
                Some(Err(_)) => {}
            }
        } else if started.elapsed() > deadline {
            bail!(
                "pod {pod} was not seen at {step:?} within {} s; it is {:?}",
                deadline.as_secs(),
                newest(pod)
            );
        }
        std::thread::sleep(LOOK);
    }
}

fn is_at(pod: &str, step: Step) -> bool {
    let sandbox = newest(pod);
    let phase = |name: &str| sandbox.as_ref().is_some_and(|s| s.phase == name);
    let container = |name: &str| sandbox.as_ref().is_some_and(|s| s.containers.iter().any(|c| c == name));
    match step {
        Step::Launching => phase("launching"),
        Step::Launched => phase("ready") && sandbox.as_ref().is_some_and(|s| s.containers.is_empty()),
        Step::Pulling => phase("ready") && !names_in(HALF_MADE).is_empty(),
        Step::Created => container("created") || container("starting"),
        Step::Running => container("running"),
        Step::Exited => container("exited"),
        Step::Stopping => phase("stopping"),
        Step::Stopped => sandbox.as_ref().is_some_and(|s| s.phase == "not-ready"),
        Step::Removed => sandbox.is_none(),
    }
}

/// The last made sandbox of a pod.
fn newest(pod: &str) -> Option<Sandbox> {
    let mut all: Vec<(i64, Sandbox)> =
        records().into_iter().filter(|(_, sandbox)| sandbox.pod == pod).collect();
    all.sort_by_key(|(created, _)| *created);
    all.pop().map(|(_, sandbox)| sandbox)
}

// --- inventory ---

fn inventory() -> anyhow::Result<Inventory> {
    Ok(Inventory {
        // Records last: what is newer than they are would look like a leak for one moment more.
        sandbox_directories: directories_in(SANDBOXES).into_iter().chain(names_in(CONFIDENTIAL)).collect(),
        processes: processes(),
        interfaces: names_in("/sys/class/net"),
        cgroups: cgroups(),
        mounts: mounts(),
        loops: loops(),
        listeners: listeners(),
        filtered: filtered(),
        half_made: names_in(HALF_MADE),
        volumes: VOLUMES.into_iter().flat_map(names_in).collect(),
        data_free: data_free()?,
        memory_available_kib: memory_available_kib(),
        sandboxes: records().into_iter().map(|(_, sandbox)| sandbox).collect(),
    })
}

fn names_in(directory: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn directories_in(directory: &str) -> BTreeSet<String> {
    let is_directory = |name: &String| Path::new(directory).join(name).is_dir();
    names_in(directory).into_iter().filter(is_directory).collect()
}

/// Every sandbox with a record, and when it was made.
fn records() -> Vec<(i64, Sandbox)> {
    names_in(SANDBOXES).into_iter().filter_map(|id| record(&id)).collect()
}

fn record(id: &str) -> Option<(i64, Sandbox)> {
    let text = fs::read_to_string(format!("{SANDBOXES}/{id}/state.json")).ok()?;
    let value: serde_json::Value = serde_json::from_str(&text).ok()?;
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let containers = value["containers"].as_array()?.iter().map(|c| variant(&c["phase"])).collect();
    let sandbox = Sandbox {
        id: id.to_owned(),
        pod: word(&value["spec"]["name"]["name"]),
        phase: variant(&value["phase"]),
        tap: word(&value["tap"]),
        address: word(&value["address"]),
        containers,
    };
    Some((value["created_ns"].as_i64()?, sandbox))
}

/// Name of an enum's variant as serde writes it: a string, or the only key of an object.
fn variant(value: &serde_json::Value) -> String {
    let key = value.as_object().and_then(|object| object.keys().next()).map(String::as_str);
    value.as_str().or(key).unwrap_or_default().to_owned()
}

fn processes() -> Vec<Process> {
    names_in("/proc").into_iter().filter_map(|name| process(name.parse().ok()?)).collect()
}

fn process(pid: i32) -> Option<Process> {
    let (state, parent, name) = stat_of(pid)?;
    // Kernel threads descend from number 2.
    if pid == 2 || parent == 2 {
        return None;
    }
    let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let group = group.trim().trim_start_matches("0::/");
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let namespaces = names_in(&format!("/proc/{pid}/ns"))
        .iter()
        .filter(|name| !name.ends_with("_for_children"))
        .filter_map(|name| fs::read_link(format!("/proc/{pid}/ns/{name}")).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect();
    Some(Process {
        pid,
        parent,
        name,
        state,
        cgroup: group.strip_prefix("atoll/").unwrap_or(group).to_owned(),
        resident_kib: kib(&rollup, "Rss:"),
        private_kib: kib(&rollup, "Private_Clean:") + kib(&rollup, "Private_Dirty:"),
        threads: kib(&status, "Threads:"),
        descriptors: u64::try_from(names_in(&format!("/proc/{pid}/fd")).len()).unwrap_or(0),
        namespaces,
    })
}

/// The number after a label at the start of a line.
fn kib(text: &str, label: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(label));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn memory_available_kib() -> u64 {
    kib(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable:")
}

fn cgroups() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![String::new()];
    while let Some(path) = open.pop() {
        for name in directories_in(&format!("{CGROUPS}/{path}")) {
            let below = if path.is_empty() { name } else { format!("{path}/{name}") };
            open.push(below.clone());
            found.insert(below);
        }
    }
    found
}

fn mounts() -> BTreeSet<String> {
    let text = fs::read_to_string("/proc/1/mountinfo").unwrap_or_default();
    text.lines().filter_map(|line| line.split(' ').nth(4).map(str::to_owned)).collect()
}

fn loops() -> BTreeSet<String> {
    let backed = |name: &String| Path::new("/sys/block").join(name).join("loop/backing_file").exists();
    names_in("/sys/block").into_iter().filter(backed).collect()
}

fn filtered() -> BTreeSet<String> {
    let Ok(output) =
        Command::new("/usr/sbin/nft").args(["-j", "list", "set", "inet", "atoll", "pods"]).output()
    else {
        return BTreeSet::new();
    };
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let sets = value["nftables"].as_array().into_iter().flatten();
    let elements = sets.filter_map(|item| item["set"]["elem"].as_array()).flatten();
    elements
        .filter_map(|element| {
            let parts = element["concat"].as_array()?;
            Some(parts.iter().filter_map(|part| part.as_str()).collect::<Vec<_>>().join(" "))
        })
        .collect()
}

/// Sockets that somebody could speak to without having been spoken to.
fn listeners() -> BTreeSet<String> {
    let table = |file: &str| fs::read_to_string(format!("/proc/net/{file}")).unwrap_or_default();
    let mut found = BTreeSet::new();
    for (file, state) in [("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07"), ("raw", "07")] {
        for line in table(file).lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if let [_, local, _, is, ..] = fields[..]
                && is == state
            {
                found.insert(format!("{file} {}", endpoint(local)));
            }
        }
    }
    for line in table("unix").lines().skip(1) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // __SO_ACCEPTCON: somebody listens; a datagram socket needs only a name.
        if let [_, _, _, flags, kind, _, _, path] = fields[..]
            && (flags == "00010000" || kind == "0002")
        {
            found.insert(format!("unix {path}"));
        }
    }
    for line in table("packet").lines().skip(1) {
        let protocol = line.split_whitespace().nth(3).unwrap_or_default();
        found.insert(format!("packet {protocol}"));
    }
    found
}

/// `0100007F:1F90` is 127.0.0.1:8080; an IPv6 address is left as it stands.
fn endpoint(text: &str) -> String {
    let Some((address, port)) = text.split_once(':') else { return text.to_owned() };
    let port = u16::from_str_radix(port, 16).unwrap_or(0);
    match u32::from_str_radix(address, 16) {
        Ok(number) if address.len() == 8 => format!("{}:{port}", Ipv4Addr::from(number.swap_bytes())),
        _ if address.bytes().all(|b| b == b'0') => format!("[::]:{port}"),
        _ => format!("[{address}]:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_an_inventory() {
        let me = i32::try_from(std::process::id()).unwrap();
        let process = process(me).unwrap();
        assert!(process.resident_kib > 0 && process.descriptors > 0 && process.threads > 0, "{process:?}");
        assert!(!listeners().is_empty() && !mounts().is_empty());
    }

    #[test]
    fn addresses_are_read_as_the_kernel_writes_them() {
        assert_eq!(endpoint("0100007F:1F90"), "127.0.0.1:8080");
        assert_eq!(endpoint("00000000000000000000000000000000:280A"), "[::]:10250");
    }

    #[test]
    fn phases_are_words_or_the_key_of_an_object() {
        assert_eq!(variant(&serde_json::json!("ready")), "ready");
        assert_eq!(variant(&serde_json::json!({"not-ready": {"reason": "x"}})), "not-ready");
    }
}
