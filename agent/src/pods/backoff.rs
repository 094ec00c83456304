//! Waiting longer after each failure ◇: 10 s, doubled each time, at most 300 s; forgotten after 10 minutes of peace.
//!
//! The same rule serves container restarts and image pulls, as it does on every Kubernetes node. What happened in the
//! future happened before the clock was set back, and keeps nothing waiting; but what is ahead by less than the first
//! wait has just happened, by a clock that differs a little.

use jiff::{SignedDuration, Timestamp};
use std::collections::HashMap;

const FIRST: SignedDuration = SignedDuration::from_secs(10);
const LONGEST: SignedDuration = SignedDuration::from_secs(300);
const FORGET: SignedDuration = SignedDuration::from_secs(600);

#[derive(Debug, Clone, Copy)]
struct Entry {
    delay: SignedDuration,
    updated: Timestamp,
}

/// Back-off of several things, by name.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    entries: HashMap<String, Entry>,
}

impl Backoff {
    /// Until when to wait after what happened at `event`; `None`: no need. The first retry is always at once.
    pub fn until(&self, name: &str, event: Timestamp, now: Timestamp) -> Option<Timestamp> {
        let entry = self.entries.get(name)?;
        let ahead = event > now + FIRST || entry.updated > now;
        let event = event.min(now);
        if event.duration_since(entry.updated) > FORGET || ahead {
            return None;
        }
        Some(event + entry.delay).filter(|until| *until > now)
    }

    /// Until when to wait after the last try itself; `None`: no need.
    pub fn until_after_try(&self, name: &str, now: Timestamp) -> Option<Timestamp> {
        let entry = self.entries.get(name).filter(|entry| entry.updated <= now)?;
        Some(entry.updated + entry.delay).filter(|until| *until > now)
    }

    /// The present delay in whole seconds.
    pub fn delay_seconds(&self, name: &str) -> i64 {
        self.entries.get(name).map_or(0, |e| e.delay.as_secs())
    }

    /// Notes a new try, after what happened at `event`.
    pub fn tried(&mut self, name: &str, event: Timestamp, now: Timestamp) {
        let delay = match self.entries.get(name) {
            Some(entry) if event.duration_since(entry.updated) <= FORGET => (entry.delay * 2).min(LONGEST),
            _ => FIRST,
        };
        self.entries.insert(name.to_owned(), Entry { delay, updated: now });
    }

    /// Takes up what another agent noted: `delay` as it was `tries` tries before the last one, which was at `updated`.
    pub fn restore(&mut self, name: &str, delay: SignedDuration, tries: u32, updated: Timestamp) {
        // More doublings than these change nothing.
        let delay = (delay.clamp(FIRST, LONGEST) * (1 << tries.min(5))).min(LONGEST);
        self.entries.insert(name.to_owned(), Entry { delay, updated });
    }

    /// Forgets a name.
    pub fn forget(&mut self, name: &str) {
        self.entries.remove(name);
    }

    /// Forgets what would not count any more.
    pub fn tidy(&mut self, now: Timestamp) {
        self.entries.retain(|_, entry| now.duration_since(entry.updated) <= FORGET);
    }
}

/// What the status of a container says that waits `seconds`, as on every Kubernetes node.
pub fn message(seconds: i64, container: &str, pod: &str) -> String {
    format!("back-off {} restarting failed container={container} pod={pod}", short(seconds))
}

/// The wait in what [`message`] said.
pub fn delay_in(message: &str) -> Option<SignedDuration> {
    let delay = message.strip_prefix("back-off ")?.split_once(" restarting failed container=")?.0;
    let (minutes, seconds) = delay.split_once('m').unwrap_or(("0", delay));
    let (minutes, seconds): (u32, u32) = (minutes.parse().ok()?, seconds.strip_suffix('s')?.parse().ok()?);
    Some(SignedDuration::from_secs(i64::from(minutes) * 60 + i64::from(seconds)))
}

/// `10s`, `1m20s`, `5m0s`.
pub fn short(seconds: i64) -> String {
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_set_back_by_years_keeps_nothing_waiting() {
        let (then, now) = (at(2_000_000_000), at(1_000_000_000));
        let mut backoff = Backoff::default();
        backoff.tried("a", then, then);
        assert!(backoff.until("a", then, then).is_some() && backoff.until_after_try("a", then).is_some());
        assert_eq!((backoff.until("a", then, now), backoff.until_after_try("a", now)), (None, None));
        backoff.tried("a", now, now);
        assert_eq!(backoff.until("a", now, now), Some(at(1_000_000_020)));
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn doubles_to_the_limit_and_forgets() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.until("a", at(100), at(100)), None);
        let mut now = 100;
        let mut delays = Vec::new();
        for _ in 0..7 {
            backoff.tried("a", at(now), at(now));
            delays.push(backoff.delay_seconds("a"));
            now += backoff.delay_seconds("a");
        }
        assert_eq!(delays, [10, 20, 40, 80, 160, 300, 300]);
        // It ran for more than ten minutes: as if new.
        let event = at(now + 601);
        assert_eq!(backoff.until("a", event, event), None);
        backoff.tried("a", event, event);
        assert_eq!(backoff.delay_seconds("a"), 10);
    }

    #[test]
    fn another_agent_reads_what_one_has_said() {
        for (seconds, text) in [(10, "10s"), (40, "40s"), (80, "1m20s"), (160, "2m40s"), (300, "5m0s")] {
            let said = message(seconds, "a", "p_ns(u)");
            assert_eq!(said, format!("back-off {text} restarting failed container=a pod=p_ns(u)"));
            assert_eq!(delay_in(&said), Some(SignedDuration::from_secs(seconds)));
        }
        for other in
            ["", "back-off", "back-off 10 restarting failed container=a", "Back-off pulling image \"i\""]
        {
            assert_eq!(delay_in(other), None, "{other}");
        }
        let mut backoff = Backoff::default();
        for (delay, tries, then) in
            [(10, 0, 10), (10, 1, 20), (160, 1, 300), (300, u32::MAX, 300), (0, 0, 10)]
        {
            backoff.restore("a", SignedDuration::from_secs(delay), tries, at(100));
            assert_eq!(backoff.delay_seconds("a"), then);
        }
        assert_eq!(backoff.until("a", at(105), at(106)), Some(at(115)));
    }

    #[test]
    fn waits_from_the_event_on() {
        let mut backoff = Backoff::default();
        backoff.tried("a", at(0), at(0));
        assert_eq!(backoff.until("a", at(5), at(6)), Some(at(15)));
        assert_eq!(backoff.until("a", at(5), at(15)), None);
        assert_eq!(backoff.until("b", at(5), at(6)), None);
        // It ended a moment after the clock was looked at.
        assert_eq!(backoff.until("a", at(6), at(5)), Some(at(15)));
        assert_eq!(backoff.until("a", at(16), at(5)), None);
    }
}
