//! One attempt of a probe or a hook, with its deadline.

use super::{grpc, http};
use crate::cri::Cri;
use crate::pods::desired::Handler;
use std::time::Duration;
use tokio::net::TcpStream;
use tonic::Code;

/// Most of a probe's output that is shown.
const SHOWN: usize = 512;

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Healthy.
    Success,
    /// Not healthy, and why.
    Failure(String),
    /// It could not be asked.
    Unknown(String),
}

/// Asks once.
pub async fn probe(cri: &Cri, id: &str, pod_ip: &str, handler: &Handler, timeout: Duration) -> Outcome {
    match handler {
        Handler::Exec(command) => exec(cri, id, command, timeout).await,
        Handler::Http { tls, host, port, path, headers } => {
            let address = if host.is_empty() { pod_ip } else { host };
            let request = http::Request { tls: *tls, host: address, port: *port, path, headers };
            let url = request.url();
            match tokio::time::timeout(timeout, request.send()).await {
                Ok(Ok(code)) if (200..400).contains(&code) => Outcome::Success,
                Ok(Ok(code)) => Outcome::Failure(format!("HTTP probe failed with statuscode: {code}")),
                Ok(Err(why)) => Outcome::Failure(format!("Get \"{url}\": {why}")),
                Err(_) => {
                    Outcome::Failure(format!("Get \"{url}\": no answer within {} s", timeout.as_secs()))
                }
            }
        }
        Handler::Tcp { host, port } => {
            let address = if host.is_empty() { pod_ip } else { host };
            match tokio::time::timeout(timeout, TcpStream::connect((address, *port))).await {
                Ok(Ok(_)) => Outcome::Success,
                Ok(Err(why)) => Outcome::Failure(format!("dial tcp {address}:{port}: {why}")),
                Err(_) => Outcome::Failure(format!(
                    "dial tcp {address}:{port}: no answer within {} s",
                    timeout.as_secs()
                )),
            }
        }
        Handler::Grpc { port, service } => {
            match tokio::time::timeout(timeout, grpc::check(pod_ip, *port, service)).await {
                Ok(Ok(())) => Outcome::Success,
                Ok(Err(why)) => Outcome::Failure(why),
                Err(_) => {
                    Outcome::Failure(format!("gRPC on port {port}: no answer within {} s", timeout.as_secs()))
                }
            }
        }
        Handler::Sleep(_) => Outcome::Unknown("a probe cannot sleep".into()),
    }
}

async fn exec(cri: &Cri, id: &str, command: &[String], timeout: Duration) -> Outcome {
    match cri.exec_sync(id, command, timeout).await {
        Ok(done) if done.exit_code == 0 => Outcome::Success,
        Ok(done) => {
            let text = String::from_utf8_lossy(&done.output[..done.output.len().min(SHOWN)]).into_owned();
            Outcome::Failure(if text.trim().is_empty() {
                format!("exit code {}", done.exit_code)
            } else {
                text
            })
        }
        Err(error) if error.status.code() == Code::DeadlineExceeded || timed_out(error.status.message()) => {
            Outcome::Failure(format!("command timed out: {command:?} timed out after {}s", timeout.as_secs()))
        }
        Err(error) => Outcome::Unknown(error.to_string()),
    }
}

/// Not every runtime has a code for it.
fn timed_out(message: &str) -> bool {
    message.contains("timeout") || message.contains("timed out") || message.contains("deadline exceeded")
}

/// Runs a hook once.
///
/// # Errors
/// Why it failed.
pub async fn hook(
    cri: &Cri,
    id: &str,
    pod_ip: &str,
    handler: &Handler,
    limit: Duration,
) -> Result<(), String> {
    if let Handler::Sleep(duration) = handler {
        tokio::time::sleep((*duration).min(limit)).await;
        return Ok(());
    }
    match probe(cri, id, pod_ip, handler, limit).await {
        Outcome::Success => Ok(()),
        Outcome::Failure(why) | Outcome::Unknown(why) => Err(why),
    }
}
