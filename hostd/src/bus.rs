//! Talks to init over D-Bus: translation only. Reports the services each time one changes.

use atoll_spec::control::{OBJECT_PATH, ServiceStatus};
use futures_util::StreamExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// For connecting and for each call.
const DEADLINE: Duration = Duration::from_secs(5);
/// Between two attempts to connect, at most.
const MAX_PAUSE: Duration = Duration::from_secs(30);

#[zbus::proxy(interface = "dev.atoll.Init1", default_path = "/dev/atoll/Init", assume_defaults = false)]
trait Init {
    fn list_services(&self) -> zbus::Result<Vec<ServiceStatus>>;

    #[zbus(signal)]
    fn service_changed(&self, status: ServiceStatus) -> zbus::Result<()>;
}

/// Reports services for ever; connects again when the connection ends.
pub async fn run(socket: PathBuf, changes: mpsc::Sender<Vec<ServiceStatus>>) {
    let mut pause = Duration::from_secs(1);
    loop {
        match follow(&socket, &changes).await {
            Ok(()) if changes.is_closed() => return,
            Ok(()) => pause = Duration::from_secs(1),
            Err(error) => tracing::debug!(%error, "no services from init"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

async fn follow(socket: &Path, changes: &mpsc::Sender<Vec<ServiceStatus>>) -> zbus::Result<()> {
    let late = || zbus::Error::Failure("init does not answer in time".into());
    let stream = timeout(DEADLINE, tokio::net::UnixStream::connect(socket)).await.map_err(|_| late())?;
    let stream = stream.and_then(tokio::net::UnixStream::into_std);
    let stream = stream.map_err(|error| zbus::Error::InputOutput(error.into()))?;
    let connecting = zbus::connection::Builder::unix_stream(stream).p2p().build();
    let connection = timeout(DEADLINE, connecting).await.map_err(|_| late())??;
    let init = InitProxy::builder(&connection).path(OBJECT_PATH).destination("dev.atoll.Init");
    let init = init.cache_properties(zbus::proxy::CacheProperties::No).build().await?;
    let mut signals = init.receive_service_changed().await?;
    let mut services = timeout(DEADLINE, init.list_services()).await.map_err(|_| late())??;
    loop {
        if changes.send(services.clone()).await.is_err() {
            return Ok(());
        }
        let Some(signal) = signals.next().await else { return Ok(()) };
        let changed = signal.args()?.status;
        match services.iter_mut().find(|s| s.name == changed.name) {
            Some(service) => *service = changed,
            None => services.push(changed),
        }
    }
}
