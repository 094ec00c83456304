//! Layer blob → erofs file: the parent's side of the helper process (see `unpacker`).

use super::StoreOptions;
use super::digest::Digest;
use super::error::ImageError;
use super::room;
use super::scratch::Scratch;
use super::tarscan::NO_ROOM;
use super::unpacker::{Job, OUTPUT, program_paths};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

/// Longest time for one layer.
const DEADLINE: Duration = Duration::from_secs(20 * 60);
/// How much of the helper's last words is kept.
const LAST_WORDS: u64 = 8 * 1024;
/// Layers are mapped into guest memory by the page.
const ALIGNMENT: u64 = 4096;

/// An erofs file in a working directory, to be moved into the store.
#[derive(Debug)]
pub struct Unpacked {
    /// Keeps the directory until the file has been moved.
    pub work: Scratch,
    /// The file.
    pub path: PathBuf,
    /// Its length, a multiple of 4096.
    pub length: u64,
}

/// Turns the verified blob in `blob` into an erofs file. When the future is dropped, the helper is killed.
pub async fn unpack(
    options: &StoreOptions,
    blob: &Scratch,
    diff_id: &Digest,
) -> Result<Unpacked, ImageError> {
    let what = format!("layer {diff_id}");
    let room = room::for_up_to(options, &what, 0)?;
    let work = Scratch::directory(&options.root, options.helper_uid)?;
    let input = std::fs::File::open(blob.path()).map_err(ImageError::io("open", blob.path()))?;
    let mut programs = program_paths(&options.mkfs_erofs);
    programs.extend(options.helper_paths.iter().cloned());
    let job = Job {
        mkfs_erofs: options.mkfs_erofs.clone(),
        // Its working directory: the store is root's alone, so the helper could not walk to it by a whole path.
        work: ".".into(),
        diff_id: diff_id.clone(),
        uid: options.helper_uid,
        room,
        programs,
    };
    let mut child = Command::new(&options.helper)
        .args(job.arguments())
        .current_dir(work.path())
        .env_clear()
        .stdin(input)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(ImageError::io("run", &options.helper))?;
    let mut group = Group(child.id());
    let mut words = String::new();
    let talk = async {
        if let Some(stderr) = child.stderr.take() {
            let mut bytes = Vec::new();
            // What could be read is what there is to tell.
            let _ = stderr.take(LAST_WORDS).read_to_end(&mut bytes).await;
            words = String::from_utf8_lossy(&bytes).into_owned();
        }
        child.wait().await
    };
    let failed = |why: String| ImageError::Unpack { layer: diff_id.clone(), why };
    let status = match tokio::time::timeout(DEADLINE, talk).await {
        Ok(status) => status.map_err(|error| failed(error.to_string()))?,
        Err(_) => return Err(failed(format!("not done after {} s", DEADLINE.as_secs()))),
    };
    // Waited for: its number may be another's from now on.
    group.forget();
    if !status.success() {
        if words.contains(NO_ROOM) || room::for_up_to(options, &what, 0).is_err() {
            return Err(room::full(options, &what));
        }
        // What mkfs.erofs said comes before what the helper made of it.
        let lines: Vec<&str> = words.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = lines[lines.len().saturating_sub(3)..].join("; ");
        return Err(failed(if last.is_empty() { format!("the helper ended with {status}") } else { last }));
    }
    words.lines().for_each(|line| tracing::warn!("unpacking {diff_id}: {line}"));
    let path = work.path().join(OUTPUT);
    let length = std::fs::metadata(&path).map_err(ImageError::io("look at", &path))?.len();
    if length == 0 || length % ALIGNMENT != 0 {
        return Err(failed(format!("the layer file has {length} bytes, not a multiple of {ALIGNMENT}")));
    }
    Ok(Unpacked { work, path, length })
}

/// Kills helper and mkfs.erofs together when the pull is given up.
struct Group(Option<u32>);

impl Group {
    fn forget(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let pid = self.0.and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            // Not waited for yet, so the number is still its own.
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
    }
}
