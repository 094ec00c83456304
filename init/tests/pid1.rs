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

/// Ready at once, and deaf to a request to stop.
const DEAF: &str = "trap '' TERM; while :; do sleep 1; done";

/// Gives signs of life, three times as often as it has to.
const LIVELY: &str = r#"
use IO::Socket::UNIX; use Socket;
my $s = IO::Socket::UNIX->new(Type => SOCK_DGRAM, Peer => $ENV{NOTIFY_SOCKET}) or die "no socket: $!";
$s->send("READY=1");
while (1) { select(undef, undef, undef, $ENV{WATCHDOG_USEC} / 3e6); $s->send("WATCHDOG=1"); }
"#;

/// Floods init with notifications.
const FLOOD: &str = r#"
use IO::Socket::UNIX; use Socket;
my $s = IO::Socket::UNIX->new(Type => SOCK_DGRAM, Peer => $ENV{NOTIFY_SOCKET}) or die "no socket: $!";
$s->send("READY=1");
$s->send("STATUS=" . "x" x 4000) while 1;
"#;

type Scenario = fn(&Inside);

/// How a scenario's host ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// It is still up and is ended from outside.
    Running,
    /// `unshare` ends by the signal that its child did, which says which kind of reboot(2) it was.
    Reboot,
    PowerOff,
}

impl End {
    fn signal(self) -> i32 {
        if self == Self::Reboot { libc::SIGHUP } else { libc::SIGINT }
    }
}

const BEFORE_SERVICES: &str = "a_shutdown_asked_before_the_services_start_is_done_first";

/// Name, what the client does, how the host ends, and the lines its console has then, in this order.
const SCENARIOS: [(&str, Scenario, End, &[&str]); 11] = [
    ("services_start_in_order_and_are_told_of", services_start_in_order_and_are_told_of, End::Running, &[]),
    ("what_is_wrong_is_refused_in_words", what_is_wrong_is_refused_in_words, End::Running, &[]),
    ("a_reboot_is_clean_and_ends_in_reboot", |it| it.shut_down(ShutdownAction::Reboot), End::Reboot, CLEAN),
    (
        "a_power_off_is_clean_and_ends_in_power_off",
        |it| it.shut_down(ShutdownAction::PowerOff),
        End::PowerOff,
        CLEAN,
    ),
    (
        "a_service_that_is_killed_is_started_again_after_a_back_off",
        a_service_that_is_killed_is_started_again_after_a_back_off,
        End::Running,
        &["service good was killed (SIGKILL); next try in 1 s", "service good starting (start 2)"],
    ),
    (
        "a_service_that_is_stopped_is_found_out_killed_and_started_again",
        a_service_that_is_stopped_is_found_out_killed_and_started_again,
        End::Running,
        &[
            "service lively hung: gave no sign of life for 2 s and was killed",
            "service lively starting (start 2)",
        ],
    ),
    (
        "a_service_that_floods_init_does_not_hold_it_up",
        a_service_that_floods_init_does_not_hold_it_up,
        End::Running,
        &[],
    ),
    (
        "what_is_malformed_on_the_bus_ends_its_connection_alone",
        what_is_malformed_on_the_bus_ends_its_connection_alone,
        End::Running,
        &["control: refused a connection: there are 8 already"],
    ),
    ("only_root_gets_onto_the_bus", only_root_gets_onto_the_bus, End::Running, &[]),
    (
        "a_second_request_to_shut_down_waits_for_nobody",
        a_second_request_to_shut_down_waits_for_nobody,
        End::PowerOff,
        &[
            "asked by control: first",
            "service deaf stopping",
            "asked to shut down again: not waiting for services any longer",
            "service deaf stopped",
        ],
    ),
    (
        BEFORE_SERVICES,
        |_| unreachable!("there is no time for a client"),
        End::Reboot,
        &["shutdown: reboot asked by signal: Ctrl-Alt-Del"],
    ),
];

/// The console of a clean shutdown.
const CLEAN: &[&str] = &[
    "asked by control: a test",
    "service stubborn stopping",
    "service stubborn stopped",
    "service good stopping",
    "asked to stop",
    "service good stopped",
];

fn main() {
    if let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) {
        if std::process::id() == 1 {
            be_pid_1(&directory);
        }
        let scenario = std::env::var(CLIENT).expect("a client knows its scenario");
        let (_, run, ..) =
            SCENARIOS.iter().find(|(name, ..)| *name == scenario).expect("there is such a scenario");
        return run(&Inside { directory });
    }
    let filter: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let (mut passed, mut left_out) = (0, 0);
    println!("\nrunning {} tests", SCENARIOS.len());
    for (name, _, end, lines) in SCENARIOS {
        if !filter.is_empty() && !filter.iter().any(|word| name.contains(word.as_str())) {
            left_out += 1;
            continue;
        }
        test(name, end, lines);
        println!("test {name} ... ok");
        passed += 1;
    }
    println!(
        "\ntest result: ok. {passed} passed; 0 failed; 0 ignored; 0 measured; {left_out} filtered out; finished"
    );
}

/// Runs a scenario in a namespace of its own and looks at how that ends.
fn test(name: &str, end: End, lines: &[&str]) {
    let mut host = Host::start(name);
    let console = if end == End::Running {
        let ended_well = host.run_client(name);
        assert!(ended_well, "{name} failed; console:\n{}", host.console());
        // Written by a thread of its own, perhaps after the client has seen what it tells of.
        wait(
            "the last line of the console",
            || host.console(),
            || lines.last().is_none_or(|line| host.console().contains(line)).then_some(()),
        );
        host.console()
    } else {
        if name != BEFORE_SERVICES {
            host.run_client(name);
        }
        let (status, console) = host.ended();
        let signal = status.signal().or(status.code().map(|code| code - 128));
        assert_eq!(signal, Some(end.signal()), "{console}");
        console
    };
    let mut rest = console.as_str();
    for line in lines {
        let at = rest.find(line).unwrap_or_else(|| panic!("{name}: no {line:?} in its place in:\n{console}"));
        rest = &rest[at + line.len()..];
    }
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
    let scenario = std::env::var(CLIENT).expect("PID 1 knows the scenario");
    if scenario == BEFORE_SERVICES {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::INT)
            .expect("PID 1 may signal itself");
    }
    let services = services(&scenario);
    let action = EventLoop::new(machine, Programs::new(services, &notify, None), phases, doors).run();
    console.flush(Duration::from_secs(1));
    let power = match action {
        ShutdownAction::Reboot => PowerAction::Restart,
        ShutdownAction::PowerOff => PowerAction::Off,
    };
    Kernel.power(power).expect("the kernel ends a namespace whose PID 1 asks for it");
    unreachable!("reboot(2) does not come back in a namespace")
}

fn services(scenario: &str) -> Vec<Service> {
    let good = service("good", &["/usr/bin/perl", "-e", GOOD], &[], true);
    match scenario {
        "a_second_request_to_shut_down_waits_for_nobody" => {
            let deaf = service("deaf", &["/bin/sh", "-c", DEAF], &["good"], false);
            vec![good, Service { stop_deadline: PATIENCE * 2, ..deaf }]
        }
        "a_service_that_is_stopped_is_found_out_killed_and_started_again" => {
            let lively = service("lively", &["/usr/bin/perl", "-e", LIVELY], &[], true);
            vec![Service { watchdog: Some(Duration::from_secs(2)), ..lively }]
        }
        "a_service_that_floods_init_does_not_hold_it_up" => {
            vec![good, service("flood", &["/usr/bin/perl", "-e", FLOOD], &[], true)]
        }
        _ => vec![
            good,
            service("stubborn", &["/bin/sh", "-c", STUBBORN], &["good"], false),
            service("crashing", &["/bin/sh", "-c", "echo about to fail >&2; exit 3"], &["good"], false),
            service("missing", &["/nowhere/program"], &["good"], true),
            service("never", &["/bin/sleep", "1000"], &["missing"], false),
        ],
    }
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
        watchdog: None,
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
    fn start(scenario: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let user: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["-Ur"] };
        let process = Command::new("unshare")
            .args(user)
            .args(["-m", "-p", "-f", "--kill-child=KILL", "--mount-proc"])
            .arg(this_program())
            .env(DIRECTORY, directory.path())
            .env(CLIENT, scenario)
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

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("the service has a process");
    rustix::process::kill_process(pid, signal).expect("the process is there");
}

fn a_service_that_is_killed_is_started_again_after_a_back_off(host: &Inside) {
    zbus::block_on(async {
        let proxy = host.connect().await;
        let ready = |service: &dyn Fn(&str) -> ServiceStatus| service("good").state == ServiceState::Ready;
        host.wait_services(&proxy, "good is up", ready).await;
        let before = proxy.list_services().await.unwrap()[0].pid;
        signal(before, rustix::process::Signal::KILL);
        host.wait_services(&proxy, "good is back", |service| {
            ready(service) && service("good").pid != before && service("good").restarts == 1
        })
        .await;
        assert_eq!(proxy.list_services().await.unwrap()[0].last_failure, "was killed (SIGKILL)");
    });
}

fn a_service_that_is_stopped_is_found_out_killed_and_started_again(host: &Inside) {
    zbus::block_on(async {
        let proxy = host.connect().await;
        let ready = |service: &dyn Fn(&str) -> ServiceStatus| service("lively").state == ServiceState::Ready;
        host.wait_services(&proxy, "lively is up", ready).await;
        let began = Instant::now();
        let before = proxy.list_services().await.unwrap()[0].pid;
        while began.elapsed() < Duration::from_secs(5) {
            let now = &proxy.list_services().await.unwrap()[0];
            assert_eq!((now.pid, now.restarts), (before, 0), "one that gives signs of life is left alone");
            std::thread::sleep(Duration::from_millis(100));
        }
        signal(before, rustix::process::Signal::STOP);
        host.wait_services(&proxy, "lively is back", |service| {
            ready(service) && service("lively").pid != before && service("lively").restarts == 1
        })
        .await;
    });
}

fn a_service_that_floods_init_does_not_hold_it_up(host: &Inside) {
    zbus::block_on(async {
        let proxy = host.connect().await;
        host.wait_services(&proxy, "both are up", |service| {
            ["good", "flood"].iter().all(|name| service(name).state == ServiceState::Ready)
        })
        .await;
        let before = proxy.list_services().await.unwrap();
        assert!(before[1].status.len() <= 512, "a status has a bound");
        proxy.restart_service("good").await.unwrap();
        host.wait_services(&proxy, "good is back", |service| {
            service("good").state == ServiceState::Ready && service("good").pid != before[0].pid
        })
        .await;
    });
}

fn a_second_request_to_shut_down_waits_for_nobody(host: &Inside) {
    zbus::block_on(async {
        let proxy = host.connect().await;
        host.wait_services(&proxy, "up", |service| {
            ["good", "deaf"].iter().all(|name| service(name).state == ServiceState::Ready)
        })
        .await;
        proxy.power_off("first").await.unwrap();
        // The answer may not come any more: the machine is off by then.
        let _ = proxy.power_off("second").await;
    });
}

/// A connection whose handshake is done by hand.
fn greeted(host: &Inside) -> UnixStream {
    use std::io::{BufRead, BufReader, Write};
    let mut stream = wait("a place", String::new, || {
        let mut stream = UnixStream::connect(host.path("bus.sock")).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
        stream.write_all(b"\0AUTH EXTERNAL 30\r\n").ok()?;
        let mut answer = String::new();
        BufReader::new(stream.try_clone().ok()?).read_line(&mut answer).ok()?;
        answer.starts_with("OK ").then_some(stream)
    });
    stream.write_all(b"BEGIN\r\n").unwrap();
    stream
}

/// Whether init ends the connection by itself.
fn is_ended(mut stream: &UnixStream) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match std::io::Read::read(&mut stream, &mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

fn what_is_malformed_on_the_bus_ends_its_connection_alone(host: &Inside) {
    use std::io::Write;
    zbus::block_on(async {
        let proxy = host.connect().await;
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\0AUTH NONSENSE\r\n\xff\xff\r\n", &[0xff; 70_000]] {
            let mut stream = UnixStream::connect(host.path("bus.sock")).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            // init may have hung up before all is sent.
            let _ = stream.write_all(garbage);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            assert!(is_ended(&stream), "{} bytes of garbage", garbage.len());
        }
        // Past the handshake: no message, a message of a wrong kind, one that says that it has 4 GiB.
        for garbage in [&[0xff; 64][..], &[b'l', 9, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], &HUGE] {
            let mut stream = greeted(host);
            stream.write_all(garbage).unwrap();
            assert!(is_ended(&stream), "{garbage:?}");
        }
        let text = "x\u{1b}[2J\n".repeat(200_000);
        let error = proxy.restart_service(&text).await.unwrap_err().to_string();
        assert!(error.len() < 4096 && error.contains("no service"), "{} bytes", error.len());
        let connection = proxy.inner().connection();
        for (path, member) in
            [(OBJECT_PATH, "NoSuchMethod"), ("/nowhere", "ListServices"), (OBJECT_PATH, "Logs")]
        {
            let call = connection.call_method(None::<&str>, path, Some(INTERFACE), member, &());
            assert!(call.await.is_err(), "{path} {member}");
        }
        // Those that never say who they are hold no place for ever.
        let idle: Vec<UnixStream> =
            (0..20).filter_map(|_| UnixStream::connect(host.path("bus.sock")).ok()).collect();
        let began = Instant::now();
        drop(greeted(host));
        assert!(began.elapsed() >= Duration::from_secs(4), "a peer has time to say who it is");
        drop(idle);
        assert_eq!(proxy.list_services().await.unwrap().len(), 5, "and the first one is served throughout");
    });
}

/// Connects as another user and prints what comes back.
const STRANGER: &str = r#"
use IO::Socket::UNIX; use Socket;
$SIG{PIPE} = "IGNORE"; # init may have hung up before anything is sent
$) = "65534 65534"; $> = 65534; $> == 65534 or die "cannot become another user: $!";
my $s = IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $ARGV[0]) or (print("kept out"), exit);
$s->send("\0AUTH EXTERNAL 30\r\n"); print("got: ", $s->getline // "");
"#;

fn only_root_gets_onto_the_bus(host: &Inside) {
    use std::os::unix::fs::PermissionsExt;
    let set_mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("it is ours");
    };
    let bus = host.path("bus.sock");
    let mode = std::fs::metadata(&bus).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "the mode of the bus");
    set_mode(&host.directory, 0o755);
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if !map.contains("4294967295") {
        println!("(there is no other user in this namespace to try it as)");
        return;
    }
    let stranger = || {
        let output =
            Command::new("/usr/bin/perl").args(["-e", STRANGER]).arg(&bus).output().expect("perl runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert_eq!(stranger(), "kept out", "by the mode of the file");
    set_mode(&bus, 0o666);
    assert_eq!(stranger(), "got: ", "by who it is: init hangs up without a word");
    zbus::block_on(async {
        let proxy = host.connect().await;
        let lines = proxy.logs("init", 0).await.unwrap();
        assert!(lines.iter().any(|line| line.text.contains("refused a connection of uid 65534: root only")));
    });
}

/// A method call whose body is said to have 4 GiB.
const HUGE: [u8; 16] = [b'l', 1, 0, 1, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0];

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
