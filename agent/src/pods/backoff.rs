//! Waiting longer after each failure ◇: 10 s, doubled each time, at most 300 s; forgotten after 10 minutes of peace.
//!
//! The same rule serves container restarts and image pulls, as it does on every Kubernetes node. What happened in the
//! future happened before the clock was set back, and keeps nothing waiting.

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
        if event.duration_since(entry.updated) > FORGET || event > now || entry.updated > now {
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

    /// Forgets a name.
    pub fn forget(&mut self, name: &str) {
        self.entries.remove(name);
    }

    /// Forgets what would not count any more.
    pub fn tidy(&mut self, now: Timestamp) {
        self.entries.retain(|_, entry| now.duration_since(entry.updated) <= FORGET);
    }
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
    fn waits_from_the_event_on() {
        let mut backoff = Backoff::default();
        backoff.tried("a", at(0), at(0));
        assert_eq!(backoff.until("a", at(5), at(6)), Some(at(15)));
        assert_eq!(backoff.until("a", at(5), at(15)), None);
        assert_eq!(backoff.until("b", at(5), at(6)), None);
    }
}
