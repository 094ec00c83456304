//! Running a command beside a container's own process.
//!
//! Called by `cri` (ExecSync) and `streaming` (Exec). Invariant: when the one who asked is gone or out of time, the
//! process group is killed in the guest.

use crate::console::Output;
use crate::error::{Error, Result};
use crate::service::process::exec_process;
use crate::service::{RunningContainer, random_hex};
use crate::vm::pod::{CALL_DEADLINE, PodVm};
use crate::vm::wire::{self, GuestStream};
use atoll_spec::guest::{Call, Channel, ExecSpec};
use atoll_spec::ids::ExecId;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{BufReader, ReadHalf, WriteHalf};

/// Most output that ExecSync returns, so that the answer stays below gRPC's 16 MiB; the rest is read and dropped.
const OUTPUT_BYTES: usize = (16 << 20) - (64 << 10);

/// A running command.
pub struct Exec {
    from: BufReader<ReadHalf<GuestStream>>,
    /// Its input; apart, so that both directions can be served at once.
    pub input: ExecInput,
    guard: KillOnDrop,
}

/// The input of a command.
pub struct ExecInput {
    to: WriteHalf<GuestStream>,
}

impl ExecInput {
    /// Data; none closes the input.
    pub async fn write(&mut self, data: &[u8]) -> Result<()> {
        self.send(Channel::Stdin, data).await
    }

    /// A new terminal size.
    pub async fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        let [a, b] = columns.to_le_bytes();
        let [c, d] = rows.to_le_bytes();
        self.send(Channel::Resize, &[a, b, c, d]).await
    }

    async fn send(&mut self, channel: Channel, data: &[u8]) -> Result<()> {
        wire::write_packets(&mut self.to, channel, data)
            .await
            .map_err(Error::os("write to", "the command's stream"))
    }
}

/// The output of a command.
pub struct ExecOutput {
    from: BufReader<ReadHalf<GuestStream>>,
    guard: KillOnDrop,
}

/// What comes from a command.
pub enum ExecEvent {
    /// Output.
    Output(Output),
    /// It has ended, with this code.
    Exited(i32),
}

struct KillOnDrop {
    vm: Arc<PodVm>,
    exec: ExecId,
    armed: bool,
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if self.armed {
            let (vm, exec) = (self.vm.clone(), self.exec.clone());
            // Ends with the call's deadline. That it is gone already is what is wanted.
            tokio::spawn(async move { drop(vm.link.call(Call::KillExec { exec }, CALL_DEADLINE).await) });
        }
    }
}

impl Exec {
    /// Starts a command.
    pub async fn start(
        container: &RunningContainer,
        args: Vec<String>,
        tty: bool,
        stdin: bool,
    ) -> Result<Self> {
        if args.is_empty() {
            return Err(Error::Invalid("exec needs a command".to_owned()));
        }
        let exec: ExecId = random_hex()?.parse().map_err(|e| Error::Invalid(format!("{e}")))?;
        let process = exec_process(&container.process, args, tty);
        let (container_id, id) = (container.id.clone(), exec.clone());
        let make = |stream| {
            Call::Exec(Box::new(ExecSpec { container: container_id, exec: id, process, stream, stdin }))
        };
        let (_, stream) = container.vm.link.call_for_stream(make, CALL_DEADLINE).await?;
        let (from, to) = tokio::io::split(stream);
        let from = BufReader::with_capacity(32 << 10, from);
        let guard = KillOnDrop { vm: container.vm.clone(), exec, armed: true };
        Ok(Self { from, input: ExecInput { to }, guard })
    }

    /// Both directions apart.
    pub fn split(self) -> (ExecInput, ExecOutput) {
        (self.input, ExecOutput { from: self.from, guard: self.guard })
    }
}

impl ExecOutput {
    /// What comes next. Not cancel-safe: a packet half read is lost.
    pub async fn next(&mut self) -> Result<ExecEvent> {
        loop {
            let packet =
                wire::read_packet(&mut self.from).await.map_err(Error::os("read", "the command's stream"))?;
            match packet {
                Some((_, data)) if data.is_empty() => {}
                Some((Channel::Stdout, data)) => return Ok(ExecEvent::Output(Output::Stdout(data))),
                Some((Channel::Stderr, data)) => return Ok(ExecEvent::Output(Output::Stderr(data))),
                Some((Channel::Exit, data)) => {
                    self.guard.armed = false;
                    let code = <[u8; 4]>::try_from(&data[..]).map(i32::from_le_bytes).unwrap_or(-1);
                    return Ok(ExecEvent::Exited(code));
                }
                Some(_) => {}
                None => {
                    let sandbox = self.guard.vm.sandbox.to_string();
                    return Err(Error::Lost { sandbox, why: "a command's stream ended early".to_owned() });
                }
            }
        }
    }
}

/// What a command said and how it ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Finished {
    /// Standard output, cut when both together are too long for an answer.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code.
    pub code: i32,
}

/// Runs a command to its end; without `timeout` for as long as it takes.
pub async fn run(
    container: &RunningContainer,
    args: Vec<String>,
    timeout: Option<Duration>,
) -> Result<Finished> {
    let command = args.join(" ");
    let (_input, mut output) = Exec::start(container, args, false, false).await?.split();
    let collect = async {
        let mut finished = Finished::default();
        let mut room = OUTPUT_BYTES;
        loop {
            let (all, data) = match output.next().await? {
                ExecEvent::Output(Output::Stdout(data)) => (&mut finished.stdout, data),
                ExecEvent::Output(Output::Stderr(data)) => (&mut finished.stderr, data),
                ExecEvent::Exited(code) => {
                    finished.code = code;
                    return Ok(finished);
                }
            };
            let taken = data.len().min(room);
            all.extend_from_slice(&data[..taken]);
            room -= taken;
        }
    };
    match timeout {
        Some(timeout) => {
            let what = || format!("command '{command}' in container {}", container.id);
            crate::error::within(timeout, what, collect).await.flatten()
        }
        None => collect.await,
    }
}
