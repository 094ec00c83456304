//! One container: made, started, ended, removed.
//!
//! | state    | start      | signal  | process ends | remove        |
//! |----------|------------|---------|--------------|---------------|
//! | Created  | → Starting | refused | –            | → gone        |
//! | Starting | refused    | refused | (kept)       | refused       |
//! | Running  | refused    | sent    | → Exited     | killed → gone |
//! | Exited   | refused    | done    | –            | → gone        |
//!
//! A failed start goes back to Created. Invariant: `Exited` is entered once, by the container's stdio thread, and
//! that sends the one event.

use crate::cgroup::Cgroup;
use crate::error::{Context as _, Failure, Result};
use crate::events::Outbox;
use crate::process::{Launch, Launched, PidNamespace, launch};
use crate::reap::Processes;
use crate::rootfs::Root;
use crate::stage::plan::{Plan, Tree};
use crate::stdio::{Counts, Ports, Pump, Role, Stream};
use crate::sys;
use atoll_spec::guest::{ContainerPhase, ContainerSpec, ContainerState, Event, Exit, MountSource, Usage};
use atoll_spec::ids::ContainerId;
use rustix::pipe::{PipeFlags, pipe_with};
use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long killed processes may take to go.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug)]
enum State {
    Created,
    Starting,
    Running { pid: i32, pidfd: Arc<OwnedFd> },
    Exited(Exit),
}

/// A container.
pub struct Container {
    /// As the runtime asked for it.
    pub spec: ContainerSpec,
    /// Files of its mounts, by target.
    pub files: BTreeMap<String, PathBuf>,
    /// What limits it.
    pub cgroup: Cgroup,
    root: Root,
    directory: PathBuf,
    state: Mutex<State>,
    pump: Mutex<Option<Arc<Pump>>>,
}

/// What a container is made from.
pub struct Parts {
    /// Its stacked root.
    pub root: Root,
    /// What limits it.
    pub cgroup: Cgroup,
    /// Directory in memory for its own files.
    pub directory: PathBuf,
    /// Files of its mounts, by target.
    pub files: BTreeMap<String, PathBuf>,
}

impl Container {
    /// Made; nothing runs.
    pub fn new(spec: ContainerSpec, parts: Parts) -> Self {
        let Parts { root, cgroup, directory, files } = parts;
        Self {
            spec,
            files,
            cgroup,
            root,
            directory,
            state: Mutex::new(State::Created),
            pump: Mutex::new(None),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn name(&self) -> &ContainerId {
        &self.spec.container
    }

    /// Where its root is mounted.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Runs it. `shared` is the PID namespace of the pod, if containers share one.
    pub fn start(
        self: &Arc<Self>,
        tree: Tree,
        shared: Option<Arc<OwnedFd>>,
        stream: Stream,
        processes: &Processes,
        outbox: &Arc<Outbox>,
    ) -> Result<i32> {
        {
            let mut state = self.lock();
            if !matches!(*state, State::Created) {
                return Err(Failure::wrong_state(format!("container {} was started already", self.name())));
            }
            *state = State::Starting;
        }
        let started = self.run(tree, shared, stream, processes, outbox);
        if started.is_err() {
            *self.lock() = State::Created;
        }
        started
    }

    fn run(
        self: &Arc<Self>,
        tree: Tree,
        shared: Option<Arc<OwnedFd>>,
        stream: Stream,
        processes: &Processes,
        outbox: &Arc<Outbox>,
    ) -> Result<i32> {
        let process = self.spec.process.clone();
        let (theirs, mut ports) = pipes(process.tty, self.spec.stdin)?;
        let plan = Plan { tree: Some(tree), process };
        let namespace = shared.as_ref().map_or(PidNamespace::New, |pidfd| PidNamespace::Of(pidfd.as_fd()));
        let request = Launch { namespace, cgroup: &self.cgroup, plan: &plan, stdio: theirs, container: None };
        let Launched { pid, pidfd, ending, terminal } = launch(processes, request)?;
        ports.terminal = terminal;
        let number = pid.as_raw_nonzero().get();
        *self.lock() = State::Running { pid: number, pidfd: Arc::new(pidfd) };
        let (container, outbox) = (Arc::clone(self), Arc::clone(outbox));
        let pump = Pump::start(Role::Container, ports, Some(stream), ending, move |code| {
            container.ended(code, &outbox)
        });
        let pump = pump.during(|| "start the thread that moves the container's output".into()).inspect_err(
            |_| {
                // Nobody would see its end: it must not run.
                let _ = sys::kill(number, libc::SIGKILL);
            },
        )?;
        *self.pump.lock().unwrap_or_else(PoisonError::into_inner) = Some(pump);
        Ok(number)
    }

    /// Its first process ended, and with it every other.
    fn ended(&self, code: i32, outbox: &Outbox) {
        if let Err(failure) = self.cgroup.kill() {
            crate::log::line(&failure.message);
        }
        let exit = Exit { code, oom_killed: self.cgroup.saw_oom_kill(), at_unix_ns: sys::clock() };
        *self.lock() = State::Exited(exit);
        outbox.event(Event::Exited { container: self.name().clone(), exit });
    }

    /// The pidfd of its first process, while it runs.
    pub fn running(&self) -> Result<Arc<OwnedFd>> {
        match &*self.lock() {
            State::Running { pidfd, .. } => Ok(Arc::clone(pidfd)),
            _ => Err(Failure::wrong_state(format!("container {} is not running", self.name()))),
        }
    }

    /// Sends a signal to its first process, or to all.
    pub fn signal(&self, signal: i32, all: bool) -> Result<()> {
        if !(1..=64).contains(&signal) {
            return Err(Failure::invalid(format!("{signal} is not a signal")));
        }
        let pidfd = match &*self.lock() {
            State::Running { pidfd, .. } => Arc::clone(pidfd),
            State::Exited(_) => return Ok(()),
            State::Created | State::Starting => {
                return Err(Failure::wrong_state(format!("container {} does not run yet", self.name())));
            }
        };
        if all && signal == libc::SIGKILL {
            return self.cgroup.kill();
        }
        if all {
            for pid in self.cgroup.processes() {
                // It may have ended since the list was read.
                let _ = sys::kill(pid, signal);
            }
        }
        match sys::pidfd_kill(&*pidfd, signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            _ if all => Ok(()),
            other => other.during(|| format!("send signal {signal} to container {}", self.name())),
        }
    }

    /// Gives its output to another stream.
    pub fn connect(&self, stream: Stream) -> Result<()> {
        match &*self.pump.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(pump) => {
                pump.connect(stream);
                Ok(())
            }
            None => Err(Failure::wrong_state(format!("container {} was not started", self.name()))),
        }
    }

    /// The runtime has this much of what it said on this stream.
    pub fn acknowledge(&self, number: u64, counts: Counts) {
        // Without a pump nothing is kept.
        if let Some(pump) = &*self.pump.lock().unwrap_or_else(PoisonError::into_inner) {
            pump.acknowledge(number, counts);
        }
    }

    /// Kills what runs, unmounts and deletes. Safe to repeat after a failure.
    pub fn remove(&self) -> Result<()> {
        if matches!(*self.lock(), State::Starting) {
            return Err(Failure::wrong_state(format!("container {} is starting", self.name())));
        }
        self.cgroup.kill()?;
        self.cgroup.remove(KILL_DEADLINE)?;
        if let Some(pump) = self.pump.lock().unwrap_or_else(PoisonError::into_inner).take() {
            pump.close();
        }
        if self.root.path().exists() {
            self.root.remove()?;
        }
        match std::fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).during(|| format!("delete {}", self.directory.display()))
            }
            _ => Ok(()),
        }
    }

    /// As the runtime sees it.
    pub fn describe(&self) -> ContainerState {
        let phase = match &*self.lock() {
            State::Created | State::Starting => ContainerPhase::Created,
            State::Running { pid, .. } => ContainerPhase::Running { pid: *pid },
            State::Exited(exit) => ContainerPhase::Exited { exit: *exit },
        };
        ContainerState { container: self.name().clone(), phase }
    }

    /// Counters, with those of what it wrote.
    pub fn usage(&self) -> Usage {
        let (writable_bytes, writable_inodes) = crate::stats::tree_size(&self.root.upper());
        Usage { writable_bytes, writable_inodes, ..self.cgroup.usage() }
    }

    /// The path in the guest of a file that was mounted at `target`.
    pub fn file(&self, target: &str) -> Result<&Path> {
        let file = self.files.get(target).map(PathBuf::as_path);
        file.ok_or_else(|| {
            Failure::not_found(format!("no file was mounted at {target} of container {}", self.name()))
        })
    }
}

/// The process's three descriptors (none with a terminal, which its stage opens) and our ends.
pub fn pipes(tty: bool, stdin: bool) -> Result<(Vec<OwnedFd>, Ports)> {
    if tty {
        return Ok((Vec::new(), Ports::default()));
    }
    let pipe = || pipe_with(PipeFlags::CLOEXEC).during(|| "make a pipe".into());
    let (input, our_input) = if stdin {
        let (read, write) = pipe()?;
        (read, Some(write))
    } else {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
        let null = rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty());
        (null.during(|| "open /dev/null".into())?, None)
    };
    let ((our_output, output), (our_error, error)) = (pipe()?, pipe()?);
    let ports = Ports { stdin: our_input, stdout: Some(our_output), stderr: Some(our_error), terminal: None };
    Ok((vec![input, output, error], ports))
}

/// Whether the mounts of a spec bring something at `target`.
pub fn mounts_at(spec: &ContainerSpec, target: &str) -> bool {
    let target = target.trim_end_matches('/');
    spec.mounts.iter().any(|mount| mount.target.trim_end_matches('/') == target)
}

/// Whether a mount is a file that comes with the spec.
pub fn is_file(source: &MountSource) -> bool {
    matches!(source, MountSource::File { .. })
}

/// Every container of the guest.
#[derive(Default)]
pub struct Containers(Mutex<BTreeMap<ContainerId, Arc<Container>>>);

impl Containers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<ContainerId, Arc<Container>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one that `make` makes, unless its name is taken.
    pub fn add(&self, name: &ContainerId, make: impl FnOnce() -> Result<Container>) -> Result<()> {
        let mut all = self.lock();
        if all.contains_key(name) {
            return Err(Failure::wrong_state(format!("container {name} exists already")));
        }
        all.insert(name.clone(), Arc::new(make()?));
        Ok(())
    }

    /// By name.
    pub fn get(&self, name: &ContainerId) -> Result<Arc<Container>> {
        let found = self.lock().get(name).cloned();
        found.ok_or_else(|| Failure::not_found(format!("there is no container {name}")))
    }

    /// Forgets one that has been removed.
    pub fn forget(&self, name: &ContainerId) {
        self.lock().remove(name);
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Container>> {
        self.lock().values().cloned().collect()
    }

    /// Signals every process of every container that runs.
    pub fn signal_all(&self, signal: i32) {
        for container in self.all() {
            // One that does not run needs no signal.
            let _ = container.signal(signal, true);
        }
    }
}
