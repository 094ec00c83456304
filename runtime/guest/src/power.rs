//! The end of the guest: every process told, then killed; disks synced; machine reset.
//!
//! Each step has a deadline and the next one follows whatever it did. The reset is what the VMM takes as a
//! clean stop (`reboot=k` on the command line); a guest cannot switch itself off without ACPI.

use crate::guest::Guest;
use crate::log;
use std::time::Duration;

const POLITE: Duration = Duration::from_millis(500);
const FORCED: Duration = Duration::from_secs(2);
const SYNC: Duration = Duration::from_secs(3);

/// Ends everything that runs, and syncs. The answer to the call goes out before [`reset`].
pub fn stop_all(guest: &Guest) {
    guest.containers.signal_all(libc::SIGTERM);
    if !guest.processes.all_gone(POLITE) {
        guest.containers.signal_all(libc::SIGKILL);
        if !guest.processes.all_gone(FORCED) {
            log::line("some processes did not end in time; switching off all the same");
        }
    }
    let (done, finished) = std::sync::mpsc::channel();
    let sync = std::thread::Builder::new().name("sync".into()).spawn(move || {
        rustix::fs::sync();
        // The receiver may have given up waiting.
        let _ = done.send(());
    });
    if sync.is_err() || finished.recv_timeout(SYNC).is_err() {
        log::line("writing back to the scratch disk took too long; switching off all the same");
    }
}

/// Resets the machine; in a rehearsal, ends the process.
pub fn reset(machine: bool) -> ! {
    if machine {
        if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::Restart) {
            log::line(&format!("cannot reset the machine: {error}"));
        }
        // The VMM ends the machine by its own deadline.
        loop {
            std::thread::sleep(FORCED);
        }
    }
    std::process::exit(0)
}
