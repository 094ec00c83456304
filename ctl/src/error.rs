//! What can go wrong in atollctl, beside the answer being no.

use std::io;

/// A command that could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {file}")]
    Read {
        /// Which.
        file: String,
        /// Why not.
        source: io::Error,
    },
    /// The result could not be written.
    #[error("cannot write the result")]
    Output(#[source] io::Error),
    /// There is no such field.
    #[error("{0}")]
    NoSuchField(String),
    /// The result could not be put into JSON.
    #[error("cannot encode the result")]
    Encode(#[from] serde_json::Error),
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
