//! hostd's side of the D-Bus connection, against an object that answers as init does.
#![expect(clippy::unwrap_used, reason = "in a test, what cannot go wrong ends it when it does")]

use atoll_spec::control::{OBJECT_PATH, ServiceState, ServiceStatus};
use std::time::Duration;
use tokio::time::timeout;

struct Init;

fn status(state: ServiceState) -> ServiceStatus {
    ServiceStatus {
        name: "agent".into(),
        state,
        pid: 7,
        since_ms: 1,
        restarts: 0,
        status: String::new(),
        last_failure: String::new(),
    }
}

#[zbus::interface(name = "dev.atoll.Init1")]
impl Init {
    fn list_services(&self) -> Vec<ServiceStatus> {
        vec![status(ServiceState::Starting)]
    }

    #[zbus(signal)]
    async fn service_changed(
        emitter: &zbus::object_server::SignalEmitter<'_>,
        status: ServiceStatus,
    ) -> zbus::Result<()>;
}

async fn accept(listener: &tokio::net::UnixListener) -> zbus::Connection {
    let (stream, _) = listener.accept().await.unwrap();
    let guid = zbus::Guid::generate();
    let builder = zbus::connection::Builder::unix_stream(stream.into_std().unwrap());
    builder.server(guid).p2p().serve_at(OBJECT_PATH, Init).build().await.unwrap()
}

#[tokio::test]
async fn services_are_followed_and_the_connection_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("bus.sock");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let (sender, mut services) = tokio::sync::mpsc::channel(8);
    let following = tokio::spawn(atoll_hostd::bus::run(socket, sender));
    let limit = Duration::from_secs(10);
    for _ in 0..2 {
        let init = timeout(limit, accept(&listener)).await.unwrap();
        let first = timeout(limit, services.recv()).await.unwrap().unwrap();
        assert_eq!(first, [status(ServiceState::Starting)]);
        let object = init.object_server().interface::<_, Init>(OBJECT_PATH).await.unwrap();
        Init::service_changed(object.signal_emitter(), status(ServiceState::Ready)).await.unwrap();
        let second = timeout(limit, services.recv()).await.unwrap().unwrap();
        assert_eq!(second, [status(ServiceState::Ready)]);
        init.close().await.unwrap();
    }
    following.abort();
}
