//! The runtime's end of the connections that a guest dials: control calls, events, streams.
//!
//! One [`GuestLink`] per sandbox, found by the [`Door`] through the vsock address that the kernel vouches for. Called
//! by everything that talks to a guest. Invariants: a call is answered, or fails, within its deadline; a call that was in
//! flight when the connection broke fails (it may have been done); later calls wait for the guest to dial again; a
//! stream goes to the one who asked for its number, and to nobody else.

use crate::error::{Error, Result, within};
use crate::vm::wire::{self, GuestStream};
use atoll_spec::guest::{Call, Event, FromGuest, GuestError, Hello, PROTOCOL, Reply, Request};
use atoll_spec::ids::SandboxId;
use atoll_spec::units::GuestCid;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;

/// Time for the first frame of a connection.
const HELLO_DEADLINE: Duration = Duration::from_secs(20);
/// Time between an answer and the stream that it promised; the guest dials before it answers.
const STREAM_DEADLINE: Duration = Duration::from_secs(20);
/// Most connections of one guest that have not said hello, or wait to become its control connection.
const MOST_GREETED: usize = 64;
/// Least time between two control connections of one guest.
const CONTROL_PACE: Duration = Duration::from_millis(20);

/// What a guest says unasked.
#[derive(Debug)]
pub enum GuestNews {
    /// The control connection is there (again).
    Connected {
        /// Which guest.
        sandbox: SandboxId,
        /// The guest's clock when it was ready, microseconds.
        ready_us: u64,
        /// How many connections there have been, this one included.
        generation: u64,
    },
    /// Something happened.
    Event {
        /// Which guest.
        sandbox: SandboxId,
        /// Its number.
        sequence: u64,
        /// What.
        event: Event,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Connected(u64),
    Dead,
}

type Answer = std::result::Result<Reply, GuestError>;

#[derive(Default)]
struct Inner {
    generation: u64,
    next_id: u64,
    control: Option<mpsc::Sender<Vec<u8>>>,
    pending: HashMap<u64, oneshot::Sender<Answer>>,
    streams: HashMap<u64, oneshot::Sender<GuestStream>>,
}

/// The link to one guest.
pub struct GuestLink {
    sandbox: SandboxId,
    greeted: Arc<Semaphore>,
    /// When the last control connection was taken.
    pace: tokio::sync::Mutex<Option<tokio::time::Instant>>,
    /// How often the guest did what guests do not do.
    offences: AtomicU64,
    inner: Mutex<Inner>,
    phase: watch::Sender<Phase>,
    news: mpsc::Sender<GuestNews>,
}

impl GuestLink {
    /// A link that waits for its guest.
    pub fn new(sandbox: SandboxId, news: mpsc::Sender<GuestNews>) -> Arc<Self> {
        let inner = Inner { next_id: first_number(), ..Inner::default() };
        Arc::new(Self {
            sandbox,
            greeted: Arc::new(Semaphore::new(MOST_GREETED)),
            pace: tokio::sync::Mutex::default(),
            offences: AtomicU64::new(0),
            inner: Mutex::new(inner),
            phase: watch::Sender::new(Phase::Waiting),
            news,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what the guest did wrong, less and less often: a hostile guest must not fill the log.
    fn complain(&self, why: &str) {
        let count = self.offences.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::warn!(sandbox = %self.sandbox, count, "{why}");
        }
    }

    fn lost(&self, why: &str) -> Error {
        Error::Lost { sandbox: self.sandbox.to_string(), why: why.to_owned() }
    }

    /// Waits for the control connection.
    pub async fn connected(&self, deadline: Duration) -> Result<()> {
        let mut phase = self.phase.subscribe();
        let wait = phase.wait_for(|p| !matches!(p, Phase::Waiting));
        let what = || format!("waiting for the guest of sandbox {}", self.sandbox);
        match within(deadline, what, wait).await?.map(|p| *p) {
            Ok(Phase::Connected(_)) => Ok(()),
            _ => Err(self.lost("it has ended")),
        }
    }

    /// The VM is gone: every call fails from now on.
    pub fn close(&self) {
        self.phase.send_replace(Phase::Dead);
        let mut inner = self.lock();
        inner.control = None;
        inner.pending.clear();
        inner.streams.clear();
    }

    /// Whether the VM is gone.
    pub fn is_closed(&self) -> bool {
        *self.phase.borrow() == Phase::Dead
    }

    /// One call.
    pub async fn call(&self, call: Call, deadline: Duration) -> Result<Reply> {
        let what = call_name(&call);
        let work = async {
            self.connected(deadline).await?;
            let (id, answer, control) = self.register()?;
            let request = wire::frame(&Request { id, call }).map_err(|e| Error::Invalid(e.to_string()))?;
            control.send(request).await.map_err(|_| self.lost("the connection broke"))?;
            answer.await.map_err(|_| self.lost("the connection broke during a call"))
        };
        let answer =
            within(deadline, || format!("{what} in the guest of sandbox {}", self.sandbox), work).await??;
        answer.map_err(|e| Error::Guest {
            sandbox: self.sandbox.to_string(),
            kind: e.kind,
            message: e.message,
        })
    }

    fn register(&self) -> Result<(u64, oneshot::Receiver<Answer>, mpsc::Sender<Vec<u8>>)> {
        let mut inner = self.lock();
        let control = inner.control.clone().ok_or_else(|| self.lost("the connection broke"))?;
        inner.next_id += 1;
        let id = inner.next_id;
        let (sender, receiver) = oneshot::channel();
        // Answers that nobody awaits any more leave when their caller is gone.
        inner.pending.retain(|_, waiting| !waiting.is_closed());
        inner.pending.insert(id, sender);
        Ok((id, receiver, control))
    }

    /// A number for a stream that the guest is about to be asked for, and the stream when it comes.
    pub fn expect_stream(&self) -> (u64, Expected) {
        let mut inner = self.lock();
        inner.next_id += 1;
        let number = inner.next_id;
        let (sender, receiver) = oneshot::channel();
        inner.streams.retain(|_, waiting| !waiting.is_closed());
        inner.streams.insert(number, sender);
        (number, Expected { receiver, sandbox: self.sandbox.clone(), number })
    }

    /// A stream that the guest was asked for before a restart of the runtime.
    pub fn expect_number(&self, number: u64) -> Expected {
        let (sender, receiver) = oneshot::channel();
        self.lock().streams.insert(number, sender);
        Expected { receiver, sandbox: self.sandbox.clone(), number }
    }

    /// A call that names a stream, and the stream.
    pub async fn call_for_stream(
        &self,
        make: impl FnOnce(u64) -> Call,
        deadline: Duration,
    ) -> Result<(Reply, GuestStream)> {
        let (number, stream) = self.expect_stream();
        let reply = self.call(make(number), deadline).await?;
        Ok((reply, stream.take().await?))
    }

    /// Takes a control connection: reads it until it ends. A newer one replaces it.
    pub(super) async fn serve(self: Arc<Self>, stream: GuestStream, ready_us: u64) {
        let (from, mut to) = tokio::io::split(stream);
        let mut from = BufReader::new(from);
        let (sender, mut outgoing) = mpsc::channel::<Vec<u8>>(16);
        let generation = {
            let mut inner = self.lock();
            inner.generation += 1;
            inner.pending.clear();
            inner.control = Some(sender);
            inner.generation
        };
        let alive = self.phase.send_if_modified(|phase| {
            let alive = *phase != Phase::Dead;
            if alive {
                *phase = Phase::Connected(generation);
            }
            alive
        });
        let news = GuestNews::Connected { sandbox: self.sandbox.clone(), ready_us, generation };
        if !alive || self.news.send(news).await.is_err() {
            return;
        }
        let write = async move {
            while let Some(bytes) = outgoing.recv().await {
                to.write_all(&bytes).await?;
                to.flush().await?;
            }
            Ok::<(), std::io::Error>(())
        };
        let read = async {
            while let Some(message) = wire::read_frame::<FromGuest>(&mut from).await? {
                if !self.take(message).await {
                    break;
                }
            }
            Ok::<(), std::io::Error>(())
        };
        // Either end of the connection ends both; neither future is used again, so cancelling one loses nothing.
        let result = tokio::select! { r = write => r, r = read => r };
        if let Err(error) = result {
            self.complain(&format!("connection to the guest broke: {error}"));
        }
        let mut inner = self.lock();
        if inner.generation == generation {
            inner.control = None;
            inner.pending.clear();
            drop(inner);
            self.phase.send_if_modified(|phase| {
                let ours = *phase == Phase::Connected(generation);
                if ours {
                    *phase = Phase::Waiting;
                }
                ours
            });
        }
    }

    /// Routes one message; `false` when the runtime is stopping.
    async fn take(&self, message: FromGuest) -> bool {
        match message {
            FromGuest::Answer { id, result } => {
                if let Some(waiting) = self.lock().pending.remove(&id) {
                    let _ = waiting.send(result); // the caller may have given up
                }
                true
            }
            FromGuest::Event { sequence, event } => self
                .news
                .send(GuestNews::Event { sandbox: self.sandbox.clone(), sequence, event })
                .await
                .is_ok(),
        }
    }

    /// Nobody waits for anything.
    #[cfg(any(test, fuzzing))]
    pub(super) fn is_empty(&self) -> bool {
        let inner = self.lock();
        inner.pending.is_empty() && inner.streams.is_empty() && inner.control.is_none()
    }

    fn deliver(&self, number: u64, stream: GuestStream) {
        match self.lock().streams.remove(&number) {
            Some(waiting) => drop(waiting.send(stream)),
            None => {
                self.complain(&format!("the guest dialled stream {number}, which nobody asked for"));
            }
        }
    }
}

/// A stream that is on its way.
pub struct Expected {
    receiver: oneshot::Receiver<GuestStream>,
    sandbox: SandboxId,
    number: u64,
}

impl Expected {
    /// What the guest was, or will be, asked for it by.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The stream. To be called after the answer, before which the guest dials.
    pub async fn take(self) -> Result<GuestStream> {
        let what = || format!("a stream from the guest of sandbox {}", self.sandbox);
        let sandbox = self.sandbox.to_string();
        let lost = |_| Error::Lost { sandbox, why: "the stream did not come".to_owned() };
        within(STREAM_DEADLINE, what, self.receiver).await?.map_err(lost)
    }
}

/// Numbers start at the clock, so that a restarted runtime does not use those of its predecessor again.
fn first_number() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as u64 * 1000
}

fn call_name(call: &Call) -> &'static str {
    match call {
        Call::Configure(_) => "Configure",
        Call::CreateContainer(_) => "CreateContainer",
        Call::StartContainer { .. } => "StartContainer",
        Call::SignalContainer { .. } => "SignalContainer",
        Call::RemoveContainer { .. } => "RemoveContainer",
        Call::OpenStdio { .. } => "OpenStdio",
        Call::AckOutput { .. } => "AckOutput",
        Call::UpdateLimits { .. } => "UpdateLimits",
        Call::Exec(_) => "Exec",
        Call::KillExec { .. } => "KillExec",
        Call::PublishTree { .. } => "PublishTree",
        Call::ReadFile { .. } => "ReadFile",
        Call::Stats => "Stats",
        Call::List => "List",
        Call::AckEvents { .. } => "AckEvents",
        Call::PowerOff => "PowerOff",
    }
}

/// A connection that has just been accepted, and who it is from.
pub type Dialled = (GuestCid, GuestStream);

/// Where guests dial in; finds the link of each.
#[derive(Clone, Default)]
pub struct Door {
    links: Arc<Mutex<HashMap<GuestCid, Arc<GuestLink>>>>,
}

impl Door {
    fn lock(&self) -> MutexGuard<'_, HashMap<GuestCid, Arc<GuestLink>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on `cid` is this guest.
    pub fn admit(&self, cid: GuestCid, link: Arc<GuestLink>) {
        self.lock().insert(cid, link);
    }

    /// Forgets a guest.
    pub fn forget(&self, cid: GuestCid) {
        self.lock().remove(&cid);
    }

    /// Serves connections until the sender of `incoming` is gone; dropping this future breaks them all.
    pub async fn serve(self, mut incoming: mpsc::Receiver<Dialled>) {
        let mut connections = JoinSet::new();
        while let Some((cid, stream)) = incoming.recv().await {
            while connections.try_join_next().is_some() {}
            let link = self.lock().get(&cid).cloned();
            match link {
                Some(link) => match link.greeted.clone().try_acquire_owned() {
                    Ok(place) => drop(connections.spawn(greet(link, stream, place))),
                    Err(_) => link.complain("the guest has too many connections open that say nothing"),
                },
                None => tracing::warn!(cid = cid.get(), "refused a connection from an unknown guest"),
            }
        }
    }
}

async fn greet(link: Arc<GuestLink>, mut stream: GuestStream, place: OwnedSemaphorePermit) {
    let hello = tokio::time::timeout(HELLO_DEADLINE, wire::read_frame::<Hello>(&mut stream)).await;
    match hello {
        Ok(Ok(Some(Hello::Control { protocol: PROTOCOL, ready_us }))) => {
            let mut last = link.pace.lock().await;
            if let Some(last) = *last {
                tokio::time::sleep_until(last + CONTROL_PACE).await;
            }
            *last = Some(tokio::time::Instant::now());
            drop((last, place));
            link.serve(stream, ready_us).await;
        }
        Ok(Ok(Some(Hello::Control { protocol, .. }))) => {
            link.complain(&format!(
                "refused a guest that speaks protocol {protocol}: its initramfs is of another release"
            ));
        }
        Ok(Ok(Some(Hello::Stream { stream: number }))) => link.deliver(number, stream),
        Ok(Ok(None)) => {}
        Ok(Err(error)) => link.complain(&format!("unreadable hello: {error}")),
        Err(_) => link.complain("no hello in time"),
    }
}
