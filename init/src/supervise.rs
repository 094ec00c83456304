//! When services start, stop and start again. Pure: events and the time go in, actions come out, and whoever
//! carries the actions out ([`crate::event_loop`]) tells what came of them as further events.
//!
//! ```text
//!                     needs ready                    READY=1
//!        Idle ─────────────────────► Starting ───────────────────► Ready
//!        ▲  ▲  back-off over             │ ended, or TERM at deadline │
//!        │  └────────── BackOff ◄────────┴────────────────────────────┤ ended by itself
//!        │                 ▲ failed to be ready                       │
//!        └── ended ── Stopping ◄──────────────────────────────────────┘ asked to stop: TERM, KILL at deadline
//! ```
//!
//! | desired \ actual | Idle | Starting, Ready | Stopping | BackOff |
//! |---|---|---|---|---|
//! | Up | start once all it needs is ready | leave | start again when ended | start when over |
//! | Down | stopped | TERM | wait, KILL | to Idle |
//!
//! A service that promised signs of life and gives none while it is ready hangs: it is killed, for it may be stopped and
//! then no request reaches it, and comes back by way of its back-off like one that crashed.
//!
//! A service whose need goes away is left running: needs are for starting, and the parts of Atoll live through each
//! other's restarts. A shutdown stops in the opposite order: a service is asked only once nothing needs it any more.

use crate::clock::millis;
use atoll_spec::control::{ServiceState, ServiceStatus};
use std::time::Duration;

/// First back-off; each further one is twice as long.
pub const BACK_OFF_FIRST: Duration = Duration::from_secs(1);
/// Longest back-off.
pub const BACK_OFF_MOST: Duration = Duration::from_secs(60);
/// A service that was ready this long begins with the first back-off again.
pub const STABLE: Duration = Duration::from_secs(60);

/// Most time that a service can ask for at once until it is ready.
pub const LONGEST_EXTENSION: Duration = Duration::from_secs(3600);

/// Place of a service in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceId(pub usize);

/// What the rules need to know of a service.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Its name.
    pub name: String,
    /// Services that must be ready before it starts; all of a lower place.
    pub after: Vec<ServiceId>,
    /// Whether it says when it is ready.
    pub notifies: bool,
    /// How long it may take to be ready.
    pub start_deadline: Duration,
    /// How long it may take to stop.
    pub stop_deadline: Duration,
    /// Longest time between two signs of life while it is ready; `None` expects none.
    pub watchdog: Option<Duration>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Time passed.
    Tick,
    /// The answer to [`Action::Spawn`]: it runs.
    Spawned(ServiceId, u32),
    /// The answer to [`Action::Spawn`]: it could not be started.
    SpawnFailed(ServiceId, String),
    /// Its process ended; how, in words.
    Ended(ServiceId, String),
    /// It says it is ready.
    BecameReady(ServiceId),
    /// It gives a sign of life.
    Alive(ServiceId),
    /// It says that it takes this much longer until it is ready.
    TakesLonger(ServiceId, Duration),
    /// It says something of itself.
    Said(ServiceId, String),
    /// Nobody ran for a while, not even this process: silence so far says nothing about anyone.
    StoodStill,
    /// It is wanted.
    Start(ServiceId),
    /// It is not wanted.
    Stop(ServiceId),
    /// It is wanted anew.
    Restart(ServiceId),
    /// Nothing is wanted any more.
    Shutdown,
    /// Like `Shutdown`, and nobody is waited for.
    ShutdownNow,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start its process and answer with `Spawned` or `SpawnFailed`.
    Spawn(ServiceId),
    /// Ask its process to stop.
    Terminate(ServiceId),
    /// End all processes of its cgroup.
    Kill(ServiceId),
    /// Tell everyone that its status changed.
    Announce(ServiceId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Desired {
    Up,
    Down,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Actual {
    Idle,
    Spawning,
    Starting { pid: u32, until: Duration },
    Ready { pid: u32, heard: Duration },
    Stopping { pid: u32, kill_at: Option<Duration>, failed: bool },
    BackOff { until: Duration },
}

#[derive(Debug)]
struct Unit {
    rules: Rules,
    desired: Desired,
    actual: Actual,
    shown: ServiceState,
    since: Duration,
    next_delay: Duration,
    restarts: u32,
    said: String,
    last_failure: String,
}

/// All services.
#[derive(Debug)]
pub struct Supervisor {
    units: Vec<Unit>,
    shutting_down: bool,
}

impl Supervisor {
    /// All services wanted, none running.
    pub fn new(rules: Vec<Rules>) -> Self {
        let unit = |rules| Unit {
            rules,
            desired: Desired::Up,
            actual: Actual::Idle,
            shown: ServiceState::Waiting,
            since: Duration::ZERO,
            next_delay: BACK_OFF_FIRST,
            restarts: 0,
            said: String::new(),
            last_failure: String::new(),
        };
        Self { units: rules.into_iter().map(unit).collect(), shutting_down: false }
    }

    /// Takes an event in and says what to do.
    pub fn step(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.take(now, event, &mut actions);
        for place in 0..self.units.len() {
            self.advance(now, ServiceId(place), &mut actions);
        }
        let announced = actions.len();
        for (place, unit) in self.units.iter_mut().enumerate() {
            let state = unit.state();
            if state != unit.shown {
                unit.shown = state;
                unit.since = now;
                actions.push(Action::Announce(ServiceId(place)));
            }
        }
        if self.shutting_down {
            // Told in the order it happens: what ended lets stop what it needed.
            actions[announced..].reverse();
        }
        actions
    }

    fn take(&mut self, now: Duration, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Tick => {}
            Event::Spawned(id, pid) => self.unit(id).spawned(now, pid),
            Event::SpawnFailed(id, why) => {
                let unit = self.unit(id);
                if unit.actual == Actual::Spawning {
                    unit.failed(now, why);
                }
            }
            Event::Ended(id, how) => {
                // What it left running must be gone before it starts again.
                actions.push(Action::Kill(id));
                self.unit(id).ended(now, how);
            }
            Event::BecameReady(id) => {
                let unit = self.unit(id);
                if let Actual::Starting { pid, .. } = unit.actual {
                    unit.actual = Actual::Ready { pid, heard: now };
                }
            }
            Event::TakesLonger(id, more) => {
                if let Actual::Starting { until, .. } = &mut self.unit(id).actual {
                    *until = (*until).max(now + more.min(LONGEST_EXTENSION));
                }
            }
            Event::Alive(id) => self.unit(id).heard(now),
            Event::StoodStill => self.units.iter_mut().for_each(|unit| unit.heard(now)),
            Event::Said(id, text) => self.unit(id).said = text,
            Event::Start(id) => {
                if !self.shutting_down {
                    let unit = self.unit(id);
                    unit.desired = Desired::Up;
                    unit.forgive();
                }
            }
            Event::Stop(id) => self.unit(id).desired = Desired::Down,
            Event::Restart(id) => {
                if !self.shutting_down {
                    let unit = self.unit(id);
                    unit.desired = Desired::Up;
                    unit.forgive();
                    actions.extend(unit.stop(now, false).then_some(Action::Terminate(id)));
                }
            }
            Event::Shutdown => self.want_nothing(),
            Event::ShutdownNow => {
                self.want_nothing();
                for (place, unit) in self.units.iter_mut().enumerate() {
                    if unit.pid() != 0 {
                        unit.stop(now, false);
                        unit.killed();
                        actions.push(Action::Kill(ServiceId(place)));
                    }
                }
            }
        }
    }

    fn want_nothing(&mut self) {
        self.shutting_down = true;
        for unit in &mut self.units {
            unit.desired = Desired::Down;
        }
    }

    fn advance(&mut self, now: Duration, id: ServiceId, actions: &mut Vec<Action>) {
        let startable = self.needs_are_ready(id);
        let stoppable = !self.shutting_down || !self.is_needed(id);
        let unit = self.unit(id);
        match (unit.desired, unit.actual) {
            (Desired::Down, Actual::BackOff { .. }) => unit.actual = Actual::Idle,
            (Desired::Down, Actual::Starting { .. } | Actual::Ready { .. }) if stoppable => {
                unit.stop(now, false);
                actions.push(Action::Terminate(id));
            }
            (Desired::Up, Actual::Starting { until, .. }) if now >= until => {
                let seconds = unit.rules.start_deadline.as_secs();
                unit.last_failure = format!("was not ready within {seconds} s");
                unit.stop(now, true);
                actions.push(Action::Terminate(id));
            }
            (Desired::Up, Actual::Ready { .. }) if unit.silent_at().is_some_and(|at| now >= at) => {
                unit.hung(now);
                actions.push(Action::Kill(id));
            }
            (_, Actual::Stopping { kill_at: Some(at), .. }) if now >= at => {
                unit.killed();
                actions.push(Action::Kill(id));
            }
            (Desired::Up, Actual::BackOff { until }) if now >= until => {
                unit.restarts = unit.restarts.saturating_add(1);
                unit.actual = Actual::Idle;
                self.advance(now, id, actions);
            }
            (Desired::Up, Actual::Idle) if startable => {
                unit.actual = Actual::Spawning;
                actions.push(Action::Spawn(id));
            }
            (_, _) => {}
        }
    }

    fn needs_are_ready(&self, id: ServiceId) -> bool {
        self.units[id.0]
            .rules
            .after
            .iter()
            .all(|need| matches!(self.units[need.0].actual, Actual::Ready { .. }))
    }

    fn is_needed(&self, id: ServiceId) -> bool {
        self.units.iter().any(|other| other.rules.after.contains(&id) && other.pid() != 0)
    }

    fn unit(&mut self, id: ServiceId) -> &mut Unit {
        &mut self.units[id.0]
    }

    /// When [`Event::Tick`] is due next.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.units
            .iter()
            .filter_map(|unit| match (unit.desired, unit.actual) {
                (Desired::Up, Actual::Starting { until, .. } | Actual::BackOff { until }) => Some(until),
                (Desired::Up, Actual::Ready { .. }) => unit.silent_at(),
                (_, Actual::Stopping { kill_at, .. }) => kill_at,
                _ => None,
            })
            .min()
    }

    /// When a service that ended by itself is started again.
    pub fn next_try(&self, id: ServiceId) -> Option<Duration> {
        match self.units[id.0].actual {
            Actual::BackOff { until } => Some(until),
            _ => None,
        }
    }

    /// The service of this name.
    pub fn find(&self, name: &str) -> Option<ServiceId> {
        self.units.iter().position(|unit| unit.rules.name == name).map(ServiceId)
    }

    /// The service whose process this is.
    pub fn by_pid(&self, pid: u32) -> Option<ServiceId> {
        self.units.iter().position(|unit| pid != 0 && unit.pid() == pid).map(ServiceId)
    }

    /// The process of a service; 0 when it has none.
    pub fn pid(&self, id: ServiceId) -> u32 {
        self.units[id.0].pid()
    }

    /// How a service is.
    pub fn status(&self, id: ServiceId) -> ServiceStatus {
        let unit = &self.units[id.0];
        ServiceStatus {
            name: unit.rules.name.clone(),
            state: unit.shown,
            pid: unit.pid(),
            since_ms: millis(unit.since),
            restarts: unit.restarts,
            status: unit.said.clone(),
            last_failure: unit.last_failure.clone(),
        }
    }

    /// All of them, in start order.
    pub fn statuses(&self) -> Vec<ServiceStatus> {
        (0..self.units.len()).map(|place| self.status(ServiceId(place))).collect()
    }

    /// Whether every wanted service is ready.
    pub fn all_ready(&self) -> bool {
        self.units
            .iter()
            .all(|unit| unit.desired == Desired::Down || matches!(unit.actual, Actual::Ready { .. }))
    }

    /// Whether no service has a process.
    pub fn all_ended(&self) -> bool {
        self.units.iter().all(|unit| unit.pid() == 0 && unit.actual != Actual::Spawning)
    }
}

impl Unit {
    fn pid(&self) -> u32 {
        match self.actual {
            Actual::Starting { pid, .. } | Actual::Ready { pid, .. } | Actual::Stopping { pid, .. } => pid,
            Actual::Idle | Actual::Spawning | Actual::BackOff { .. } => 0,
        }
    }

    fn state(&self) -> ServiceState {
        match (self.actual, self.desired) {
            (Actual::Idle, Desired::Down) => ServiceState::Stopped,
            (Actual::Idle, Desired::Up) => ServiceState::Waiting,
            (Actual::Spawning | Actual::Starting { .. }, _) => ServiceState::Starting,
            (Actual::Ready { .. }, _) => ServiceState::Ready,
            (Actual::Stopping { .. }, _) => ServiceState::Stopping,
            (Actual::BackOff { .. }, _) => ServiceState::BackingOff,
        }
    }

    fn spawned(&mut self, now: Duration, pid: u32) {
        if self.actual == Actual::Spawning {
            self.said.clear();
            self.actual = if self.rules.notifies {
                Actual::Starting { pid, until: now + self.rules.start_deadline }
            } else {
                Actual::Ready { pid, heard: now }
            };
            self.since = now;
        }
    }

    fn ended(&mut self, now: Duration, how: String) {
        match self.actual {
            Actual::Stopping { failed: false, .. } => self.actual = Actual::Idle,
            Actual::Stopping { failed: true, .. } => {
                let why = self.last_failure.clone();
                self.failed(now, why);
            }
            Actual::Starting { .. } => self.failed(now, how + " before it was ready"),
            Actual::Ready { .. } => {
                self.reward(now);
                self.failed(now, how);
            }
            Actual::Idle | Actual::Spawning | Actual::BackOff { .. } => {}
        }
    }

    fn failed(&mut self, now: Duration, why: String) {
        self.last_failure = why;
        self.actual = Actual::BackOff { until: now + self.next_delay };
        self.next_delay = (self.next_delay * 2).min(BACK_OFF_MOST);
    }

    /// One that was ready for long enough is not held to what went wrong before.
    fn reward(&mut self, now: Duration) {
        if now.saturating_sub(self.since) >= STABLE {
            self.next_delay = BACK_OFF_FIRST;
        }
    }

    fn heard(&mut self, now: Duration) {
        if let Actual::Ready { heard, .. } = &mut self.actual {
            *heard = now;
        }
    }

    /// When a ready one has been silent for too long.
    fn silent_at(&self) -> Option<Duration> {
        match self.actual {
            Actual::Ready { heard, .. } => self.rules.watchdog.map(|within| heard + within),
            _ => None,
        }
    }

    /// It is ready and says nothing any more: killed at once, because one that is stopped hears no request.
    fn hung(&mut self, now: Duration) {
        let seconds = self.rules.watchdog.unwrap_or_default().as_secs();
        self.last_failure = format!("hung: gave no sign of life for {seconds} s and was killed");
        self.reward(now);
        if let Actual::Ready { pid, .. } = self.actual {
            self.actual = Actual::Stopping { pid, kill_at: None, failed: true };
        }
    }

    /// A person asked: no waiting for what went wrong before.
    fn forgive(&mut self) {
        self.next_delay = BACK_OFF_FIRST;
        if matches!(self.actual, Actual::BackOff { .. }) {
            self.actual = Actual::Idle;
        }
    }

    /// Begins to stop; `false` when there is nothing to ask.
    fn stop(&mut self, now: Duration, failed: bool) -> bool {
        match self.actual {
            Actual::Starting { pid, .. } | Actual::Ready { pid, .. } => {
                self.actual = Actual::Stopping { pid, kill_at: Some(now + self.rules.stop_deadline), failed };
                true
            }
            _ => false,
        }
    }

    fn killed(&mut self) {
        if let Actual::Stopping { kill_at, .. } = &mut self.actual {
            *kill_at = None;
        }
    }
}

#[cfg(test)]
mod tests;
