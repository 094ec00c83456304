//! What can fail in PID 1: each error names the operation, the object and, where a person can do something, what.

use std::io;
use std::time::Duration;

/// An error of init.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file system could not be mounted.
    #[error("cannot mount {source_name} ({kind}) at {target}")]
    Mount {
        /// What was to be mounted.
        source_name: String,
        /// Its file system type.
        kind: String,
        /// Where.
        target: String,
        /// Why not.
        source: io::Error,
    },
    /// The system tree could not become the root.
    #[error("cannot make {path} the root")]
    Root {
        /// The mounted tree.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// A kernel module could not be loaded.
    #[error("cannot load the kernel module {path}")]
    Module {
        /// Its file.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// Kernel modules that the host needs are not there after loading them.
    #[error("the kernel modules {names} did not load: the image lacks them, or the kernel refused them")]
    ModulesMissing {
        /// Their names.
        names: String,
    },
    /// A file or directory.
    #[error("cannot {operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// A file with content that makes no sense.
    #[error("{path} is malformed: {what}")]
    Malformed {
        /// The file.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// A system call without a path.
    #[error("cannot {operation}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot {step} of {program}")]
    Spawn {
        /// The program.
        program: String,
        /// The step that failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The drivers of devices, by what these ask for.
    #[error("cannot load the drivers of {first} and {more} more")]
    Drivers {
        /// The first name.
        first: String,
        /// How many more there were.
        more: usize,
        /// Why not.
        source: Box<Error>,
    },
    /// A program took longer than it was waited for.
    #[error("{program} had not ended after {} s and goes on by itself", deadline.as_secs())]
    Overrun {
        /// The program.
        program: String,
        /// How long it had.
        deadline: Duration,
    },
    /// Several independent things failed.
    #[error("{}", .0.iter().map(chain).collect::<Vec<_>>().join("; "))]
    Several(Vec<Error>),
}

/// Result of init.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// For `map_err` on file operations.
    pub fn file(operation: &'static str, path: impl AsRef<str>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::File { operation, path, source }
    }

    /// For `map_err` on other operations.
    pub fn system<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { operation, source: source.into() }
    }

    /// `Ok` when nothing failed.
    ///
    /// # Errors
    /// The one failure, or all of them as one.
    pub fn all(mut failures: Vec<Self>) -> Result<()> {
        match failures.len() {
            0 => Ok(()),
            1 => Err(failures.remove(0)),
            _ => Err(Self::Several(failures)),
        }
    }
}

/// An error with its causes on one line.
pub fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
