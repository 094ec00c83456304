//! Storage steps: partition tables, mkfs, fsck, mount. Every program has a deadline.

use crate::error::{Context, Error, Result};
use crate::observe::storage::read_table;
use crate::plan::storage::{Mounting, Step};
use crate::sys;
use rustix::mount::{MountFlags, mount};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

const FORMAT_DEADLINE: Duration = Duration::from_secs(300);
const CHECK_DEADLINE: Duration = Duration::from_secs(900);
const GROW_DEADLINE: Duration = Duration::from_secs(300);

/// Does one step.
pub async fn apply(step: &Step) -> Result<()> {
    match step {
        Step::GrowPartition { disk, number } => grow_partition(disk, *number),
        Step::Format { device, label } => format(device, label).await,
        Step::Check { device, whole } => check(device, *whole).await,
        Step::Mount { device, target, how } => mount_volume(device, target, *how),
        Step::GrowFilesystem { device } => {
            let outcome = run("resize2fs", &[device.as_os_str()], device, GROW_DEADLINE).await?;
            outcome.expect_success("resize2fs", device)
        }
        Step::MountMemory { target, percent } => {
            let options = format!("size={percent}%,mode=0755");
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
            let options = std::ffi::CString::new(options).map_err(std::io::Error::other);
            let options = options.context("mount memory at", target.display())?;
            mount("tmpfs", target, "tmpfs", flags, options.as_c_str())
                .context("mount memory at", target.display())
        }
        Step::Directory { path, mode, owner } => directory(path, *mode, *owner),
    }
}

fn grow_partition(disk: &Path, number: u32) -> Result<()> {
    let shown = disk.display();
    let table = read_table(disk)?;
    let file = OpenOptions::new().read(true).write(true).open(disk).context("open for writing", &shown)?;
    let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).context("measure", &shown)?;
    let growth = table
        .grow(number, bytes)
        .map_err(|source| Error::PartitionTable { device: shown.to_string(), source })?;
    let Some(growth) = growth else { return Ok(()) };
    // In this order, each safely on the disk before the next: a power cut leaves one whole table.
    for (offset, content) in &growth.writes {
        file.write_all_at(content, *offset).context("write the partition table of", &shown)?;
        file.sync_all().context("write the partition table of", &shown)?;
    }
    sys::resize_partition(&file, number, growth.start, growth.length).context("resize a partition of", &shown)
}

async fn format(device: &Path, label: &str) -> Result<()> {
    let device_argument = device.as_os_str();
    let arguments = ["-q", "-F", "-L", label, "-m", "1", "-E", "nodiscard", "-O", "metadata_csum,64bit"];
    let mut all: Vec<&std::ffi::OsStr> = arguments.iter().map(std::ffi::OsStr::new).collect();
    all.push(device_argument);
    run("mkfs.ext4", &all, device, FORMAT_DEADLINE).await?.expect_success("mkfs.ext4", device)
}

/// Mends what can be mended: first what is certain, then everything, because nobody can answer questions here.
async fn check(device: &Path, whole: bool) -> Result<()> {
    for mode in ["-p", "-y"] {
        let mut arguments = vec![std::ffi::OsStr::new(mode), device.as_os_str()];
        if whole {
            arguments.insert(0, std::ffi::OsStr::new("-f"));
        }
        let outcome = run("e2fsck", &arguments, device, CHECK_DEADLINE).await?;
        match outcome.code {
            Some(0) => return Ok(()),
            // Mended; 2 asks for a reboot only when the file system was mounted, which it was not.
            Some(1..=3) => {
                tracing::warn!(device = %device.display(), "file system had errors and was mended");
                return Ok(());
            }
            Some(4..=7) if mode == "-p" => {
                tracing::warn!(device = %device.display(), words = outcome.words, "file system needs a full repair");
            }
            _ => return outcome.expect_success("e2fsck", device),
        }
    }
    Ok(())
}

fn mount_volume(device: &Path, target: &Path, how: Mounting) -> Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    let (kind, flags, options) = match how {
        // The ESP may hold a join token: root only.
        Mounting::Esp => ("vfat", safe | MountFlags::NOEXEC | MountFlags::RDONLY, c"fmask=0177,dmask=0077"),
        Mounting::Ext4 => ("ext4", safe | MountFlags::NOATIME, c"errors=remount-ro"),
    };
    fs::create_dir_all(target)
        .or_else(|error| if target.is_dir() { Ok(()) } else { Err(error) })
        .context("create", target.display())?;
    mount(device, target, kind, flags, options)
        .context("mount", format_args!("{} ({kind}) at {}", device.display(), target.display()))
}

fn directory(path: &Path, mode: u32, owner: u32) -> Result<()> {
    fs::create_dir_all(path).context("create", path.display())?;
    // Only root can give directories away; as anyone else (on a development machine) they stay one's own.
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = (rustix::fs::Uid::from_raw(owner), rustix::fs::Gid::from_raw(owner));
        match rustix::fs::chown(path, Some(uid), Some(gid)) {
            // In a user namespace that does not have this user.
            Err(rustix::io::Errno::INVAL) => {}
            other => other.context("change the owner of", path.display())?,
        }
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).context("change the mode of", path.display())
}

struct Outcome {
    code: Option<i32>,
    words: String,
}

impl Outcome {
    fn expect_success(self, program: &str, device: &Path) -> Result<()> {
        let code = match self.code {
            Some(0) => return Ok(()),
            Some(code) => format!("exit code {code}"),
            None => "killed by a signal".into(),
        };
        let outcome = if self.words.is_empty() { code } else { format!("{code}: {}", self.words) };
        Err(Error::Program { program: program.into(), object: device.display().to_string(), outcome })
    }
}

async fn run(
    program: &str,
    arguments: &[&std::ffi::OsStr],
    device: &Path,
    limit: Duration,
) -> Result<Outcome> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let failed = |outcome: String| Error::Program {
        program: program.into(),
        object: device.display().to_string(),
        outcome,
    };
    let output = tokio::time::timeout(limit, command.output())
        .await
        .map_err(|_| failed(format!("took longer than {} s and was stopped", limit.as_secs())))?
        .map_err(|error| failed(format!("cannot be started: {error}")))?;
    let text =
        String::from_utf8_lossy(if output.stderr.is_empty() { &output.stdout } else { &output.stderr })
            .into_owned();
    let last = text.lines().rev().map(str::trim).find(|l| !l.is_empty()).unwrap_or_default();
    Ok(Outcome { code: output.status.code(), words: last.chars().take(300).collect() })
}
