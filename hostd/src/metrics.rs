//! Health and Prometheus metrics over HTTP on a local socket: `/healthz`, `/metrics`.

use crate::clock::Clock;
use crate::error::{Context, Result};
use crate::status::Status;
use atoll_spec::control::ServiceState;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::fmt::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, watch};

/// For one connection, however many requests it makes.
const CONNECTION: Duration = Duration::from_secs(30);
/// Connections at a time.
const CONNECTIONS: usize = 4;

/// Opens the socket, for root only.
pub fn listen(path: &Path) -> Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context("remove", path.display());
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).context("listen on", path.display())?;
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, mode).context("change the mode of", path.display())?;
    Ok(listener)
}

/// Answers until the task is dropped.
pub async fn serve(listener: UnixListener, status: watch::Receiver<Status>, data: std::path::PathBuf) {
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    // Connections live in this set, so they end with this task.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok(permit) = free.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "metrics: connection not accepted");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let (status, data) = (status.clone(), data.clone());
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(&request, &status.borrow(), &data);
                async move { Ok::<_, Infallible>(answer) }
            });
            let serving =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            // A client that breaks off or is slow only harms itself.
            let _ = tokio::time::timeout(CONNECTION, serving).await;
            drop(permit);
        });
    }
}

fn answer(request: &Request<Incoming>, status: &Status, data: &Path) -> Response<Full<Bytes>> {
    let (code, text) = match (request.method(), request.uri().path()) {
        (&http::Method::GET, "/metrics") => (StatusCode::OK, metrics(status, space(data))),
        (&http::Method::GET, "/healthz") => health(status),
        (&http::Method::GET, _) => (StatusCode::NOT_FOUND, "there are /metrics and /healthz\n".into()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = code;
    let kind = http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    response
}

fn health(status: &Status) -> (StatusCode, String) {
    if status.ready && status.problems.is_empty() {
        return (StatusCode::OK, "ok\n".into());
    }
    let mut text = String::from(if status.ready { "" } else { "not ready yet\n" });
    for problem in &status.problems {
        text += &format!("{}\n", problem.text);
    }
    (StatusCode::SERVICE_UNAVAILABLE, text)
}

/// Total and free bytes of the file system that holds `data`.
pub fn space(data: &Path) -> Option<(u64, u64)> {
    let stat = rustix::fs::statvfs(data).ok()?;
    Some((stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize))
}

/// Resident memory of this process in bytes.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    text.split(' ').nth(1)?.parse::<u64>().ok().map(|pages| pages * rustix::param::page_size() as u64)
}

struct Writer(String);

impl Writer {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        let escape = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}=\"{}\"", escape(v))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }
}

fn metrics(status: &Status, space: Option<(u64, u64)>) -> String {
    let mut out = Writer(String::new());
    out.family("atoll_host_info", "gauge", "The host; always 1.");
    out.sample("atoll_host_info", &[("system", &status.system), ("node", &status.node)], 1);
    out.gauge("atoll_host_ready", "Whether storage and network are up.", status.ready.into());
    let synchronised = matches!(status.clock, Clock::Synchronised { .. });
    out.gauge(
        "atoll_clock_synchronised",
        "Whether the clock is set from a time server.",
        synchronised.into(),
    );
    out.gauge("atoll_storage_persistent", "Whether data outlives a reboot.", status.persistent.into());
    out.gauge("atoll_problems", "Problems on the status screen.", status.problems.len() as u64);
    if let Some((total, free)) = space {
        out.gauge("atoll_data_bytes", "Size of the data file system.", total);
        out.gauge("atoll_data_free_bytes", "Free space of the data file system.", free);
    }
    out.family("atoll_link_carrier", "gauge", "Whether the link has a peer.");
    for link in &status.links {
        out.sample("atoll_link_carrier", &[("link", &link.name)], link.carrier.into());
    }
    out.family("atoll_link_addresses", "gauge", "Addresses of the link.");
    for link in &status.links {
        out.sample("atoll_link_addresses", &[("link", &link.name)], link.addresses.len() as u64);
    }
    out.family("atoll_service_ready", "gauge", "Whether the service is ready.");
    for service in &status.services {
        let ready = service.state == ServiceState::Ready;
        out.sample("atoll_service_ready", &[("service", &service.name)], ready.into());
    }
    out.family("atoll_service_restarts_total", "counter", "How often the service ended by itself.");
    for service in &status.services {
        out.sample("atoll_service_restarts_total", &[("service", &service.name)], service.restarts.into());
    }
    if let Some(agent) = &status.agent {
        out.gauge("atoll_node_ready", "Whether the cluster has the node as Ready.", agent.node_ready.into());
        out.gauge("atoll_pods_running", "Pods that run.", agent.pods_running.into());
    }
    if let Some(bytes) = resident() {
        out.gauge("process_resident_memory_bytes", "Resident memory of hostd.", bytes);
    }
    out.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{Area, LinkStatus};

    #[test]
    fn metrics_are_in_the_text_format() {
        let mut status = Status::new("Atoll \"0.1\"".into());
        status.links.push(LinkStatus { name: "eth0".into(), carrier: true, dhcp: true, addresses: vec![] });
        let text = metrics(&status, Some((100, 40)));
        assert!(text.contains("atoll_host_info{system=\"Atoll \\\"0.1\\\"\",node=\"\"} 1\n"), "{text}");
        assert!(text.contains("atoll_link_carrier{link=\"eth0\"} 1\n"), "{text}");
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(
                name.starts_with(|c: char| c.is_ascii_lowercase()) && value.parse::<u64>().is_ok(),
                "{line}"
            );
        }
    }

    #[tokio::test]
    async fn the_socket_is_for_root_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.sock");
        std::fs::write(&path, "left over").unwrap();
        let _listener = listen(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn health_says_what_is_wrong() {
        let mut status = Status::new("Atoll".into());
        assert_eq!(health(&status).0, StatusCode::SERVICE_UNAVAILABLE);
        status.ready = true;
        assert_eq!(health(&status), (StatusCode::OK, "ok\n".into()));
        status.set_problems(Area::Config, ["wrong".into()]);
        assert_eq!(health(&status), (StatusCode::SERVICE_UNAVAILABLE, "wrong\n".into()));
    }
}
