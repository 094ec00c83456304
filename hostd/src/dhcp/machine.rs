//! The states of a DHCP client: bytes and clocks stay outside. ◇
//!
//! ```text
//!            offer             ack             free           T1               T2
//! Selecting ───────► Requesting ───────► Probing ─────► Bound ───────► Renewing ───────► Rebinding
//!    ▲  ▲                 │ nak, silence    │ taken       ▲               │ ack              │ ack
//!    │  ├─────────────────┘                 │             └───────────────┴──────────────────┘
//!    │  └───────────────────────────────────┘
//!    └──────────────────────── nak, or the lease ran out ◄───────────────────────────────────┘
//! ```
//!
//! [`Machine::step`] takes an input and the time and returns what to do; [`Machine::deadline`] says when to step
//! with [`Input::Timer`] at the latest. Times are seconds on any clock that only goes forward.

use super::packet::{Kind, Lease, Message};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// Where the exchange is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Looking for servers.
    Selecting,
    /// Asked for an offered address.
    Requesting(Box<Lease>),
    /// Was given an address, and asks the link whether somebody has it.
    Probing(Box<Lease>),
    /// Has an address.
    Bound(Box<Lease>),
    /// Asking its server to keep the address.
    Renewing(Box<Lease>),
    /// Asking every server to keep the address.
    Rebinding(Box<Lease>),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The deadline passed.
    Timer,
    /// A message came.
    Received(Message),
    /// Somebody on the link, with this hardware address, has the address that is probed.
    Taken([u8; 6]),
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send to everyone on the link.
    Broadcast(Message),
    /// Send to the server, from the leased address.
    Unicast(Ipv4Addr, Message),
    /// Ask everyone on the link who has this address.
    Probe(Ipv4Addr),
    /// What the server gave is in use by this hardware address; the server was told, and is asked again in so many
    /// seconds.
    Conflict(Box<Lease>, [u8; 6], u32),
    /// The lease holds: new, or renewed.
    Granted(Box<Lease>),
    /// The lease is gone; the address must not be used any more.
    Lost,
}

/// A DHCP client on one link.
#[derive(Debug)]
pub struct Machine {
    state: State,
    mac: [u8; 6],
    hostname: Option<String>,
    xid: u32,
    attempt: u32,
    /// Addresses given since the last one that was free.
    taken: u32,
    began: f64,
    /// When a server was last asked for a lease.
    asked: f64,
    /// When the lease that holds was asked for; its times count from here.
    leased: f64,
    deadline: f64,
}

/// Longest pause between two attempts to get an address.
const MAX_PAUSE: f64 = 64.0;
/// How often an offer is asked for before looking for another.
const MAX_REQUESTS: u32 = 4;
/// Probes for an address, and the time between them and after the last: shorter than RFC 5227 has it, which adds five
/// seconds to each boot for what servers mostly probe themselves.
const PROBES: (u32, f64) = (3, 0.2);
/// Pause after an address that was taken (RFC 2131 3.1), and after one too many (RFC 5227 2.1.1).
const TAKEN_PAUSES: (u32, u32) = (10, 60);
/// Addresses that may be taken before the longer pause.
const MAX_TAKEN: u32 = 10;

impl Machine {
    /// A client that begins at once. `seed` makes its transaction id.
    pub fn new(mac: [u8; 6], hostname: Option<String>, seed: u32, now: f64) -> Self {
        Self {
            state: State::Selecting,
            mac,
            hostname,
            xid: seed,
            attempt: 0,
            taken: 0,
            began: now,
            asked: now,
            leased: now,
            deadline: now,
        }
    }

    /// When to step with [`Input::Timer`].
    pub fn deadline(&self) -> f64 {
        self.deadline
    }

    /// Where it is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Goes one step.
    pub fn step(&mut self, input: Input, now: f64) -> Vec<Action> {
        match input {
            Input::Timer if now < self.deadline => Vec::new(),
            Input::Timer => self.timer(now),
            Input::Received(message) if self.is_for_me(&message) => self.received(&message, now),
            Input::Received(_) => Vec::new(),
            Input::Taken(by) => self.taken(by, now),
        }
    }

    /// The address that is being probed.
    pub fn probed(&self) -> Option<Ipv4Addr> {
        if let State::Probing(lease) = &self.state { Some(lease.address.addr()) } else { None }
    }

    fn is_for_me(&self, message: &Message) -> bool {
        message.reply && message.xid == self.xid && message.mac == self.mac
    }

    fn timer(&mut self, now: f64) -> Vec<Action> {
        match self.state.clone() {
            State::Selecting => self.discover(now),
            State::Requesting(offer) if self.attempt < MAX_REQUESTS => self.request(&offer, now),
            State::Requesting(_) => self.start_over(now),
            State::Probing(lease) if self.attempt < PROBES.0 => self.probe(&lease, now),
            State::Probing(lease) => self.granted(*lease, now),
            State::Bound(lease) => {
                self.state = State::Renewing(lease);
                self.begin_exchange();
                self.extend(now)
            }
            State::Renewing(_) | State::Rebinding(_) => self.extend(now),
        }
    }

    fn received(&mut self, message: &Message, now: f64) -> Vec<Action> {
        let lease = Lease::from_message(message);
        match (self.state.clone(), message.kind, lease) {
            (State::Selecting, Kind::Offer, Some(offer)) => {
                self.attempt = 0;
                self.state = State::Requesting(Box::new(offer.clone()));
                self.request(&offer, now)
            }
            (State::Renewing(old) | State::Rebinding(old), Kind::Ack, Some(lease))
                if old.address == lease.address =>
            {
                self.granted(lease, now)
            }
            (State::Renewing(_) | State::Rebinding(_), Kind::Ack, Some(lease)) => {
                let mut actions = vec![Action::Lost];
                actions.extend(self.begin_probing(lease, now));
                actions
            }
            (State::Requesting(_), Kind::Ack, Some(lease)) => self.begin_probing(lease, now),
            (State::Requesting(offer), Kind::Nak, _) if message.address(54) == Some(offer.server) => {
                self.start_over(now)
            }
            (State::Renewing(_) | State::Rebinding(_), Kind::Nak, _) => {
                let mut actions = vec![Action::Lost];
                actions.extend(self.start_over(now));
                actions
            }
            _ => Vec::new(),
        }
    }

    fn granted(&mut self, lease: Lease, now: f64) -> Vec<Action> {
        self.leased = self.asked;
        self.deadline = (self.leased + f64::from(lease.renew_after)).max(now + 1.0);
        (self.attempt, self.taken) = (0, 0);
        self.state = State::Bound(Box::new(lease.clone()));
        vec![Action::Granted(Box::new(lease))]
    }

    fn begin_probing(&mut self, lease: Lease, now: f64) -> Vec<Action> {
        self.attempt = 0;
        self.state = State::Probing(Box::new(lease.clone()));
        self.probe(&lease, now)
    }

    fn probe(&mut self, lease: &Lease, now: f64) -> Vec<Action> {
        self.attempt += 1;
        self.deadline = now + PROBES.1;
        vec![Action::Probe(lease.address.addr())]
    }

    /// The server must know, or it gives the same address again; it is asked again later, for it may have no other.
    fn taken(&mut self, by: [u8; 6], now: f64) -> Vec<Action> {
        let State::Probing(lease) = self.state.clone() else { return Vec::new() };
        let mut decline = self.message(Kind::Decline, Ipv4Addr::UNSPECIFIED, now);
        decline.options.retain(|option, _| *option == 61);
        decline.options.insert(50, lease.address.addr().octets().to_vec());
        decline.options.insert(54, lease.server.octets().to_vec());
        self.start_over(now);
        self.taken = self.taken.saturating_add(1);
        let pause = if self.taken < MAX_TAKEN { TAKEN_PAUSES.0 } else { TAKEN_PAUSES.1 };
        self.deadline = now + f64::from(pause);
        vec![Action::Broadcast(decline), Action::Conflict(lease, by, pause)]
    }

    fn start_over(&mut self, now: f64) -> Vec<Action> {
        self.state = State::Selecting;
        self.began = now;
        self.begin_exchange();
        // Not at once: a server that always refuses must not be asked in a tight loop.
        self.deadline = now + 1.0;
        Vec::new()
    }

    fn begin_exchange(&mut self) {
        self.attempt = 0;
        self.xid = self.xid.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    }

    fn pause(&mut self) -> f64 {
        let seconds = f64::from(1u32 << self.attempt.min(6)).min(MAX_PAUSE);
        self.attempt = self.attempt.saturating_add(1);
        // Up to a quarter more, so that machines that started together drift apart.
        seconds * (1.0 + f64::from((self.xid >> 8) & 0xff) / 1024.0)
    }

    fn discover(&mut self, now: f64) -> Vec<Action> {
        self.deadline = now + self.pause();
        vec![Action::Broadcast(self.message(Kind::Discover, Ipv4Addr::UNSPECIFIED, now))]
    }

    fn request(&mut self, offer: &Lease, now: f64) -> Vec<Action> {
        self.deadline = now + self.pause();
        self.asked = now;
        let mut message = self.message(Kind::Request, Ipv4Addr::UNSPECIFIED, now);
        message.options.insert(50, offer.address.addr().octets().to_vec());
        message.options.insert(54, offer.server.octets().to_vec());
        vec![Action::Broadcast(message)]
    }

    /// Asks to keep the lease: its server until T2, then everyone, until it ends.
    fn extend(&mut self, now: f64) -> Vec<Action> {
        let (State::Renewing(lease) | State::Rebinding(lease)) = self.state.clone() else {
            return Vec::new();
        };
        let end = lease.seconds.map_or(f64::INFINITY, |s| self.leased + f64::from(s));
        let rebind = self.leased + f64::from(lease.rebind_after);
        if now >= end {
            let mut actions = vec![Action::Lost];
            actions.extend(self.start_over(now));
            return actions;
        }
        let next = if now >= rebind { end } else { rebind };
        let message = self.message(Kind::Request, lease.address.addr(), now);
        self.asked = now;
        // RFC 2131 4.4.5: half of what is left, but not more often than each minute, unless the end comes first.
        self.deadline = (now + ((next - now) / 2.0).max(60.0)).min(next.max(now + 1.0));
        if now >= rebind {
            self.state = State::Rebinding(lease);
            vec![Action::Broadcast(message)]
        } else {
            vec![Action::Unicast(lease.server, message)]
        }
    }

    fn message(&self, kind: Kind, ciaddr: Ipv4Addr, now: f64) -> Message {
        let mut options = BTreeMap::from([
            (55, vec![1, 3, 6, 12, 15, 26, 42, 51, 54, 58, 59, 121]),
            (57, 1472u16.to_be_bytes().to_vec()),
            (61, [&[1], &self.mac[..]].concat()),
        ]);
        if let Some(name) = &self.hostname {
            options.insert(12, name.as_bytes().to_vec());
        }
        let secs = (now - self.began).clamp(0.0, 65535.0) as u16;
        Message {
            reply: false,
            kind,
            xid: self.xid,
            secs,
            ciaddr,
            yiaddr: Ipv4Addr::UNSPECIFIED,
            mac: self.mac,
            options,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::tests::offer;
    use super::*;
    use proptest::prelude::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn reply(machine: &Machine, kind: Kind, seconds: u32) -> Input {
        Input::Received(offer(kind, machine.xid, &[(51, &seconds.to_be_bytes())]))
    }

    fn bound(seconds: u32) -> Machine {
        let mut machine = Machine::new(MAC, None, 7, 0.0);
        assert!(
            matches!(&machine.step(Input::Timer, 0.0)[..], [Action::Broadcast(m)] if m.kind == Kind::Discover)
        );
        let input = reply(&machine, Kind::Offer, seconds);
        assert!(matches!(&machine.step(input, 0.1)[..], [Action::Broadcast(m)] if m.kind == Kind::Request));
        let input = reply(&machine, Kind::Ack, seconds);
        assert!(matches!(&machine.step(input, 0.2)[..], [Action::Probe(_)]));
        while let State::Probing(_) = machine.state() {
            let now = machine.deadline();
            assert!(now < 1.0, "boots wait for it");
            machine.step(Input::Timer, now);
        }
        assert!(matches!(machine.state(), State::Bound(_)));
        machine
    }

    /// Asks until an address is probed.
    fn probing(machine: &mut Machine) -> f64 {
        let now = machine.deadline();
        machine.step(Input::Timer, now);
        for kind in [Kind::Offer, Kind::Ack] {
            let input = reply(machine, kind, 3600);
            machine.step(input, now);
        }
        assert_eq!(machine.probed(), Some(Ipv4Addr::new(10, 0, 0, 7)));
        now
    }

    #[test]
    fn an_address_that_somebody_has_is_declined_and_asked_for_again_later() {
        let mut machine = Machine::new(MAC, None, 7, 0.0);
        for round in 1..15 {
            let now = probing(&mut machine);
            let actions = machine.step(Input::Taken([9; 6]), now);
            let [Action::Broadcast(decline), Action::Conflict(lease, by, pause)] = &actions[..] else {
                panic!("{actions:?}")
            };
            assert_eq!((decline.kind, *by), (Kind::Decline, [9; 6]));
            assert_eq!(decline.options.keys().copied().collect::<Vec<_>>(), [50, 54, 61], "RFC 2131 table 5");
            assert_eq!(decline.address(50), Some(lease.address.addr()));
            assert!(decline.ciaddr.is_unspecified());
            assert_eq!(*pause, if round < 10 { 10 } else { 60 });
            assert!((machine.deadline() - now - f64::from(*pause)).abs() < 0.01);
            assert_eq!(machine.state(), &State::Selecting);
            assert!(machine.step(Input::Taken([9; 6]), now).is_empty(), "told once");
        }
        let now = probing(&mut machine);
        let mut actions = Vec::new();
        while actions.is_empty() || matches!(actions[..], [Action::Probe(_)]) {
            actions = machine.step(Input::Timer, machine.deadline());
        }
        assert!(matches!(actions[..], [Action::Granted(_)]), "free at last: {actions:?}");
        assert!(machine.step(Input::Taken([9; 6]), now + 5.0).is_empty(), "only while it is probed");
    }

    #[test]
    fn a_renewal_with_another_address_is_probed_too_and_with_the_same_is_not() {
        let mut machine = bound(3600);
        machine.step(Input::Timer, 1801.0);
        let Input::Received(mut message) = reply(&machine, Kind::Ack, 3600) else { panic!() };
        message.yiaddr = Ipv4Addr::new(10, 0, 0, 8);
        let actions = machine.step(Input::Received(message.clone()), 1802.0);
        assert_eq!(actions, [Action::Lost, Action::Probe(message.yiaddr)]);
    }

    #[test]
    fn a_lease_is_renewed_with_its_server_then_with_any_then_lost() {
        let mut machine = bound(3600);
        let (mut unicasts, mut broadcasts) = (0, 0);
        loop {
            let now = machine.deadline();
            let actions = machine.step(Input::Timer, now);
            match &actions[..] {
                [Action::Unicast(server, m)] => {
                    assert!(
                        now < 3150.2 && *server == Ipv4Addr::new(10, 0, 0, 1) && !m.ciaddr.is_unspecified()
                    );
                    unicasts += 1;
                }
                [Action::Broadcast(m)] => {
                    assert!(now > 3149.0 && !m.options.contains_key(&54));
                    broadcasts += 1;
                }
                [Action::Lost] => {
                    assert!((3600.0..3602.0).contains(&now), "{now}");
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!((2..30).contains(&unicasts) && (2..12).contains(&broadcasts), "{unicasts} {broadcasts}");
        assert_eq!(machine.state(), &State::Selecting);
    }

    #[test]
    fn a_renewed_lease_counts_from_the_request_that_was_answered() {
        let mut machine = bound(3600);
        let now = machine.deadline();
        machine.step(Input::Timer, now);
        let input = reply(&machine, Kind::Ack, 3600);
        assert!(matches!(&machine.step(input, now + 1.0)[..], [Action::Granted(_)]));
        assert!((machine.deadline() - (now + 1800.0)).abs() < 2.0, "{} {now}", machine.deadline());
    }

    #[test]
    fn a_refusal_takes_the_address_away() {
        let mut machine = bound(3600);
        machine.step(Input::Timer, 1801.0);
        let input = Input::Received(offer(Kind::Nak, machine.xid, &[]));
        assert_eq!(machine.step(input, 1802.0), [Action::Lost]);
        assert!(machine.deadline() > 1802.0);
    }

    #[test]
    fn answers_to_others_are_ignored() {
        let mut machine = Machine::new(MAC, None, 7, 0.0);
        machine.step(Input::Timer, 0.0);
        assert!(machine.step(Input::Received(offer(Kind::Offer, 8, &[])), 0.1).is_empty());
        assert_eq!(machine.state(), &State::Selecting);
    }

    proptest! {
        /// Whatever comes, it keeps asking, not too often, and uses an address only while a lease for it holds.
        #[test]
        fn it_never_stops_and_never_floods(script in proptest::collection::vec((0u8..8, 30u32..4000), 1..80)) {
            let mut machine = Machine::new(MAC, None, 1, 0.0);
            let mut now = 0.0;
            let mut holds: Option<f64> = None;
            for (what, seconds) in script {
                let sent_at = machine.deadline().max(now);
                let input = match what {
                    0 => reply(&machine, Kind::Offer, seconds),
                    1 | 2 => reply(&machine, Kind::Ack, seconds),
                    3 => Input::Received(offer(Kind::Nak, machine.xid, &[])),
                    4 => Input::Taken([9; 6]),
                    _ => { now = sent_at; Input::Timer }
                };
                let timer = input == Input::Timer;
                for action in machine.step(input, now) {
                    match action {
                        Action::Granted(lease) => holds = Some(now + f64::from(lease.seconds.unwrap())),
                        Action::Lost => holds = None,
                        Action::Probe(_) | Action::Conflict(..) => prop_assert!(holds.is_none()),
                        Action::Broadcast(m) | Action::Unicast(_, m) => {
                            prop_assert!(m.ciaddr.is_unspecified() || holds.is_some_and(|end| now <= end + 1.0));
                        }
                    }
                }
                prop_assert!(!timer || machine.deadline() > now, "a deadline in the past would spin");
                prop_assert!(machine.deadline() < now + 4000.0);
            }
        }
    }
}
