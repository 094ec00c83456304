//! Lines for whoever reads the guest's console.
//!
//! The console is for faults only: a healthy guest says nothing, because each byte on a serial port is an exit
//! to the VMM.

use std::io::Write as _;
use std::sync::OnceLock;

static KERNEL_LOG: OnceLock<std::fs::File> = OnceLock::new();

/// From here on lines go to the kernel's log, which carries them to the console where there is one.
pub fn to_kernel() {
    if let Ok(file) = std::fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        // Set once; a second call changes nothing.
        let _ = KERNEL_LOG.set(file);
    }
}

/// Writes one line.
pub fn line(message: &str) {
    let message = message.replace('\n', " ");
    // There is nowhere left to report a failure to write the report.
    let _ = match KERNEL_LOG.get() {
        Some(mut kernel) => kernel.write_all(format!("<3>atoll-guest: {message}\n").as_bytes()),
        None => std::io::stderr().write_all(format!("atoll-guest: {message}\n").as_bytes()),
    };
}
