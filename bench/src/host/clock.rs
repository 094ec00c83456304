//! Virtual time: a nanosecond for each instruction.

use super::sys;
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// A length of time in milliseconds, for a figure.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Time from power-on until the kernel's clock began: firmware and boot loader.
pub fn firmware() -> Duration {
    let (cycles, kernel) = (sys::cycles(), since(ClockId::Boottime));
    Duration::from_nanos(cycles).saturating_sub(kernel)
}

/// Time from power-on until now.
pub fn power_on() -> Duration {
    Duration::from_nanos(sys::cycles())
}

fn since(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// Where the wall clock stood at a moment that was noted with the monotonic one, in nanoseconds since 1970; for
/// comparison with what the runtime says.
pub fn wall(moment: Instant) -> i64 {
    let ago = i64::try_from(moment.elapsed().as_nanos()).unwrap_or(i64::MAX);
    i64::try_from(since(ClockId::Realtime).as_nanos()).unwrap_or(i64::MAX) - ago
}

/// Milliseconds from one wall clock time to a later one.
pub fn between(from_ns: i64, to_ns: i64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 / 1e6
}
