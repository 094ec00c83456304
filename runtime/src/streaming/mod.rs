//! The streaming server: exec, attach and port forwarding at one-time URLs.
//!
//! ```text
//! Exec RPC ─► token ─► URL ─► agent proxies ─► `server` ─► `spdy` or `websocket` ─► `remote`, `forward` ─► guest
//! ```
//!
//! `cri::stream` makes the URLs, the agent's kubelet API sends connections. Invariants: it listens on the loopback
//! address alone; a URL works once, for a minute, and cannot be guessed; a session ends its command when its peer
//! is gone.

mod forward;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod remote;
mod server;
pub mod spdy;
mod tokens;
mod websocket;

pub use server::serve;

use crate::error::{Error, Result};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokens::Tokens;
use tokio::net::TcpListener;

/// Which streams a session has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streams {
    /// Input.
    pub stdin: bool,
    /// Output.
    pub stdout: bool,
    /// Error output.
    pub stderr: bool,
    /// A terminal.
    pub tty: bool,
}

/// What a URL does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Job {
    /// Run a command.
    Exec {
        /// In which container.
        container: String,
        /// The command.
        command: Vec<String>,
        /// With which streams.
        streams: Streams,
    },
    /// Follow a container's own process.
    Attach {
        /// Which container.
        container: String,
        /// With which streams.
        streams: Streams,
    },
    /// Forward connections.
    PortForward {
        /// To which pod.
        sandbox: String,
        /// To which ports, for clients that do not name one per connection.
        ports: Vec<u16>,
    },
}

impl Job {
    fn verb(&self) -> &'static str {
        match self {
            Self::Exec { .. } => "exec",
            Self::Attach { .. } => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

/// Makes URLs and redeems them.
#[derive(Clone)]
pub struct Streaming {
    base: String,
    tokens: Arc<Mutex<Tokens>>,
}

impl Streaming {
    /// Opens the server's socket.
    pub async fn bind(address: SocketAddr) -> Result<(Self, TcpListener)> {
        let object = address.to_string();
        let listener = TcpListener::bind(address).await.map_err(Error::os("listen on", &object))?;
        let local = listener.local_addr().map_err(Error::os("listen on", &object))?;
        Ok((Self { base: format!("http://{local}"), tokens: Arc::default() }, listener))
    }

    /// Where the server listens.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// A URL that does the job once.
    pub fn url(&self, job: Job) -> Result<String> {
        let (verb, token) = (job.verb(), crate::service::random_hex()?);
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.put(token.clone(), job, std::time::Instant::now()).map_err(Error::State)?;
        Ok(format!("{}/{verb}/{token}", self.base))
    }

    fn redeem(&self, verb: &str, token: &str) -> Option<Job> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.take(token, std::time::Instant::now()).filter(|job| job.verb() == verb)
    }
}
