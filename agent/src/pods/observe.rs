//! Looks at what the runtime has of one pod.
//!
//! Called by `worker`. An ended container does not change any more, so its status is asked for once.

use super::actual::{Actual, MESSAGE_PATH, MESSAGE_POLICY, Ran, Sandbox, State};
use crate::cri::{Cri, Result};
use atoll_cri::v1;
use std::collections::HashMap;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

/// Most of a termination message that is kept, and of a log that stands in for it.
const MESSAGE_BYTES: u64 = 4096;
const LOG_BYTES: u64 = 2048;
const LOG_LINES: usize = 80;

/// Remembers ended containers.
#[derive(Debug, Default)]
pub struct Observer {
    ended: HashMap<String, Ran>,
}

impl Observer {
    /// Everything the runtime has of a pod.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn look(&mut self, cri: &Cri, uid: &str) -> Result<Actual> {
        let mut sandboxes = Vec::new();
        for listed in cri.sandboxes(Some(uid)).await? {
            sandboxes.push(sandbox(cri, listed).await?);
        }
        let listed = cri.containers(Some(uid)).await?;
        self.ended.retain(|id, _| listed.iter().any(|c| c.id == *id));
        let mut containers = Vec::new();
        for container in listed {
            if let Some(ran) = self.ended.get(&container.id) {
                containers.push(ran.clone());
                continue;
            }
            // Removed since the list was made.
            let Some(status) = cri.container_status(&container.id).await? else { continue };
            let ran = read(status, container.pod_sandbox_id);
            if ran.state == State::Exited {
                self.ended.insert(ran.id.clone(), ran.clone());
            }
            containers.push(ran);
        }
        Ok(Actual::new(sandboxes, containers))
    }
}

async fn sandbox(cri: &Cri, listed: v1::PodSandbox) -> Result<Sandbox> {
    let status = cri.sandbox_status(&listed.id).await?;
    let ready = v1::PodSandboxState::SandboxReady as i32;
    let network = status.as_ref().and_then(|s| s.network.clone()).unwrap_or_default();
    let more = network.additional_ips.into_iter().map(|ip| ip.ip);
    Ok(Sandbox {
        id: listed.id,
        attempt: listed.metadata.map_or(0, |m| m.attempt),
        ready: status.map_or(listed.state, |s| s.state) == ready,
        created: listed.created_at,
        ips: std::iter::once(network.ip).chain(more).filter(|ip| !ip.is_empty()).collect(),
    })
}

fn read(status: v1::ContainerStatus, sandbox: String) -> Ran {
    let path = status.annotations.get(MESSAGE_PATH).cloned().unwrap_or_default();
    let log_too = status.annotations.get(MESSAGE_POLICY).is_some_and(|p| p == "FallbackToLogsOnError");
    let host = status.mounts.iter().find(|m| m.container_path == path).map(|m| m.host_path.clone());
    let mut ran = Ran::read(status, sandbox);
    if ran.state != State::Exited {
        return ran;
    }
    if ran.reason.is_empty() {
        ran.reason = if ran.exit_code == 0 { "Completed" } else { "Error" }.into();
    }
    let mut said = host.and_then(|path| head(Path::new(&path))).unwrap_or_default();
    if said.is_empty() && log_too && ran.exit_code != 0 {
        said = log_tail(Path::new(&ran.log_path)).unwrap_or_default();
    }
    if !said.is_empty() {
        ran.message = said;
    }
    ran
}

fn head(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(MESSAGE_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last lines of a log in CRI's format (`time stream tag text`), without what CRI added.
fn log_tail(path: &Path) -> Option<String> {
    let mut file = std::fs::File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    // CRI's part of a line is about 40 bytes long.
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES * 4))).ok()?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES * 4).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    // The first line is the end of one, when there is more before it, and has nothing of CRI's.
    let begins_inside = length > LOG_BYTES * 4;
    let said = |(number, line)| {
        if number == 0 && begins_inside { Some(line) } else { str::splitn(line, 4, ' ').nth(3) }
    };
    let lines: Vec<_> = text.lines().enumerate().filter_map(said).collect();
    let mut tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
    let over = tail.len().saturating_sub(LOG_BYTES as usize);
    if over > 0 {
        // Whole lines, unless the last one alone is too long: then its end.
        let line = tail.as_bytes()[over - 1..].iter().position(|byte| *byte == b'\n').map(|at| over + at);
        let end = || (over..).find(|at| tail.is_char_boundary(*at));
        let cut = line.filter(|at| *at < tail.len()).or_else(end).unwrap_or(over);
        tail.drain(..cut);
    }
    if !tail.is_empty() {
        tail.push('\n');
    }
    Some(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_stands_in_for_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, "2026-01-01T00:00:00Z stdout F one two\n2026-01-01T00:00:01Z stderr F three\n")
            .unwrap();
        assert_eq!(log_tail(&path).unwrap(), "one two\nthree\n");
        // Lines that are too many, one that is too long, and one that does not begin where the file is read from.
        let line = |text: &str| format!("2026-01-01T00:00:00Z stderr F {text}\n");
        std::fs::write(&path, line(&"a".repeat(1500)) + &line(&"b".repeat(1500))).unwrap();
        assert_eq!(log_tail(&path).unwrap(), "b".repeat(1500) + "\n");
        for long in [3000, 30_000] {
            std::fs::write(&path, line(&("é ".repeat(long) + "end"))).unwrap();
            let tail = log_tail(&path).unwrap();
            assert!(tail.ends_with(" é end\n") && (2040..=2049).contains(&tail.len()), "{}", tail.len());
        }
    }
}
