//! A built machine and its threads.
//!
//! ```text
//! Machine::new ──► start: threads made, filtered, parked ──► run ◄──► pause ──► ended (first word counts)
//! ```
//!
//! `control.rs` owns it. Threads never stop: when the machine has ended the process exits, and the kernel takes back
//! memory, descriptors and the virtual machine in one go.

use crate::bus::Bus;
use crate::error::{Error, Result};
use crate::seccomp::{self, Class};
use crate::stats::{Counters, Launch};
use crate::vcpu::{End, Ending, Gate, Vcpu};
use crate::virtio::layers::Layers;
use atoll_spec::vm::VmStats;
use kvm_ioctls::VmFd;
use seccompiler::BpfProgram;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// How long the processors may take to leave the guest.
const PAUSE_DEADLINE: Duration = Duration::from_secs(2);
/// How long threads may take to start.
const START_DEADLINE: Duration = Duration::from_secs(10);
const STACK_BYTES: usize = 256 << 10;

/// The thread of one disk, not started.
pub struct DiskWorker {
    /// For the thread's name.
    pub name: &'static str,
    /// Never returns.
    pub run: Box<dyn FnOnce() + Send>,
}

/// Whether threads confine themselves before they start work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// With the filter of their class.
    On,
    /// Not at all: only when there is no jail either.
    Off,
}

/// A machine.
pub struct Machine {
    bus: Arc<Bus>,
    waiting: Option<(Vec<Vcpu>, Vec<DiskWorker>)>,
    vcpu_threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    ending: Arc<Ending>,
    ended: EventFd,
    layers: Layers,
    counters: Arc<Counters>,
    launch: Launch,
    /// Kept open: KVM's view of the guest lives as long as this and the processors.
    _vm: VmFd,
}

impl Machine {
    /// Puts the parts together.
    pub fn new(
        bus: Arc<Bus>,
        vcpus: Vec<Vcpu>,
        disks: Vec<DiskWorker>,
        layers: Layers,
        counters: Arc<Counters>,
        launch: Launch,
        vm: VmFd,
    ) -> Result<Self> {
        Ok(Self {
            bus,
            waiting: Some((vcpus, disks)),
            vcpu_threads: Vec::new(),
            gate: Arc::default(),
            ending: Arc::default(),
            ended: EventFd::new(EFD_NONBLOCK)
                .map_err(Error::system("make the event of the machine's end"))?,
            layers,
            counters,
            launch,
            _vm: vm,
        })
    }

    /// Makes the threads and waits until each has confined itself. The guest does not run yet.
    pub fn start(&mut self, filter: Filter) -> Result<()> {
        let Some((vcpus, disks)) = self.waiting.take() else { return Ok(()) };
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|error| Error::system("handle the pause signal")(std::io::Error::from(error)))?;
        let (ready, started) = mpsc::channel();
        let count = vcpus.len() + disks.len();
        let (on_disks, on_vcpus) = (confinement(Class::Disk, filter)?, confinement(Class::Vcpu, filter)?);
        for disk in disks {
            spawn(disk.name.to_owned(), on_disks.clone(), ready.clone(), disk.run)?;
        }
        for (id, vcpu) in (0u8..).zip(vcpus) {
            let run = self.vcpu_loop(id, vcpu)?;
            self.vcpu_threads.push(spawn(format!("vcpu{id}"), on_vcpus.clone(), ready.clone(), run)?);
        }
        for _ in 0..count {
            started.recv_timeout(START_DEADLINE).map_err(|_| Error::Seccomp {
                thread: "vcpu or disk",
                reason: "it did not report in time".into(),
            })??;
        }
        self.launch.done("threads");
        Ok(())
    }

    fn vcpu_loop(&self, id: u8, mut vcpu: Vcpu) -> Result<Box<dyn FnOnce() + Send>> {
        let (bus, gate, counters) = (self.bus.clone(), self.gate.clone(), self.counters.clone());
        let ending = self.ending.clone();
        let ended = self.ended.try_clone().map_err(Error::system("copy the event of the machine's end"))?;
        Ok(Box::new(move || {
            ending.say(vcpu.run(id, &bus, &gate, &counters));
            // Fails only when the counter is full, that is when it has been written to.
            drop(ended.write(1));
            loop {
                thread::park();
            }
        }))
    }

    /// Lets the guest run.
    pub fn run(&mut self) {
        self.gate.open();
        if self.launch.last() != Some("running") {
            self.launch.done("running");
        }
    }

    /// Stops the processors where they are. Repeating it succeeds.
    pub fn pause(&self) -> std::result::Result<(), String> {
        let nudge = || {
            for thread in &self.vcpu_threads {
                // A thread that cannot be signalled does not park, and the deadline below notices.
                let _ = thread.kill(SIGRTMIN());
            }
        };
        if self.gate.close(self.vcpu_threads.len(), PAUSE_DEADLINE, nudge) {
            Ok(())
        } else {
            self.gate.open();
            Err("cannot pause: a processor did not leave the guest in 2 s, it goes on; try again".into())
        }
    }

    /// Lets the processors go on. Repeating it succeeds.
    pub fn resume(&self) {
        self.gate.open();
    }

    /// Readable once the machine has ended.
    pub fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// How the machine ended.
    pub fn end(&self) -> Option<End> {
        self.ending.heard()
    }

    /// The layer window.
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    /// Counters since the start.
    pub fn stats(&self) -> VmStats {
        self.counters.snapshot(&self.launch)
    }
}

/// Its only work is to have interrupted a system call.
extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// What a thread does to itself before it works.
type Confinement = Option<(Class, BpfProgram)>;

fn confinement(class: Class, filter: Filter) -> Result<Confinement> {
    match filter {
        Filter::On => Ok(Some((class, seccomp::compile(class)?))),
        Filter::Off => Ok(None),
    }
}

fn spawn(
    name: String,
    confinement: Confinement,
    ready: Sender<Result<()>>,
    run: Box<dyn FnOnce() + Send>,
) -> Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(name)
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let confined = confinement.map_or(Ok(()), |(class, program)| seccomp::install(class, &program));
            let fit = confined.is_ok();
            // The receiver is gone only when the start has failed already, and then the process ends.
            drop(ready.send(confined));
            if fit {
                run();
            }
        })
        .map_err(Error::system("start a thread"))
}
