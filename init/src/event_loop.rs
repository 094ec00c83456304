//! What PID 1 does from the end of the boot to the shutdown: waits for whatever happens, tells the supervisor, and
//! carries out what it answers. One thread, one owner of all state; nothing here blocks.

use crate::boot;
use crate::clock::{millis, uptime};
use crate::control::{Bus, Query, Reply, Request};
use crate::devices::Devices;
use crate::error::chain;
use crate::notify::{self, Notice, NotifySocket};
use crate::programs::Programs;
use crate::reap::{Asked, Signals};
use crate::shutdown::{self, Machine};
use crate::supervise::{Action, Event, Rules, ServiceId, Supervisor};
use crate::sys::{Signal, Target};
use atoll_spec::control::{BootPhase, ServiceState, ServiceStatus, ShutdownAction};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use std::time::Duration;

/// The loop comes round at least this often.
const ROUND: Duration = Duration::from_secs(5);
/// When it comes round this much too late, the whole machine stood still (a hypervisor stopped it), and whoever owes a
/// sign of life could not give one either.
const STOOD_STILL: Duration = Duration::from_secs(5);
/// Notifications read in one round: a service that floods must not keep the loop from all else.
const NOTICES_AT_ONCE: usize = 256;
/// It promises the guard to come round within this; starting a program may take a while under pressure.
const PROMISE: Duration = Duration::from_secs(60);
/// When services are not ready by then, the boot is told as incomplete and goes on.
const SERVICES_READY_WITHIN: Duration = Duration::from_secs(300);
/// After the kill there is only the kernel to wait for.
const AFTER_KILL: Duration = Duration::from_secs(3);

/// Name under which init's own lines are asked for.
const INIT: &str = "init";

/// Where the loop meets services and hostd.
#[derive(Debug)]
pub struct Doors {
    /// Where services say that they are ready.
    pub notify: NotifySocket,
    /// Where hostd asks.
    pub bus: Bus,
    /// Signals of this process.
    pub signals: Signals,
    /// Power buttons and what is plugged in.
    pub devices: Devices,
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
    programs: Programs,
    supervisor: Supervisor,
    doors: Doors,
    phases: Vec<BootPhase>,
    started: Duration,
    services_told: bool,
    shutdown: Option<Shutdown>,
}

impl<'a> EventLoop<'a> {
    /// A loop that will start these programs' services.
    pub fn new(machine: Machine<'a>, programs: Programs, phases: Vec<BootPhase>, mut doors: Doors) -> Self {
        let services = programs.services();
        let place = |name: &String| services.iter().position(|service| service.name == *name).map(ServiceId);
        let rules = services
            .iter()
            .map(|service| Rules {
                name: service.name.clone(),
                after: service.after.iter().filter_map(place).collect(),
                notifies: service.notifies,
                start_deadline: service.start_deadline,
                stop_deadline: service.stop_deadline,
                watchdog: service.watchdog,
            })
            .collect();
        machine.console.say(match doors.devices.look_for_buttons() {
            0 => "no power button found yet".to_owned(),
            count => format!("listening to {count} power button(s)"),
        });
        Self {
            machine,
            supervisor: Supervisor::new(rules),
            programs,
            doors,
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
            let action = self.shutdown.as_ref().map_or(ShutdownAction::Reboot, |shutdown| shutdown.action);
            self.machine.guard.promise("init's event loop", PROMISE, Duration::ZERO, action);
            let asleep_from = uptime();
            self.wait();
            if uptime().saturating_sub(asleep_from) > ROUND + STOOD_STILL {
                self.machine.console.say("the machine stood still for a while");
                self.tell(Event::StoodStill);
            }
            self.read_notices();
            self.programs.read_outputs(self.machine.console);
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
            self.doors.devices.next_deadline(),
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
        fds.extend(self.doors.devices.descriptors().map(readable));
        fds.extend(self.programs.descriptors().map(readable));
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
            Action::Spawn(id) => Some(match self.programs.start(sys, id) {
                Ok(child) => Event::Spawned(id, child.pid),
                Err(error) => Event::SpawnFailed(id, chain(&error)),
            }),
            Action::Terminate(id) => {
                // A process that has just ended is collected on the next round.
                let _ = sys.kill(Target::Process(self.supervisor.pid(id)), Signal::Term);
                None
            }
            Action::Kill(id) => {
                self.programs.kill(sys, id, self.supervisor.pid(id));
                None
            }
            Action::Announce(id) => {
                let status = self.supervisor.status(id);
                let text = self.describe(&status);
                self.programs.remark(id, &text);
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
                let wait = self.supervisor.find(&status.name).and_then(|id| self.supervisor.next_try(id));
                let wait = wait.unwrap_or_default().saturating_sub(uptime());
                format!("{}; next try in {} s", status.last_failure, wait.as_millis().div_ceil(1000))
            }
            ServiceState::Starting => format!("starting (start {})", status.restarts + 1),
            state => state.to_string(),
        }
    }

    fn read_notices(&mut self) {
        for _ in 0..NOTICES_AT_ONCE {
            let Some(datagram) = self.doors.notify.receive() else { return };
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
                    Notice::Alive => Event::Alive(id),
                    Notice::TakesLonger(more) => Event::TakesLonger(id, more),
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
            if self.doors.devices.ended(pid) {
                continue;
            }
            if let Some(id) = self.supervisor.by_pid(pid) {
                // Its last words come before the news of its end.
                self.programs.read_outputs(self.machine.console);
                let how = self.programs.explain(self.machine.sys, id, exit);
                self.tell(Event::Ended(id, how));
            }
        }
    }

    fn read_devices(&mut self) {
        if self.doors.devices.read(self.machine.console) {
            self.begin_shutdown(ShutdownAction::PowerOff, "power-button", "the power button was pressed");
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
            Request::Logs(name, lines) if name == INIT => {
                Reply::Lines(self.machine.console.last(usize::try_from(lines).unwrap_or(usize::MAX)))
            }
            Request::Logs(name, lines) => {
                self.with_service(&name, |it, id| Reply::Lines(it.programs.log(id, lines)))
            }
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
                let known: Vec<&str> =
                    self.programs.services().iter().map(|service| service.name.as_str()).collect();
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
        // The disk may hang already, and then it is this action that is due.
        self.machine.guard.promise("the record of the shutdown's cause", PROMISE, Duration::ZERO, action);
        shutdown::record_cause(self.machine.sys, self.machine.console, action, source, reason);
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
