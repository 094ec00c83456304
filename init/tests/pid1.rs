//! init's event loop as a real PID 1: in process and mount namespaces of its own, with small services, driven over
//! its D-Bus interface, down to reboot(2), which in a namespace ends that namespace alone.
//!
//! No libtest here: the same program is the test (outside), PID 1 (inside, known by its process number) and its
//! client (inside too, as D-Bus peers must be), and PID 1 must block signals before any other thread exists.

#![expect(clippy::unwrap_used, reason = "a test, though not one of libtest's")]

use atoll_init::console::Console;
use atoll_init::control::Bus;
use atoll_init::devices::Devices;
use atoll_init::event_loop::{Doors, EventLoop};
use atoll_init::notify::NotifySocket;
use atoll_init::process::{Confinement, User};
use atoll_init::programs::Programs;
use atoll_init::reap::Signals;
use atoll_init::services::{Limits, Service};
use atoll_init::shutdown::Machine;
use atoll_init::sys::{self, Kernel, PowerAction, Syscalls};
use atoll_init::watchdog::Guard;
use atoll_spec::control::{
    BootPhase, INTERFACE, LogLine, OBJECT_PATH, ServiceState, ServiceStatus, ShutdownAction,
};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const DIRECTORY: &str = "ATOLL_TEST_DIRECTORY";
const CLIENT: &str = "ATOLL_TEST_CLIENT";
const PATIENCE: Duration = Duration::from_secs(60);

/// Says that it is ready, and a line, and ends when asked.
const GOOD: &str = r#"
use IO::Socket::UNIX; use Socket;
my $s = IO::Socket::UNIX->new(Type => SOCK_DGRAM, Peer => $ENV{NOTIFY_SOCKET}) or die "no socket: $!";
$SIG{TERM} = sub { print "asked to stop\n"; exit 0 };
$| = 1; print "serving\n";
$s->send("READY=1\nSTATUS=all well");
sleep 1 while 1;
"#;

/// Never ends when asked, and leaves orphans behind.
const STUBBORN: &str = "trap '' TERM; (sleep 0.1 & ) ; (sleep 0.2 & ); echo deaf; while :; do sleep 1; done";

type Scenario = fn(&Inside);

const SCENARIOS: [(&str, Scenario); 4] = [
    ("services_start_in_order_and_are_told_of", services_start_in_order_and_are_told_of),
    ("what_is_wrong_is_refused_in_words", what_is_wrong_is_refused_in_words),
    ("a_reboot_is_clean_and_ends_in_reboot", |inside| inside.shut_down(ShutdownAction::Reboot)),
    ("a_power_off_is_clean_and_ends_in_power_off", |inside| inside.shut_down(ShutdownAction::PowerOff)),
];

fn main() {
    if let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) {
        if std::process::id() == 1 {
            be_pid_1(&directory);
        }
        let scenario = std::env::var(CLIENT).expect("a client knows its scenario");
        let (_, run) =
            SCENARIOS.iter().find(|(name, _)| *name == scenario).expect("there is such a scenario");
        return run(&Inside { directory });
    }
    let filter: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let (mut passed, mut left_out) = (0, 0);
    println!("\nrunning {} tests", SCENARIOS.len());
    for (name, _) in SCENARIOS {
        if !filter.is_empty() && !filter.iter().any(|word| name.contains(word.as_str())) {
            left_out += 1;
            continue;
        }
        test(name);
        println!("test {name} ... ok");
        passed += 1;
    }
    println!(
        "\ntest result: ok. {passed} passed; 0 failed; 0 ignored; 0 measured; {left_out} filtered out; finished"
    );
}

/// Runs a scenario in a namespace of its own and looks at how that ends.
fn test(name: &str) {
    let mut host = Host::start();
    let ended_well = host.run_client(name);
    if !name.contains("clean") {
        assert!(ended_well, "{name} failed; console:\n{}", host.console());
        return;
    }
    let (status, console) = host.ended();
    // `unshare` ends by the signal that its child did, which says which kind of reboot(2) it was.
    let signal = if name.contains("reboot") { libc::SIGHUP } else { libc::SIGINT };
    assert_eq!(status.signal().or(status.code().map(|code| code - 128)), Some(signal), "{console}");
    let position = |text: &str| console.find(text).unwrap_or_else(|| panic!("no {text:?} in:\n{console}"));
    assert!(position("asked by control: a test") < position("service stubborn stopping"), "{console}");
    assert!(position("service stubborn stopped") < position("service good stopping"), "{console}");
    assert!(position("asked to stop") < position("service good stopped"), "{console}");
}

fn be_pid_1(directory: &Path) -> ! {
    sys::block_signals().expect("signals can be blocked");
    let console = Console::start();
    let guard = Guard::start(&console, Kernel).expect("a thread can be made");
    let notify = directory.join("notify.sock");
    let doors = Doors {
        notify: NotifySocket::bind(&notify).expect("the notify socket can be made"),
        bus: Bus::start(&directory.join("bus.sock"), &console).expect("the bus can be started"),
        signals: Signals::open().expect("signals have a descriptor"),
        devices: Devices::default(),
    };
    let phases = vec![BootPhase { name: "test".into(), started_ms: 1, took_ms: 2, problem: String::new() }];
    let machine = Machine { sys: &Kernel, console: &console, guard: &guard };
    let services = vec![
        service("good", &["/usr/bin/perl", "-e", GOOD], &[], true),
        service("stubborn", &["/bin/sh", "-c", STUBBORN], &["good"], false),
        service("crashing", &["/bin/sh", "-c", "echo about to fail >&2; exit 3"], &["good"], false),
        service("missing", &["/nowhere/program"], &["good"], true),
        service("never", &["/bin/sleep", "1000"], &["missing"], false),
    ];
    let action = EventLoop::new(machine, Programs::new(services, &notify, None), phases, doors).run();
    console.flush(Duration::from_secs(1));
    let power = match action {
        ShutdownAction::Reboot => PowerAction::Restart,
        ShutdownAction::PowerOff => PowerAction::Off,
    };
    Kernel.power(power).expect("the kernel ends a namespace whose PID 1 asks for it");
    unreachable!("reboot(2) does not come back in a namespace")
}

fn service(name: &str, command: &[&str], after: &[&str], notifies: bool) -> Service {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    Service {
        name: name.into(),
        command: words(command),
        after: words(after),
        notifies,
        start_deadline: Duration::from_secs(30),
        stop_deadline: Duration::from_secs(1),
        confinement: Confinement {
            user: User { uid: 0, gid: 0, groups: Vec::new() },
            capabilities: 0,
            open_files: 256,
            oom_score_adj: 100,
            hidden: Vec::new(),
        },
        limits: Limits { memory_min_mib: 0, memory_max_mib: 64, processes: 64 },
    }
}

#[zbus::proxy(interface = "dev.atoll.Init1", default_path = "/dev/atoll/Init")]
trait Init {
    fn list_services(&self) -> zbus::Result<Vec<ServiceStatus>>;
    fn start_service(&self, name: &str) -> zbus::Result<()>;
    fn stop_service(&self, name: &str) -> zbus::Result<()>;
    fn restart_service(&self, name: &str) -> zbus::Result<()>;
    fn logs(&self, name: &str, lines: u32) -> zbus::Result<Vec<LogLine>>;
    fn boot_phases(&self) -> zbus::Result<Vec<BootPhase>>;
    fn reboot(&self, reason: &str) -> zbus::Result<()>;
    fn power_off(&self, reason: &str) -> zbus::Result<()>;
    #[zbus(signal)]
    fn service_changed(&self, status: ServiceStatus) -> zbus::Result<()>;
}

/// A namespace with init in it, killed when dropped.
struct Host {
    directory: tempfile::TempDir,
    process: Child,
}

/// The same, seen from inside.
struct Inside {
    directory: PathBuf,
}

fn wait<T>(what: &str, console: impl Fn() -> String, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}: not within {PATIENCE:?}; console:\n{}", console());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn this_program() -> PathBuf {
    std::env::current_exe().expect("this program has a path")
}

impl Host {
    fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let user: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["-Ur"] };
        let process = Command::new("unshare")
            .args(user)
            .args(["-m", "-p", "-f", "--kill-child=KILL", "--mount-proc"])
            .arg(this_program())
            .env(DIRECTORY, directory.path())
            .stderr(std::fs::File::create(directory.path().join("console")).expect("a log can be made"))
            .spawn()
            .expect("unshare runs");
        Self { directory, process }
    }

    fn console(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("console")).unwrap_or_default()
    }

    /// Runs this program as a client inside; whether it ended well.
    fn run_client(&mut self, scenario: &str) -> bool {
        let pid = self.process.id();
        let children = format!("/proc/{pid}/task/{pid}/children");
        let init = wait(
            "PID 1",
            || self.console(),
            || {
                let text = std::fs::read_to_string(&children).ok()?;
                self.directory.path().join("bus.sock").exists().then_some(())?;
                text.split_whitespace().next().map(str::to_owned)
            },
        );
        let user: &[&str] =
            if rustix::process::geteuid().is_root() { &[] } else { &["-U", "--preserve-credentials"] };
        let client = Command::new("nsenter")
            .args(["-t", &init, "-p", "-m"])
            .args(user)
            .arg(this_program())
            .env(DIRECTORY, self.directory.path())
            .env(CLIENT, scenario)
            .status();
        client.expect("nsenter runs").success()
    }

    /// How `unshare` saw its child end.
    fn ended(mut self) -> (std::process::ExitStatus, String) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().expect("the child is ours") {
                return (status, self.console());
            }
            assert!(Instant::now() < end, "the namespace did not end; console:\n{}", self.console());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Ended already, or killed here; either way it is collected.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Inside {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    async fn connect(&self) -> InitProxy<'static> {
        let look = || UnixStream::connect(self.path("bus.sock")).ok();
        let stream = wait("the bus", String::new, look);
        let connection =
            zbus::connection::Builder::unix_stream(stream).p2p().build().await.expect("init lets us in");
        InitProxy::builder(&connection)
            .destination(INTERFACE)
            .path(OBJECT_PATH)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .expect("a proxy can be made")
    }

    /// Asks for the list until it is as wanted.
    async fn wait_services(
        &self,
        proxy: &InitProxy<'_>,
        what: &str,
        wanted: impl Fn(&dyn Fn(&str) -> ServiceStatus) -> bool,
    ) {
        let end = Instant::now() + PATIENCE;
        loop {
            let list = proxy.list_services().await.expect("the list comes");
            let by_name =
                |name: &str| list.iter().find(|status| status.name == name).expect("it is listed").clone();
            if wanted(&by_name) {
                return;
            }
            assert!(Instant::now() < end, "{what}: {list:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn shut_down(&self, action: ShutdownAction) {
        zbus::block_on(async {
            let proxy = self.connect().await;
            self.wait_services(&proxy, "up", |service| {
                service("stubborn").state == ServiceState::Ready
                    && service("good").state == ServiceState::Ready
            })
            .await;
            match action {
                ShutdownAction::Reboot => proxy.reboot("a test").await,
                ShutdownAction::PowerOff => proxy.power_off("a test").await,
            }
            .unwrap();
            assert!(proxy.start_service("good").await.is_err(), "started while shutting down");
        });
    }
}

fn services_start_in_order_and_are_told_of(host: &Inside) {
    zbus::block_on(async {
        let proxy = host.connect().await;
        host.wait_services(&proxy, "all have come where they can", |service| {
            service("good").state == ServiceState::Ready
                && service("stubborn").state == ServiceState::Ready
                && service("crashing").restarts >= 1
                && service("missing").state == ServiceState::BackingOff
                && service("never").state == ServiceState::Waiting
        })
        .await;
        let list = proxy.list_services().await.unwrap();
        assert_eq!(list[0].status, "all well");
        assert!(list[2].last_failure.contains("ended with code 3"), "{list:#?}");
        assert!(list[3].last_failure.contains("/nowhere/program: No such file"), "{list:#?}");
        let lines = |name: &'static str| async {
            let lines = proxy.logs(name, 0).await.unwrap();
            lines.into_iter().map(|line| line.text).collect::<Vec<_>>()
        };
        assert!(lines("good").await.contains(&"serving".to_owned()));
        assert!(lines("crashing").await.contains(&"about to fail".to_owned()));
        assert_eq!(proxy.logs("good", 1).await.unwrap().len(), 1);
        assert_eq!(proxy.boot_phases().await.unwrap()[0].name, "test");

        let before = list[0].pid;
        proxy.restart_service("good").await.unwrap();
        host.wait_services(&proxy, "a new process", |service| {
            service("good").state == ServiceState::Ready && service("good").pid != before
        })
        .await;
        assert!(lines("good").await.contains(&"asked to stop".to_owned()));
        proxy.stop_service("stubborn").await.unwrap();
        host.wait_services(&proxy, "killed", |service| service("stubborn").state == ServiceState::Stopped)
            .await;
        proxy.start_service("stubborn").await.unwrap();
        host.wait_services(&proxy, "back", |service| service("stubborn").state == ServiceState::Ready).await;
    });
    // One that has just ended may be a zombie for a moment; none may stay one.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while zombies() > 0 {
        assert!(std::time::Instant::now() < deadline, "orphans were not collected");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn zombies() -> usize {
    let processes = std::fs::read_dir("/proc").expect("/proc is there").flatten();
    processes
        .filter(|entry| {
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z"))
        })
        .count()
}

fn what_is_wrong_is_refused_in_words(host: &Inside) {
    zbus::block_on(async {
        let proxy = host.connect().await;
        let error = proxy.restart_service("hostt").await.unwrap_err().to_string();
        assert!(error.contains("no service \"hostt\"; there are good, stubborn"), "{error}");
        assert!(proxy.logs("", 1).await.is_err());
        // A notification of somebody who is no service is nobody's.
        let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
        socket.send_to(b"READY=1", host.path("notify.sock")).unwrap();
        assert_eq!(proxy.list_services().await.unwrap().len(), 5);
    });
}
