//! Builds the daemon from its settings, runs it, drains it.
//!
//! Called by `main` and, with a host of their own, by tests. Invariant: the CRI socket is opened last, when everything that
//! a request needs stands; it is closed first.

use crate::config::Config;
use crate::cri::Cri;
use crate::error::{Error, Result};
use crate::images::{ImageStore, StoreOptions};
use crate::roots::Roots;
use crate::server;
use crate::service::{Owner, Service, Shared};
use crate::streaming::{self, Streaming};
use crate::vm::guest::Door;
use crate::vm::host::{Host, LinuxHost};
use crate::vm::jail;
use crate::vm::launch::Launcher;
use crate::vm::scratch::{self, Scratch};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinHandle;

/// How long open requests may take to end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// Events that a slow listener may be behind.
const EVENTS: usize = 1024;

/// A running daemon.
pub struct App {
    stop: watch::Sender<bool>,
    tasks: Vec<(&'static str, JoinHandle<()>)>,
    /// Where the streaming server listens.
    pub streaming: String,
}

impl App {
    /// Starts the daemon on Linux.
    pub async fn start(config: Config) -> Result<Self> {
        if let Err(error) = jail::enable_controllers(&config.cgroup) {
            // Status says so, too, as soon as a pod is tried; images can be served without.
            tracing::error!(%error, "pods cannot run");
        }
        let host = Arc::new(LinuxHost::new(&config));
        if let Err(why) = host.check() {
            tracing::error!(why, "pods cannot run");
        } else {
            host.hold_machine();
        }
        Self::start_on(config, host).await
    }

    /// Starts the daemon on any host.
    pub async fn start_on(config: Config, host: Arc<dyn Host>) -> Result<Self> {
        for directory in [config.sandboxes(), config.vm_sockets()] {
            make_private(&directory)?;
        }
        let scratch_mib = scratch::most_mib(config.scratch_mib, &config.data)?;
        let images = ImageStore::open(store_options(&config)).await?;
        let door = Door::default();
        let (news_sender, news) = mpsc::channel(256);
        let launcher = Arc::new(Launcher {
            host: host.clone(),
            door: door.clone(),
            scratch: Scratch::new(&config.mkfs_ext4, &config.sandboxes(), scratch_mib),
            news: news_sender,
        });
        let (stop, stopped) = watch::channel(false);
        let (events, _) = broadcast::channel(EVENTS);
        let shared = Arc::new(Shared {
            roots: Arc::new(Roots::new(&config)),
            config: config.clone(),
            images,
            launcher: launcher.clone(),
            events,
        });
        let (service, commands) = Service::new(shared.clone());
        let (streaming, streaming_listener) = Streaming::bind(config.streaming).await?;
        let mut owner = Owner::new(shared);
        owner.recover().await?;

        let guests = tokio::spawn(door.serve(host.listen()));
        let owner = tokio::spawn(owner.run(commands, news, stopped.clone()));
        let template = tokio::spawn(async move {
            // Early, so that the first pod does not wait for it; that pod reports an error.
            if let Err(error) = launcher.scratch.prepare().await {
                tracing::error!(%error, "cannot prepare scratch disks");
            }
        });
        let base = streaming.base().to_owned();
        let sessions =
            streaming::serve(streaming_listener, streaming.clone(), service.clone(), stopped.clone());
        let sessions = tokio::spawn(sessions);
        let listener = server::bind(&config.socket, config.socket_gid)?;
        let served = tokio::spawn(server::serve(listener, Cri::new(service, streaming), stopped));
        // For whoever carries the streams elsewhere; the address says nothing, the URLs' tokens do.
        let address = config.socket.with_file_name("streaming.addr");
        if let Err(error) = std::fs::write(&address, base.trim_start_matches("http://")) {
            tracing::warn!(%error, "cannot write {}", address.display());
        }
        tracing::info!(socket = %config.socket.display(), streaming = base, "serving CRI");
        let tasks = vec![
            ("CRI server", served),
            ("streaming server", sessions),
            ("service", owner),
            ("scratch template", template),
            ("guest door", guests),
        ];
        Ok(Self { stop, tasks, streaming: base })
    }

    /// Lets open requests end, then stops. Pods go on.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        let deadline = tokio::time::Instant::now() + DRAIN_DEADLINE;
        for (name, mut task) in self.tasks {
            // The door and the template have no end of their own.
            if matches!(name, "guest door" | "scratch template") {
                task.abort();
            } else if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                tracing::warn!(task = name, "did not end in time, cut off");
                task.abort();
            }
        }
    }
}

/// A directory for root alone: records hold the environment of containers, which may hold secrets.
fn make_private(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).map_err(Error::io("make", directory))?;
    std::fs::set_permissions(directory, PermissionsExt::from_mode(0o700))
        .map_err(Error::io("set mode of", directory))
}

fn store_options(config: &Config) -> StoreOptions {
    StoreOptions {
        registries: config.registries.clone(),
        mkfs_erofs: config.mkfs_erofs.clone(),
        system_ca: config.system_ca.clone(),
        helper: Path::new("/proc/self/exe").to_owned(),
        helper_uid: (config.unpack_uid != 0).then_some(config.unpack_uid),
        ..StoreOptions::new(config.data.join("images"))
    }
}
