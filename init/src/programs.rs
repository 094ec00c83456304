//! The programs of the services: started with their limits, their output read, their ends explained. The event loop
//! says when; this says how.

use crate::cgroups;
use crate::clock::{millis, uptime};
use crate::console::Console;
use crate::error::{Error, Result};
use crate::log::ServiceLog;
use crate::process::{self, Child, Exit, Program};
use crate::services::Service;
use crate::supervise::ServiceId;
use crate::sys::{Signal, Syscalls, Target};
use atoll_spec::control::LogLine;
use rustix::pipe::{PipeFlags, pipe_with};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

const READ_AT_ONCE: usize = 64 * 1024;

/// What a service's programs write comes through here.
struct Output {
    id: ServiceId,
    pipe: OwnedFd,
}

/// All of them.
pub struct Programs {
    services: Vec<Service>,
    environment: Vec<String>,
    logs: Vec<ServiceLog>,
    outputs: Vec<Output>,
    /// How many of each service's processes had run out of its memory when it started.
    out_of_memory: Vec<u64>,
}

impl Programs {
    /// Of these services, which find the notify socket there.
    pub fn new(services: Vec<Service>, notify: &Path, log_filter: Option<&str>) -> Self {
        let mut environment = vec![
            "PATH=/usr/sbin:/usr/bin".to_owned(),
            "HOME=/".to_owned(),
            format!("NOTIFY_SOCKET={}", notify.display()),
        ];
        environment.extend(log_filter.map(|filter| format!("ATOLL_LOG={filter}")));
        Self {
            logs: services.iter().map(|_| ServiceLog::default()).collect(),
            out_of_memory: vec![0; services.len()],
            outputs: Vec::new(),
            services,
            environment,
        }
    }

    /// The services, in start order.
    pub fn services(&self) -> &[Service] {
        &self.services
    }

    /// Starts a service's program.
    ///
    /// # Errors
    /// When it cannot be started, with the step that failed.
    pub fn start(&mut self, sys: &dyn Syscalls, id: ServiceId) -> Result<Child> {
        let service = &self.services[id.0];
        let (reader, writer) =
            pipe_with(PipeFlags::CLOEXEC).map_err(Error::system("make a pipe for a service's output"))?;
        rustix::io::ioctl_fionbio(&reader, true)
            .map_err(Error::system("set up a pipe for a service's output"))?;
        let cgroup = cgroups::open(&service.name);
        self.out_of_memory[id.0] = cgroups::out_of_memory_kills(sys, &service.name);
        let mut environment = self.environment.clone();
        environment.extend(service.watchdog.map(|within| format!("WATCHDOG_USEC={}", within.as_micros())));
        let child = process::spawn(&Program {
            command: &service.command,
            environment: &environment,
            confinement: Some(&service.confinement),
            cgroup: cgroup.as_ref().map(AsFd::as_fd),
            output: writer.as_fd(),
        })?;
        self.outputs.push(Output { id, pipe: reader });
        Ok(child)
    }

    /// Ends all processes of a service: those of its cgroup, or where there is none the one that is known.
    pub fn kill(&self, sys: &dyn Syscalls, id: ServiceId, pid: u32) {
        let group = cgroups::group_of(&self.services[id.0].name);
        if !sys.exists(&group) || cgroups::kill(sys, &group).is_err() {
            // It may have ended already.
            let _ = sys.kill(Target::Process(pid), Signal::Kill);
        }
    }

    /// How a service ended, in words.
    pub fn explain(&self, sys: &dyn Syscalls, id: ServiceId, exit: Exit) -> String {
        let service = &self.services[id.0];
        let killed = cgroups::out_of_memory_kills(sys, &service.name) > self.out_of_memory[id.0];
        if exit == Exit::Signal(libc::SIGKILL) && killed {
            let most = service.limits.memory_max_mib;
            return format!("was killed: it needed more than the {most} MiB of memory it may have");
        }
        exit.to_string()
    }

    /// Descriptors to wait on.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.outputs.iter().map(|output| output.pipe.as_fd())
    }

    /// Reads what was written and hands it on.
    pub fn read_outputs(&mut self, console: &Console) {
        let mut buffer = vec![0_u8; READ_AT_ONCE];
        let (logs, services) = (&mut self.logs, &self.services);
        self.outputs.retain(|Output { id, pipe }| {
            let now = millis(uptime());
            let (lines, open): (Vec<String>, bool) = match rustix::io::read(pipe, &mut buffer[..]) {
                Ok(0) => (logs[id.0].finish(now).into_iter().collect(), false),
                Ok(read) => (logs[id.0].take(now, &buffer[..read]), true),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => (Vec::new(), true),
                Err(_) => (Vec::new(), false),
            };
            for line in lines {
                console.service(&services[id.0].name, now, &line);
            }
            open
        });
    }

    /// Adds what init itself has to say about a service to its log.
    pub fn remark(&mut self, id: ServiceId, text: &str) {
        self.logs[id.0].add(millis(uptime()), &format!("init: {text}"));
    }

    /// The last lines of a service's log; all for 0.
    pub fn log(&self, id: ServiceId, lines: u32) -> Vec<LogLine> {
        self.logs[id.0].last(usize::try_from(lines).unwrap_or(usize::MAX))
    }
}
