//! What runs and lies around in a booted host of the test image, and signals for its processes.
//!
//! The test image carries [`host`] in its test bridge; tests talk to it through [`Inspector`], one JSON line each way
//! on a connection of its own. [`rules`] says what of an [`Inventory`] belongs to nobody.

pub mod host;
pub mod rules;
pub mod search;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Port of the inspector on the test network.
pub const PORT: u16 = 10352;
/// Longest line either side accepts: an inventory of a host with hundreds of processes.
pub const LINE_LIMIT: u64 = 4 << 20;
/// Time to connect, and beyond what was asked for until the answer comes.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same for a search of all files of a disk.
const SEARCH: Duration = Duration::from_secs(240);
/// What belongs to nobody may still be on its way out for this long.
const LEAVING: Duration = Duration::from_secs(60);

/// A process of the host plane, or a microVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// The main process of a service of PID 1.
    Service(String),
    /// The VMM of the pod of this name.
    Vmm(String),
}

/// A step of a pod's life, as the runtime's records and files show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Its microVM is being made.
    Launching,
    /// Its microVM runs, without a container.
    Launched,
    /// A layer is on its way into the store.
    Pulling,
    /// A container was made and not started.
    Created,
    /// A container runs.
    Running,
    /// A container has exited.
    Exited,
    /// The sandbox is being stopped.
    Stopping,
    /// The sandbox has no microVM any more.
    Stopped,
    /// Nothing is known of the sandbox.
    Removed,
}

/// What a test asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Everything that runs and lies around.
    Inventory,
    /// Send a signal.
    Signal {
        /// To whom.
        target: Target,
        /// Its number.
        signal: i32,
    },
    /// Wait until a pod is at a step, then send a signal if one is given.
    At {
        /// Name of the pod.
        pod: String,
        /// The step to wait for.
        step: Step,
        /// How long.
        deadline_ms: u64,
        /// Whom to send which signal at once.
        then: Option<(Target, i32)>,
    },
    /// The end of a file.
    Read {
        /// Where it is.
        path: String,
    },
    /// Files of a directory and their sizes.
    Sizes {
        /// The directory.
        directory: String,
    },
    /// Files below a directory that hold a text, a path a line.
    Holders {
        /// The directory.
        directory: String,
        /// The text.
        text: String,
    },
    /// Fill DATA until this much is left; 0 frees what was filled.
    Fill {
        /// Bytes to leave.
        leave: u64,
    },
}

/// The host's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Request::Inventory`].
    Inventory(Box<Inventory>),
    /// Done; milliseconds of the host's monotonic clock.
    Done(u64),
    /// To [`Request::Read`] and [`Request::Holders`].
    Text(String),
    /// To [`Request::Sizes`]: bytes by name.
    Sizes(BTreeMap<String, u64>),
    /// What went wrong.
    Failed(String),
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// The kernel's short name for it.
    pub name: String,
    /// One letter, as in /proc/PID/stat.
    pub state: char,
    /// Its cgroup below `atoll/`, or the whole path when it is elsewhere.
    pub cgroup: String,
    /// Resident memory, KiB.
    pub resident_kib: u64,
    /// Memory that only it has, KiB.
    pub private_kib: u64,
    /// Threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Its namespaces (`net:[4026531840]`).
    pub namespaces: BTreeSet<String>,
}

/// A sandbox as the runtime's record has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Its id, which names its directory and cgroup.
    pub id: String,
    /// Name of its pod.
    pub pod: String,
    /// The record's phase.
    pub phase: String,
    /// Name of its tap.
    pub tap: String,
    /// Its address.
    pub address: String,
    /// Phases of its containers.
    pub containers: Vec<String>,
}

/// What runs and lies around in a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Sandboxes with a record.
    pub sandboxes: Vec<Sandbox>,
    /// Directories of sandboxes, with a record or without.
    pub sandbox_directories: BTreeSet<String>,
    /// Everything but kernel threads.
    pub processes: Vec<Process>,
    /// Network interfaces.
    pub interfaces: BTreeSet<String>,
    /// Cgroups below `atoll/`.
    pub cgroups: BTreeSet<String>,
    /// Mount points that PID 1 sees.
    pub mounts: BTreeSet<String>,
    /// Loop devices with a file behind them.
    pub loops: BTreeSet<String>,
    /// Listening and unconnected sockets: `tcp 0.0.0.0:10250`, `unix /run/…`, `packet 3`.
    pub listeners: BTreeSet<String>,
    /// Pods' addresses that the packet filter lets through.
    pub filtered: BTreeSet<String>,
    /// Half-made files of the image store.
    pub half_made: BTreeSet<String>,
    /// Directories of pods' volumes.
    pub volumes: BTreeSet<String>,
    /// Bytes free on DATA.
    pub data_free: u64,
    /// Memory that could be given out, KiB.
    pub memory_available_kib: u64,
}

/// Talks to the inspector of one host.
#[derive(Debug, Clone)]
pub struct Inspector {
    address: SocketAddr,
}

impl Inspector {
    /// The inspector of the host at this address.
    ///
    /// # Errors
    /// When it is no address.
    pub fn new(host: &str) -> anyhow::Result<Self> {
        let address = format!("{host}:{PORT}").parse().with_context(|| format!("{host} is no address"))?;
        Ok(Self { address })
    }

    fn ask(&self, request: &Request, patience: Duration) -> anyhow::Result<Reply> {
        let context = || format!("cannot ask the inspector at {}", self.address);
        let stream = TcpStream::connect_timeout(&self.address, PATIENCE).with_context(context)?;
        stream.set_read_timeout(Some(patience)).with_context(context)?;
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        (&stream).write_all(line.as_bytes()).with_context(context)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).with_context(context)?;
        match serde_json::from_str(&answer).with_context(|| format!("the inspector said {answer:?}"))? {
            Reply::Failed(why) => bail!("{request:?}: {why}"),
            reply => Ok(reply),
        }
    }

    fn done(&self, request: &Request, patience: Duration) -> anyhow::Result<u64> {
        match self.ask(request, patience)? {
            Reply::Done(at) => Ok(at),
            other => bail!("the inspector answered {other:?} to {request:?}"),
        }
    }

    /// Everything that runs and lies around.
    ///
    /// # Errors
    /// When the host does not answer.
    pub fn inventory(&self) -> anyhow::Result<Inventory> {
        match self.ask(&Request::Inventory, PATIENCE)? {
            Reply::Inventory(inventory) => Ok(*inventory),
            other => bail!("the inspector answered {other:?} to an inventory"),
        }
    }

    /// Sends a signal; returns the host's time, ms.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn signal(&self, target: Target, signal: i32) -> anyhow::Result<u64> {
        self.done(&Request::Signal { target, signal }, PATIENCE)
    }

    /// Waits until a pod is at a step, and sends a signal then; returns the host's time, ms.
    ///
    /// # Errors
    /// At the deadline, or when there is no such process.
    pub fn at(
        &self,
        pod: &str,
        step: Step,
        deadline: Duration,
        then: Option<(Target, i32)>,
    ) -> anyhow::Result<u64> {
        let deadline_ms = u64::try_from(deadline.as_millis()).context("a deadline beyond all time")?;
        let request = Request::At { pod: pod.to_owned(), step, deadline_ms, then };
        self.done(&request, deadline + PATIENCE)
    }

    /// The end of a file of the host.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, path: &str) -> anyhow::Result<String> {
        match self.ask(&Request::Read { path: path.to_owned() }, PATIENCE)? {
            Reply::Text(text) => Ok(text),
            other => bail!("the inspector answered {other:?} to a read"),
        }
    }

    /// The files below a directory of the host that hold a text, a path a line.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn holders(&self, directory: &str, text: &str) -> anyhow::Result<String> {
        let request = Request::Holders { directory: directory.to_owned(), text: text.to_owned() };
        match self.ask(&request, SEARCH)? {
            Reply::Text(paths) => Ok(paths),
            other => bail!("the inspector answered {other:?} to a search"),
        }
    }

    /// The files of a directory of the host, and their sizes in bytes.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn sizes(&self, directory: &str) -> anyhow::Result<BTreeMap<String, u64>> {
        match self.ask(&Request::Sizes { directory: directory.to_owned() }, PATIENCE)? {
            Reply::Sizes(sizes) => Ok(sizes),
            other => bail!("the inspector answered {other:?} to a list of sizes"),
        }
    }

    /// Fills DATA until `leave` bytes are left; 0 frees what was filled.
    ///
    /// # Errors
    /// When the host cannot.
    pub fn fill(&self, leave: u64) -> anyhow::Result<()> {
        self.done(&Request::Fill { leave }, PATIENCE).map(drop)
    }

    /// Fails when anything in the host belongs to nobody and stays. What is on its way in or out is given time: only
    /// what every look shows counts.
    ///
    /// # Errors
    /// With a line for each such thing.
    pub fn nothing_leaked(&self) -> anyhow::Result<()> {
        let started = Instant::now();
        let mut always: Option<BTreeSet<String>> = None;
        loop {
            let now = rules::unaccounted(&self.inventory()?);
            let still = match always {
                None => now,
                Some(before) => before.intersection(&now).cloned().collect(),
            };
            if still.is_empty() {
                return Ok(());
            }
            if started.elapsed() > LEAVING {
                let lines: Vec<String> = still.into_iter().collect();
                bail!("left over in the host:\n  {}", lines.join("\n  "));
            }
            always = Some(still);
            std::thread::sleep(crate::process::POLL);
        }
    }
}
