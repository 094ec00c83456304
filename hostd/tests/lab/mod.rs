//! A network of two namespaces joined by a cable: the host under test at one end, its servers at the other. Nothing
//! touches the machine's own network, clock or name. Everything ends when the lab is dropped.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A process that ends with its owner.
pub struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Guard {
    pub fn signal(&self, signal: rustix::process::Signal) {
        // nsenter becomes the program that it starts.
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), signal).unwrap();
    }

    pub fn terminate(&mut self) -> std::process::ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "hostd did not end within 10 s of SIGTERM");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

pub struct Lab {
    // Order matters: what runs inside ends before the namespaces.
    pub servers: Vec<Guard>,
    host: Guard,
    outside: Guard,
    pub root: tempfile::TempDir,
}

fn holder(command: &mut Command) -> Guard {
    Guard(command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("unshare is installed"))
}

/// Whether the process has come as far as to be `cat`: then its namespaces, and who is root in them, are set up.
fn settled(pid: u32) -> Option<()> {
    (std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()? == "cat\n").then_some(())
}

/// Waits until `check` gives a value.
pub fn wait_for<T>(what: &str, seconds: u64, mut check: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: not within {seconds} s");
        std::thread::sleep(Duration::from_millis(50));
    }
}

impl Lab {
    /// `host` has `eth0`, whose other end is `srv0` with 10.9.0.1/24 outside.
    pub fn new() -> Self {
        let outside = holder(Command::new("unshare").args(["-Urnu", "cat"]));
        let pid = outside.0.id();
        wait_for("the outside namespace", 10, || settled(pid));
        let host = holder(Command::new("nsenter").args([
            "-t",
            &pid.to_string(),
            "-U",
            "--preserve-credentials",
            "unshare",
            "-nu",
            "cat",
        ]));
        wait_for("the host's namespace", 10, || settled(host.0.id()));
        let root = tempfile::tempdir().unwrap();
        for directory in
            ["run/agent", "run/runtime", "run/net", "run/hostd", "run/init", "state", "data", "esp", "sys"]
        {
            std::fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        std::fs::write(root.path().join("run/machine-id"), "0123456789abcdef0123456789abcdef\n").unwrap();
        let lab = Self { servers: Vec::new(), host, outside, root };
        let host_pid = lab.host.0.id().to_string();
        lab.outside(&[
            "ip", "link", "add", "srv0", "type", "veth", "peer", "name", "eth0", "netns", &host_pid,
        ]);
        lab.outside(&["ip", "addr", "add", "10.9.0.1/24", "dev", "srv0"]);
        lab.outside(&["ip", "link", "set", "srv0", "up"]);
        lab.outside(&["ip", "link", "set", "lo", "up"]);
        lab
    }

    fn enter(guard: &Guard, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &guard.0.id().to_string(), "-U", "-n", "-u", "--preserve-credentials", program]);
        command.stdin(Stdio::null());
        command
    }

    fn run(guard: &Guard, words: &[&str]) -> String {
        let output = Self::enter(guard, words[0]).args(&words[1..]).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command at the servers' end.
    pub fn outside(&self, words: &[&str]) -> String {
        Self::run(&self.outside, words)
    }

    /// Runs a command at the host's end.
    pub fn host(&self, words: &[&str]) -> String {
        Self::run(&self.host, words)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn log(&self, name: &str) -> Stdio {
        std::fs::OpenOptions::new().create(true).append(true).open(self.path(name)).unwrap().into()
    }

    /// A real DHCP server, and a DNS server when a port is given for it; its log is `dnsmasq.log`.
    pub fn dnsmasq(&mut self, options: &[&str]) {
        let leases = format!("--dhcp-leasefile={}", self.path("leases").display());
        let child = Self::enter(&self.outside, "dnsmasq")
            .args([
                "--no-daemon",
                "--conf-file=/dev/null",
                "--user=root",
                "--interface=srv0",
                "--bind-interfaces",
            ])
            .args(["--log-dhcp", "--dhcp-authoritative", &leases])
            .args((!options.iter().any(|option| option.starts_with("--port="))).then_some("--port=0"))
            .args(options)
            .stderr(self.log("dnsmasq.log"))
            .spawn()
            .expect("dnsmasq is installed (package dnsmasq-base)");
        self.servers.push(Guard(child));
    }

    /// This test program in another role at the servers' end.
    pub fn role(&mut self, role: &str) {
        let me = std::env::current_exe().unwrap();
        let child = Self::enter(&self.outside, me.to_str().unwrap())
            .args(["--exact", "role", "--nocapture"])
            .env("ATOLL_TEST_ROLE", role)
            .stdout(Stdio::null())
            .stderr(self.log("role.log"))
            .spawn()
            .unwrap();
        self.servers.push(Guard(child));
    }

    /// hostd; its log is `hostd.log`.
    pub fn hostd(&self, options: &[&str]) -> Guard {
        self.hostd_with(options, &[])
    }

    /// The same, with more in its environment.
    pub fn hostd_with(&self, options: &[&str], environment: &[(&str, &str)]) -> Guard {
        let at = |name: &str| self.path(name).display().to_string();
        let child = Self::enter(&self.host, env!("CARGO_BIN_EXE_atoll-hostd"))
            .args(["--esp", &at("esp"), "--state", &at("state"), "--data", &at("data"), "--run", &at("run")])
            .args(["--sys", &at("sys"), "--cmdline", &at("cmdline"), "--screen", &at("none")])
            .args(["--storage", "directories", "--clock", "report"])
            .args(options)
            .env("NOTIFY_SOCKET", self.path("notify"))
            .envs(environment.iter().copied())
            .stderr(self.log("hostd.log"))
            .spawn()
            .unwrap();
        Guard(child)
    }

    /// Waits for a line in hostd's log.
    pub fn expect(&self, text: &str, seconds: u64) {
        let end = Instant::now() + Duration::from_secs(seconds);
        while !self.read("hostd.log").contains(text) {
            assert!(
                Instant::now() < end,
                "'{text}' not within {seconds} s\n--- hostd\n{}\n--- dnsmasq\n{}",
                self.read("hostd.log"),
                self.read("dnsmasq.log")
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What `/healthz` answers: code and text.
    pub fn health(&self) -> Option<String> {
        use std::io::{Read, Write};
        let mut stream = std::os::unix::net::UnixStream::connect(self.path("run/hostd/metrics.sock")).ok()?;
        write!(stream, "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    pub fn agent_config(&self) -> atoll_spec::node::AgentConfig {
        serde_json::from_slice(&std::fs::read(self.path("run/agent/config.json")).unwrap()).unwrap()
    }
}

/// Socket for the readiness protocol.
pub struct Notify(UnixDatagram);

impl Notify {
    pub fn bind(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self(socket)
    }

    /// How long to wait for a message.
    pub fn within(&self, deadline: Duration) {
        self.0.set_read_timeout(Some(deadline)).unwrap();
    }

    /// The next message. A machine that was stopped and goes on interrupts whoever waits with a deadline (signal(7)).
    pub fn recv(&self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.0.recv(buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}
