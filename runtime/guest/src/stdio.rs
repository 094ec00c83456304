//! Moves the bytes of one process: its pipes or terminal on one side, a stream to the runtime on the other.
//!
//! ```text
//!            ┌── no stream: output waits in the pipe, the process blocks when it is full
//! process ───┤
//!            └── stream: pipe ─► one packet ─► stream, next read when it is gone
//!
//! process ended and pipes empty ─► end marks (─► exit code, exec only) ─► thread ends
//! ```
//!
//! One thread for each process. What a container said is kept until the runtime has it for certain ([`Kept`]), and
//! at most so much of it that a slow runtime slows the process and nothing else. A new stream replaces the one before and
//! begins with what is kept: a runtime that was killed loses nothing that it had not written.

mod inbox;
mod kept;
mod packet;

pub use inbox::Stream;
pub use kept::Counts;
pub use packet::next_packet;

use crate::log;
use crate::reap::Ending;
use crate::transport::Connection;
use atoll_spec::guest::{Channel, MAX_PACKET, OUTPUT_WINDOW};
use inbox::{Inbox, say_ended};
use kept::Kept;
use packet::{HEADER, packet};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::termios::{Winsize, tcsetwinsize};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes read from a pipe at once.
const CHUNK: usize = 32 * 1024;
/// How long an ended process's output may stay silent while something else holds its pipe open.
const QUIET: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

/// PID 1's ends of a process's stdio.
#[derive(Default)]
pub struct Ports {
    /// Write end of its input.
    pub stdin: Option<OwnedFd>,
    /// Read end of its output.
    pub stdout: Option<OwnedFd>,
    /// Read end of its error output.
    pub stderr: Option<OwnedFd>,
    /// Master of its terminal: input and output at once.
    pub terminal: Option<OwnedFd>,
}

/// What the process is to its pump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A container: its output waits for a stream as long as it takes.
    Container,
    /// An exec: it has one stream, which ends with the exit code; without it nobody wants its output.
    Exec,
}

/// Handle to a running pump.
pub struct Pump {
    wake: OwnedFd,
    inbox: Mutex<Inbox>,
}

impl Pump {
    /// Starts the thread. `on_exit` runs once, as soon as the process has ended.
    pub fn start(
        role: Role,
        ports: Ports,
        stream: Option<Stream>,
        ending: Arc<Ending>,
        on_exit: impl FnOnce(i32) + Send + 'static,
    ) -> std::io::Result<Arc<Self>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let inbox = Mutex::new(Inbox { stream, ..Inbox::default() });
        let pump = Arc::new(Self { wake, inbox });
        let shared = Arc::clone(&pump);
        std::thread::Builder::new().name("stdio".into()).spawn(move || {
            let mut mover = Mover::new(role, ports, &ending);
            mover.run(&shared, on_exit);
            let left = {
                let mut inbox = shared.lock();
                inbox.finished = true;
                inbox.stream.take()
            };
            if let Some(stream) = left {
                say_ended(stream);
            }
        })?;
        Ok(pump)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives it a new stream, in place of the one it has. When all has been said already, the stream says so and ends.
    pub fn connect(&self, stream: Stream) {
        let mut inbox = self.lock();
        if inbox.finished {
            drop(inbox);
            say_ended(stream);
        } else {
            inbox.stream = Some(stream);
            self.notify();
        }
    }

    /// The runtime has this much of the stream of this number.
    pub fn acknowledge(&self, number: u64, counts: Counts) {
        self.lock().acknowledged = Some((number, counts));
        self.notify();
    }

    /// Ends the thread, whatever has not been sent.
    pub fn close(&self) {
        self.lock().closed = true;
        self.notify();
    }

    fn notify(&self) {
        // Adding 1 to an eventfd cannot fail short of 2^64.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// An output channel of the process.
struct Output {
    channel: Channel,
    port: Option<OwnedFd>,
    /// Whether the present stream knows that it has ended.
    marked: bool,
}

struct Mover<'a> {
    role: Role,
    ending: &'a Ending,
    stdin: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
    outputs: Vec<Output>,
    connection: Option<Connection>,
    /// Number of that stream.
    number: u64,
    /// Containers only.
    kept: Kept,
    /// Packets to send before anything new.
    replay: VecDeque<Vec<u8>>,
    /// Packet on its way to the runtime, and how much of it has gone.
    outgoing: (Vec<u8>, usize),
    incoming: Vec<u8>,
    input: Vec<u8>,
    close_input: bool,
    exit_sent: bool,
}

/// What became ready.
struct Ready {
    wake: bool,
    stream_in: bool,
    stream_gone: bool,
    outputs: Vec<bool>,
    quiet: bool,
}

impl<'a> Mover<'a> {
    fn new(role: Role, ports: Ports, ending: &'a Ending) -> Self {
        let copy = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3).ok();
        let (stdout, stdin) = match &ports.terminal {
            Some(terminal) => (copy(terminal), copy(terminal)),
            None => (ports.stdout, ports.stdin),
        };
        let mut outputs = vec![Output { channel: Channel::Stdout, port: stdout, marked: false }];
        if ports.terminal.is_none() {
            outputs.push(Output { channel: Channel::Stderr, port: ports.stderr, marked: false });
        }
        for fd in outputs.iter().filter_map(|output| output.port.as_ref()).chain(&stdin) {
            set_nonblocking(fd);
        }
        Self {
            role,
            ending,
            stdin,
            terminal: ports.terminal,
            outputs,
            connection: None,
            number: 0,
            kept: Kept::default(),
            replay: VecDeque::new(),
            outgoing: (Vec::new(), 0),
            incoming: Vec::new(),
            input: Vec::new(),
            close_input: false,
            exit_sent: false,
        }
    }

    fn run(&mut self, pump: &Pump, on_exit: impl FnOnce(i32)) {
        let mut on_exit = Some(on_exit);
        loop {
            {
                let mut inbox = pump.lock();
                if inbox.closed && self.ending.code().is_some() {
                    return self.told(&mut on_exit);
                }
                self.take_mail(&mut inbox);
            }
            self.told(&mut on_exit);
            self.refill();
            if self.finished() {
                return;
            }
            match self.wait(pump) {
                Ok(ready) => self.act(pump, &ready),
                Err(Errno::INTR) => {}
                Err(error) => {
                    log::line(&format!("moving the output of a process failed: {error}"));
                    return;
                }
            }
        }
    }

    fn take_mail(&mut self, inbox: &mut Inbox) {
        let acknowledged = inbox.acknowledged.take();
        // It may be of the stream that is being replaced, and then the new one must not begin with what it covers.
        self.forget(acknowledged);
        if let Some(stream) = inbox.stream.take() {
            self.adopt(stream);
            self.forget(acknowledged);
        }
    }

    fn forget(&mut self, acknowledged: Option<(u64, Counts)>) {
        if let Some((number, counts)) = acknowledged
            && number == self.number
        {
            self.kept.acknowledge(counts);
        }
    }

    fn told(&self, on_exit: &mut Option<impl FnOnce(i32)>) {
        if let Some(code) = self.ending.code()
            && let Some(on_exit) = on_exit.take()
        {
            on_exit(code);
        }
    }

    fn adopt(&mut self, stream: Stream) {
        if let Err(error) = stream.connection.set_nonblocking(true) {
            log::line(&format!("a stream cannot be used: {error}"));
            return;
        }
        self.connection = Some(stream.connection);
        self.number = stream.number;
        self.replay = self.kept.replay();
        self.outgoing = (Vec::new(), 0);
        self.incoming.clear();
        self.outputs.iter_mut().for_each(|output| output.marked = false);
    }

    /// Lost its stream: a container goes on, an exec has lost its purpose.
    fn disconnect(&mut self) {
        self.connection = None;
        if self.role == Role::Exec {
            self.stdin = None;
            self.terminal = None;
            self.outputs.iter_mut().for_each(|output| output.port = None);
            self.exit_sent = true;
            self.outgoing = (Vec::new(), 0);
        }
    }

    /// Puts end marks and the exit code into the free packet.
    fn refill(&mut self) {
        if !self.outgoing.0.is_empty() || self.connection.is_none() {
            return;
        }
        if let Some(packet) = self.replay.pop_front() {
            self.outgoing = (packet, 0);
        } else if let Some(output) =
            self.outputs.iter_mut().find(|output| output.port.is_none() && !output.marked)
        {
            output.marked = true;
            self.outgoing = (packet(output.channel, &[]), 0);
        } else if self.role == Role::Exec
            && !self.exit_sent
            && self.outputs.iter().all(|output| output.marked)
            && let Some(code) = self.ending.code()
        {
            self.exit_sent = true;
            self.outgoing = (packet(Channel::Exit, &code.to_le_bytes()), 0);
        }
    }

    fn finished(&self) -> bool {
        let said = match self.role {
            Role::Exec => self.exit_sent,
            Role::Container => {
                self.kept.len() == 0
                    && self.outputs.iter().all(|output| output.port.is_none() && output.marked)
            }
        };
        said && self.outgoing.0.is_empty() && self.ending.code().is_some()
    }

    fn wait(&self, pump: &Pump) -> Result<Ready, Errno> {
        let mut polled = vec![PollFd::new(&pump.wake, PollFlags::IN)];
        let wake_of_ending = self.ending.wake();
        let ended = self.ending.code().is_some();
        if !ended {
            polled.push(PollFd::new(&wake_of_ending, PollFlags::IN));
        }
        let stream_at = polled.len();
        if let Some(connection) = &self.connection {
            let mut wanted = PollFlags::empty();
            wanted.set(PollFlags::IN, self.input.is_empty() && !self.close_input);
            wanted.set(PollFlags::OUT, !self.outgoing.0.is_empty());
            polled.push(PollFd::new(connection, wanted));
        }
        let outputs_at = polled.len();
        let room = self.kept.len() < OUTPUT_WINDOW && self.replay.is_empty();
        let reading = self.connection.is_some() && self.outgoing.0.is_empty() && room;
        let mut watched = Vec::new();
        for (index, output) in self.outputs.iter().enumerate() {
            if let (true, Some(port)) = (reading, &output.port) {
                watched.push(index);
                polled.push(PollFd::new(port, PollFlags::IN));
            }
        }
        if let (false, Some(stdin)) = (self.input.is_empty(), &self.stdin) {
            polled.push(PollFd::new(stdin, PollFlags::OUT));
        }
        // Only silence with nothing held back counts as the end of what an ended process had to say.
        let timeout = (ended && reading).then_some(&QUIET);
        let count = poll(&mut polled, timeout)?;
        let stream = (outputs_at > stream_at).then(|| polled[stream_at].revents());
        let mut outputs = vec![false; self.outputs.len()];
        for (offset, index) in watched.iter().enumerate() {
            outputs[*index] = !polled[outputs_at + offset].revents().is_empty();
        }
        Ok(Ready {
            wake: !polled[0].revents().is_empty(),
            stream_in: stream.is_some_and(|events| events.contains(PollFlags::IN)),
            stream_gone: stream.is_some_and(|events| {
                events.intersects(PollFlags::HUP | PollFlags::ERR) && !events.contains(PollFlags::IN)
            }),
            outputs,
            quiet: count == 0,
        })
    }

    fn act(&mut self, pump: &Pump, ready: &Ready) {
        if ready.wake {
            // Non-blocking, and read only to make it quiet again.
            let _ = rustix::io::read(&pump.wake, &mut [0; 8]);
        }
        if ready.stream_in {
            self.take_from_stream();
        } else if ready.stream_gone {
            self.disconnect();
        }
        self.write_input();
        if let Some(index) = ready.outputs.iter().position(|ready| *ready) {
            self.read_output(index);
        } else if ready.quiet {
            self.outputs.iter_mut().for_each(|output| output.port = None);
        }
        self.write_outgoing();
    }

    fn read_output(&mut self, index: usize) {
        let output = &mut self.outputs[index];
        let Some(port) = &output.port else { return };
        let mut buffer = [0; CHUNK];
        match rustix::io::read(port, &mut buffer) {
            // A terminal whose other end is closed everywhere says EIO.
            Ok(0) | Err(Errno::IO) => output.port = None,
            Ok(count) => {
                self.outgoing = (packet(output.channel, &buffer[..count]), 0);
                if self.role == Role::Container {
                    self.kept.keep(output.channel, &buffer[..count]);
                }
                // The other channel gets its turn next time.
                self.outputs.rotate_left(1);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => {
                log::line(&format!("cannot read the output of a process: {error}"));
                output.port = None;
            }
        }
    }

    fn write_outgoing(&mut self) {
        let (bytes, done) = &mut self.outgoing;
        let Some(connection) = &mut self.connection else { return };
        while *done < bytes.len() {
            match connection.write(&bytes[*done..]) {
                Ok(count) => *done += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return self.disconnect(),
            }
        }
        self.outgoing = (Vec::new(), 0);
    }

    fn take_from_stream(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        let mut buffer = [0; CHUNK];
        match connection.read(&mut buffer) {
            Ok(0) => return self.disconnect(),
            Ok(count) => self.incoming.extend(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
            Err(_) => return self.disconnect(),
        }
        while let Some((channel, payload, rest)) = next_packet(&self.incoming) {
            match Channel::try_from(channel) {
                Ok(Channel::Stdin) if payload.is_empty() => self.close_input = true,
                Ok(Channel::Stdin) => self.input.extend(payload),
                Ok(Channel::Resize) => resize(self.terminal.as_ref(), payload),
                _ => {}
            }
            self.incoming = rest.to_vec();
        }
        if self.incoming.len() > HEADER + MAX_PACKET {
            log::line("the runtime sent a packet that is too long");
            self.disconnect();
        }
    }

    fn write_input(&mut self) {
        while let (Some(stdin), false) = (&self.stdin, self.input.is_empty()) {
            match rustix::io::write(stdin, &self.input) {
                Ok(count) => drop(self.input.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // The process reads no more.
                Err(_) => self.stdin = None,
            }
        }
        if self.stdin.is_none() {
            self.input.clear();
        }
        if self.close_input {
            // A terminal has no end of input to give; hanging it up would kill the process.
            if self.terminal.is_none() {
                self.stdin = None;
            }
            self.close_input = false;
        }
    }
}

fn set_nonblocking(fd: &OwnedFd) {
    let flags = rustix::fs::fcntl_getfl(fd).map(|flags| flags | rustix::fs::OFlags::NONBLOCK);
    if let Err(error) = flags.and_then(|flags| rustix::fs::fcntl_setfl(fd, flags)) {
        log::line(&format!("cannot make a pipe non-blocking: {error}"));
    }
}

fn resize(terminal: Option<&OwnedFd>, payload: &[u8]) {
    let (Some(terminal), [c0, c1, r0, r1]) = (terminal, payload) else { return };
    let size = Winsize {
        ws_col: u16::from_le_bytes([*c0, *c1]),
        ws_row: u16::from_le_bytes([*r0, *r1]),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // The terminal may have been hung up: then its size matters to nobody.
    let _ = tcsetwinsize(terminal.as_fd(), size);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(number: u64) -> Stream {
        Stream { connection: Connection::pair().unwrap().0, number }
    }

    #[test]
    fn what_was_acknowledged_just_before_a_new_stream_came_is_not_said_again() {
        let ending = Ending::of(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let mut mover = Mover::new(Role::Container, Ports::default(), &ending);
        mover.take_mail(&mut Inbox { stream: Some(stream(1)), ..Inbox::default() });
        mover.kept.keep(Channel::Stdout, b"first\nsecond\n");
        let first = Some((1, Counts { stdout: 6, stderr: 0 }));
        mover.take_mail(&mut Inbox { stream: Some(stream(2)), acknowledged: first, ..Inbox::default() });
        assert_eq!(mover.replay, [packet(Channel::Stdout, b"second\n")]);
        // And of the new one what came right after it.
        let second = Some((3, Counts { stdout: 7, stderr: 0 }));
        mover.take_mail(&mut Inbox { stream: Some(stream(3)), acknowledged: second, ..Inbox::default() });
        assert_eq!(mover.kept.len(), 0);
    }
}
