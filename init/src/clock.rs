//! Time since power-on, which every deadline, log line and phase is told in. The wall clock is not to be trusted
//! before hostd has set it.

use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Time since the kernel started.
pub fn uptime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

/// Whole milliseconds of a duration, as the wire types have them.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
