//! A pretend runtime that carries out plans, loses sandboxes and forgets the agent's memory at every boundary.
//!
//! What must hold whatever happens: a main container never runs before the init containers of its sandbox have
//! ended well, no container runs twice at once, a pod that is over starts nothing, and when the trouble ends the pod
//! gets where it should.

use super::*;
use crate::pods::testing::pod;
use proptest::prelude::*;

/// What befalls an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Luck {
    /// It is done.
    Done,
    /// The agent dies before it.
    Before,
    /// The agent dies in the middle of it: a container is made and not started.
    Middle,
    /// The agent dies after it.
    After,
    /// The sandbox dies after it.
    SandboxLost,
}

struct World {
    desired: Desired,
    actual: Actual,
    memory: Memory,
    now: Timestamp,
    ids: u32,
}

impl World {
    fn new(spec: &str) -> Self {
        let now = Timestamp::from_second(10_000).unwrap();
        Self { desired: pod(spec), actual: Actual::default(), memory: Memory::default(), now, ids: 0 }
    }

    fn nanoseconds(&self) -> i64 {
        i64::try_from(self.now.as_nanosecond()).unwrap()
    }

    fn finish(&mut self, id: &str, code: i32) {
        let now = self.nanoseconds();
        for ran in self.actual.containers.iter_mut().filter(|c| c.id == id && c.state == State::Running) {
            (ran.state, ran.exit_code, ran.finished) = (State::Exited, code, now);
        }
    }

    /// Init containers that run end well; everything that runs passes its probes.
    fn time_passes(&mut self) {
        self.now += Duration::from_secs(400);
        for container in self.desired.of_role(Role::Init).map(|c| c.name.clone()).collect::<Vec<_>>() {
            let current = self.actual.current(&container).map(|r| r.id.clone());
            if let Some(id) = current {
                self.finish(&id, 0);
            }
        }
        let probed = |r: &Ran| (r.id.clone(), Probed { started: true, ready: true, kill: None });
        self.memory.probed = self.actual.running().map(probed).collect();
    }

    fn lose_sandbox(&mut self) {
        self.actual.sandboxes.iter_mut().for_each(|s| s.ready = false);
        for id in self.actual.running().map(|r| r.id.clone()).collect::<Vec<_>>() {
            self.finish(&id, 137);
        }
    }

    fn carry_out(&mut self, action: &Action, luck: Luck) {
        if luck == Luck::Before {
            self.memory = Memory::default();
            return;
        }
        self.ids += 1;
        let (id, now) = (format!("id{}", self.ids), self.nanoseconds());
        match action {
            Action::CreateSandbox { attempt } => {
                let made = crate::pods::actual::Sandbox {
                    id,
                    attempt: *attempt,
                    ready: true,
                    created: now,
                    ips: vec![],
                };
                self.actual.sandboxes.insert(0, made);
            }
            Action::Start { name, restarts, sandbox } => {
                let mut made = crate::pods::testing::ran(name, *restarts, State::Running, 0);
                (made.id, made.sandbox, made.created, made.started) = (id, sandbox.clone(), now, now);
                if luck == Luck::Middle {
                    (made.state, made.started) = (State::Created, 0);
                }
                self.actual.containers.insert(0, made);
            }
            Action::Kill { id, .. } => self.finish(id, 137),
            Action::StopSandbox { id } => {
                self.actual.sandboxes.iter_mut().filter(|s| s.id == *id).for_each(|s| s.ready = false);
            }
            Action::RemoveContainer { id } => self.actual.containers.retain(|c| c.id != *id),
            Action::RemoveSandbox { id } => self.actual.sandboxes.retain(|s| s.id != *id),
        }
        match luck {
            Luck::Middle | Luck::After => self.memory = Memory::default(),
            Luck::SandboxLost => self.lose_sandbox(),
            Luck::Done | Luck::Before => {}
        }
        self.actual = Actual::new(self.actual.sandboxes.clone(), self.actual.containers.clone());
    }

    fn check(&self) -> Result<(), TestCaseError> {
        for container in &self.desired.containers {
            let running = self.actual.runs(&container.name).filter(|r| r.state == State::Running).count();
            prop_assert!(running <= 1, "{} runs {running} times", container.name);
        }
        for main in
            self.actual.running().filter(|r| self.desired.container(&r.name).unwrap().role == Role::Main)
        {
            for init in self.desired.of_role(Role::Init) {
                let well =
                    |r: &Ran| r.sandbox == main.sandbox && r.state == State::Exited && r.exit_code == 0;
                prop_assert!(
                    self.actual.runs(&init.name).any(well),
                    "{} runs before {}",
                    main.name,
                    init.name
                );
            }
        }
        Ok(())
    }

    fn settled(&self) -> bool {
        let up = |c: &Container| self.actual.current(&c.name).is_some_and(|r| r.state == State::Running);
        self.desired.containers.iter().filter(|c| c.role != Role::Init).all(up)
    }
}

fn luck() -> impl Strategy<Value = Luck> {
    prop_oneof![
        4 => Just(Luck::Done),
        1 => Just(Luck::Before),
        1 => Just(Luck::Middle),
        1 => Just(Luck::After),
        1 => Just(Luck::SandboxLost),
    ]
}

const SPEC: &str =
    "{initContainers: [{name: i, image: i}, {name: s, image: i, restartPolicy: Always}, {name: j, image: i}],
    containers: [{name: a, image: i}, {name: b, image: i}]}";

proptest! {
    #[test]
    fn a_pod_gets_up_and_goes_whatever_befalls_the_agent(fortune in prop::collection::vec(luck(), 0..24)) {
        let mut world = World::new(SPEC);
        let mut fortune = fortune.into_iter();
        let mut rounds = 0;
        loop {
            let plan = run(&world.desired, &world.actual, &world.memory, world.now);
            let mut troubled = false;
            for action in &plan.actions {
                let luck = fortune.next().unwrap_or(Luck::Done);
                troubled |= luck != Luck::Done;
                world.carry_out(action, luck);
                world.check()?;
                if troubled {
                    break;
                }
            }
            if !troubled && plan.actions.is_empty() && world.settled() {
                break;
            }
            world.time_passes();
            rounds += 1;
            prop_assert!(rounds < 200, "it never gets up: {:?}", world.actual);
        }
        let order = Stop { why: String::new(), deadline: world.now, remove: true };
        for _ in 0..30 {
            let plan = stop(&world.desired, &world.actual, &world.memory, &order, world.now);
            for action in &plan.actions {
                world.carry_out(action, Luck::Done);
            }
            if plan.gone {
                return Ok(());
            }
        }
        prop_assert!(false, "it never goes: {:?}", world.actual);
    }

    #[test]
    fn a_job_runs_its_work_once(fortune in prop::collection::vec(luck(), 0..12), code in 0..2) {
        let mut world = World::new("{restartPolicy: Never, containers: [{name: a, image: i}]}");
        let mut fortune = fortune.into_iter();
        let mut begun = 0;
        for _ in 0..60 {
            if verdict(&world.desired, &world.actual) == Verdict::Over {
                break;
            }
            let plan = run(&world.desired, &world.actual, &world.memory, world.now);
            for action in &plan.actions {
                let luck = fortune.next().unwrap_or(Luck::Done);
                world.carry_out(action, luck);
                let works = matches!(action, Action::Start { .. }) && !matches!(luck, Luck::Before | Luck::Middle);
                begun += u32::from(works);
            }
            world.time_passes();
            let running = world.actual.running().next().map(|r| r.id.clone());
            if let Some(id) = running {
                world.finish(&id, code);
            }
        }
        prop_assert_eq!(verdict(&world.desired, &world.actual), Verdict::Over);
        prop_assert_eq!(begun, 1);
    }
}
