//! A guest whose programs are a few words: `echo TEXT`, `exit CODE`, `cat`, `sleep`, `stubborn`, `immortal`, `spew BYTES`, `sizes`, and
//! as a container's own program `flow BYTES`, which keeps to the window.

use super::{Exchange, FakeVmm, Fault};
use atoll_runtime::vm::wire::{read_frame, read_packet, write_packets};
use atoll_spec::guest::*;
use atoll_spec::ids::ContainerId;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

struct Container {
    spec: ContainerSpec,
    phase: ContainerPhase,
    signal: watch::Sender<i32>,
}

#[derive(Default)]
struct State {
    containers: BTreeMap<ContainerId, Container>,
    events: Vec<(u64, Event)>,
    sequence: u64,
    trees: BTreeMap<String, usize>,
}

#[derive(Clone)]
struct Guest {
    exchange: Exchange,
    vmm: FakeVmm,
    state: Arc<Mutex<State>>,
    out: Arc<Mutex<Option<mpsc::UnboundedSender<FromGuest>>>>,
}

/// Boots: dials, serves, dials again when the connection breaks, until its VM ends.
pub async fn run(exchange: Exchange, vmm: FakeVmm) {
    let guest = Guest { exchange, vmm: vmm.clone(), state: Arc::default(), out: Arc::default() };
    let life = async {
        loop {
            let mut stream = guest.exchange.dial(guest.vmm.cid).await;
            if send(&mut stream, &Hello::Control { protocol: PROTOCOL, ready_us: 1 }).await.is_ok() {
                guest.serve(stream).await;
            }
        }
    };
    tokio::select! { () = life => {}, () = vmm.ended() => {} }
}

/// Dials, takes whatever it is asked, and never answers.
pub async fn mute(exchange: Exchange, vmm: FakeVmm) {
    let life = async {
        let mut stream = exchange.dial(vmm.cid).await;
        let hello = send(&mut stream, &Hello::Control { protocol: PROTOCOL, ready_us: 1 }).await;
        while hello.is_ok() && stream.read(&mut [0; 4096]).await.is_ok_and(|count| count > 0) {}
        std::future::pending::<()>().await;
    };
    tokio::select! { () = life => {}, () = vmm.ended() => {} }
}

async fn send(to: &mut (impl AsyncWriteExt + Unpin), message: &impl serde::Serialize) -> std::io::Result<()> {
    to.write_all(&atoll_runtime::vm::wire::frame(message)?).await
}

impl Guest {
    async fn serve(&self, stream: UnixStream) {
        let (mut from, mut to) = stream.into_split();
        let (out, mut outgoing) = mpsc::unbounded_channel();
        for (sequence, event) in self.state.lock().unwrap().events.clone() {
            let _ = out.send(FromGuest::Event { sequence, event });
        }
        *self.out.lock().unwrap() = Some(out.clone());
        let write = tokio::spawn(async move {
            while let Some(message) = outgoing.recv().await {
                if send(&mut to, &message).await.is_err() {
                    return;
                }
            }
        });
        while let Ok(Some(Request { id, call })) = read_frame::<Request>(&mut from).await {
            let breaks = match call {
                Call::AckOutput { .. } => self.vmm.happens(Fault::Receipt),
                Call::StartContainer { .. } => self.vmm.happens(Fault::Start),
                Call::PublishTree { .. } => self.vmm.happens(Fault::Publish),
                _ => false,
            };
            if breaks {
                break;
            }
            let (guest, out) = (self.clone(), out.clone());
            tokio::spawn(async move {
                let result = guest.call(call).await;
                let _ = out.send(FromGuest::Answer { id, result });
            });
        }
        write.abort();
    }

    async fn stream(&self, number: u64) -> UnixStream {
        let mut stream = self.exchange.dial(self.vmm.cid).await;
        send(&mut stream, &Hello::Stream { stream: number }).await.unwrap();
        stream
    }

    async fn call(&self, call: Call) -> Result<Reply, GuestError> {
        match call {
            Call::Configure(_) | Call::UpdateLimits { .. } => Ok(Reply::Done),
            Call::CreateContainer(spec) => {
                let container =
                    Container { phase: ContainerPhase::Created, signal: watch::Sender::new(0), spec: *spec };
                self.state.lock().unwrap().containers.insert(container.spec.container.clone(), container);
                self.vmm.containers.fetch_add(1, SeqCst);
                Ok(Reply::Done)
            }
            Call::AckOutput { stdout, stderr, .. } => {
                self.vmm.acknowledged.store(stdout + stderr, SeqCst);
                Ok(Reply::Done)
            }
            Call::StartContainer { container } => self.start(container).await,
            Call::SignalContainer { container, signal, .. } => self.with(&container, |c| {
                c.signal.send_replace(signal);
                Ok(Reply::Done)
            }),
            Call::RemoveContainer { .. } if self.vmm.happens(Fault::Remove) => {
                Err(error(GuestErrorKind::System))
            }
            Call::RemoveContainer { container } => {
                let removed = self.state.lock().unwrap().containers.remove(&container);
                self.vmm.containers.fetch_sub(usize::from(removed.is_some()), SeqCst);
                removed.map(|_| Reply::Done).ok_or_else(|| error(GuestErrorKind::NotFound))
            }
            Call::OpenStdio { .. } if self.vmm.happens(Fault::Stdio) => Err(error(GuestErrorKind::System)),
            Call::List if self.vmm.happens(Fault::List) => Err(error(GuestErrorKind::System)),
            Call::ReadFile { .. } if self.vmm.happens(Fault::File) => {
                let mut records = self.vmm.records.subscribe();
                let half_a_second = std::time::Duration::from_millis(500);
                let _ = tokio::time::timeout(half_a_second, records.wait_for(|r| !r.is_empty())).await;
                Ok(Reply::File { base64: STANDARD.encode("late") })
            }
            Call::OpenStdio { container, stream } => {
                let stream = self.stream(stream).await;
                let args = self.with(&container, |c| Ok(c.spec.process.args.clone()))?;
                let signal = self.with(&container, |c| Ok(c.signal.subscribe()))?;
                tokio::spawn(program(args, stream, signal));
                self.vmm.reopened.fetch_add(1, SeqCst);
                Ok(Reply::Done)
            }
            Call::Exec(spec) => {
                let kind = match spec.process.args[0].as_str() {
                    "missing" => return Err(error(GuestErrorKind::CommandNotFound)),
                    _ => spec.process.args,
                };
                let mut stream = self.stream(spec.stream).await;
                tokio::spawn(async move {
                    let (_keep, signal) = watch::channel(0);
                    let code = program(kind, &mut stream, signal).await;
                    let _ = write_packets(&mut stream, Channel::Exit, &code.to_le_bytes()).await;
                });
                Ok(Reply::Started { pid: 9 })
            }
            Call::PublishTree { tree, stream } => {
                let mut stream = self.stream(stream).await;
                let mut tar = Vec::new();
                stream.read_to_end(&mut tar).await.unwrap();
                *self.state.lock().unwrap().trees.entry(tree).or_default() += 1;
                Ok(Reply::Done)
            }
            Call::ReadFile { .. } => Ok(Reply::File { base64: STANDARD.encode("from the container") }),
            Call::Stats => Ok(Reply::Stats(Box::new(self.stats()))),
            Call::List => {
                let state = self.state.lock().unwrap();
                let list = state.containers.iter();
                let containers = list.map(|(id, c)| ContainerState { container: id.clone(), phase: c.phase });
                Ok(Reply::Containers { containers: containers.collect() })
            }
            Call::AckEvents { sequence } => {
                self.vmm.acknowledged_events();
                self.state.lock().unwrap().events.retain(|(s, _)| *s > sequence);
                Ok(Reply::Done)
            }
            Call::KillExec { .. } => Ok(Reply::Done),
            Call::PowerOff => {
                self.vmm.end(0);
                Ok(Reply::Done)
            }
        }
    }

    fn with<T>(
        &self,
        id: &ContainerId,
        work: impl FnOnce(&mut Container) -> Result<T, GuestError>,
    ) -> Result<T, GuestError> {
        let mut state = self.state.lock().unwrap();
        state.containers.get_mut(id).map(work).unwrap_or_else(|| Err(error(GuestErrorKind::NotFound)))
    }

    fn stats(&self) -> GuestStats {
        let state = self.state.lock().unwrap();
        let usage =
            Usage { memory_bytes: 11, pids: state.trees.values().sum::<usize>() as u64, ..Usage::default() };
        let containers = state.containers.keys().map(|id| (id.to_string(), usage)).collect();
        let mounts = state.containers.values().flat_map(|c| &c.spec.mounts);
        let volumes = mounts.filter_map(|mount| match &mount.source {
            MountSource::Scratch { volume, .. } => Some((volume.clone(), volume.len() as u64)),
            _ => None,
        });
        GuestStats { total: usage, containers, volumes: volumes.collect(), ..GuestStats::default() }
    }

    async fn start(&self, id: ContainerId) -> Result<Reply, GuestError> {
        let (args, number) = self.with(&id, |c| Ok((c.spec.process.args.clone(), c.spec.stdio_stream)))?;
        if args[0] == "missing" {
            return Err(error(GuestErrorKind::CommandNotFound));
        }
        let mut stream = self.stream(number).await;
        let signal = self.with(&id, |c| {
            c.phase = ContainerPhase::Running { pid: 7 };
            Ok(c.signal.subscribe())
        })?;
        let guest = self.clone();
        tokio::spawn(async move {
            // The process outlives its stream: what it would print then is lost in this fake.
            let mut again = signal.clone();
            let mut code = match args[0].as_str() {
                "flow" => guest.flow(args[1].parse().unwrap(), &mut stream).await.map_or(BROKEN, |()| 0),
                _ => program(args, &mut stream, signal).await,
            };
            drop(stream);
            if code == BROKEN {
                let _ = again.wait_for(|s| *s != 0).await;
                code = 128 + *again.borrow();
            }
            guest.exited(&id, code);
        });
        Ok(Reply::Started { pid: 7 })
    }

    /// Output that waits while as much as the window holds has not been acknowledged.
    async fn flow(&self, bytes: usize, stream: &mut UnixStream) -> std::io::Result<()> {
        let packet = vec![b'x'; MAX_PACKET];
        for said in (0..bytes).step_by(MAX_PACKET) {
            while said + MAX_PACKET > self.vmm.acknowledged.load(SeqCst) as usize + OUTPUT_WINDOW {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            write_packets(stream, Channel::Stdout, &packet).await?;
        }
        write_packets(stream, Channel::Stdout, &[]).await?;
        write_packets(stream, Channel::Stderr, &[]).await
    }

    fn exited(&self, id: &ContainerId, code: i32) {
        let exit = Exit { code, oom_killed: code == 99, at_unix_ns: 42 };
        let mut state = self.state.lock().unwrap();
        if let Some(container) = state.containers.get_mut(id) {
            container.phase = ContainerPhase::Exited { exit };
        }
        state.sequence += 1;
        let (sequence, event) = (state.sequence, Event::Exited { container: id.clone(), exit });
        state.events.push((sequence, event.clone()));
        if let Some(out) = &*self.out.lock().unwrap() {
            let _ = out.send(FromGuest::Event { sequence, event });
        }
    }
}

fn error(kind: GuestErrorKind) -> GuestError {
    GuestError { kind, message: format!("fake: {kind:?}") }
}

/// Exit code of a program whose stream broke under it.
const BROKEN: i32 = -99;

/// Runs a program on a stream until it ends or is signalled; answers its exit code.
async fn program<S>(args: Vec<String>, mut stream: S, mut signal: watch::Receiver<i32>) -> i32
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let stubborn = args[0] == "stubborn";
    let immortal = args[0] == "immortal";
    let work = async {
        match args[0].as_str() {
            "echo" => {
                let text = args[1..].join(" ") + "\n";
                write_packets(&mut stream, Channel::Stdout, text.as_bytes()).await?;
                write_packets(&mut stream, Channel::Stderr, b"oops\n").await?;
                Ok(0)
            }
            "exit" => Ok(args[1].parse().unwrap()),
            "spew" => {
                let data = vec![b'x'; args[1].parse().unwrap()];
                write_packets(&mut stream, Channel::Stdout, &data).await?;
                Ok(0)
            }
            "cat" | "sizes" => loop {
                match read_packet(&mut stream).await? {
                    Some((Channel::Stdin, data)) if data.is_empty() => return Ok(0),
                    Some((Channel::Stdin, data)) => {
                        write_packets(&mut stream, Channel::Stdout, &data).await?
                    }
                    Some((Channel::Resize, data)) => {
                        let text = format!("{}x{}\n", data[0], data[2]);
                        write_packets(&mut stream, Channel::Stdout, text.as_bytes()).await?;
                    }
                    Some(_) => {}
                    None => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                }
            },
            _ => loop {
                if read_packet(&mut stream).await?.is_none() {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
            },
        }
    };
    let code: std::io::Result<i32> = tokio::select! {
        code = work => code,
        received = signal.wait_for(|s| *s != 0 && !immortal && (!stubborn || *s == 9)) => {
            received.map(|s| 128 + *s).map_err(|_| std::io::ErrorKind::BrokenPipe.into())
        }
    };
    let Ok(code) = code else { return BROKEN };
    for channel in [Channel::Stdout, Channel::Stderr] {
        let _ = write_packets(&mut stream, channel, &[]).await;
    }
    code
}
