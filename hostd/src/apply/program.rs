//! Runs a program that works on a file system to its end, however long that takes as long as it gets on.
//!
//! Invariant: nothing that writes to a disk is stopped because it is slow. A check of a large disk that is damaged takes
//! hours, and one that is cut off in the middle of its repair leaves worse than it found. It is stopped, first by SIGTERM,
//! on which e2fsck leaves a file system that can be checked again, when it has neither reported progress nor used the
//! processor for [`Patience::silent`], and after [`Patience::whole`] in any case.

use crate::error::{Error, Result};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::time::{Instant, MissedTickBehavior};

/// How long a program is waited for, and how often is told how far it is.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Longest time without any sign that it gets on.
    pub silent: Duration,
    /// Longest time in all.
    pub whole: Duration,
    /// When it is first told how far it is, and how often from then on.
    pub tell: (Duration, Duration),
    /// Between SIGTERM and SIGKILL.
    pub grace: Duration,
}

/// On a running host. A disk that does not answer for half an hour will not any more; controllers give a request up
/// within minutes.
pub const PATIENCE: Patience = Patience {
    silent: Duration::from_secs(30 * 60),
    whole: Duration::from_secs(24 * 3600),
    tell: (Duration::from_secs(10), Duration::from_secs(30)),
    grace: Duration::from_secs(60),
};

/// How often to look whether it uses the processor, at least.
const LOOK: Duration = Duration::from_secs(5);

/// How a program ended.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// The last line that it said, to its error output if it said anything there.
    pub words: String,
}

impl Outcome {
    /// Fails unless the code is 0.
    pub fn expect_success(self, program: &str, device: &Path) -> Result<()> {
        let code = match self.code {
            Some(0) => return Ok(()),
            Some(code) => format!("exit code {code}"),
            None => "killed by a signal".into(),
        };
        let outcome = if self.words.is_empty() { code } else { format!("{code}: {}", self.words) };
        Err(Error::Program { program: program.into(), object: device.display().to_string(), outcome })
    }
}

/// Runs it. `tell` is told how far it is when it takes long.
pub async fn run(
    program: &str,
    arguments: &[&OsStr],
    device: &Path,
    patience: &Patience,
    tell: &(dyn Fn(&str) + Sync),
) -> Result<Outcome> {
    let failed = |outcome: String| Error::Program {
        program: program.into(),
        object: device.display().to_string(),
        outcome,
    };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child =
        command.kill_on_drop(true).spawn().map_err(|error| failed(format!("cannot be started: {error}")))?;
    let unseen = |error: std::io::Error| failed(format!("cannot be watched: {error}"));
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let (mut said, mut complained) = (Said::default(), Said::default());
    let mut watch = Watch::new(*patience, Instant::now());
    let mut look = tokio::time::interval(LOOK.min(patience.silent / 4));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let status = loop {
        // Cancel-safe: a read takes nothing from the pipe unless it returns it, and `wait` may be called again.
        tokio::select! {
            text = read(&mut out) => said.take(&text.map_err(unseen)?),
            text = read(&mut err) => complained.take(&text.map_err(unseen)?),
            status = child.wait(), if out.is_none() && err.is_none() => break status.map_err(unseen)?,
            _ = look.tick() => {
                let now = Instant::now();
                watch.look(now, said.progress.as_ref(), processor_time(&child));
                if let Some(why) = watch.give_up(now) {
                    stop(&mut child, patience.grace).await;
                    return Err(failed(why));
                }
                if let Some(how_far) = watch.how_far(now) {
                    tell(&how_far);
                }
            }
        }
    };
    let words = if complained.last().is_empty() { said } else { complained }.last().to_owned();
    Ok(Outcome { code: status.code(), words })
}

/// What came next from one of its pipes, which is closed at its end.
async fn read(pipe: &mut Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let Some(open) = pipe else { return std::future::pending().await };
    let mut bytes = vec![0; 4096];
    let length = open.read(&mut bytes).await?;
    bytes.truncate(length);
    if length == 0 {
        *pipe = None;
    }
    Ok(bytes)
}

async fn stop(child: &mut Child, grace: Duration) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        // When it is gone already, that is what is wanted.
        let _ = kill_process(pid, Signal::TERM);
    }
    if tokio::time::timeout(grace, child.wait()).await.is_err() {
        // One that waits for a disk ends when the disk answers; waiting for that here would be for ever.
        let _ = child.start_kill();
        let _ = tokio::time::timeout(grace, child.wait()).await;
    }
}

/// Clock ticks that it has used; 0 when it is gone.
fn processor_time(child: &Child) -> u64 {
    let stat = child.id().and_then(|id| std::fs::read_to_string(format!("/proc/{id}/stat")).ok());
    let stat = stat.unwrap_or_default();
    // The name, in parentheses, may hold anything.
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
    fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

/// How far e2fsck says that it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) pass: u32,
    done: u64,
    all: u64,
}

impl Progress {
    /// A line of `e2fsck -C`: pass, how far, of how much, and the volume's label or device.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(4, ' ');
        let mut number = || words.next()?.parse::<u64>().ok();
        let (pass, done, all) = (number()?, number()?, number()?);
        (1..=5).contains(&pass).then_some(Self { pass: pass as u32, done, all })
    }
}

/// What it says: its last line, bounded, and how far it is.
#[derive(Debug, Default)]
struct Said {
    line: String,
    before: String,
    progress: Option<Progress>,
}

impl Said {
    const LONGEST: usize = 300;

    fn take(&mut self, bytes: &[u8]) {
        for part in String::from_utf8_lossy(bytes).split_inclusive(['\n', '\r']) {
            let text = part.trim_end_matches(['\n', '\r']);
            let room = Self::LONGEST.saturating_sub(self.line.chars().count());
            self.line.extend(text.chars().take(room));
            if text.len() < part.len() {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        match Progress::parse(&line) {
            Some(progress) => self.progress = Some(progress),
            None if line.trim().is_empty() => {}
            None => self.before = line,
        }
    }

    fn last(&self) -> &str {
        let line = self.line.trim();
        if line.is_empty() { self.before.trim() } else { line }
    }
}

/// Sees whether a program gets on.
#[derive(Debug)]
struct Watch {
    patience: Patience,
    began: Instant,
    alive: Instant,
    told: Option<Instant>,
    progress: Option<Progress>,
    processor_time: u64,
}

impl Watch {
    fn new(patience: Patience, now: Instant) -> Self {
        Self { patience, began: now, alive: now, told: None, progress: None, processor_time: 0 }
    }

    fn look(&mut self, now: Instant, progress: Option<&Progress>, processor_time: u64) {
        if self.progress.as_ref() != progress || processor_time > self.processor_time {
            self.alive = now;
        }
        self.progress = progress.cloned();
        self.processor_time = self.processor_time.max(processor_time);
    }

    fn give_up(&self, now: Instant) -> Option<String> {
        let (silent, whole) = (now - self.alive, now - self.began);
        if silent >= self.patience.silent {
            return Some(format!(
                "did nothing for {} and was stopped: the disk may be failing",
                span(silent)
            ));
        }
        let long = whole >= self.patience.whole;
        long.then(|| format!("had no end after {} and was stopped: the disk may be failing", span(whole)))
    }

    /// What to tell, when it is time to.
    fn how_far(&mut self, now: Instant) -> Option<String> {
        let (first, every) = self.patience.tell;
        let due = self.told.map_or(self.began + first, |told| told + every);
        if now < due {
            return None;
        }
        self.told = Some(now);
        let far = self.progress.as_ref().map_or(String::new(), |p| {
            // Pass 1 to 5 of 5; a pass that has nothing to do is whole.
            let percent = (p.done.min(p.all) * 100).checked_div(p.all).unwrap_or(100);
            format!("pass {} of 5, {percent} % of it, ", p.pass)
        });
        Some(format!("{far}for {} so far", span(now - self.began)))
    }
}

fn span(time: Duration) -> String {
    match time.as_secs() {
        0..=119 => format!("{} s", time.as_secs()),
        seconds => format!("{} min", seconds / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    const SHORT: Patience = Patience {
        silent: Duration::from_millis(800),
        whole: Duration::from_secs(60),
        tell: (Duration::from_millis(200), Duration::from_millis(200)),
        grace: Duration::from_millis(300),
    };

    async fn shell(script: &str, patience: Patience) -> (Result<Outcome>, Vec<String>) {
        let told = Mutex::new(Vec::new());
        let arguments = [OsStr::new("-c"), OsStr::new(script)];
        let tell = |text: &str| told.lock().unwrap().push(text.to_owned());
        let outcome = run("sh", &arguments, Path::new("/dev/x"), &patience, &tell).await;
        (outcome, told.into_inner().unwrap())
    }

    #[tokio::test]
    async fn what_gets_on_is_never_stopped_and_tells_how_far_it_is() {
        // Twice as long as it may be silent.
        let slow = "for n in 1 2 3 4 5 6 7 8; do echo \"1 $n 8 /dev/x\"; sleep 0.2; done; echo done; exit 1";
        let (outcome, told) = shell(slow, SHORT).await;
        let outcome = outcome.unwrap();
        assert_eq!((outcome.code, outcome.words.as_str()), (Some(1), "done"), "{told:?}");
        assert!(told.iter().any(|text| text.starts_with("pass 1 of 5, ")), "{told:?}");
        assert!((2..=9).contains(&told.len()), "at a bound rate: {told:?}");
        let (outcome, _) = shell("i=0; while [ $i -lt 1000000 ]; do i=$((i+1)); done; exit 4", SHORT).await;
        assert_eq!(outcome.unwrap().code, Some(4), "it says nothing, yet it works");
    }

    #[tokio::test]
    async fn what_does_nothing_is_stopped_at_last_and_said_to_be() {
        for script in ["exec sleep 60", "trap '' TERM; exec sleep 60"] {
            let began = Instant::now();
            let error = shell(script, SHORT).await.0.unwrap_err().to_string();
            assert!(error.contains("did nothing for") && error.contains("was stopped"), "{error}");
            assert!(began.elapsed() >= SHORT.silent && began.elapsed() < Duration::from_secs(30));
        }
        let endless = Patience { whole: Duration::from_secs(1), ..SHORT };
        let error = shell("while :; do :; done", endless).await.0.unwrap_err().to_string();
        assert!(error.contains("had no end after"), "{error}");
    }

    #[test]
    fn words_are_kept_to_the_last_line_and_bounded() {
        let mut said = Said::default();
        said.take(b"first\n3 10 20 /dev/vda3\nse");
        said.take(b"cond\r\n\n");
        assert_eq!((said.last(), said.progress.as_ref().map(|p| p.pass)), ("second", Some(3)));
        for _ in 0..1000 {
            said.take(&[b'x'; 4096]);
        }
        assert_eq!(said.last().len(), Said::LONGEST);
        assert_eq!(Progress::parse("12 inodes used"), None, "words that begin with a number");
    }
}
