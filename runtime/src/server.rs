//! The CRI socket: who may use it, and how it ends.
//!
//! Called by `app`. Invariant: the socket belongs to root and one group, nobody else, before anyone can connect.

use crate::cri::Cri;
use crate::error::{Error, Result};
use atoll_cri::{ImageServiceServer, RuntimeServiceServer};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener as StdListener;
use std::path::Path;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

/// Largest message, as container runtimes have it.
const MAX_MESSAGE: usize = 16 << 20;

/// Opens the socket for root and `gid`.
pub fn bind(path: &Path, gid: u32) -> Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(Error::io("make", parent))?;
    }
    // Made under another name, so that nobody connects before the mode is right; the rename replaces a dead one's.
    let new = path.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", &new)(e)),
        _ => {}
    }
    let listener = StdListener::bind(&new).map_err(Error::io("listen on", &new))?;
    listener.set_nonblocking(true).map_err(Error::io("listen on", &new))?;
    if rustix::process::geteuid().is_root() {
        chown(&new, None, Some(gid)).map_err(Error::io("give to its group", &new))?;
    }
    std::fs::set_permissions(&new, PermissionsExt::from_mode(0o660))
        .map_err(Error::io("set mode of", &new))?;
    std::fs::rename(&new, path).map_err(Error::io("rename to", path))?;
    UnixListener::from_std(listener).map_err(Error::io("listen on", path))
}

/// Serves until `stop` says so and open requests have ended.
pub async fn serve(listener: UnixListener, cri: Cri, mut stop: watch::Receiver<bool>) {
    let runtime = RuntimeServiceServer::new(cri.clone())
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let images = ImageServiceServer::new(cri)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let stopped = async move { drop(stop.wait_for(|s| *s).await) };
    let served = Server::builder()
        .add_service(runtime)
        .add_service(images)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped);
    if let Err(error) = served.await {
        tracing::error!(%error, "the CRI server ended");
    }
}
