//! Room on the store's file system: what a layer may take of it, and the one error for when there is none.
//!
//! Called before a download, before an unpack and after either has failed. Invariant: images never take the last
//! bytes of the file system, because the pods' logs and writable disks and the host's own state live there too.

use super::StoreOptions;
use super::error::ImageError;
use rustix::io::Errno;
use std::io;

/// Bytes free for this process.
fn available(options: &StoreOptions) -> Result<u64, ImageError> {
    let file_system = rustix::fs::statvfs(&options.root)
        .map_err(|error| ImageError::io("look at the file system of", &options.root)(error.into()))?;
    Ok(file_system.f_bavail.saturating_mul(file_system.f_frsize))
}

/// Bytes that something may take; an error when `at_least` do not fit.
pub fn for_up_to(options: &StoreOptions, what: &str, at_least: u64) -> Result<u64, ImageError> {
    let room = available(options)?.saturating_sub(options.reserve);
    if room < at_least.max(1) { Err(full(options, what)) } else { Ok(room) }
}

/// The error for a file system that has no room for `what`.
pub fn full(options: &StoreOptions, what: &str) -> ImageError {
    ImageError::Full {
        what: what.to_owned(),
        path: options.root.clone(),
        // It is told all the same when even this cannot be read.
        available: available(options).unwrap_or(0),
        reserve: options.reserve,
    }
}

/// Whether an error says that there is no room: no bytes, no inodes, or the end of a quota.
pub fn is_lacking(error: &io::Error) -> bool {
    let lacking = [Errno::NOSPC, Errno::DQUOT].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|number| lacking.contains(&number))
}
