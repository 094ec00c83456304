//! What a person at the machine sees, written by a thread of its own: a serial line that nobody reads, or that is
//! slow, must never hold up PID 1. Lines that do not fit the queue are dropped and counted.
//!
//! init's own lines go to every console of the kernel. Once the host is up, lines of services go to serial lines
//! only, because the screen is then hostd's.

use crate::clock;
use crate::log::ServiceLog;
use atoll_spec::control::LogLine;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const QUEUE: usize = 1024;

enum Message {
    Own(String),
    Service(String),
    Open,
    LeaveScreen,
    Flush(SyncSender<()>),
}

/// A handle on the console's thread.
#[derive(Clone, Debug)]
pub struct Console {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
    /// init's own lines, for whoever asks later.
    kept: Arc<Mutex<ServiceLog>>,
}

impl Console {
    /// Starts the thread; lines go to standard error until [`Console::open`].
    pub fn start() -> Self {
        let (queue, lines) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let lost = dropped.clone();
        let started =
            std::thread::Builder::new().name("console".into()).spawn(move || write_all(&lines, &lost));
        if let Err(error) = started {
            // Without the thread the queue just fills up; this line is all that will ever be seen.
            eprintln!("atoll: cannot start the console's thread: {error}");
        }
        Self { queue, dropped, kept: Arc::default() }
    }

    /// Opens the kernel's consoles, once `/dev` and `/sys` are there.
    pub fn open(&self) {
        self.send(Message::Open);
    }

    /// From now on the screen belongs to hostd.
    pub fn leave_screen(&self) {
        self.send(Message::LeaveScreen);
    }

    /// A line of init's own.
    pub fn say(&self, text: impl AsRef<str>) {
        let now = clock::uptime();
        self.kept().add(clock::millis(now), text.as_ref());
        self.send(Message::Own(format!("atoll: [{:8.3}s] {}", now.as_secs_f64(), text.as_ref())));
    }

    /// The last lines of init's own, oldest first; all for 0.
    pub fn last(&self, count: usize) -> Vec<LogLine> {
        self.kept().last(count)
    }

    fn kept(&self) -> MutexGuard<'_, ServiceLog> {
        // A thread that panicked while it added a line left the lines before.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line of a service.
    pub fn service(&self, name: &str, at_ms: u64, text: &str) {
        let seconds = Duration::from_millis(at_ms).as_secs_f64();
        self.send(Message::Service(format!("{name}: [{seconds:8.3}s] {text}")));
    }

    /// Waits until everything said so far is written, but no longer than this.
    pub fn flush(&self, deadline: Duration) {
        let (done, written) = sync_channel(1);
        if self.queue.try_send(Message::Flush(done)).is_ok() {
            // A console that does not keep up loses its last lines: the deadline matters more.
            let _ = written.recv_timeout(deadline);
        }
    }

    fn send(&self, message: Message) {
        if self.queue.try_send(message).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

struct Device {
    file: File,
    screen: bool,
}

fn write_all(lines: &Receiver<Message>, dropped: &AtomicU64) {
    let mut devices: Vec<Device> = Vec::new();
    let mut screen_left = false;
    for message in lines {
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            write(
                &mut devices,
                &format!("atoll: {lost} lines left out here: the console is slower than they came"),
                false,
            );
        }
        match message {
            Message::Own(line) => write(&mut devices, &line, false),
            Message::Service(line) => write(&mut devices, &line, screen_left),
            Message::Open => devices = open_active(),
            Message::LeaveScreen => screen_left = true,
            // The other side may have stopped waiting.
            Message::Flush(done) => drop(done.send(())),
        }
    }
}

fn write(devices: &mut [Device], line: &str, serial_only: bool) {
    // One write per line, so that lines of the kernel come between and not into ours. A console that fails is a
    // console nobody sees: there is nowhere to report it.
    let bytes = format!("{line}\n").into_bytes();
    if devices.is_empty() {
        let _ = std::io::stderr().write_all(&bytes);
    }
    for device in devices.iter_mut().filter(|device| !(serial_only && device.screen)) {
        let _ = device.file.write_all(&bytes);
    }
}

fn open_active() -> Vec<Device> {
    let active = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    let mut names: Vec<&str> = active.split_whitespace().collect();
    if names.is_empty() {
        names.push("console");
    }
    names
        .iter()
        .filter_map(|name| {
            let file = OpenOptions::new()
                .write(true)
                .custom_flags(rustix::fs::OFlags::NOCTTY.bits().cast_signed())
                .open(format!("/dev/{name}"))
                .ok()?;
            Some(Device { file, screen: is_screen(name) })
        })
        .collect()
}

fn is_screen(name: &str) -> bool {
    name.strip_prefix("tty").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_line_is_no_screen() {
        assert!(is_screen("tty0") && is_screen("tty1"));
        assert!(!is_screen("ttyS0") && !is_screen("hvc0"));
    }

    #[test]
    fn a_full_queue_never_blocks() {
        let (queue, _lines) = sync_channel(1);
        let console = Console { queue, dropped: Arc::default(), kept: Arc::default() };
        console.say("one");
        console.say("two");
        console.flush(Duration::from_millis(1));
        assert_eq!(console.last(1)[0].text, "two");
        assert_eq!(console.dropped.load(Ordering::Relaxed), 1);
    }
}
