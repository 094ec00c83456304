//! Says what is being built or waited for, and for how long: on a terminal one line that counts, elsewhere a line
//! when a step starts, one every [`QUIET_INTERVAL`], and one when it ends.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a long step is mentioned where no line can be rewritten.
const QUIET_INTERVAL: Duration = Duration::from_secs(20);

/// A finished step: name and time.
#[derive(Debug, Clone)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// How long it took.
    pub took: Duration,
}

/// Steps that are done, in order.
#[derive(Debug, Default)]
pub struct Progress {
    phases: Vec<Phase>,
}

impl Progress {
    /// Runs `work` while saying `name`.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn step<T>(&mut self, name: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let started = Instant::now();
        let ticker = Ticker::start(name);
        let outcome = work();
        let took = started.elapsed();
        ticker.stop(if outcome.is_ok() { "done" } else { "FAILED" }, took);
        if outcome.is_ok() {
            self.phases.push(Phase { name: name.to_owned(), took });
        }
        outcome
    }

    /// Records a step that was timed elsewhere.
    pub fn record(&mut self, name: &str, took: Duration) {
        self.phases.push(Phase { name: name.to_owned(), took });
    }

    /// The table of all steps.
    pub fn table(&self) -> String {
        let width = self.phases.iter().map(|p| p.name.len()).max().unwrap_or(0).max(5);
        let mut text = format!("{:width$}  {:>9}\n", "PHASE", "TIME");
        for phase in &self.phases {
            text.push_str(&format!("{:width$}  {:>8.1}s\n", phase.name, phase.took.as_secs_f64()));
        }
        text
    }
}

/// Mentions a running step until stopped.
struct Ticker {
    stop: Sender<()>,
    thread: JoinHandle<()>,
    name: String,
    terminal: bool,
}

impl Ticker {
    fn start(name: &str) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let (stop, stopped) = mpsc::channel();
        let text = name.to_owned();
        if !terminal {
            eprintln!("==> {name}");
        }
        let thread = std::thread::spawn(move || {
            let started = Instant::now();
            let interval = if terminal { Duration::from_secs(1) } else { QUIET_INTERVAL };
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                let seconds = started.elapsed().as_secs();
                if terminal {
                    eprint!("\r\x1b[K==> {text} … {seconds} s");
                    // The terminal may be gone; progress is then of no interest.
                    let _ = std::io::stderr().flush();
                } else {
                    eprintln!("    {text}: {seconds} s so far");
                }
            }
        });
        Self { stop, thread, name: name.to_owned(), terminal }
    }

    fn stop(self, outcome: &str, took: Duration) {
        // Both fail only when the thread is gone already.
        let _ = self.stop.send(());
        let _ = self.thread.join();
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        eprintln!("{clear}==> {} {outcome} in {:.1} s", self.name, took.as_secs_f64());
    }
}
