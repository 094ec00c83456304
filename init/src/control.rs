//! The D-Bus interface for hostd, translation only: each call becomes a [`Query`] to the event loop, which owns all
//! state and answers. See [`atoll_spec::control`] for the interface itself.
//!
//! One thread accepts, one thread per connection runs zbus on it, one sends signals. Only uid 0 gets in. None of them
//! can hold up the event loop: queues are bounded, and what does not fit is refused or left out.

use crate::console::Console;
use crate::error::{Error, Result};
use crate::sys;
use atoll_spec::control::{BootPhase, INTERFACE, LogLine, OBJECT_PATH, ServiceStatus, ShutdownAction};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

const CONNECTIONS: usize = 8;
const QUEUE: usize = 64;
/// How long the event loop may take to answer; it answers at once unless it is about to reboot the machine.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A peer that has not said who it is by then makes room when others want in.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// Who insists does not fill the console.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// Longest name or reason that is taken over; the rest is cut off.
const LONGEST_TEXT: usize = 512;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// All services.
    List,
    /// Start one.
    Start(String),
    /// Stop one.
    Stop(String),
    /// Stop and start one.
    Restart(String),
    /// The last lines of one's log.
    Logs(String, u32),
    /// End the machine's run, with a reason.
    Shutdown(ShutdownAction, String),
    /// The phases of the boot.
    Phases,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// It is done, or begun.
    Done,
    /// The services.
    Services(Vec<ServiceStatus>),
    /// Lines of a log.
    Lines(Vec<LogLine>),
    /// Phases of the boot.
    Phases(Vec<BootPhase>),
    /// No, and why.
    Refused(String),
}

/// A request and where its answer goes.
#[derive(Debug)]
pub struct Query {
    /// The request.
    pub request: Request,
    answer: SyncSender<Reply>,
}

impl Query {
    /// Answers.
    pub fn answer(self, reply: Reply) {
        // Whoever asked may have gone.
        let _ = self.answer.try_send(reply);
    }
}

/// The event loop's side of the interface.
#[derive(Debug)]
pub struct Bus {
    queries: Receiver<Query>,
    wake: Arc<OwnedFd>,
    changes: SyncSender<ServiceStatus>,
}

#[derive(Clone)]
struct Asker {
    queries: SyncSender<Query>,
    wake: Arc<OwnedFd>,
}

type Connections = Arc<Mutex<Vec<zbus::Connection>>>;

impl Bus {
    /// Makes the socket and starts the threads.
    ///
    /// # Errors
    /// When either cannot be made.
    pub fn start(path: &Path, console: &Console) -> Result<Self> {
        let name = path.display().to_string();
        // Left by a run before, in tests only: /run is new at each boot.
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).map_err(Error::file("make the socket", &name))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .map_err(Error::file("close to all but root", &name))?;
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let wake = rustix::event::eventfd(0, flags).map_err(Error::system("make an event descriptor"))?;
        let wake = Arc::new(wake);
        let (queries, asked) = sync_channel(QUEUE);
        let (changes, changed) = sync_channel(QUEUE);
        let connections = Connections::default();
        let asker = Asker { queries, wake: wake.clone() };
        let (console, accepted) = (console.clone(), connections.clone());
        thread("bus", move || accept(&listener, &asker, &accepted, &console))?;
        thread("bus-signals", move || send_signals(&changed, &connections))?;
        Ok(Self { queries: asked, wake, changes })
    }

    /// The next request; `None` when there is none.
    pub fn next(&self) -> Option<Query> {
        // Only counts wake-ups; empty is fine.
        let _ = rustix::io::read(&*self.wake, &mut [0_u8; 8]);
        self.queries.try_recv().ok()
    }

    /// Signals a change to all who are connected.
    pub fn announce(&self, status: ServiceStatus) {
        // Listeners that do not keep up ask for the list when they need the truth.
        let _ = self.changes.try_send(status);
    }
}

impl AsFd for Bus {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map(drop)
        .map_err(Error::system("start a thread of the control interface"))
}

/// A connection, from its acceptance to its end.
struct Peer {
    /// Held by the connection's thread for as long as it runs.
    stream: Weak<UnixStream>,
    since: Instant,
    greeted: Arc<AtomicBool>,
}

impl Peer {
    /// Ends it when it holds a place and does not say who it is. Its thread then ends by itself.
    fn hurry(&self) {
        if !self.greeted.load(Ordering::Relaxed)
            && self.since.elapsed() >= HANDSHAKE_WITHIN
            && let Some(stream) = self.stream.upgrade()
        {
            // It may have gone by itself in the meantime.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

fn accept(listener: &UnixListener, asker: &Asker, connections: &Connections, console: &Console) {
    let mut peers: Vec<Peer> = Vec::new();
    let mut told = None;
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // Out of descriptors or memory: no use in spinning.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        match sys::peer_uid(stream.as_fd()) {
            Ok(0) => {}
            Ok(uid) => {
                console.say(format!("control: refused a connection of uid {uid}: root only"));
                continue;
            }
            Err(_) => continue,
        }
        peers.retain(|peer| peer.stream.strong_count() > 0);
        if peers.len() >= CONNECTIONS {
            if told.is_none_or(|at: Instant| at.elapsed() >= TELL_EVERY) {
                console.say(format!("control: refused a connection: there are {CONNECTIONS} already"));
                told = Some(Instant::now());
            }
            peers.iter().for_each(Peer::hurry);
            continue;
        }
        let Ok(copy) = stream.try_clone() else { continue };
        let (held, greeted) = (Arc::new(copy), Arc::new(AtomicBool::new(false)));
        peers.push(Peer { stream: Arc::downgrade(&held), since: Instant::now(), greeted: greeted.clone() });
        let (asker, connections, console) = (asker.clone(), connections.clone(), console.clone());
        // When there is no thread for it, all of this is dropped, and the connection with it.
        let _ = thread("bus-peer", move || {
            if let Err(error) = zbus::block_on(serve(stream, asker, &connections, &greeted)) {
                console.say(format!("control: a connection failed: {error}"));
            }
            drop(held);
        });
    }
}

async fn serve(
    stream: UnixStream,
    asker: Asker,
    connections: &Connections,
    greeted: &AtomicBool,
) -> zbus::Result<()> {
    let connection = zbus::connection::Builder::unix_stream(stream)
        .server(zbus::Guid::generate())
        .p2p()
        .serve_at(OBJECT_PATH, Interface { asker })
        .build()
        .await?;
    greeted.store(true, Ordering::Relaxed);
    let list = || connections.lock().unwrap_or_else(PoisonError::into_inner);
    list().push(connection.clone());
    connection.closed().await;
    list().retain(|other| !other.is_closed());
    Ok(())
}

fn send_signals(changed: &Receiver<ServiceStatus>, connections: &Connections) {
    for status in changed {
        let list = connections.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for connection in list.into_iter().filter(|connection| !connection.is_closed()) {
            let body = (&status,);
            let signal =
                connection.emit_signal(None::<&str>, OBJECT_PATH, INTERFACE, "ServiceChanged", &body);
            // A peer that has gone away is noticed by its own thread.
            let _ = zbus::block_on(signal);
        }
    }
}

impl Asker {
    fn ask(&self, request: Request) -> zbus::fdo::Result<Reply> {
        let (answer, answered) = sync_channel(1);
        let busy = |_| zbus::fdo::Error::LimitsExceeded("init is busy: try again".into());
        self.queries.try_send(Query { request, answer }).map_err(|_| busy(()))?;
        // A full counter means that the event loop is woken already.
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        match answered.recv_timeout(ANSWER_WITHIN) {
            Ok(Reply::Refused(why)) => Err(zbus::fdo::Error::InvalidArgs(why)),
            Ok(reply) => Ok(reply),
            Err(_) => Err(zbus::fdo::Error::Timeout("init did not answer in time".into())),
        }
    }

    fn do_it(&self, request: Request) -> zbus::fdo::Result<()> {
        self.ask(request).map(drop)
    }
}

fn unexpected<T>() -> zbus::fdo::Result<T> {
    Err(zbus::fdo::Error::Failed("init gave the answer to another question: a defect of init".into()))
}

/// What a peer sends ends up in lines on the console and in a file: one line, of bounded length.
fn bounded(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(LONGEST_TEXT).collect()
}

struct Interface {
    asker: Asker,
}

#[zbus::interface(name = "dev.atoll.Init1")]
impl Interface {
    fn list_services(&self) -> zbus::fdo::Result<Vec<ServiceStatus>> {
        match self.asker.ask(Request::List)? {
            Reply::Services(services) => Ok(services),
            _ => unexpected(),
        }
    }

    fn start_service(&self, name: String) -> zbus::fdo::Result<()> {
        self.asker.do_it(Request::Start(bounded(&name)))
    }

    fn stop_service(&self, name: String) -> zbus::fdo::Result<()> {
        self.asker.do_it(Request::Stop(bounded(&name)))
    }

    fn restart_service(&self, name: String) -> zbus::fdo::Result<()> {
        self.asker.do_it(Request::Restart(bounded(&name)))
    }

    fn logs(&self, name: String, lines: u32) -> zbus::fdo::Result<Vec<LogLine>> {
        match self.asker.ask(Request::Logs(bounded(&name), lines))? {
            Reply::Lines(lines) => Ok(lines),
            _ => unexpected(),
        }
    }

    fn reboot(&self, reason: String) -> zbus::fdo::Result<()> {
        self.asker.do_it(Request::Shutdown(ShutdownAction::Reboot, bounded(&reason)))
    }

    fn power_off(&self, reason: String) -> zbus::fdo::Result<()> {
        self.asker.do_it(Request::Shutdown(ShutdownAction::PowerOff, bounded(&reason)))
    }

    fn boot_phases(&self) -> zbus::fdo::Result<Vec<BootPhase>> {
        match self.asker.ask(Request::Phases)? {
            Reply::Phases(phases) => Ok(phases),
            _ => unexpected(),
        }
    }

    #[zbus(signal)]
    async fn service_changed(
        emitter: &zbus::object_server::SignalEmitter<'_>,
        status: ServiceStatus,
    ) -> zbus::Result<()>;
}
