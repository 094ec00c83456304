//! What can go wrong while an image is built: each variant names the operation, the object and, where there is
//! one, the remedy. Sources are chained and printed once, in `main`.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Failures of the builder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// Verb, as in "read".
        operation: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A program that the builder runs is not there.
    #[error(
        "cannot run {program}, needed to {purpose}: install it with the packages in qemu-test/packages.txt"
    )]
    NoProgram {
        /// Its name.
        program: String,
        /// Why it was to run.
        purpose: String,
        /// Why it did not.
        source: std::io::Error,
    },
    /// A program ended badly.
    #[error("cannot {purpose}: {program} ended with {status}; its last lines:\n{tail}")]
    Program {
        /// Its name.
        program: String,
        /// Why it ran.
        purpose: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// End of its error output.
        tail: String,
    },
    /// A profile, lock file or argument is wrong.
    #[error("{what}: {problem}")]
    Input {
        /// Where.
        what: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A package, module, library or file that was asked for is not where it should be.
    #[error("no {kind} {name} {place}: {remedy}")]
    Missing {
        /// "module", "library", ...
        kind: &'static str,
        /// Its name.
        name: String,
        /// Where it was looked for.
        place: String,
        /// What to do.
        remedy: String,
    },
    /// A download is not what the lock file says.
    #[error(
        "{name} has sha256 {found}, image/debian.lock says {wanted}: do not use it; if the mirror is right, run `atoll-image lock`"
    )]
    Digest {
        /// Package.
        name: String,
        /// Measured.
        found: String,
        /// Locked.
        wanted: String,
    },
    /// An artefact or structure does not have the shape it must have.
    #[error("{what}: {problem}")]
    Format {
        /// Which file.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The result is larger than the design allows.
    #[error(
        "{what} is {size} bytes, the limit is {limit}: see the table of sizes above for what to leave out"
    )]
    TooLarge {
        /// Which artefact.
        what: String,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// Not one of ours: nothing was written.
    #[error("{} is not an Atoll disk ({problem}): nothing was written; give atoll.raw or the whole disk it was copied to", path.display())]
    NotOurs {
        /// Image or device.
        path: PathBuf,
        /// What was found instead.
        problem: String,
    },
}

impl Error {
    /// For `map_err` on a file operation.
    pub fn file(operation: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::File { operation, path, source }
    }

    /// A structure that is not as it should be.
    pub fn format(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Format { what: what.into(), problem: problem.into() }
    }

    /// A mistake in what the user wrote.
    pub fn input(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Input { what: what.into(), problem: problem.into() }
    }
}
