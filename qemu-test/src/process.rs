//! Child processes that cannot outlive the harness, with their output in a log file and a deadline on every wait.

use anyhow::{Context, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Interval at which waits look again, at first.
pub const POLL: Duration = Duration::from_millis(50);
/// The same when it has taken a while: a probe is often a kubectl, which costs the processor that is waited for.
const LONGEST_POLL: Duration = Duration::from_millis(500);

/// A child in the background, killed when dropped.
#[derive(Debug)]
pub struct Background {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Background {
    /// Starts `command` with its output appended to `log`.
    ///
    /// # Errors
    /// When the log cannot be opened or the program cannot be started.
    pub fn spawn(name: &str, command: &mut Command, log: &Path) -> anyhow::Result<Self> {
        let file = open_log(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("cannot duplicate a log descriptor")?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name} ({:?})", command.get_program()))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails with the end of the log when the process has ended.
    ///
    /// # Errors
    /// When it has ended, or cannot be waited for.
    pub fn check_alive(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))? {
            None => Ok(()),
            Some(status) => bail!(
                "{} ended with {status}; end of {}:\n{}",
                self.name,
                self.log.display(),
                tail(&self.log, 15)
            ),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it still runs at the deadline.
    pub fn wait(&mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        wait_for(&format!("the end of {}", self.name), deadline, || {
            self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))
        })
    }

    /// Asks it to end (SIGTERM), kills it at the deadline.
    pub fn stop(&mut self, deadline: Duration) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw) {
            // It may have ended already, which is what is wanted.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        if self.wait(deadline).is_err() {
            self.kill();
        }
    }

    /// Kills it (SIGKILL) and reaps it.
    pub fn kill(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The child of `parent` that has this word among its arguments.
pub fn child_with_argument(parent: u32, word: &str) -> Option<rustix::process::Pid> {
    let is_child = |directory: &Path| {
        let stat = std::fs::read_to_string(directory.join("stat")).unwrap_or_default();
        // After the name in parentheses: state, parent (proc_pid_stat(5)).
        let parent_field = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
        parent_field == Some(parent)
    };
    let named = |directory: &Path| {
        let arguments = std::fs::read(directory.join("cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).any(|argument| argument == word.as_bytes())
    };
    let processes = std::fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    let mut found = processes.filter(|directory| is_child(directory) && named(directory));
    let number = found.next()?.file_name()?.to_str()?.parse().ok()?;
    rustix::process::Pid::from_raw(number)
}

fn open_log(log: &Path) -> anyhow::Result<File> {
    if let Some(parent) = log.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    }
    File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open log {}", log.display()))
}

/// The last `lines` lines of a file, or why there are none.
pub fn tail(path: &Path, lines: usize) -> String {
    match std::fs::read(path) {
        Err(error) => format!("(cannot read {}: {error})", path.display()),
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
    }
}

/// Calls `probe` until it returns a value.
///
/// # Errors
/// Those of `probe`, and the deadline.
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let started = Instant::now();
    let mut pause = POLL;
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if started.elapsed() >= deadline {
            bail!("waited {} s for {what}", deadline.as_secs());
        }
        std::thread::sleep(pause);
        pause = (pause * 5 / 4).min(LONGEST_POLL);
    }
}

/// What a finished command printed.
#[derive(Debug)]
pub struct Output {
    /// Exit status; -1 for a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs a command to its end, killing it at the deadline.
///
/// # Errors
/// When it cannot be started or the deadline passes. A non-zero exit is not an error here.
pub fn run(command: &mut Command, deadline: Duration) -> anyhow::Result<Output> {
    run_with_input(command, b"", deadline)
}

/// Like [`run`], with bytes for its standard input.
///
/// # Errors
/// Those of [`run`].
pub fn run_with_input(command: &mut Command, input: &[u8], deadline: Duration) -> anyhow::Result<Output> {
    use std::io::{Read, Write};
    let what = format!("{:?}", command.get_program());
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {what}"))?;
    let mut stdin = child.stdin.take().context("no pipe to the child")?;
    let mut stdout = child.stdout.take().context("no pipe from the child")?;
    let mut stderr = child.stderr.take().context("no pipe from the child")?;
    std::thread::scope(|scope| {
        // A child that does not read its input is not an error.
        scope.spawn(move || stdin.write_all(input).ok());
        let out = scope.spawn(move || {
            let mut bytes = Vec::new();
            stdout.read_to_end(&mut bytes).map(|_| bytes)
        });
        let err = scope.spawn(move || {
            let mut bytes = Vec::new();
            stderr.read_to_end(&mut bytes).map(|_| bytes)
        });
        let status = wait_for(&format!("{what} to end"), deadline, || Ok(child.try_wait()?));
        if status.is_err() {
            // Already gone is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
        let text = |thread: std::thread::ScopedJoinHandle<'_, std::io::Result<Vec<u8>>>| {
            thread
                .join()
                .ok()
                .and_then(Result::ok)
                .map(|b| String::from_utf8_lossy(&b).into_owned())
                .unwrap_or_default()
        };
        let (stdout, stderr) = (text(out), text(err));
        let status = status.with_context(|| format!("stdout: {stdout}\nstderr: {stderr}"))?;
        Ok(Output { code: status.code().unwrap_or(-1), stdout, stderr })
    })
}

/// Like [`run`], but a non-zero exit is an error that carries what was printed.
///
/// # Errors
/// Those of [`run`], and a non-zero exit.
pub fn run_ok(command: &mut Command, deadline: Duration) -> anyhow::Result<String> {
    let output = run(command, deadline)?;
    if output.code != 0 {
        bail!("{command:?} ended with {}\n{}{}", output.code, output.stdout, output.stderr);
    }
    Ok(output.stdout)
}
