//! The rules of supervision, by example and as properties over random histories.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn rules(name: &str, after: &[usize]) -> Rules {
    Rules {
        name: name.into(),
        after: after.iter().map(|place| ServiceId(*place)).collect(),
        notifies: true,
        start_deadline: seconds(90),
        stop_deadline: seconds(10),
        watchdog: None,
    }
}

/// One service that owes a sign of life each half minute, ready from the first second on.
fn watched() -> Supervisor {
    let mut supervisor = Supervisor::new(vec![Rules { watchdog: Some(seconds(30)), ..rules("hostd", &[]) }]);
    step(&mut supervisor, 0, Event::Tick);
    step(&mut supervisor, 0, Event::Spawned(HOSTD, 10));
    step(&mut supervisor, 1, Event::BecameReady(HOSTD));
    supervisor
}

fn host() -> Supervisor {
    Supervisor::new(vec![rules("hostd", &[]), rules("runtime", &[0]), rules("agent", &[0, 1])])
}

const HOSTD: ServiceId = ServiceId(0);
const RUNTIME: ServiceId = ServiceId(1);
const AGENT: ServiceId = ServiceId(2);

/// Steps and leaves announcements out.
fn step(supervisor: &mut Supervisor, at: u64, event: Event) -> Vec<Action> {
    let mut actions = supervisor.step(seconds(at), event);
    actions.retain(|action| !matches!(action, Action::Announce(_)));
    actions
}

fn all_ready() -> Supervisor {
    let mut supervisor = host();
    assert_eq!(step(&mut supervisor, 0, Event::Tick), [Action::Spawn(HOSTD)]);
    assert_eq!(step(&mut supervisor, 0, Event::Spawned(HOSTD, 10)), []);
    assert_eq!(step(&mut supervisor, 1, Event::BecameReady(HOSTD)), [Action::Spawn(RUNTIME)]);
    step(&mut supervisor, 1, Event::Spawned(RUNTIME, 11));
    assert_eq!(step(&mut supervisor, 2, Event::BecameReady(RUNTIME)), [Action::Spawn(AGENT)]);
    step(&mut supervisor, 2, Event::Spawned(AGENT, 12));
    assert!(!supervisor.all_ready());
    assert_eq!(step(&mut supervisor, 3, Event::BecameReady(AGENT)), []);
    assert!(supervisor.all_ready());
    supervisor
}

#[test]
fn starts_in_order_of_needs_and_stops_in_the_opposite() {
    let mut supervisor = all_ready();
    assert_eq!(step(&mut supervisor, 9, Event::Shutdown), [Action::Terminate(AGENT)]);
    let ended = |id| Event::Ended(id, "ended with code 0".into());
    assert_eq!(step(&mut supervisor, 9, ended(AGENT)), [Action::Kill(AGENT), Action::Terminate(RUNTIME)]);
    assert_eq!(step(&mut supervisor, 19, Event::Tick), [Action::Kill(RUNTIME)]);
    assert_eq!(step(&mut supervisor, 19, ended(RUNTIME)), [Action::Kill(RUNTIME), Action::Terminate(HOSTD)]);
    assert_eq!(step(&mut supervisor, 19, ended(HOSTD)), [Action::Kill(HOSTD)]);
    assert!(supervisor.all_ended());
    assert_eq!(step(&mut supervisor, 20, Event::Start(HOSTD)), []);
}

#[test]
fn backs_off_doubling_to_a_minute_and_forgets_after_a_stable_one() {
    let mut supervisor = Supervisor::new(vec![rules("hostd", &[])]);
    let mut at = 0;
    let mut delays = Vec::new();
    assert_eq!(step(&mut supervisor, at, Event::Tick), [Action::Spawn(HOSTD)]);
    for _ in 0..8 {
        step(&mut supervisor, at, Event::SpawnFailed(HOSTD, "missing".into()));
        let due = supervisor.next_deadline().unwrap();
        delays.push(due.as_secs() - at);
        at = due.as_secs();
        assert_eq!(step(&mut supervisor, at, Event::Tick), [Action::Spawn(HOSTD)]);
    }
    assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60]);
    assert_eq!(supervisor.status(HOSTD).restarts, 8);
    step(&mut supervisor, at, Event::Spawned(HOSTD, 20));
    step(&mut supervisor, at, Event::BecameReady(HOSTD));
    at += 60;
    step(&mut supervisor, at, Event::Ended(HOSTD, "crashed".into()));
    assert_eq!(supervisor.next_deadline().unwrap(), seconds(at + 1));
    assert_eq!(supervisor.status(HOSTD).last_failure, "crashed");
    assert_eq!(supervisor.status(HOSTD).state, ServiceState::BackingOff);
}

#[test]
fn one_that_is_never_ready_is_stopped_and_tried_again() {
    let mut supervisor = Supervisor::new(vec![rules("hostd", &[])]);
    step(&mut supervisor, 0, Event::Tick);
    step(&mut supervisor, 0, Event::Spawned(HOSTD, 10));
    assert_eq!(step(&mut supervisor, 90, Event::Tick), [Action::Terminate(HOSTD)]);
    assert_eq!(step(&mut supervisor, 100, Event::Tick), [Action::Kill(HOSTD)]);
    step(&mut supervisor, 100, Event::Ended(HOSTD, "was killed".into()));
    assert_eq!(supervisor.status(HOSTD).last_failure, "was not ready within 90 s");
    assert_eq!(step(&mut supervisor, 101, Event::Tick), [Action::Spawn(HOSTD)]);
}

#[test]
fn dependents_live_through_a_restart_of_what_they_need() {
    let mut supervisor = all_ready();
    assert_eq!(step(&mut supervisor, 5, Event::Restart(RUNTIME)), [Action::Terminate(RUNTIME)]);
    let actions = step(&mut supervisor, 6, Event::Ended(RUNTIME, "ended with code 0".into()));
    assert_eq!(actions, [Action::Kill(RUNTIME), Action::Spawn(RUNTIME)]);
    assert_eq!(supervisor.status(AGENT).state, ServiceState::Ready);
    assert_eq!(supervisor.status(RUNTIME).restarts, 0);
}

#[test]
fn stopped_by_hand_it_stays_down_until_started_by_hand() {
    let mut supervisor = all_ready();
    assert_eq!(step(&mut supervisor, 5, Event::Stop(AGENT)), [Action::Terminate(AGENT)]);
    step(&mut supervisor, 6, Event::Ended(AGENT, "ended with code 0".into()));
    assert_eq!(step(&mut supervisor, 600, Event::Tick), []);
    assert_eq!(supervisor.status(AGENT).state, ServiceState::Stopped);
    assert!(supervisor.all_ready());
    assert_eq!(step(&mut supervisor, 601, Event::Start(AGENT)), [Action::Spawn(AGENT)]);
}

#[test]
fn every_change_is_announced_once() {
    let mut supervisor = host();
    let announced = |actions: Vec<Action>| actions.contains(&Action::Announce(HOSTD));
    assert!(announced(supervisor.step(seconds(0), Event::Tick)));
    assert!(!announced(supervisor.step(seconds(0), Event::Spawned(HOSTD, 10))));
    assert!(announced(supervisor.step(seconds(1), Event::BecameReady(HOSTD))));
    assert!(!announced(supervisor.step(seconds(2), Event::BecameReady(HOSTD))));
}

#[test]
fn a_forced_shutdown_waits_for_nobody() {
    let mut supervisor = all_ready();
    let kills = step(&mut supervisor, 5, Event::ShutdownNow);
    assert_eq!(kills, [Action::Kill(HOSTD), Action::Kill(RUNTIME), Action::Kill(AGENT)]);
    assert_eq!(supervisor.next_deadline(), None);
}

#[test]
fn one_that_gives_no_sign_of_life_is_killed_and_started_again() {
    let mut supervisor = watched();
    assert_eq!(step(&mut supervisor, 20, Event::Alive(HOSTD)), []);
    assert_eq!(supervisor.next_deadline(), Some(seconds(50)));
    assert_eq!(step(&mut supervisor, 49, Event::Tick), []);
    assert_eq!(step(&mut supervisor, 50, Event::Tick), [Action::Kill(HOSTD)]);
    assert_eq!(step(&mut supervisor, 51, Event::Tick), [], "it is killed once");
    let status = supervisor.status(HOSTD);
    assert_eq!(status.state, ServiceState::Stopping);
    assert_eq!(status.last_failure, "hung: gave no sign of life for 30 s and was killed");
    step(&mut supervisor, 51, Event::Ended(HOSTD, "was killed by signal 9".into()));
    assert!(supervisor.status(HOSTD).last_failure.starts_with("hung"), "the cause, not how it ended");
    assert_eq!(supervisor.status(HOSTD).state, ServiceState::BackingOff);
    assert_eq!(step(&mut supervisor, 52, Event::Tick), [Action::Spawn(HOSTD)]);
    assert_eq!(supervisor.status(HOSTD).restarts, 1);
}

#[test]
fn one_that_is_not_ready_owes_no_sign_of_life() {
    let mut supervisor = Supervisor::new(vec![Rules { watchdog: Some(seconds(30)), ..rules("hostd", &[]) }]);
    step(&mut supervisor, 0, Event::Tick);
    step(&mut supervisor, 0, Event::Spawned(HOSTD, 10));
    assert_eq!(step(&mut supervisor, 80, Event::Tick), [], "its start has a deadline of its own");
    step(&mut supervisor, 80, Event::BecameReady(HOSTD));
    assert_eq!(step(&mut supervisor, 109, Event::Tick), []);
    assert_eq!(step(&mut supervisor, 109, Event::Stop(HOSTD)), [Action::Terminate(HOSTD)]);
    assert_eq!(step(&mut supervisor, 118, Event::Tick), [], "asked to stop, it has the time to");
    assert_eq!(step(&mut supervisor, 119, Event::Tick), [Action::Kill(HOSTD)]);
}

#[test]
fn one_that_says_that_it_takes_longer_gets_the_time_and_no_more() {
    let mut supervisor = Supervisor::new(vec![rules("hostd", &[])]);
    step(&mut supervisor, 0, Event::Tick);
    step(&mut supervisor, 0, Event::Spawned(HOSTD, 10));
    step(&mut supervisor, 80, Event::TakesLonger(HOSTD, seconds(1000)));
    assert_eq!(step(&mut supervisor, 1079, Event::Tick), []);
    step(&mut supervisor, 1079, Event::TakesLonger(HOSTD, Duration::MAX));
    assert_eq!(step(&mut supervisor, 1079 + 3599, Event::Tick), []);
    assert_eq!(step(&mut supervisor, 1079 + 3600, Event::Tick), [Action::Terminate(HOSTD)]);
}

#[test]
fn after_the_machine_stood_still_nobody_is_taken_for_hung() {
    let mut supervisor = watched();
    assert_eq!(step(&mut supervisor, 500, Event::StoodStill), []);
    assert_eq!(step(&mut supervisor, 529, Event::Tick), []);
    assert_eq!(step(&mut supervisor, 530, Event::Tick), [Action::Kill(HOSTD)]);
}

#[test]
fn one_that_hangs_at_each_start_backs_off_and_one_that_was_stable_does_not() {
    let mut supervisor = watched();
    let mut at = 1;
    let mut delays = Vec::new();
    for stable in [false, false, false, true] {
        if stable {
            at += 60;
            step(&mut supervisor, at - 30, Event::Alive(HOSTD));
            step(&mut supervisor, at, Event::Alive(HOSTD));
        }
        at += 30;
        assert_eq!(step(&mut supervisor, at, Event::Tick), [Action::Kill(HOSTD)]);
        step(&mut supervisor, at, Event::Ended(HOSTD, "was killed".into()));
        let due = supervisor.next_deadline().unwrap().as_secs();
        delays.push(due - at);
        at = due;
        assert_eq!(step(&mut supervisor, at, Event::Tick), [Action::Spawn(HOSTD)]);
        step(&mut supervisor, at, Event::Spawned(HOSTD, 10));
        step(&mut supervisor, at, Event::BecameReady(HOSTD));
    }
    assert_eq!(delays, [1, 2, 4, 1]);
}

/// What the world may do between two steps of the supervisor.
#[derive(Debug, Clone)]
enum Happening {
    Wait(u64),
    Ready(usize),
    Dies(usize),
    SpawnsFail(bool),
    Obeys(bool),
    Ask(usize, u8),
    Alive(usize),
    Shutdown,
}

fn happenings() -> impl Strategy<Value = Vec<Happening>> {
    let service = 0..4_usize;
    let one = prop_oneof![
        4 => (0..40_u64).prop_map(Happening::Wait),
        4 => service.clone().prop_map(Happening::Ready),
        2 => service.clone().prop_map(Happening::Dies),
        1 => any::<bool>().prop_map(Happening::SpawnsFail),
        1 => any::<bool>().prop_map(Happening::Obeys),
        3 => service.clone().prop_map(Happening::Alive),
        2 => (service, 0..3_u8).prop_map(|(place, what)| Happening::Ask(place, what)),
        1 => Just(Happening::Shutdown),
    ];
    proptest::collection::vec(one, 0..120)
}

/// A world that obeys the actions and checks them against what may never be.
struct World {
    supervisor: Supervisor,
    now: Duration,
    alive: BTreeMap<usize, u32>,
    asked: BTreeMap<usize, Duration>,
    next_pid: u32,
    spawns_fail: bool,
    obeys: bool,
    down: bool,
}

impl World {
    fn new() -> Self {
        let supervisor = Supervisor::new(vec![
            rules("a", &[]),
            Rules { watchdog: Some(seconds(30)), ..rules("b", &[0]) },
            rules("c", &[0, 1]),
            Rules { notifies: false, ..rules("d", &[1]) },
        ]);
        let mut world = Self {
            supervisor,
            now: Duration::ZERO,
            alive: BTreeMap::new(),
            asked: BTreeMap::new(),
            next_pid: 100,
            spawns_fail: false,
            obeys: true,
            down: false,
        };
        world.tell(Event::Tick);
        world
    }

    fn tell(&mut self, event: Event) {
        let mut pending = vec![event];
        while let Some(event) = pending.pop() {
            for action in self.supervisor.step(self.now, event) {
                pending.extend(self.obey(action));
            }
        }
    }

    fn obey(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Spawn(id) => {
                assert!(!self.down, "started {id:?} while shutting down");
                assert!(!self.alive.contains_key(&id.0), "started {id:?} twice");
                for need in &self.supervisor.units[id.0].rules.after {
                    assert_eq!(
                        self.supervisor.units[need.0].state(),
                        ServiceState::Ready,
                        "{id:?} before {need:?}"
                    );
                }
                if self.spawns_fail {
                    return Some(Event::SpawnFailed(id, "missing".into()));
                }
                self.next_pid += 1;
                self.alive.insert(id.0, self.next_pid);
                Some(Event::Spawned(id, self.next_pid))
            }
            Action::Terminate(id) => {
                assert!(self.alive.contains_key(&id.0), "asked {id:?} to stop, which is not there");
                assert!(self.asked.insert(id.0, self.now).is_none(), "asked {id:?} twice");
                if self.down {
                    let dependent = self.supervisor.units.iter().enumerate().find(|(place, unit)| {
                        unit.rules.after.contains(&id) && self.alive.contains_key(place)
                    });
                    assert!(dependent.is_none(), "asked {id:?} to stop before {dependent:?}");
                }
                (self.obeys).then(|| self.die(id.0)).flatten()
            }
            Action::Kill(id) => self.die(id.0),
            Action::Announce(_) => None,
        }
    }

    fn die(&mut self, place: usize) -> Option<Event> {
        self.asked.remove(&place);
        self.alive.remove(&place).map(|_| Event::Ended(ServiceId(place), "ended".into()))
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Wait(time) => {
                self.now += seconds(time);
                self.tell(Event::Tick);
            }
            Happening::Ready(place) => self.tell(Event::BecameReady(ServiceId(place))),
            Happening::Alive(place) => self.tell(Event::Alive(ServiceId(place))),
            Happening::Dies(place) => {
                if let Some(event) = self.die(place) {
                    self.tell(event);
                }
            }
            Happening::SpawnsFail(fail) => self.spawns_fail = fail,
            Happening::Obeys(obeys) => self.obeys = obeys,
            Happening::Ask(place, 0) => self.tell(Event::Start(ServiceId(place))),
            Happening::Ask(place, 1) => self.tell(Event::Stop(ServiceId(place))),
            Happening::Ask(place, _) => self.tell(Event::Restart(ServiceId(place))),
            Happening::Shutdown => {
                self.down = true;
                self.tell(Event::Shutdown);
            }
        }
        self.check();
    }

    fn check(&self) {
        for (place, unit) in self.supervisor.units.iter().enumerate() {
            assert_eq!(unit.pid(), self.alive.get(&place).copied().unwrap_or(0), "{}", unit.rules.name);
            assert_eq!(unit.shown, unit.state());
            assert!(unit.next_delay <= BACK_OFF_MOST);
            if let Some(at) = unit.silent_at().filter(|_| unit.desired == Desired::Up) {
                assert!(self.now < at, "{} is silent for too long and left alone", unit.rules.name);
            }
            if let Actual::BackOff { until } = unit.actual {
                assert!(until <= self.now + BACK_OFF_MOST);
            }
        }
        for (place, since) in &self.asked {
            assert!(self.now <= *since + seconds(10 + 40), "{place} was asked to stop and never killed");
        }
    }
}

proptest! {
    #[test]
    fn nothing_forbidden_ever_happens(history in happenings()) {
        let mut world = World::new();
        for happening in history {
            world.happen(happening);
        }
    }

    #[test]
    fn a_shutdown_ends_within_the_sum_of_its_deadlines(history in happenings(), obeys: bool) {
        let mut world = World::new();
        for happening in history {
            world.happen(happening);
        }
        world.obeys = obeys;
        world.happen(Happening::Shutdown);
        for _ in 0..4 * 10 {
            world.happen(Happening::Wait(1));
        }
        prop_assert!(world.supervisor.all_ended());
    }

    #[test]
    fn in_a_healthy_world_all_becomes_ready(history in happenings()) {
        let mut world = World::new();
        for happening in history {
            if !matches!(happening, Happening::Shutdown) {
                world.happen(happening);
            }
        }
        world.spawns_fail = false;
        world.obeys = true;
        for place in 0..4 {
            world.happen(Happening::Ask(place, 0));
        }
        for _ in 0..20 {
            world.happen(Happening::Wait(10));
            for place in 0..4 {
                world.happen(Happening::Ready(place));
                world.happen(Happening::Alive(place));
            }
        }
        prop_assert!(world.supervisor.all_ready());
    }
}
