//! What PID 1 does from the end of the boot to the shutdown: waits for whatever happens, tells the supervisor, and
//! carries out what it answers. One thread, one owner of all state; nothing here blocks.

use crate::clock::{millis, uptime};
use crate::control::{Bus, Query, Reply, Request};
use crate::error::{Error, Result, chain};
use crate::hotplug::Hotplug;
use crate::log::ServiceLog;
use crate::notify::{self, Notice, NotifySocket};
use crate::power_button::PowerButtons;
use crate::process::{self, Child, Program};
use crate::reap::{Asked, Signals};
use crate::services::Service;
use crate::shutdown::{self, Machine};
use crate::supervise::{Action, Event, Rules, ServiceId, Supervisor};
use crate::sys::{Signal, Target};
use crate::{boot, cgroups, modules};
use atoll_spec::control::{BootPhase, RebootCause, ServiceState, ServiceStatus, ShutdownAction};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// The loop comes round at least this often.
const ROUND: Duration = Duration::from_secs(5);
/// It promises the guard to come round within this; starting a program may take a while under pressure.
const PROMISE: Duration = Duration::from_secs(60);
/// When services are not ready by then, the boot is told as incomplete and goes on.
const SERVICES_READY_WITHIN: Duration = Duration::from_secs(300);
/// After the kill there is only the kernel to wait for.
const AFTER_KILL: Duration = Duration::from_secs(3);
/// Longest run of modprobe for a device that was plugged in.
const DRIVER_WITHIN: Duration = Duration::from_secs(20);
const READ_AT_ONCE: usize = 64 * 1024;

/// Where the loop meets services and hostd.
#[derive(Debug)]
pub struct Doors {
    /// Where services say that they are ready.
    pub notify: NotifySocket,
    /// Where hostd asks.
    pub bus: Bus,
    /// Signals of this process.
    pub signals: Signals,
}

/// What a service's programs wrote, by the pipe it comes through.
struct Output {
    id: ServiceId,
    pipe: OwnedFd,
}

struct Shutdown {
    action: ShutdownAction,
    /// When those that have not stopped are killed; then, when they are given up.
    force_at: Duration,
    forced: bool,
}

/// The state of a running host.
pub struct EventLoop<'a> {
    machine: Machine<'a>,
    services: Vec<Service>,
    environment: Vec<String>,
    supervisor: Supervisor,
    logs: Vec<ServiceLog>,
    outputs: Vec<Output>,
    doors: Doors,
    hotplug: Option<Hotplug>,
    driver: Option<(Child, Duration)>,
    buttons: PowerButtons,
    phases: Vec<BootPhase>,
    started: Duration,
    services_told: bool,
    shutdown: Option<Shutdown>,
}

impl<'a> EventLoop<'a> {
    /// A loop that will start these services.
    pub fn new(
        machine: Machine<'a>,
        services: Vec<Service>,
        phases: Vec<BootPhase>,
        doors: Doors,
        notify: &Path,
        log_filter: Option<&str>,
    ) -> Self {
        let place = |name: &String| services.iter().position(|service| service.name == *name).map(ServiceId);
        let rules = services
            .iter()
            .map(|service| Rules {
                name: service.name.clone(),
                after: service.after.iter().filter_map(place).collect(),
                notifies: service.notifies,
                start_deadline: service.start_deadline,
                stop_deadline: service.stop_deadline,
            })
            .collect();
        let mut environment = vec![
            "PATH=/usr/sbin:/usr/bin".to_owned(),
            "HOME=/".to_owned(),
            format!("NOTIFY_SOCKET={}", notify.display()),
        ];
        environment.extend(log_filter.map(|filter| format!("ATOLL_LOG={filter}")));
        let hotplug = Hotplug::open();
        if let Err(error) = &hotplug {
            machine.console.say(format!("devices plugged in later get no driver: {}", chain(error)));
        }
        let logs = services.iter().map(|_| ServiceLog::default()).collect();
        let mut buttons = PowerButtons::default();
        buttons.look();
        machine.console.say(match buttons.count() {
            0 => "no power button found yet".to_owned(),
            count => format!("listening to {count} power button(s)"),
        });
        Self {
            machine,
            supervisor: Supervisor::new(rules),
            services,
            environment,
            logs,
            outputs: Vec::new(),
            doors,
            hotplug: hotplug.ok(),
            driver: None,
            buttons,
            phases,
            started: uptime(),
            services_told: false,
            shutdown: None,
        }
    }

    /// Runs until a shutdown was asked for and all services have stopped or been given up.
    pub fn run(&mut self) -> ShutdownAction {
        self.tell(Event::Tick);
        loop {
            self.machine.guard.promise("init's event loop", PROMISE, Duration::ZERO);
            self.wait();
            self.read_notices();
            self.read_outputs();
            self.read_signals();
            self.read_devices();
            while let Some(query) = self.doors.bus.next() {
                self.answer(query);
            }
            self.tell(Event::Tick);
            self.tell_services_phase();
            if let Some(action) = self.check_shutdown() {
                return action;
            }
        }
    }

    fn wait(&self) {
        let now = uptime();
        let deadlines = [
            self.supervisor.next_deadline(),
            self.hotplug.as_ref().filter(|_| self.driver.is_none()).and_then(Hotplug::next_deadline),
            self.driver.as_ref().map(|(_, until)| *until),
            self.shutdown.as_ref().map(|shutdown| shutdown.force_at),
        ];
        let next = deadlines.into_iter().flatten().min().unwrap_or(Duration::MAX);
        let left = next.saturating_sub(now).min(ROUND) + Duration::from_millis(1);
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds: Vec<PollFd<'_>> =
            [self.doors.signals.as_fd(), self.doors.notify.as_fd(), self.doors.bus.as_fd()]
                .into_iter()
                .map(readable)
                .collect();
        fds.extend(self.hotplug.iter().map(|hotplug| readable(hotplug.as_fd())));
        fds.extend(self.buttons.descriptors().map(readable));
        fds.extend(self.outputs.iter().map(|output| readable(output.pipe.as_fd())));
        // Interrupted or not: everything is looked at afterwards, and all of it without blocking.
        let _ = poll(&mut fds, Some(&timeout));
    }

    /// Takes an event to the supervisor and carries out what follows, until nothing does.
    fn tell(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            for action in self.supervisor.step(uptime(), event) {
                events.extend(self.carry_out(action));
            }
        }
    }

    fn carry_out(&mut self, action: Action) -> Option<Event> {
        let sys = self.machine.sys;
        match action {
            Action::Spawn(id) => Some(match self.spawn(id) {
                Ok(child) => Event::Spawned(id, child.pid),
                Err(error) => Event::SpawnFailed(id, chain(&error)),
            }),
            Action::Terminate(id) => {
                // A process that has just ended is collected on the next round.
                let _ = sys.kill(Target::Process(self.supervisor.pid(id)), Signal::Term);
                None
            }
            Action::Kill(id) => {
                let group = cgroups::group_of(&self.services[id.0].name);
                if cgroups::kill(sys, &group).is_err() || !sys.exists(&group) {
                    // Without a cgroup there is the main process alone.
                    let _ = sys.kill(Target::Process(self.supervisor.pid(id)), Signal::Kill);
                }
                None
            }
            Action::Announce(id) => {
                let status = self.supervisor.status(id);
                let text = self.describe(&status);
                self.logs[id.0].add(millis(uptime()), &format!("init: {text}"));
                self.machine.console.say(format!("service {} {text}", status.name));
                self.doors.bus.announce(status);
                None
            }
        }
    }

    fn describe(&self, status: &ServiceStatus) -> String {
        match status.state {
            ServiceState::Ready => {
                format!(
                    "ready {} ms into the services phase",
                    status.since_ms.saturating_sub(millis(self.started))
                )
            }
            ServiceState::BackingOff => {
                let next = self.supervisor.next_deadline().unwrap_or_default().saturating_sub(uptime());
                format!("{}; next try in at most {} s", status.last_failure, next.as_secs() + 1)
            }
            ServiceState::Starting => format!("starting (start {})", status.restarts + 1),
            state => state.to_string(),
        }
    }

    fn spawn(&mut self, id: ServiceId) -> Result<Child> {
        let service = &self.services[id.0];
        let (reader, writer) =
            pipe_with(PipeFlags::CLOEXEC).map_err(Error::system("make a pipe for a service's output"))?;
        rustix::io::ioctl_fionbio(&reader, true)
            .map_err(Error::system("set up a pipe for a service's output"))?;
        let cgroup = cgroups::open(&service.name);
        let child = process::spawn(&Program {
            command: &service.command,
            environment: &self.environment,
            confinement: Some(&service.confinement),
            cgroup: cgroup.as_ref().map(AsFd::as_fd),
            output: writer.as_fd(),
        })?;
        self.outputs.push(Output { id, pipe: reader });
        Ok(child)
    }

    fn read_notices(&mut self) {
        while let Some(datagram) = self.doors.notify.receive() {
            let Some(id) = self.sender(datagram.pid) else {
                let pid = datagram.pid;
                self.machine
                    .console
                    .say(format!("passed over a notification of process {pid}, which is no service's"));
                continue;
            };
            for notice in notify::parse(&datagram.content) {
                self.tell(match notice {
                    Notice::Ready => Event::BecameReady(id),
                    Notice::Status(text) => Event::Said(id, text),
                });
            }
        }
    }

    fn sender(&self, pid: u32) -> Option<ServiceId> {
        self.supervisor.by_pid(pid).or_else(|| {
            let text = self.machine.sys.read(&format!("/proc/{pid}/cgroup")).ok()?;
            self.supervisor.find(notify::service_of_cgroup(&text)?)
        })
    }

    fn read_outputs(&mut self) {
        let mut buffer = vec![0_u8; READ_AT_ONCE];
        let (logs, services, console) = (&mut self.logs, &self.services, self.machine.console);
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

    fn read_signals(&mut self) {
        while let Some(asked) = self.doors.signals.next() {
            match asked {
                Asked::PowerOff => {
                    self.begin_shutdown(ShutdownAction::PowerOff, "signal", "SIGTERM to PID 1")
                }
                Asked::Reboot => self.begin_shutdown(ShutdownAction::Reboot, "signal", "Ctrl-Alt-Del"),
                Asked::Reap | Asked::Nothing => {}
            }
        }
        // Signals of the same kind merge: collect until nobody is left.
        while let Some((pid, exit)) = self.machine.sys.collect() {
            if self.driver.as_ref().is_some_and(|(child, _)| child.pid == pid) {
                self.driver = None;
                self.buttons.look();
            } else if let Some(id) = self.supervisor.by_pid(pid) {
                self.tell(Event::Ended(id, exit.to_string()));
            }
        }
    }

    fn read_devices(&mut self) {
        let now = uptime();
        if self.buttons.pressed() {
            self.begin_shutdown(ShutdownAction::PowerOff, "power-button", "the power button was pressed");
        }
        let Some(hotplug) = &mut self.hotplug else { return };
        hotplug.read(now);
        if hotplug.take_seen_input() {
            self.buttons.look();
        }
        match &self.driver {
            Some((child, until)) if now >= *until => {
                // It is collected when it has ended.
                let _ = self.machine.sys.kill(Target::Process(child.pid), Signal::Kill);
            }
            Some(_) => {}
            None => {
                if let Some(aliases) = hotplug.take_due(now) {
                    self.load_drivers(&aliases);
                }
            }
        }
    }

    fn load_drivers(&mut self, aliases: &[String]) {
        let started = std::fs::File::options()
            .write(true)
            .open("/dev/null")
            .map_err(Error::file("open", "/dev/null"))
            .and_then(|null| {
                process::spawn(&Program {
                    command: &modules::modprobe(aliases),
                    environment: &self.environment[..1],
                    confinement: None,
                    cgroup: None,
                    output: null.as_fd(),
                })
            });
        match started {
            Ok(child) => self.driver = Some((child, uptime() + DRIVER_WITHIN)),
            Err(error) => self.machine.console.say(format!("no driver for a new device: {}", chain(&error))),
        }
    }

    fn answer(&mut self, query: Query) {
        let request = query.request.clone();
        let reply = match request {
            Request::List => Reply::Services(self.supervisor.statuses()),
            Request::Phases => Reply::Phases(self.phases.clone()),
            Request::Start(name) => self.with_service(&name, |it, id| it.ask(Event::Start(id))),
            Request::Stop(name) => self.with_service(&name, |it, id| it.ask(Event::Stop(id))),
            Request::Restart(name) => self.with_service(&name, |it, id| it.ask(Event::Restart(id))),
            Request::Logs(name, lines) => self.with_service(&name, |it, id| {
                Reply::Lines(it.logs[id.0].last(usize::try_from(lines).unwrap_or(usize::MAX)))
            }),
            Request::Shutdown(action, reason) => {
                self.begin_shutdown(action, "control", &reason);
                Reply::Done
            }
        };
        query.answer(reply);
    }

    fn ask(&mut self, event: Event) -> Reply {
        if self.shutdown.is_some() {
            return Reply::Refused("the host is shutting down".into());
        }
        self.tell(event);
        Reply::Done
    }

    fn with_service(&mut self, name: &str, then: impl FnOnce(&mut Self, ServiceId) -> Reply) -> Reply {
        match self.supervisor.find(name) {
            Some(id) => then(self, id),
            None => {
                let known: Vec<&str> = self.services.iter().map(|service| service.name.as_str()).collect();
                Reply::Refused(format!("there is no service {name:?}; there are {}", known.join(", ")))
            }
        }
    }

    fn tell_services_phase(&mut self) {
        let took = uptime().saturating_sub(self.started);
        let ready = self.supervisor.all_ready();
        if self.services_told || self.shutdown.is_some() || (!ready && took < SERVICES_READY_WITHIN) {
            return;
        }
        self.services_told = true;
        let late: Vec<String> = self
            .supervisor
            .statuses()
            .into_iter()
            .filter(|status| !matches!(status.state, ServiceState::Ready | ServiceState::Stopped))
            .map(|status| format!("{} {} ({})", status.name, status.state, status.last_failure))
            .collect();
        let problem = if ready { String::new() } else { late.join(", ") };
        self.machine.console.say(boot::line("services", took, &problem));
        if ready {
            self.machine.console.say(format!("host is up {:.3} s after power-on", uptime().as_secs_f64()));
        }
        self.machine.console.leave_screen();
        self.phases.push(BootPhase {
            name: "services".into(),
            started_ms: millis(self.started),
            took_ms: millis(took),
            problem,
        });
    }

    fn begin_shutdown(&mut self, action: ShutdownAction, source: &str, reason: &str) {
        if let Some(shutdown) = &mut self.shutdown {
            self.machine.console.say("asked to shut down again: not waiting for services any longer");
            shutdown.force_at = uptime();
            return;
        }
        self.machine.console.say(format!(
            "shutdown: {action} asked by {source}: {reason}; takes at most {} s",
            shutdown::WORST_CASE.as_secs()
        ));
        let since_epoch =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        shutdown::record_cause(
            &self.machine,
            &RebootCause {
                action,
                source: source.to_owned(),
                reason: reason.to_owned(),
                uptime_s: uptime().as_secs(),
                unix_time_s: since_epoch.as_secs(),
            },
        );
        self.shutdown = Some(Shutdown {
            action,
            force_at: uptime() + shutdown::SERVICES_WITHIN - AFTER_KILL,
            forced: false,
        });
        self.tell(Event::Shutdown);
    }

    /// The action, once services have stopped or have to be given up.
    fn check_shutdown(&mut self) -> Option<ShutdownAction> {
        let shutdown = self.shutdown.as_mut()?;
        if self.supervisor.all_ended() {
            return Some(shutdown.action);
        }
        let now = uptime();
        if now < shutdown.force_at {
            return None;
        }
        if shutdown.forced {
            self.machine.console.say("shutdown: services that cannot be killed are given up");
            return Some(shutdown.action);
        }
        shutdown.forced = true;
        shutdown.force_at = now + AFTER_KILL;
        self.tell(Event::ShutdownNow);
        None
    }
}
