//! The control connection: dial the runtime, take requests, send answers and events; dial again when it breaks.
//!
//! Each request runs on a thread of its own, so that a slow one (a large tree) delays no other; their number is
//! bounded. The runtime may restart at any time: nothing here touches containers when the connection ends.

use crate::events::Outbox;
use crate::guest::Guest;
use crate::log;
use crate::sys;
use crate::transport::{Connection, read_frame, write_frame};
use atoll_spec::guest::{GuestError, GuestErrorKind, Hello, PROTOCOL, Request};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

const FIRST_DELAY: Duration = Duration::from_millis(5);
const LONGEST_DELAY: Duration = Duration::from_secs(1);
const MAX_CALLS: usize = 32;

/// Serves the runtime for the life of the guest.
pub fn serve(guest: &Arc<Guest>) {
    let ready_us = sys::monotonic_us();
    let calls = Arc::new(Slots::default());
    let mut delay = FIRST_DELAY;
    loop {
        match guest.options.peer.dial(&Hello::Control { protocol: PROTOCOL, ready_us }) {
            Ok(connection) => {
                delay = FIRST_DELAY;
                converse(guest, connection, &calls);
            }
            Err(error) if delay == LONGEST_DELAY => log::line(&format!("cannot reach the runtime: {error}")),
            Err(_) => {}
        }
        std::thread::sleep(delay);
        delay = (delay * 2).min(LONGEST_DELAY);
    }
}

/// One connection, until it breaks.
fn converse(guest: &Arc<Guest>, mut connection: Connection, calls: &Arc<Slots>) {
    let generation = guest.outbox.connected();
    let Ok(writer) = connection.try_clone() else { return };
    let outbox = Arc::clone(&guest.outbox);
    let sender =
        std::thread::Builder::new().name("send".into()).spawn(move || send(&outbox, writer, generation));
    if let Err(error) = &sender {
        log::line(&format!("cannot start the sender: {error}"));
        return;
    }
    loop {
        match read_frame(&mut connection) {
            Ok(Some(frame)) => match serde_json::from_slice::<Request>(&frame) {
                Ok(request) => dispatch(guest, request, generation, calls),
                Err(error) => refuse(&guest.outbox, generation, &frame, &error),
            },
            Ok(None) => break,
            Err(error) => {
                log::line(&format!("the connection to the runtime broke: {error}"));
                break;
            }
        }
    }
    // The sender may sit in a write: closing the socket wakes it.
    let _ = connection.shutdown(std::net::Shutdown::Both);
    guest.outbox.disconnected(generation);
    if let Ok(sender) = sender {
        // A sender that panicked has nothing more to tell.
        let _ = sender.join();
    }
}

fn send(outbox: &Outbox, mut writer: Connection, generation: u64) {
    while let Some(message) = outbox.next(generation) {
        if let Err(error) = write_frame(&mut writer, &message) {
            log::line(&format!("cannot send to the runtime: {error}"));
            // Wakes the reader, which dials again.
            let _ = writer.shutdown(std::net::Shutdown::Both);
            return;
        }
    }
}

/// Answers a request that this guest does not understand, as far as its number can be read.
fn refuse(outbox: &Outbox, generation: u64, frame: &[u8], error: &serde_json::Error) {
    match not_understood(frame, error) {
        Some((id, why)) => outbox.answer(generation, id, Err(why)),
        None => log::line(&format!("a request was not understood: {error}")),
    }
}

/// The answer to such a request, and its number.
pub fn not_understood(frame: &[u8], error: &serde_json::Error) -> Option<(u64, GuestError)> {
    #[derive(serde::Deserialize)]
    struct Numbered {
        id: u64,
    }
    let Numbered { id } = serde_json::from_slice(frame).ok()?;
    let message = format!("request not understood by this guest: {error}");
    Some((id, GuestError { kind: GuestErrorKind::Invalid, message }))
}

fn dispatch(guest: &Arc<Guest>, request: Request, generation: u64, calls: &Arc<Slots>) {
    let Request { id, call } = request;
    calls.take();
    let (owner, slots) = (Arc::clone(guest), Arc::clone(calls));
    let spawned = std::thread::Builder::new().name("call".into()).spawn(move || {
        let _slot = Release(slots);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| owner.call(call)));
        let result = outcome.unwrap_or_else(|_| {
            Err(GuestError {
                kind: GuestErrorKind::System,
                message: "the guest failed inside this call".into(),
            })
        });
        owner.outbox.answer(generation, id, result);
    });
    if let Err(error) = spawned {
        calls.give();
        let message = format!("cannot start a thread for the call: {error}");
        guest.outbox.answer(generation, id, Err(GuestError { kind: GuestErrorKind::System, message }));
    }
}

/// Bounds the calls under way.
#[derive(Default)]
struct Slots {
    taken: Mutex<usize>,
    freed: Condvar,
}

impl Slots {
    fn take(&self) {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken =
            self.freed.wait_while(taken, |taken| *taken >= MAX_CALLS).unwrap_or_else(PoisonError::into_inner);
        *taken += 1;
    }

    fn give(&self) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.freed.notify_one();
    }
}

/// Frees a slot whatever happens to the call.
struct Release(Arc<Slots>);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.give();
    }
}
