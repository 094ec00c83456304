//! The guard: a thread that the main thread owes a sign of life. Before anything that could take long the main
//! thread promises when it will be done; when that time has passed the guard says what hangs and ends the machine's run by
//! reboot(2), in the way that the promise named: a power-off that hangs stays one. While all is well it feeds the
//! hardware watchdog, which bites when this whole process, or the kernel, stands still, or when that call itself hangs.

use crate::clock;
use crate::console::Console;
use crate::error::{Error, Result};
use crate::shutdown;
use crate::sys::{self, Syscalls, WatchdogFacts};
use atoll_spec::control::ShutdownAction;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const DEVICE: &str = "/dev/watchdog0";
/// Seconds without food until the hardware resets the machine.
pub const BITES_AFTER_S: u32 = 60;
const ROUND: Duration = Duration::from_millis(500);
const FEED_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
struct Promise {
    what: String,
    until: Duration,
    /// Time for a person to read the console before the machine's run is ended.
    countdown: Duration,
    /// How it is ended.
    action: ShutdownAction,
}

#[derive(Debug, Default)]
struct Owed {
    promise: Option<Promise>,
    device: Option<File>,
}

/// A handle on the guard.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    owed: Arc<Mutex<Owed>>,
}

impl Guard {
    /// Starts the guard's thread.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn start(console: &Console, kernel: impl Syscalls + Send + Sync + 'static) -> Result<Self> {
        let guard = Self::default();
        let (owed, console, kernel) = (guard.owed.clone(), console.clone(), Arc::new(kernel));
        std::thread::Builder::new()
            .name("guard".into())
            .spawn(move || watch(&owed, &console, &kernel))
            .map_err(Error::system("start the guard's thread"))?;
        Ok(guard)
    }

    /// Promises to be done with this within that time, or the machine's run ends by that action. Replaces the promise
    /// before.
    pub fn promise(&self, what: &str, within: Duration, countdown: Duration, action: ShutdownAction) {
        let until = clock::uptime() + within;
        lock(&self.owed).promise = Some(Promise { what: what.to_owned(), until, countdown, action });
    }

    /// Nothing is owed: used only while a person is to read the console.
    pub fn release(&self) {
        lock(&self.owed).promise = None;
    }

    /// Opens the hardware watchdog and feeds it from now on.
    ///
    /// # Errors
    /// When there is none.
    pub fn take_watchdog(&self) -> Result<WatchdogFacts> {
        let device =
            File::options().write(true).open(DEVICE).map_err(Error::file("open the watchdog", DEVICE))?;
        let facts = sys::configure_watchdog(device.as_fd(), BITES_AFTER_S)
            .map_err(Error::file("set up the watchdog", DEVICE))?;
        lock(&self.owed).device = Some(device);
        Ok(facts)
    }
}

fn lock(owed: &Mutex<Owed>) -> MutexGuard<'_, Owed> {
    // A thread that panicked while it held the lock left whole values behind.
    owed.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Leaves the cause behind, as long as the disk takes it at once: it may be the disk that hangs.
fn record(kernel: &Arc<impl Syscalls + Send + Sync + 'static>, console: &Console, broken: Promise) {
    let (done, written) = sync_channel(1);
    let (kernel, console) = (kernel.clone(), console.clone());
    let reason = format!("{} did not end by its deadline", broken.what);
    let writer = std::thread::Builder::new().name("cause".into()).spawn(move || {
        shutdown::record_cause(&*kernel, &console, broken.action, "init", &reason);
        // Nobody waits any longer.
        let _ = done.send(());
    });
    if writer.is_ok() {
        // Unrecorded, it is still on the console.
        let _ = written.recv_timeout(Duration::from_secs(2));
    }
}

fn watch(owed: &Mutex<Owed>, console: &Console, kernel: &Arc<impl Syscalls + Send + Sync + 'static>) {
    let mut last_fed = Duration::ZERO;
    let mut overdue_since = None;
    loop {
        std::thread::sleep(ROUND);
        let now = clock::uptime();
        let broken = lock(owed).promise.clone().filter(|promise| now >= promise.until);
        match (broken, overdue_since) {
            (None, Some(_)) => {
                console.say("it has ended after all: nothing is forced");
                overdue_since = None;
            }
            (None, None) => {}
            (Some(promise), None) => {
                let seconds = promise.countdown.as_secs();
                console.say(format!(
                    "{} has not ended by its deadline: forced {} in {seconds} s",
                    promise.what, promise.action
                ));
                overdue_since = Some(now);
            }
            (Some(promise), Some(since)) if now >= since + promise.countdown => {
                let action = promise.action;
                record(kernel, console, promise);
                console.say(format!("forced {action}"));
                console.flush(Duration::from_secs(2));
                // If the kernel cannot even do that, nobody feeds the watchdog any more.
                let _ = kernel.power(shutdown::power_action(action));
                return;
            }
            (Some(_), Some(_)) => {}
        }
        if now >= last_fed + FEED_EVERY {
            last_fed = now;
            if let Some(device) = &mut lock(owed).device {
                // Unfed, it resets the machine, which is then right.
                let _ = device.write_all(b".");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fake::Fake;
    use atoll_spec::control::{REBOOT_CAUSE_FILE, RebootCause};

    /// How the guard ended the machine's run, if it did.
    fn ended(kernel: &Fake, within: Duration) -> Option<String> {
        let end = clock::uptime() + within;
        while clock::uptime() < end {
            if let Some(call) = kernel.calls().into_iter().find(|call| call.starts_with("power ")) {
                return Some(call);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }

    #[test]
    fn a_broken_promise_reboots_and_a_kept_one_does_not() {
        let kernel = Fake::default();
        let guard = Guard::start(&Console::start(), kernel.clone()).unwrap();
        guard.promise("kept", Duration::from_secs(100), Duration::ZERO, ShutdownAction::Reboot);
        assert_eq!(ended(&kernel, ROUND * 3), None);
        let moment = Duration::from_millis(1);
        guard.promise("broken", moment, moment, ShutdownAction::Reboot);
        assert_eq!(ended(&kernel, Duration::from_secs(20)).as_deref(), Some("power Restart"));
    }

    #[test]
    fn a_power_off_that_is_late_stays_one_and_is_recorded_as_one() {
        let kernel = Fake::default();
        kernel.file("/proc/self/mounts", "/dev/vda2 /state ext4 rw 0 0\n");
        let guard = Guard::start(&Console::start(), kernel.clone()).unwrap();
        let within = Duration::from_millis(1);
        guard.promise("shutdown step unmount disks", within, Duration::ZERO, ShutdownAction::PowerOff);
        assert_eq!(ended(&kernel, Duration::from_secs(20)).as_deref(), Some("power Off"));
        let text = kernel.read(REBOOT_CAUSE_FILE).unwrap();
        let cause: RebootCause = serde_json::from_str(&text).unwrap();
        assert_eq!(cause.action, ShutdownAction::PowerOff);
        assert!(cause.reason.contains("unmount disks did not end"), "{}", cause.reason);
    }
}
