//! Test programs as cargo builds them, run several at a time.
//!
//! `cargo test` runs one program after another; most of ours spend their time waiting for deadlines that they test, so
//! that side by side they take as long as the longest of them.

use crate::artifacts::Artifacts;
use anyhow::{Context, ensure};
use std::collections::VecDeque;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// Programs that run at once.
const AT_ONCE: usize = 2;
/// Tests that run at once in each: more than there are processors, for they wait.
const THREADS: &str = "6";

/// One test program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestProgram {
    /// Package, kind and target, as `agent: test node`.
    pub name: String,
    executable: PathBuf,
    /// Where cargo would run it.
    directory: PathBuf,
}

impl TestProgram {
    /// The program itself.
    pub fn executable(&self) -> &Path {
        &self.executable
    }

    /// The program, where cargo would run it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.executable);
        command.current_dir(&self.directory).env("CARGO_MANIFEST_DIR", &self.directory);
        command
    }
}

/// Builds what `cargo test` with these arguments would run, and names it.
///
/// # Errors
/// When it does not compile; cargo has said why on standard error.
pub fn build(artifacts: &Artifacts, arguments: &[&str]) -> anyhow::Result<Vec<TestProgram>> {
    let output = artifacts
        .cargo()
        .args(["test", "--locked", "--no-run", "--message-format=json-render-diagnostics"])
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(output.status.success(), "the tests do not compile (cargo test {})", arguments.join(" "));
    let mut programs: Vec<_> = String::from_utf8_lossy(&output.stdout).lines().filter_map(program).collect();
    ensure!(!programs.is_empty(), "cargo named no test program (cargo test {})", arguments.join(" "));
    // Those with a peer take longest: started first, they are not what is waited for at the end.
    programs.sort_by_key(|program| !program.name.contains(": test "));
    Ok(programs)
}

/// The program that a line of cargo's messages names, when it names one (cargo's "External tools", compiler-artifact).
fn program(line: &str) -> Option<TestProgram> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    if message["profile"]["test"] != true {
        return None;
    }
    let directory = Path::new(message["manifest_path"].as_str()?).parent()?;
    let package = directory.file_name()?.to_str()?;
    let target = message["target"]["name"].as_str()?;
    let kind = message["target"]["kind"][0].as_str()?;
    Some(TestProgram {
        name: format!("{package}: {kind} {target}"),
        executable: message["executable"].as_str()?.into(),
        directory: directory.to_owned(),
    })
}

/// What a program printed, and whether it succeeded.
#[derive(Debug)]
pub struct Ended {
    /// The program's name.
    pub name: String,
    /// Standard output and error, in the order they came.
    pub output: String,
    /// Whether its exit status was 0.
    pub success: bool,
}

/// Runs all of them, several at once, and hands each to `ended` when it is through.
///
/// # Errors
/// When one cannot be started, and what `ended` returns.
pub fn run(
    programs: Vec<TestProgram>,
    ended: impl FnMut(Ended) -> anyhow::Result<()> + Send,
) -> anyhow::Result<()> {
    let queue = Mutex::new(VecDeque::from(programs));
    let ended = Mutex::new(ended);
    let work = || -> anyhow::Result<()> {
        loop {
            let Some(program) = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front() else {
                return Ok(());
            };
            let outcome = run_one(&program)?;
            ended.lock().unwrap_or_else(PoisonError::into_inner)(outcome)?;
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("it does not panic"))
    })
}

fn run_one(program: &TestProgram) -> anyhow::Result<Ended> {
    let (mut reader, writer) = std::io::pipe()?;
    let mut command = program.command();
    command.env("RUST_TEST_THREADS", THREADS).stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("cannot start the tests of {}", program.name))?;
    // It holds the writing end; with it open here, reading would never end.
    drop(command);
    let mut output = Vec::new();
    reader.read_to_end(&mut output).context("cannot read a test's output")?;
    let success = child.wait()?.success();
    Ok(Ended { name: program.name.clone(), output: String::from_utf8_lossy(&output).into_owned(), success })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_test_programs_are_named() {
        let line = |test: bool| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/a/agent/Cargo.toml","profile":{{"test":{test}}},
                "target":{{"kind":["test"],"name":"node"}},"executable":"/t/node-1"}}"#
            )
        };
        let named = program(&line(true)).unwrap();
        assert_eq!(
            (named.name.as_str(), named.directory.as_path()),
            ("agent: test node", Path::new("/a/agent"))
        );
        assert_eq!(program(&line(false)), None);
        assert_eq!(program("not of cargo"), None);
    }
}
