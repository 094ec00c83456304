//! `lab`: the demo and the lab that `./just up` leaves running.
//!
//! `demo` and `serve` build outside, then run themselves again inside namespaces of their own, where everything
//! dies with them. `up` starts `serve` in the background; `kubectl` and `console` reach into it; `down` ends it.

use anyhow::{Context, bail, ensure};
use atoll_qemu_test::artifacts::{Artifacts, Profile};
use atoll_qemu_test::lab::{BUSYBOX, Lab, node_name};
use atoll_qemu_test::machine::{Accelerator, Machine};
use atoll_qemu_test::process::{run, run_ok, tail, wait_for};
use atoll_qemu_test::progress::Progress;
use atoll_qemu_test::{namespaces, network};
use clap::{Parser, Subcommand};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

#[derive(Debug, Parser)]
#[command(about = "Runs a whole Atoll lab on this machine: Supervisor, registry and a host in QEMU")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Boot, join, run a pod, show its log and an exec, delete it, power off; then a table of the times.
    Demo,
    /// Start a lab in the background and say how to reach it.
    Up {
        /// Boot the test image, whose CRI socket is on the lab's network.
        #[arg(long)]
        test: bool,
    },
    /// Run a lab in the foreground until SIGTERM (what `up` starts).
    Serve {
        /// See `up`.
        #[arg(long)]
        test: bool,
    },
    /// Power the host off cleanly and end the lab.
    Down,
    /// Run kubectl against the lab.
    Kubectl {
        /// kubectl's own arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Show the serial console of the lab's host; Ctrl-C leaves it.
    Console,
    /// Run a program inside the lab's network, such as curl.
    Run {
        /// The program and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Build every artefact and stop.
    Build,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().verb {
        Verb::Demo => demo(),
        Verb::Up { test } => up(test),
        Verb::Serve { test } => serve(test),
        Verb::Down => down(),
        Verb::Kubectl { arguments } => kubectl(&arguments),
        Verb::Console => console(),
        Verb::Run { command } => run_inside(&command),
        Verb::Build => build(&[Profile::Release, Profile::Test]),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn build(profiles: &[Profile]) -> anyhow::Result<()> {
    let mut progress = Progress::default();
    Artifacts::locate()?.build(&mut progress, profiles).context("the build failed; whole logs are in out/log")
}

/// Builds outside the namespaces, then enters them; returns inside.
fn enter(profile: Profile) -> anyhow::Result<()> {
    if !namespaces::inside() {
        build(&[profile])?;
        return Err(namespaces::reenter());
    }
    Ok(())
}

/// The first process of a namespace ignores signals that it has no handler for. On the first one `stop` is set; while
/// it is `None`, everything ends at once.
fn on_signal(stop: Arc<OnceLock<AtomicBool>>) -> anyhow::Result<()> {
    let mut signals =
        signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM])
            .context("cannot install a signal handler")?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            match stop.get() {
                Some(stop) if !stop.swap(true, Ordering::Relaxed) => {}
                _ => {
                    eprintln!("\ninterrupted: everything that was started is being ended");
                    std::process::exit(130);
                }
            }
        }
    });
    Ok(())
}

fn demo() -> anyhow::Result<()> {
    enter(Profile::Release)?;
    on_signal(Arc::default())?;
    let artifacts = Artifacts::locate()?;
    let directory = artifacts.out().join("demo");
    let mut progress = Progress::default();
    run_demo(&artifacts, &directory, &mut progress).with_context(|| {
        format!(
            "the demo failed; console and logs are in {}. `./just up` gives the same lab to look around in",
            directory.display()
        )
    })?;
    println!("\n{}", progress.table());
    if Accelerator::detect() == Accelerator::Tcg {
        println!(
            "This machine has no hardware virtualisation: the host ran in emulation, 10 to 50 times slower than a server."
        );
    }
    Ok(())
}

fn run_demo(artifacts: &Artifacts, directory: &Path, progress: &mut Progress) -> anyhow::Result<()> {
    let lab = Lab::start(artifacts, directory, progress)?;
    let powered_on = Instant::now();
    let mut machine = progress.step("start the machine", || lab.boot_host(artifacts, Profile::Release, 0))?;
    progress.step("firmware and kernel until PID 1", || {
        machine.serial.expect("atoll:", 0, Duration::from_secs(120)).map(drop)
    })?;
    progress.step("services, join, node Ready", || lab.wait_ready(&mut machine, 0))?;
    progress.record("power-on → Ready in all", powered_on.elapsed());
    show(&lab, &["get", "nodes", "-o", "wide"])?;
    let example = artifacts.root().join("examples/hello.yaml");
    let yaml =
        std::fs::read_to_string(&example).with_context(|| format!("cannot read {}", example.display()))?;
    progress.step("kubectl apply → Running (with the image pull)", || {
        lab.supervisor.apply(&yaml)?;
        lab.supervisor.wait_field("pod", "hello", "{.status.phase}", "Running", Duration::from_secs(120))
    })?;
    show(&lab, &["get", "pods", "-o", "wide"])?;
    progress.step("kubectl logs", || {
        wait_for("the pod's first line", Duration::from_secs(30), || {
            Ok((!lab.supervisor.kubectl_ok(&["logs", "hello"])?.is_empty()).then_some(()))
        })
    })?;
    show(&lab, &["logs", "hello"])?;
    progress.step("kubectl exec", || show(&lab, &["exec", "hello", "--", "uname", "-a"]))?;
    progress.step("kubectl delete", || {
        run_ok(&mut lab.supervisor.kubectl_command(&["delete", "pod", "hello"]), Duration::from_secs(120))
            .map(drop)
    })?;
    progress.step("power off", || {
        machine.press_power_button()?;
        machine.wait_off(Duration::from_secs(120))
    })
}

/// Prints a kubectl command and its output as a person would see it.
fn show(lab: &Lab, arguments: &[&str]) -> anyhow::Result<()> {
    let output = lab.supervisor.kubectl_ok(arguments)?;
    println!("\n$ kubectl {}\n{}", arguments.join(" "), output);
    std::io::stdout().flush().context("cannot write to standard output")
}

/// Files of the lab that `up` starts.
struct Standing {
    directory: PathBuf,
}

impl Standing {
    fn locate() -> anyhow::Result<Self> {
        Ok(Self { directory: Artifacts::locate()?.out().join("lab") })
    }

    fn pid_file(&self) -> PathBuf {
        self.directory.with_extension("pid")
    }

    fn log(&self) -> PathBuf {
        self.directory.with_extension("log")
    }

    fn ready(&self) -> PathBuf {
        self.directory.join("ready")
    }

    /// Number of the `unshare` that holds the lab, when it runs.
    fn pid(&self) -> Option<u32> {
        let pid: u32 = std::fs::read_to_string(self.pid_file()).ok()?.trim().parse().ok()?;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (name.trim() == "unshare").then_some(pid)
    }

    /// Number of the lab's first process inside its namespaces.
    fn inner_pid(&self) -> anyhow::Result<u32> {
        let outer = self.pid().context("no lab is running: start one with ./just up")?;
        let path = format!("/proc/{outer}/task/{outer}/children");
        let children = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        children.split_whitespace().next().and_then(|pid| pid.parse().ok()).context("the lab is ending")
    }
}

fn up(test: bool) -> anyhow::Result<()> {
    let standing = Standing::locate()?;
    ensure!(standing.pid().is_none(), "a lab is already running: end it with ./just down");
    let profile = if test { Profile::Test } else { Profile::Release };
    build(&[profile])?;
    if standing.directory.exists() {
        std::fs::remove_dir_all(&standing.directory).context("cannot clear the last lab's files")?;
    }
    let log = std::fs::File::create(standing.log())
        .with_context(|| format!("cannot create {}", standing.log().display()))?;
    let mut command = namespaces::unshare_detached();
    command.arg(std::env::current_exe()?).arg("serve");
    if test {
        command.arg("--test");
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .context("cannot start unshare: install util-linux")?;
    std::fs::write(standing.pid_file(), child.id().to_string())?;
    ends_on_signal(child.id())?;
    let mut progress = Progress::default();
    let ready = progress.step("start the lab and boot the host until it is Ready", || {
        wait_for("the lab", Duration::from_secs(900), || {
            if let Some(status) = child.try_wait()? {
                bail!(
                    "the lab ended with {status}; end of {}:\n{}",
                    standing.log().display(),
                    tail(&standing.log(), 40)
                );
            }
            Ok(standing.ready().exists().then_some(()))
        })
    });
    if ready.is_err() {
        // It may have ended by itself. With it goes everything in its namespaces.
        let _ = child.kill();
    }
    ready?;
    print!("{}", std::fs::read_to_string(standing.ready())?);
    Ok(())
}

/// Whoever interrupts `up` before the lab is Ready does not want it to stay.
fn ends_on_signal(lab: u32) -> anyhow::Result<()> {
    let mut signals =
        signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM])
            .context("cannot install a signal handler")?;
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            eprintln!("\ninterrupted: the lab is ended");
            // Its first process takes everything in its namespaces along.
            let _ = run(Command::new("kill").args(["-KILL", &lab.to_string()]), Duration::from_secs(5));
            std::process::exit(130);
        }
    });
    Ok(())
}

fn serve(test: bool) -> anyhow::Result<()> {
    let profile = if test { Profile::Test } else { Profile::Release };
    enter(profile)?;
    let ready = Arc::new(OnceLock::new());
    on_signal(Arc::clone(&ready))?;
    let artifacts = Artifacts::locate()?;
    let standing = Standing::locate()?;
    let mut progress = Progress::default();
    let lab = Lab::start(&artifacts, &standing.directory, &mut progress)?;
    let mut machine = lab.boot_host(&artifacts, profile, 0)?;
    progress.step("boot the host until it is Ready", || lab.wait_ready(&mut machine, 0))?;
    std::fs::write(standing.ready(), how_to_reach(&machine, test))?;
    let stop = ready.get_or_init(|| AtomicBool::new(false));
    while !stop.load(Ordering::Relaxed) {
        machine.check_alive()?;
        std::thread::sleep(Duration::from_millis(200));
    }
    eprintln!("==> power off");
    machine.press_power_button()?;
    machine.wait_off(Duration::from_secs(120))
}

fn how_to_reach(machine: &Machine, test: bool) -> String {
    let mut text = format!(
        "{} is Ready at {}.\n\n  ./just kubectl get nodes -o wide\n  ./just kubectl apply -f examples/hello.yaml\n  ./just console              the host's serial console\n  ./just run curl …           any program inside the lab's network\n  ./just down                 power off and end\n\nImages: push to {} from inside the lab's network; {BUSYBOX} is there.\n",
        node_name(0),
        machine.address(),
        atoll_qemu_test::lab::REGISTRY,
    );
    if test {
        text.push_str(&format!(
            "CRI: tcp://{address}:10350 inside the lab's network (streaming URLs: replace their host and port by {address}:10351).\n",
            address = machine.address()
        ));
    }
    text
}

fn down() -> anyhow::Result<()> {
    let standing = Standing::locate()?;
    let Some(outer) = standing.pid() else {
        println!("no lab is running");
        return Ok(());
    };
    let inner = standing.inner_pid()?;
    let mut progress = Progress::default();
    progress.step("power the host off and end the lab", || {
        run(Command::new("kill").args(["-TERM", &inner.to_string()]), Duration::from_secs(5))?;
        wait_for("the lab to end", Duration::from_secs(180), || {
            Ok((!Path::new(&format!("/proc/{outer}")).exists()).then_some(()))
        })
    })
}

fn kubectl(arguments: &[String]) -> anyhow::Result<()> {
    let standing = Standing::locate()?;
    let mut command = namespaces::nsenter(standing.inner_pid()?);
    command
        .arg(Artifacts::locate()?.supervisor()?)
        .arg("kubectl")
        .args(arguments)
        .env("KUBECONFIG", standing.directory.join("supervisor/admin.kubeconfig"));
    Err(anyhow::Error::new(command.exec()).context("cannot start nsenter: install util-linux"))
}

fn run_inside(arguments: &[String]) -> anyhow::Result<()> {
    let standing = Standing::locate()?;
    let error = namespaces::nsenter(standing.inner_pid()?).args(arguments).exec();
    Err(anyhow::Error::new(error).context("cannot start nsenter: install util-linux"))
}

fn console() -> anyhow::Result<()> {
    let standing = Standing::locate()?;
    standing.inner_pid()?;
    let log = standing.directory.join(node_name(0)).join("serial.log");
    eprintln!("console of {} ({}), Ctrl-C leaves it", node_name(0), network::address(0));
    Err(anyhow::Error::new(Command::new("tail").args(["-n", "200", "-f"]).arg(log).exec())
        .context("cannot start tail"))
}
