//! Which tests run beside which.
//!
//! Every test has a thread of its own from the start and waits here for its turn; a test that only reads what another
//! one has seen takes none. So the tests that wait for each other keep nobody else from working, and two processors
//! are never asked for more hosts at once than they can carry.

use atoll_qemu_test::inspect::Inspector;
use atoll_qemu_test::network::address;
use std::cell::RefCell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

/// Tests with hosts of their own that run at once: each boots, and booting takes a whole processor.
const OWN_AT_ONCE: usize = 2;
/// Tests on the shared host that run at once.
const SHARED_AT_ONCE: usize = 3;

/// What a test does with the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Boots a host of its own, by its index: one tap, one directory, so one test at a time.
    OwnHost(usize),
    /// Uses the shared host beside others.
    SharedHost,
    /// Harms the shared host, or measures it.
    SharedHostAlone,
    /// Harms the control plane that every host needs.
    Lab,
}

#[derive(Debug)]
struct Now {
    own: Vec<usize>,
    shared: usize,
    shared_alone: bool,
    lab: bool,
}

impl Now {
    fn has_room(&self, wanted: Use) -> bool {
        let host_is_free = self.shared == 0 && !self.shared_alone;
        !self.lab
            && match wanted {
                Use::OwnHost(index) => self.own.len() < OWN_AT_ONCE && !self.own.contains(&index),
                Use::SharedHost => !self.shared_alone && self.shared < SHARED_AT_ONCE,
                Use::SharedHostAlone => host_is_free,
                Use::Lab => host_is_free && self.own.is_empty(),
            }
    }

    fn change(&mut self, wanted: Use, begins: bool) {
        match wanted {
            Use::OwnHost(index) if begins => self.own.push(index),
            Use::OwnHost(index) => self.own.retain(|own| *own != index),
            Use::SharedHost if begins => self.shared += 1,
            Use::SharedHost => self.shared -= 1,
            Use::SharedHostAlone => self.shared_alone = begins,
            Use::Lab => (self.lab, self.shared_alone) = (begins, begins),
        }
    }
}

static NOW: (Mutex<Now>, Condvar) =
    (Mutex::new(Now { own: Vec::new(), shared: 0, shared_alone: false, lab: false }), Condvar::new());

fn now() -> MutexGuard<'static, Now> {
    NOW.0.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// The turn of this thread's test.
    static MINE: RefCell<Weak<Turn>> = const { RefCell::new(Weak::new()) };
}

/// A test's turn; it ends when the last clone goes.
#[derive(Debug)]
pub struct Turn(Use);

/// Waits for this test's turn. A test that has one already gets the same once more.
pub fn take(wanted: Use) -> Arc<Turn> {
    if let Some(mine) = MINE.with_borrow(Weak::upgrade) {
        assert_eq!(mine.0, wanted, "a test cannot change what it does with the lab");
        return mine;
    }
    let mut guard = now();
    while !guard.has_room(wanted) {
        guard = NOW.1.wait(guard).unwrap_or_else(PoisonError::into_inner);
    }
    guard.change(wanted, true);
    let turn = Arc::new(Turn(wanted));
    MINE.set(Arc::downgrade(&turn));
    turn
}

impl Turn {
    /// After a test that used the shared host there must be nothing in it that belongs to nobody.
    fn nothing_leaked(&self) -> anyhow::Result<()> {
        if matches!(self.0, Use::OwnHost(_)) || std::thread::panicking() {
            return Ok(());
        }
        Inspector::new(&address(0)).and_then(|host| host.nothing_leaked())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let checked = self.nothing_leaked();
        now().change(self.0, false);
        NOW.1.notify_all();
        if let Err(error) = checked {
            panic!("after this test: {error:#}");
        }
    }
}
