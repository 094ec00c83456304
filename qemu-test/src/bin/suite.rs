//! `suite`: runs formatting, lints, unit tests and end-to-end tests, goes on after a failure, and ends with one line
//! that counts all of them: `N passed, N failed, N skipped`.
//!
//! A check without tests of its own (formatting, lints, a build) counts as one.

use anyhow::{Context, ensure};
use atoll_qemu_test::artifacts::{Artifacts, Profile};
use atoll_qemu_test::faults;
use atoll_qemu_test::namespaces;
use atoll_qemu_test::progress::Progress;
use atoll_qemu_test::test_programs;
use clap::{Parser, ValueEnum};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// Threads of the end-to-end tests: one for each, for they take turns among themselves (tests/e2e/turns.rs).
const E2E_THREADS: &str = "200";
/// The end-to-end tests that have a long form.
const LONG: [&str; 6] = [
    "power::",
    "scale::",
    "processes::",
    "containers::log_",
    "containers::many_execs",
    "control_plane::client_",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Everything.
    All,
    /// What needs no QEMU.
    Quick,
    /// End-to-end tests only.
    E2e,
    /// The long forms of the tests that have one: hours.
    Soak,
}

#[derive(Debug, Parser)]
#[command(about = "Runs Atoll's checks and tests and counts them")]
struct Arguments {
    part: Part,
    /// Run only end-to-end tests whose names contain one of these.
    filter: Vec<String>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Runs the parts and keeps the counts.
struct Suite {
    artifacts: Artifacts,
    counts: Counts,
    failures: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    // Not each by itself: some would pass without having tried anything.
    ensure!(
        rustix::process::geteuid().is_root(),
        "the tests make namespaces, mounts and cgroups, which needs root: run this as root"
    );
    let mut suite =
        Suite { artifacts: Artifacts::locate()?, counts: Counts::default(), failures: Vec::new() };
    let started = Instant::now();
    match arguments.part {
        Part::All => {
            suite.quick()?;
            suite.end_to_end(&arguments.filter, false)?;
            if arguments.filter.is_empty() {
                suite.bench()?;
                suite.reproducible()?;
            }
        }
        Part::Quick => suite.quick()?,
        Part::E2e => suite.end_to_end(&arguments.filter, false)?,
        Part::Soak if arguments.filter.is_empty() => {
            suite.end_to_end(&LONG.map(str::to_owned), true)?;
        }
        Part::Soak => suite.end_to_end(&arguments.filter, true)?,
    }
    println!("\nall in {:.0} s", started.elapsed().as_secs_f64());
    for failure in &suite.failures {
        println!("FAILED {failure}");
    }
    let Counts { passed, failed, skipped } = suite.counts;
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(failed == 0)
}

impl Suite {
    fn quick(&mut self) -> anyhow::Result<()> {
        let go = |arguments: &[&str], root: &Artifacts| {
            let mut command = Command::new("go");
            command.current_dir(root.root().join("supervisor")).env("CGO_ENABLED", "0").args(arguments);
            command
        };
        let mut fmt = self.artifacts.cargo();
        fmt.args(["fmt", "--all", "--check"]);
        self.check("formatting of Rust", &mut fmt)?;
        let mut gofmt = Command::new("bash");
        gofmt
            .current_dir(self.artifacts.root().join("supervisor"))
            .args(["-c", "test -z \"$(gofmt -l . | tee /dev/stderr)\""]);
        self.check("formatting of Go", &mut gofmt)?;
        let mut clippy = self.artifacts.cargo();
        clippy.args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ]);
        self.check("lints of Rust", &mut clippy)?;
        self.unit_tests()?;
        // Not `go vet`: it would analyse the 2,600 packages of Kubernetes for the few files here.
        let test = ["test", "-trimpath", "-vet=off", "-v", "./..."];
        self.tests("unit tests of Go", &mut go(&test, &self.artifacts), false, go_counts).map(drop)
    }

    /// The quick form of the bench: its figures are the same each time, and those that grew beyond their row in
    /// `bench/budgets.toml` fail.
    fn bench(&mut self) -> anyhow::Result<()> {
        let mut bench = self.artifacts.cargo();
        bench.args(["run", "--quiet", "--locked", "-p", "atoll-bench", "--bin", "bench", "--", "quick"]);
        self.check("bench, quick form", &mut bench)
    }

    /// The image, built twice: not among the unit tests, for it takes the guest kernel of the build.
    fn reproducible(&mut self) -> anyhow::Result<()> {
        let programs = test_programs::build(&self.artifacts, &["--workspace"])?;
        let program = programs.iter().find(|program| program.name == "image: test reproducible");
        let mut command = program.context("no test program 'reproducible'")?.command();
        self.tests("image built twice", command.arg("--ignored"), false, cargo_counts).map(drop)
    }

    /// `long` asks for the long forms, one test at a time.
    fn end_to_end(&mut self, filter: &[String], long: bool) -> anyhow::Result<()> {
        let mut progress = Progress::default();
        if let Err(error) = self.artifacts.build(&mut progress, &[Profile::Release, Profile::Test]) {
            self.fail(&format!("build: {error:#}"));
            return Ok(());
        }
        self.counts.passed += 1;
        // Built outside the namespaces.
        let programs = test_programs::build(&self.artifacts, &["-p", "atoll-qemu-test", "--test", "e2e"])?;
        let run = |arguments: &[&str]| {
            let mut command = namespaces::unshare();
            command.current_dir(self.artifacts.root()).arg(programs[0].executable());
            command.args(arguments);
            command
        };
        let mut first = run(&["--test-threads", if long { "1" } else { E2E_THREADS }]);
        first.args(filter);
        if long {
            first.args(["--nocapture", "--include-ignored"]).env("ATOLL_SOAK", "1");
        }
        let mut again = run(&["--test-threads", E2E_THREADS, "--exact"]);
        let before = self.counts.failed;
        let failed = self.tests("end-to-end tests", &mut first, true, cargo_counts)?;
        // Unless the program itself died: then nobody knows which tests it had left.
        let all_named = usize::try_from(self.counts.failed - before).is_ok_and(|count| count == failed.len());
        if !failed.is_empty() && all_named && !long && self.was_the_emulation()? {
            // They count by what comes now.
            self.counts.failed = before;
            self.failures.pop();
            self.tests("end-to-end tests once more", again.args(failed), true, cargo_counts)?;
        }
        Ok(())
    }

    /// Whether the emulation crashed a host while tests failed: then nobody knows what they would have said.
    fn was_the_emulation(&self) -> anyhow::Result<bool> {
        let lab = self.artifacts.out().join("e2e");
        let faults = faults::of_the_emulation(&lab)?;
        if faults.is_empty() {
            return Ok(false);
        }
        let kept = lab.with_extension("faults");
        println!("==> QEMU's emulation crashed {} times; logs: {}", faults.len(), kept.display());
        faults.iter().for_each(|fault| println!("    {fault}"));
        if kept.exists() {
            std::fs::remove_dir_all(&kept).with_context(|| format!("cannot remove {}", kept.display()))?;
        }
        std::fs::rename(&lab, &kept).with_context(|| format!("cannot keep {}", lab.display()))?;
        Ok(true)
    }

    /// The workspace's test programs side by side. It has no examples in its documentation: `cargo test --doc` would find
    /// nothing.
    fn unit_tests(&mut self) -> anyhow::Result<()> {
        let (name, started) = ("unit tests of Rust", Instant::now());
        println!("==> {name}");
        let programs = match test_programs::build(&self.artifacts, &["--workspace"]) {
            Ok(programs) => programs,
            Err(error) => {
                self.fail(&format!("{name}: {error:#}"));
                return Ok(());
            }
        };
        let (path, mut log) = self.log(name)?;
        let mut total = Counts::default();
        test_programs::run(programs, |ended| {
            writeln!(log, "==> {}\n{}", ended.name, ended.output)?;
            let mut counts = Counts::default();
            ended.output.lines().filter_map(cargo_counts).for_each(|more| counts.add(more));
            if !ended.success {
                // A program that died in the middle has counted nothing.
                counts.failed = counts.failed.max(1);
                println!("    {} failed:\n{}", ended.name, ended.output);
            }
            total.add(counts);
            Ok(())
        })?;
        self.count(name, total, started, &path);
        Ok(())
    }

    /// The log of a step, emptied.
    fn log(&self, name: &str) -> anyhow::Result<(PathBuf, File)> {
        let path = self.artifacts.out().join("log").join(format!("test-{}.log", name.replace(' ', "-")));
        std::fs::create_dir_all(path.parent().context("the log has no directory")?)?;
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok((path, file))
    }

    /// Adds what a step counted, and says it.
    fn count(&mut self, name: &str, counts: Counts, started: Instant, log: &Path) {
        self.counts.add(counts);
        let seconds = started.elapsed().as_secs_f64();
        let Counts { passed, failed, skipped } = counts;
        println!("    {passed} passed, {failed} failed, {skipped} skipped in {seconds:.0} s");
        if failed > 0 {
            self.failures.push(format!("{name}: see {}", log.display()));
        }
    }

    /// A command whose exit status is the result.
    fn check(&mut self, name: &str, command: &mut Command) -> anyhow::Result<()> {
        self.tests(name, command, false, |_| None).map(drop)
    }

    /// A command whose output is counted by `count`, line by line; its exit status counts where no line did. Answers
    /// with the names of the tests that failed.
    fn tests(
        &mut self,
        name: &str,
        command: &mut Command,
        show: bool,
        count: fn(&str) -> Option<Counts>,
    ) -> anyhow::Result<Vec<String>> {
        let started = Instant::now();
        println!("==> {name}");
        let (path, mut log) = self.log(name)?;
        let (reader, writer) = std::io::pipe()?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        // The command holds the writing end; with it open here, reading would never end.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut total = Counts::default();
        let mut counted = false;
        let mut names = Vec::new();
        for line in BufReader::new(reader).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            // Tests that wait for their turn are no news.
            if line.ends_with("has been running for over 60 seconds") {
                continue;
            }
            writeln!(log, "{line}")?;
            if show
                || line.starts_with("test result: FAILED")
                || line.contains(" ... FAILED")
                || line.contains("panicked at")
            {
                // When it was said tells which test took how long.
                println!("    {:4.0} s  {line}", started.elapsed().as_secs_f64());
            }
            let name = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"));
            names.extend(name.map(str::to_owned));
            if let Some(counts) = count(&line) {
                total.add(counts);
                counted = true;
            }
        }
        let status = child.wait()?;
        if !counted {
            total = if status.success() {
                Counts { passed: 1, ..Counts::default() }
            } else {
                Counts { failed: 1, ..Counts::default() }
            };
        } else if !status.success() && total.failed == 0 {
            total.failed = 1;
        }
        self.count(name, total, started, &path);
        if total.failed > 0 && !show {
            println!("{}", atoll_qemu_test::process::tail(&path, 40));
        }
        Ok(names)
    }

    fn fail(&mut self, what: &str) {
        println!("FAILED {what}");
        self.counts.failed += 1;
        self.failures.push(what.to_owned());
    }
}

/// libtest's closing line: `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
fn cargo_counts(line: &str) -> Option<Counts> {
    let rest = line.strip_prefix("test result: ")?;
    let mut counts = Counts::default();
    for part in rest.split(['.', ';']) {
        let mut words = part.split_whitespace();
        let (Some(number), Some(kind)) = (words.next().and_then(|n| n.parse().ok()), words.next()) else {
            continue;
        };
        match kind {
            "passed" => counts.passed = number,
            "failed" => counts.failed = number,
            "ignored" => counts.skipped = number,
            _ => {}
        }
    }
    Some(counts)
}

/// One line a test, of `go test -v`; subtests, which are indented, are part of theirs.
fn go_counts(line: &str) -> Option<Counts> {
    let none = Counts::default();
    if line.starts_with("--- PASS") {
        Some(Counts { passed: 1, ..none })
    } else if line.starts_with("--- FAIL") {
        Some(Counts { failed: 1, ..none })
    } else if line.starts_with("--- SKIP") {
        Some(Counts { skipped: 1, ..none })
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_counted() {
        let counts = cargo_counts("test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s").unwrap();
        assert_eq!((counts.passed, counts.failed, counts.skipped), (3, 2, 1));
        assert!(cargo_counts("running 3 tests").is_none());
        assert_eq!(go_counts("--- FAIL: TestPin (0.00s)").unwrap().failed, 1);
        assert!(go_counts("    --- PASS: TestPin/empty (0.00s)").is_none());
    }
}
