//! Everything that can go wrong in the agent outside pods, each with operation, object and remedy.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. The cause, where there is one, is the error's source; print the chain with [`chain`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// What the file is.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {what} {}: is the state partition mounted and not full?", path.display())]
    Write {
        /// What the file is.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// hostd's file is not one.
    #[error("{} is not what this version of hostd writes: update the host as a whole", path.display())]
    Config {
        /// Which.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Joining failed.
    #[error(transparent)]
    Join(#[from] crate::join::JoinError),
    /// A certificate or key cannot be used.
    #[error("{what} cannot be used: {reason}")]
    Certificate {
        /// Which certificate or key.
        what: String,
        /// Why.
        reason: String,
    },
    /// A call to the API server failed.
    #[error("{operation}")]
    Api {
        /// What was tried, on what.
        operation: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// The kubelet API cannot listen.
    #[error("cannot listen on {address}: is another node agent running?")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The container runtime did not answer.
    #[error("container runtime: {operation}")]
    Runtime {
        /// What was tried.
        operation: String,
        /// Why.
        #[source]
        source: Box<tonic::Status>,
    },
    /// Something took longer than it may.
    #[error("{what} took more than {seconds} s")]
    Deadline {
        /// What.
        what: String,
        /// How long it may take.
        seconds: u64,
    },
}

impl Error {
    /// An API call's failure.
    pub fn api(operation: impl Into<String>, source: kube::Error) -> Self {
        Self::Api { operation: operation.into(), source: Box::new(source) }
    }
}

/// Whether an API call failed because the server cannot be asked now, rather than because of what was asked.
pub fn is_away(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code == 429 || status.code >= 500,
        kube::Error::HyperError(_) | kube::Error::Service(_) | kube::Error::ReadEvents(_) => true,
        _ => false,
    }
}

/// An error and its causes in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if let Some(answer) = answer(cause) {
            // Its own words hold the whole answer as Rust shows it, and so do those of whatever wraps it.
            text = text.replace(&cause_text, &answer);
            push(&mut text, &answer);
            break;
        }
        push(&mut text, &cause_text);
        next = cause.source();
    }
    // What a server said may have any number of lines.
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Adds a cause that is not in the words of what it caused.
fn push(text: &mut String, cause: &str) {
    if !text.contains(cause) {
        text.push_str(if text.is_empty() { "" } else { ": " });
        text.push_str(cause);
    }
}

/// What the API server said, for people.
fn answer(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let boxed = || error.downcast_ref::<Box<kube::Error>>().map(AsRef::as_ref);
    match error.downcast_ref::<kube::Error>().or_else(boxed) {
        Some(kube::Error::Api(status)) => {
            Some(format!("the API server answered {}: {}", status.code, status.message))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_one_line() {
        let source = std::io::Error::other("first\nsecond\n\tthird");
        let error = Error::Read { what: "config", path: "/x".into(), source };
        assert_eq!(chain(&error), "cannot read config /x: first second third");
    }

    #[test]
    fn what_the_api_server_said_is_told_for_people() {
        let status = kube::core::Status::failure("Too many requests, please try again later.", "no JSON");
        let refused = || kube::Error::Api(status.clone().with_code(429).boxed());
        let told = "the API server answered 429: Too many requests, please try again later.";
        assert_eq!(
            chain(&Error::api("cannot read the node", refused())),
            format!("cannot read the node: {told}")
        );
        let watch = kube::runtime::watcher::Error::WatchStartFailed(refused());
        assert_eq!(chain(&watch), format!("failed to start watching object: {told}"));
    }
}
