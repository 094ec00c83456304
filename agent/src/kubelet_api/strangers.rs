//! Callers that are not known yet: how many of them one address may have at a time.
//!
//! Called by `kubelet_api` for every connection, until its first request is authenticated. Invariant: one address that
//! opens connections and says nothing leaves room for all the others.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Unknown callers of one address at a time.
const MOST: usize = 64;

/// Counts them; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Strangers(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One of them; not counted any more when it is dropped.
#[derive(Debug)]
pub(super) struct Stranger {
    address: IpAddr,
    all: Strangers,
}

impl Strangers {
    /// One more; `None` when its address has enough of them.
    pub(super) fn enter(&self, address: IpAddr) -> Option<Stranger> {
        let mut all = self.lock();
        let count = all.entry(address).or_default();
        if *count >= MOST {
            return None;
        }
        *count += 1;
        Some(Stranger { address, all: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // The map is whole after every statement, so a panic elsewhere spoils nothing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        if let Some(count) = all.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_leaves_room_for_others_and_nothing_is_remembered_of_those_who_left() {
        let strangers = Strangers::default();
        let (one, two) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let inside: Vec<_> = (0..MOST).map(|_| strangers.enter(one).unwrap()).collect();
        assert!(strangers.enter(one).is_none());
        assert!(strangers.enter(two).is_some());
        drop(inside);
        assert!(strangers.lock().is_empty());
        assert!(strangers.enter(one).is_some());
    }
}
