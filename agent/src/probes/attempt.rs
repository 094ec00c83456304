//! One attempt of a probe or a hook, with its deadline.

use super::{grpc, http};
use crate::cri::Cri;
use crate::pods::desired::Handler;
use std::time::Duration;
use tokio::net::TcpStream;
use tonic::{Code, Status};

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
            match get(&request, timeout).await {
                Ok(code) if (200..400).contains(&code) => Outcome::Success,
                Ok(code) => Outcome::Failure(format!("HTTP probe failed with statuscode: {code}")),
                Err(why) => Outcome::Failure(why),
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
        Handler::Unusable(why) => Outcome::Unknown(why.clone()),
    }
}

async fn get(request: &http::Request<'_>, timeout: Duration) -> Result<u16, String> {
    let url = request.url();
    match tokio::time::timeout(timeout, request.send()).await {
        Ok(answer) => answer.map_err(|why| format!("Get \"{url}\": {why}")),
        Err(_) => Err(format!("Get \"{url}\": no answer within {} s", timeout.as_secs())),
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
        Err(error) if timed_out(&error.status) => {
            Outcome::Failure(format!("command timed out: {command:?} timed out after {}s", timeout.as_secs()))
        }
        Err(error) => Outcome::Unknown(error.to_string()),
    }
}

/// Whether the command took too long. Not every runtime has a code for it; a runtime that cannot be reached says
/// nothing about the container, whatever the words.
fn timed_out(status: &Status) -> bool {
    let message = status.message();
    match status.code() {
        Code::DeadlineExceeded => return true,
        Code::Unavailable | Code::Cancelled => return false,
        _ => {}
    }
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
    match handler {
        Handler::Sleep(duration) => {
            tokio::time::sleep((*duration).min(limit)).await;
            return Ok(());
        }
        // A hook tells the container something: whatever it answers, it was told.
        Handler::Http { tls, host, port, path, headers } => {
            let address = if host.is_empty() { pod_ip } else { host };
            let request = http::Request { tls: *tls, host: address, port: *port, path, headers };
            return get(&request, limit).await.map(drop);
        }
        _ => {}
    }
    match probe(cri, id, pod_ip, handler, limit).await {
        Outcome::Success => Ok(()),
        Outcome::Failure(why) | Outcome::Unknown(why) => Err(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probes::http::answering;

    /// A runtime behind a socket that takes connections and never says anything.
    fn stalled(directory: &std::path::Path) -> (Cri, tokio::net::UnixListener) {
        let socket = directory.join("cri.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        (Cri::new(&socket), listener)
    }

    #[tokio::test]
    async fn hook_takes_any_answer_and_a_probe_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let (cri, _listener) = stalled(dir.path());
        for (status, healthy) in [("204 No Content", true), ("404 Not Found", false), ("500 Error", false)] {
            let (port, server) = answering(status, 2).await;
            let (host, path) = ("127.0.0.1".to_owned(), "/".to_owned());
            let handler = Handler::Http { tls: false, host, port, path, headers: Vec::new() };
            let limit = Duration::from_secs(30);
            assert_eq!(hook(&cri, "c", "", &handler, limit).await, Ok(()), "{status}");
            let probed = probe(&cri, "c", "", &handler, limit).await;
            assert_eq!(probed == Outcome::Success, healthy, "{status}: {probed:?}");
            server.await.unwrap();
            hook(&cri, "c", "", &handler, limit).await.expect_err("nobody listens any more");
        }
    }

    #[tokio::test]
    async fn handler_that_cannot_be_used_says_nothing_of_the_container_and_fails_a_hook() {
        let dir = tempfile::tempdir().unwrap();
        let (cri, _listener) = stalled(dir.path());
        let (handler, limit) = (Handler::Unusable("no such port".into()), Duration::from_secs(1));
        assert_eq!(probe(&cri, "c", "", &handler, limit).await, Outcome::Unknown("no such port".into()));
        assert_eq!(hook(&cri, "c", "", &handler, limit).await, Err("no such port".into()));
    }

    #[test]
    fn only_the_runtime_can_say_that_a_command_took_too_long() {
        assert!(timed_out(&Status::deadline_exceeded("")));
        assert!(timed_out(&Status::unknown("command timed out")));
        assert!(!timed_out(&Status::unavailable("the connection timed out")));
        assert!(!timed_out(&Status::internal("no such container")));
    }
}
