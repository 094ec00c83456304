//! A container's log on a disk that fills up, and has room again.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use atoll_runtime::config::Config;
use atoll_runtime::logs::{Finished, LINE_BYTES, LogPlace, LogWriter, Source};
use atoll_runtime::roots::Roots;
use bytes::Bytes;
use clap::Parser;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

/// A file system of a few pages for logs, unmounted in the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", directory.path(), "tmpfs", flags, c"size=1m").unwrap();
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Takes all the room but this.
    fn fill(&self, but: u64) {
        let free = rustix::fs::statvfs(self.0.path()).unwrap();
        let length = free.f_bavail * free.f_frsize - but;
        std::fs::write(self.path("filler"), vec![0; usize::try_from(length).unwrap()]).unwrap();
    }

    fn free(&self) {
        std::fs::remove_file(self.path("filler")).unwrap();
    }

    fn place(&self) -> LogPlace {
        let root = self.0.path().display().to_string();
        let config = Cli::parse_from(["test", "--log-root", &root]).config;
        LogPlace { roots: Arc::new(Roots::new(&config)), path: self.path("0.log") }
    }

    fn log(&self) -> Vec<Record> {
        let text = std::fs::read_to_string(self.path("0.log")).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'), "half a record at the end");
        text.lines().map(Record::parse).collect()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The directory can be deleted only when nothing is mounted in it.
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[derive(Debug)]
struct Record {
    source: String,
    whole: bool,
    text: String,
}

impl Record {
    /// Panics at anything that is not one record.
    fn parse(line: &str) -> Self {
        let fields: Vec<&str> = line.splitn(4, ' ').collect();
        let [time, source, tag, text] = fields[..] else { panic!("not a record: {line:?}") };
        assert!(time.len() == "2026-01-02T03:04:05.000000001Z".len() && time.ends_with('Z'), "{line:?}");
        assert!(source == "stdout" || source == "stderr", "{line:?}");
        assert!(tag == "P" || tag == "F", "{line:?}");
        assert!(!text.contains(" stdout "), "two records in one: {line:?}");
        Self { source: source.into(), whole: tag == "F", text: text.into() }
    }
}

/// The lines of a stream, as readers put them together.
fn lines(records: &[Record], source: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for record in records.iter().filter(|r| r.source == source) {
        lines.last_mut().unwrap().push_str(&record.text);
        if record.whole {
            lines.push(String::new());
        }
    }
    lines.pop();
    lines
}

async fn ended(writer: LogWriter, finished: Finished) {
    drop(writer);
    finished.await.unwrap();
}

/// Sends output and waits until it has been written, or lost.
async fn say(writer: &LogWriter, said: &mut u64, text: &str) {
    writer.data(Source::Stdout, Bytes::copy_from_slice(text.as_bytes())).await;
    *said += text.len() as u64;
    let mut written = writer.written();
    let wait = written.wait_for(|now| now.stdout >= *said);
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("not written").unwrap();
}

#[tokio::test]
async fn a_log_on_a_full_disk_keeps_whole_records_and_goes_on_once_there_is_room() {
    // However much of a record still fits.
    for room in [4096, 8192, 12288, 20480] {
        let disk = SmallDisk::new();
        let (writer, finished) = LogWriter::open(disk.place()).await.unwrap();
        let mut said = 0;
        say(&writer, &mut said, "before\n").await;
        disk.fill(room);
        let batch: String = (0..300).map(|n| format!("line {n} {}\n", "x".repeat(90))).collect();
        say(&writer, &mut said, &batch).await;
        // More than what is left: what fits is written.
        say(&writer, &mut said, &format!("{}\n", "lost".repeat(LINE_BYTES / 4))).await;
        let kept = lines(&disk.log(), "stdout");
        assert!(kept.len() > 1 && kept.len() < 300, "{room}: {}", kept.len());
        disk.free();
        say(&writer, &mut said, "after\n").await;
        ended(writer, finished).await;
        let all = lines(&disk.log(), "stdout");
        assert_eq!(all[..kept.len()], kept);
        assert_eq!(all[kept.len()..], ["after"]);
        for (n, line) in kept[1..].iter().enumerate() {
            assert_eq!(*line, format!("line {n} {}", "x".repeat(90)));
        }
    }
}

#[tokio::test]
async fn a_long_line_whose_rest_was_lost_is_ended_before_the_next() {
    let disk = SmallDisk::new();
    let (writer, finished) = LogWriter::open(disk.place()).await.unwrap();
    let mut said = 0;
    say(&writer, &mut said, "first\n").await;
    // Room for the first piece of the line, not for the second.
    disk.fill(5 * 4096);
    say(&writer, &mut said, &format!("{}\n", "x".repeat(3 * LINE_BYTES))).await;
    let kept = disk.log();
    assert!(kept.len() == 2 && !kept[1].whole && kept[1].text.len() == LINE_BYTES, "{} records", kept.len());
    say(&writer, &mut said, &format!("{}\n", "lost".repeat(LINE_BYTES / 4))).await;
    disk.free();
    say(&writer, &mut said, "after\n").await;
    ended(writer, finished).await;
    assert_eq!(
        lines(&disk.log(), "stdout"),
        ["first".to_owned(), "x".repeat(LINE_BYTES), "after".to_owned()]
    );
}

#[tokio::test]
async fn half_a_record_that_a_kill_left_is_taken_off() {
    let disk = SmallDisk::new();
    let place = disk.place();
    let whole = "2026-01-02T03:04:05.000000001Z stdout F one\n";
    for torn in ["2026-01-02T03:04:05.0000", "2026-01-02T03:04:05.000000001Z stdout F tw", ""] {
        for before in [whole, ""] {
            std::fs::write(&place.path, format!("{before}{torn}")).unwrap();
            let (writer, finished) = LogWriter::open(place.clone()).await.unwrap();
            say(&writer, &mut 0, "two\n").await;
            ended(writer, finished).await;
            let expected: &[&str] = if before.is_empty() { &["two"] } else { &["one", "two"] };
            assert_eq!(lines(&disk.log(), "stdout"), expected, "{torn:?}");
        }
    }
}
