//! Where the guest finds things: fixed inside a microVM, elsewhere in a rehearsal.
//!
//! A *rehearsal* runs the same program as root in namespaces of a development machine, without a VM: a unix
//! socket stands for vsock, directories stand for layers. The tests drive containers through it.

use crate::transport::Peer;
use std::path::PathBuf;

/// What this process is.
pub enum Mode {
    /// PID 1 of a microVM.
    Machine(Options),
    /// The same without a VM.
    Rehearsal(Options),
    /// A process on its way into a container.
    Stage,
    /// First process of a PID namespace that the pod's containers share.
    Pause {
        /// The empty directory it locks itself into.
        empty: String,
    },
}

/// Where layers come from.
#[derive(Debug, Clone)]
pub enum LayerSource {
    /// Byte ranges of a block device.
    Device(PathBuf),
    /// Directory `<offset>` under this one stands for the layer at that offset.
    Directories(PathBuf),
}

/// Places.
#[derive(Debug, Clone)]
pub struct Options {
    /// The runtime.
    pub peer: Peer,
    /// Layers.
    pub layers: LayerSource,
    /// The disk for what containers write.
    pub scratch: PathBuf,
    /// Everything the guest makes.
    pub run: PathBuf,
    /// Root of the cgroup tree that is ours.
    pub cgroup: PathBuf,
    /// Whether network, clock and host name are ours to set.
    pub machine: bool,
}

impl Options {
    fn machine() -> Self {
        Self {
            peer: Peer::Host,
            layers: LayerSource::Device("/dev/vda".into()),
            scratch: "/dev/vdb".into(),
            run: "/run/atoll".into(),
            cgroup: "/sys/fs/cgroup".into(),
            machine: true,
        }
    }
}

/// Reads the arguments. Without a known first word this is PID 1 of a machine: the kernel passes words of its
/// command line that it does not know.
pub fn parse(args: &[String]) -> Result<Mode, String> {
    match args.get(1).map(String::as_str) {
        Some("stage") => Ok(Mode::Stage),
        Some("pause") if args.len() == 3 => Ok(Mode::Pause { empty: args[2].clone() }),
        Some("rehearse") => rehearsal(&args[2..]).map(Mode::Rehearsal),
        _ if rustix::process::getpid().as_raw_nonzero().get() == 1 => Ok(Mode::Machine(Options::machine())),
        _ => Err("this is PID 1 of an Atoll microVM; use `rehearse --socket S --layers D --run D --cgroup D` to try it".into()),
    }
}

fn rehearsal(args: &[String]) -> Result<Options, String> {
    let mut options = Options { machine: false, ..Options::machine() };
    let mut pairs = args.chunks_exact(2);
    for pair in pairs.by_ref() {
        let value = PathBuf::from(&pair[1]);
        match pair[0].as_str() {
            "--socket" => options.peer = Peer::Socket(value),
            "--layers" => options.layers = LayerSource::Directories(value),
            "--layer-device" => options.layers = LayerSource::Device(value),
            "--scratch" => options.scratch = value,
            "--run" => options.run = value,
            "--cgroup" => options.cgroup = value,
            other => return Err(format!("unknown option {other}")),
        }
    }
    if pairs.remainder().is_empty() { Ok(options) } else { Err("an option lacks its value".into()) }
}
