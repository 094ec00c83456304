//! The runtime's side of the guest protocol, for tests: a guest in namespaces of its own, containers made of
//! busybox.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use atoll_spec::guest::*;
use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

pub const DEADLINE: Duration = Duration::from_secs(20);
/// Offset that stands for the busybox layer.
pub const BUSYBOX: Layer = Layer { offset: 4096, length: 4096 };

pub fn frame(message: &impl serde::Serialize) -> Vec<u8> {
    let text = serde_json::to_vec(message).unwrap();
    let mut frame = (text.len() as u32).to_le_bytes().to_vec();
    frame.extend(text);
    frame
}

pub fn read_frame(from: &mut impl Read) -> Option<Vec<u8>> {
    let mut header = [0; 4];
    from.read_exact(&mut header).ok()?;
    let mut text = vec![0; u32::from_le_bytes(header) as usize];
    from.read_exact(&mut text).ok()?;
    Some(text)
}

#[derive(Default)]
struct Streams {
    arrived: Mutex<BTreeMap<u64, UnixStream>>,
    changed: Condvar,
}

/// A running guest and the runtime's side of it.
pub struct Peer {
    child: Child,
    control: UnixStream,
    controls: Receiver<UnixStream>,
    streams: Arc<Streams>,
    next_id: u64,
    stdio: u64,
    pub events: VecDeque<(u64, Event)>,
    cgroup: PathBuf,
    _dir: tempfile::TempDir,
}

fn cgroup2() -> Option<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = text.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4).map(PathBuf::from)
}

fn busybox_layer(directory: &Path) {
    for name in ["bin", "etc", "tmp", "root", "home/web"] {
        std::fs::create_dir_all(directory.join(name)).unwrap();
    }
    let busybox =
        ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists()).unwrap();
    std::fs::copy(busybox, directory.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "echo", "id", "ls", "sleep", "env", "pwd", "stty", "tty", "grep", "hostname", "mknod",
        "readlink", "ps", "head", "dd", "stat", "wc", "true", "kill", "touch", "mkdir", "umount", "mount",
    ] {
        std::os::unix::fs::symlink("busybox", directory.join("bin").join(applet)).unwrap();
    }
    std::fs::write(
        directory.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/home/web:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(directory.join("etc/group"), "root:x:0:\nlog:x:40:web\n").unwrap();
    std::fs::write(directory.join("etc/plain"), "not a program").unwrap();
    let dir = directory.join("bin/script");
    std::fs::write(&dir, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
}

/// `None` where a rehearsal cannot run: it needs root, cgroup v2 and busybox.
pub fn possible() -> bool {
    let root = rustix::process::geteuid().is_root();
    let can = root && cgroup2().is_some() && Path::new("/bin/busybox").exists();
    if !can {
        eprintln!("skipped: a rehearsal of the guest needs root, cgroup v2 and busybox");
    }
    can
}

pub fn config() -> GuestConfig {
    GuestConfig {
        hostname: "pod-1".into(),
        network: None,
        resolv_conf: "nameserver 192.0.2.53\n".into(),
        sysctls: BTreeMap::new(),
        share_process_namespace: false,
        unix_ns: 0,
        scratch_disk: false,
        shm_bytes: 1 << 20,
    }
}

pub fn process(args: &[&str]) -> Process {
    Process {
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: vec!["PATH=/bin".into()],
        cwd: "/".into(),
        user: User::Name { name: String::new(), groups: vec![] },
        tty: false,
        capabilities: ["CAP_CHOWN", "CAP_MKNOD", "CAP_SETUID", "CAP_KILL"].map(String::from).to_vec(),
        no_new_privileges: true,
        system_calls: SystemCalls::Any,
        oom_score_adj: 100,
    }
}

pub fn container(name: &str, args: &[&str]) -> ContainerSpec {
    ContainerSpec {
        container: name.parse().unwrap(),
        layers: vec![BUSYBOX],
        read_only_root: false,
        process: process(args),
        mounts: vec![],
        limits: Limits::default(),
        masked_paths: vec!["/proc/meminfo".into(), "/proc/acpi".into()],
        read_only_paths: vec!["/proc/sys".into()],
        privileged: false,
        stdio_stream: 0,
        stdin: false,
        stdin_once: false,
    }
}

/// What came out of a process.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Output {
    pub stdout: String,
    pub stderr: String,
    pub exit: Option<i32>,
}

impl Peer {
    pub fn start(config: GuestConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        busybox_layer(&dir.path().join("layers/4096"));
        let socket = dir.path().join("host.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let name = dir.path().file_name().unwrap().to_string_lossy().replace('.', "");
        let cgroup = cgroup2().unwrap().join(format!("atoll-rehearsal-{name}"));
        std::fs::create_dir(&cgroup).unwrap();
        let child = Command::new("unshare")
            .args(["--pid", "--mount", "--uts", "--ipc", "--net", "--fork", "--kill-child", "--mount-proc"])
            .arg(env!("CARGO_BIN_EXE_atoll-guest"))
            .arg("rehearse")
            .arg("--socket")
            .arg(&socket)
            .arg("--layers")
            .arg(dir.path().join("layers"))
            .arg("--run")
            .arg(dir.path().join("run"))
            .arg("--cgroup")
            .arg(&cgroup)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let streams = Arc::new(Streams::default());
        let (sender, controls) = channel();
        let shared = Arc::clone(&streams);
        std::thread::spawn(move || accept(&listener, &sender, &shared));
        let control = controls.recv_timeout(DEADLINE).expect("the guest dials");
        let mut peer = Self {
            child,
            control,
            controls,
            streams,
            next_id: 0,
            stdio: 0,
            events: VecDeque::new(),
            cgroup,
            _dir: dir,
        };
        peer.call(Call::Configure(Box::new(config))).unwrap();
        peer
    }

    pub fn call(&mut self, call: Call) -> Result<Reply, GuestError> {
        self.next_id += 1;
        let id = self.next_id;
        self.control.write_all(&frame(&Request { id, call })).unwrap();
        self.control.set_read_timeout(Some(DEADLINE)).unwrap();
        loop {
            match self.message() {
                FromGuest::Answer { id: answered, result } if answered == id => return result,
                FromGuest::Answer { .. } => panic!("an answer to nothing"),
                FromGuest::Event { sequence, event } => self.events.push_back((sequence, event)),
            }
        }
    }

    fn message(&mut self) -> FromGuest {
        let text = read_frame(&mut self.control).expect("the guest answers");
        serde_json::from_slice(&text).unwrap()
    }

    pub fn exit_of(&mut self, name: &str) -> Exit {
        self.control.set_read_timeout(Some(DEADLINE)).unwrap();
        loop {
            let mine = |(_, event): &(u64, Event)| {
                let Event::Exited { container, .. } = event;
                container.as_str() == name
            };
            if let Some(at) = self.events.iter().position(mine) {
                let (_, Event::Exited { exit, .. }) = self.events.remove(at).unwrap();
                return exit;
            }
            match self.message() {
                FromGuest::Event { sequence, event } => self.events.push_back((sequence, event)),
                FromGuest::Answer { .. } => panic!("an answer to nothing"),
            }
        }
    }

    /// Drops the control connection, as a restarting runtime does, and takes the next.
    pub fn reconnect(&mut self) {
        self.control.shutdown(std::net::Shutdown::Both).unwrap();
        self.control = self.controls.recv_timeout(DEADLINE).expect("the guest dials again");
    }

    pub fn stream_number(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Number of the stdio of the container that was run last.
    pub fn stdio(&self) -> u64 {
        self.stdio
    }

    /// The host has this much of what a container said on a stream.
    pub fn acknowledge(&mut self, container: &str, stream: u64, stdout: u64, stderr: u64) {
        let container = container.parse().unwrap();
        self.call(Call::AckOutput { container, stream, stdout, stderr }).unwrap();
    }

    pub fn stream(&self, number: u64) -> UnixStream {
        let arrived = self.streams.arrived.lock().unwrap();
        let (mut arrived, timeout) = self
            .streams
            .changed
            .wait_timeout_while(arrived, DEADLINE, |all| !all.contains_key(&number))
            .unwrap();
        assert!(!timeout.timed_out(), "stream {number} was not dialled");
        arrived.remove(&number).unwrap()
    }

    /// Makes and starts a container; gives its stdio.
    pub fn run(&mut self, mut spec: ContainerSpec) -> Result<UnixStream, GuestError> {
        spec.stdio_stream = self.stream_number();
        let (name, number) = (spec.container.clone(), spec.stdio_stream);
        self.stdio = number;
        self.call(Call::CreateContainer(Box::new(spec)))?;
        self.call(Call::StartContainer { container: name })?;
        Ok(self.stream(number))
    }

    /// Runs a container to its end.
    pub fn run_to_end(&mut self, spec: ContainerSpec) -> (Output, Exit) {
        let name = spec.container.to_string();
        let tty = spec.process.tty;
        let stream = self.run(spec).unwrap();
        let output = read_to_end(stream, tty, false);
        let exit = self.exit_of(&name);
        self.call(Call::RemoveContainer { container: name.parse().unwrap() }).unwrap();
        (output, exit)
    }

    pub fn exec(
        &mut self,
        container: &str,
        exec: &str,
        process: Process,
        stdin: bool,
    ) -> Result<UnixStream, GuestError> {
        let stream = self.stream_number();
        let spec = ExecSpec {
            container: container.parse().unwrap(),
            exec: exec.parse().unwrap(),
            process,
            stream,
            stdin,
        };
        self.call(Call::Exec(Box::new(spec)))?;
        Ok(self.stream(stream))
    }

    /// What the guest has kept of containers: cgroups, directories of its own, what they wrote, mounts, descriptors.
    pub fn leftovers(&self) -> Vec<String> {
        // PID 1 of the namespace is the child of `unshare`.
        let unshare = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
        let guest = children.split_whitespace().next().unwrap().to_owned();
        let run = format!("/proc/{guest}/root{}", self._dir.path().join("run").display());
        let list = |path: String| {
            let entries = std::fs::read_dir(&path).into_iter().flatten().flatten();
            entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.path().display().to_string())
        };
        let mut left: Vec<String> = list(self.cgroup.join("pod").display().to_string()).collect();
        left.extend(list(format!("{run}/containers")));
        left.extend(list(format!("{run}/scratch/containers")));
        let mounts = std::fs::read_to_string(format!("/proc/{guest}/mountinfo")).unwrap();
        left.extend(mounts.lines().filter(|line| line.contains(" overlay ")).map(str::to_owned));
        let open = std::fs::read_dir(format!("/proc/{guest}/fd")).unwrap().count();
        // Its three standard ones, the control connection twice, the directory being listed.
        if open > 8 {
            left.push(format!("{open} open descriptors"));
        }
        left
    }

    pub fn publish(&mut self, tree: &str, archive: &[u8]) -> Result<Reply, GuestError> {
        let stream = self.stream_number();
        let streams = Arc::clone(&self.streams);
        let archive = archive.to_vec();
        let writer = std::thread::spawn(move || {
            let arrived = streams.arrived.lock().unwrap();
            let (mut arrived, _) = streams
                .changed
                .wait_timeout_while(arrived, DEADLINE, |all| !all.contains_key(&stream))
                .unwrap();
            let mut connection = arrived.remove(&stream).unwrap();
            // A refused tree is closed early.
            let _ = connection.write_all(&archive);
        });
        let result = self.call(Call::PublishTree { tree: tree.into(), stream });
        writer.join().unwrap();
        result
    }
}

fn accept(listener: &UnixListener, controls: &Sender<UnixStream>, streams: &Streams) {
    while let Ok((mut connection, _)) = listener.accept() {
        let Some(text) = read_frame(&mut connection) else { continue };
        match serde_json::from_slice(&text).unwrap() {
            Hello::Control { protocol, .. } => {
                assert_eq!(protocol, PROTOCOL);
                if controls.send(connection).is_err() {
                    return;
                }
            }
            Hello::Stream { stream } => {
                streams.arrived.lock().unwrap().insert(stream, connection);
                streams.changed.notify_all();
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Killing `unshare` kills the guest, PID 1 of its namespace, and with it everything in it.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let until = Instant::now() + Duration::from_secs(5);
        while remove_groups(&self.cgroup).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn remove_groups(group: &Path) -> std::io::Result<()> {
    if let Ok(entries) = std::fs::read_dir(group) {
        for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
            remove_groups(&entry.path())?;
        }
        std::fs::remove_dir(group)?;
    }
    Ok(())
}

pub fn send(stream: &mut UnixStream, channel: Channel, payload: &[u8]) {
    let mut packet = vec![channel as u8];
    packet.extend((payload.len() as u32).to_le_bytes());
    packet.extend(payload);
    stream.write_all(&packet).unwrap();
}

pub fn receive(stream: &mut UnixStream) -> Option<(Channel, Vec<u8>)> {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut header = [0; 5];
    stream.read_exact(&mut header).ok()?;
    let mut payload = vec![0; u32::from_le_bytes(header[1..].try_into().unwrap()) as usize];
    stream.read_exact(&mut payload).ok()?;
    Some((Channel::try_from(header[0]).unwrap(), payload))
}

/// Reads until everything has ended.
pub fn read_to_end(mut stream: UnixStream, tty: bool, exec: bool) -> Output {
    let (mut out, mut err, mut exit) = (Vec::new(), Vec::new(), None);
    let mut open = if tty { 1 } else { 2 };
    while open > 0 || (exec && exit.is_none()) {
        let (channel, payload) = receive(&mut stream).expect("the stream goes on until all has ended");
        match channel {
            Channel::Stdout | Channel::Stderr if payload.is_empty() => open -= 1,
            Channel::Stdout => out.extend(payload),
            Channel::Stderr => err.extend(payload),
            Channel::Exit => exit = Some(i32::from_le_bytes(payload.try_into().unwrap())),
            other => panic!("{other:?} goes the other way"),
        }
    }
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Output { stdout: text(out), stderr: text(err), exit }
}
