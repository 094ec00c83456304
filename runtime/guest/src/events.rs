//! What waits to be sent to the runtime: numbered events until it has acknowledged them, and answers to the
//! calls of the present connection.
//!
//! ```text
//! event ──► kept ──sent──► kept (sent) ──AckEvents──► gone
//!             ▲                 │
//!             └── connection lost (all kept ones are sent again)
//! ```
//!
//! Called by whoever finishes a call or sees a process end; drained by the one sender thread of the connection.
//! Invariant: an event leaves only by an acknowledgement, so a restarted runtime misses none.

use atoll_spec::guest::{Event, FromGuest, GuestError, Reply};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Number of a control connection; answers for an older one are dropped.
pub type Generation = u64;

#[derive(Default)]
struct State {
    generation: Generation,
    connected: bool,
    answers: VecDeque<FromGuest>,
    events: VecDeque<(u64, Event)>,
    last: u64,
    sent: u64,
    /// The sender has written all it was given.
    idle: bool,
}

/// The outbox.
#[derive(Default)]
pub struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is valid after every statement, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new connection: every kept event is due again.
    pub fn connected(&self) -> Generation {
        let mut state = self.lock();
        state.generation += 1;
        state.connected = true;
        state.sent = 0;
        state.answers.clear();
        state.generation
    }

    /// The connection ended; its sender stops.
    pub fn disconnected(&self, generation: Generation) {
        let mut state = self.lock();
        if state.generation == generation {
            state.connected = false;
            self.changed.notify_all();
        }
    }

    /// Keeps an event until it is acknowledged.
    pub fn event(&self, event: Event) {
        let mut state = self.lock();
        state.last += 1;
        let sequence = state.last;
        state.events.push_back((sequence, event));
        self.changed.notify_all();
    }

    /// Answers a call of the given connection.
    pub fn answer(&self, generation: Generation, id: u64, result: Result<Reply, GuestError>) {
        let mut state = self.lock();
        if state.generation == generation && state.connected {
            state.answers.push_back(FromGuest::Answer { id, result });
            self.changed.notify_all();
        }
    }

    /// Waits until every answer has been taken by the sender, at most `limit`.
    pub fn wait_until_answered(&self, limit: Duration) {
        let until = Instant::now() + limit;
        // An answer that is still to be queued by its call gets a moment too.
        while Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
            let state = self.lock();
            if state.idle && state.answers.is_empty() {
                break;
            }
        }
    }

    /// The runtime has everything up to `sequence`.
    pub fn acknowledge(&self, sequence: u64) {
        self.lock().events.retain(|(number, _)| *number > sequence);
    }

    /// Waits for the next message of a connection; `None` when the connection is over.
    pub fn next(&self, generation: Generation) -> Option<FromGuest> {
        let mut state = self.lock();
        loop {
            if state.generation != generation || !state.connected {
                return None;
            }
            if let Some(answer) = state.answers.pop_front() {
                return Some(answer);
            }
            let sent = state.sent;
            let due = state.events.iter().find(|(number, _)| *number > sent).cloned();
            if let Some((sequence, event)) = due {
                state.sent = sequence;
                return Some(FromGuest::Event { sequence, event });
            }
            state.idle = true;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_spec::guest::Exit;

    fn exited(code: i32) -> Event {
        let exit = Exit { code, oom_killed: false, at_unix_ns: 0 };
        Event::Exited { container: "c1".parse().unwrap(), exit }
    }

    #[test]
    fn events_come_again_until_acknowledged() {
        let outbox = Outbox::default();
        outbox.event(exited(1));
        outbox.event(exited(2));
        let first = outbox.connected();
        assert!(matches!(outbox.next(first), Some(FromGuest::Event { sequence: 1, .. })));
        outbox.acknowledge(1);
        outbox.disconnected(first);
        assert!(outbox.next(first).is_none());
        let second = outbox.connected();
        outbox.answer(first, 9, Ok(Reply::Done));
        assert!(
            matches!(outbox.next(second), Some(FromGuest::Event { sequence: 2, .. })),
            "and no stale answer"
        );
    }
}
