//! Shows the status: as lines on stderr, which init forwards to the serial console, and as a screen on a monitor.
//!
//! The lines come whole once, when there is something to tell; after that only those that changed.

use crate::screen;
use crate::status::Status;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;

/// Changes come in bursts; they are shown together.
const BURST: Duration = Duration::from_millis(1500);

/// Shows each change until the app ends.
pub async fn run(terminal: PathBuf, mut status: watch::Receiver<Status>) {
    let mut shown: Option<Vec<String>> = None;
    while status.changed().await.is_ok() {
        tokio::time::sleep(BURST).await;
        let now = status.borrow_and_update().clone();
        draw(&terminal, &now);
        if shown.is_none() && !now.ready && now.problems.is_empty() {
            continue;
        }
        let lines = screen::lines(&now);
        say(&changed(shown.as_deref(), &lines));
        shown = Some(lines);
    }
}

/// What has to be said: everything the first time, then the lines that were not there before.
fn changed(before: Option<&[String]>, lines: &[String]) -> Vec<String> {
    match before {
        None => lines.to_vec(),
        Some(before) => lines.iter().filter(|line| !before.contains(line)).cloned().collect(),
    }
}

/// One write per line: lines of other processes do not end up inside.
pub fn say(lines: &[String]) {
    let mut stderr = std::io::stderr().lock();
    for line in lines {
        let clean: String = line.chars().filter(|c| !c.is_control()).collect();
        // When even stderr is gone there is nobody left to tell.
        let _ = stderr.write_all(format!("atoll: {clean}\n").as_bytes());
    }
}

fn draw(terminal: &Path, status: &Status) {
    use rustix::fs::{Mode, OFlags, open};
    // Neither a controlling terminal nor a block when nobody reads it.
    let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(fd) = open(terminal, flags, Mode::empty()) else { return };
    let width = rustix::termios::tcgetwinsize(&fd).map_or(80, |size| usize::from(size.ws_col.max(40)));
    let mut file = std::fs::File::from(fd);
    if let Err(error) = file.write_all(screen::terminal(status, width).as_bytes()) {
        tracing::debug!(%error, "status screen not drawn");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_the_first_time_only_changes_are_said() {
        let lines = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let first = lines(&["a", "b"]);
        assert_eq!(changed(None, &first), first);
        assert_eq!(changed(Some(&first), &lines(&["a", "c"])), ["c"]);
        assert!(changed(Some(&first), &first).is_empty());
    }
}
