//! Prepares storage at boot: waits for the boot disk, plans, applies. Runs once, before anything else.

use crate::error::{Error, Result, chain};
use crate::options::{Options, StorageMode};
use crate::plan::storage::{Observed, Plan, Step, boot_disk, plan};
use crate::{apply, observe};
use std::time::Duration;
use tokio::time::Instant;

/// How often to look for the boot disk.
const LOOK: Duration = Duration::from_millis(100);

/// What was made of the storage.
#[derive(Debug, Clone, Default)]
pub struct Storage {
    /// For the console.
    pub summary: String,
    /// Whether it outlives a reboot.
    pub persistent: bool,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Waits for the boot disk and plans. Returns the plan and what it is made on.
pub async fn plan_storage(options: &Options) -> Result<(Plan, String)> {
    let targets = options.storage_targets();
    if options.storage == StorageMode::Directories {
        let mut all = plan(&Observed::default(), &targets).map_err(Error::Host)?;
        all.steps.retain(|step| matches!(step, Step::Directory { .. }));
        all.notes.clear();
        return Ok((all, "directories as they are".into()));
    }
    let observed = wait_for_disk(options).await?;
    let plan = plan(&observed, &targets).map_err(Error::Host)?;
    let summary = match boot_disk(&observed).map_err(Error::Host)? {
        Some(disk) => format!("{} ({})", disk.device.display(), size(disk.bytes)),
        None => "memory only, nothing is kept".into(),
    };
    Ok((plan, summary))
}

/// A disk may take seconds to appear (USB, RAID controllers). One that the firmware named is waited for by that name.
async fn wait_for_disk(options: &Options) -> Result<Observed> {
    let sources = options.storage_sources();
    let end = Instant::now() + Duration::from_secs(options.disk_deadline);
    loop {
        let observed = observe::storage::observe(&sources)?;
        let found = boot_disk(&observed).map_err(Error::Host)?;
        if found.is_some() || Instant::now() >= end {
            return Ok(observed);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Plans and does it all; a step that fails ends it, because each needs those before it. Growing is not needed.
/// `tell` is told what is being done and how long it may take, for that is minutes on a large disk.
pub async fn prepare(options: &Options, tell: impl Fn(&str, Duration) + Sync) -> Result<Storage> {
    let (plan, summary) = plan_storage(options).await?;
    let mut notes = plan.notes;
    for step in &plan.steps {
        match (do_step(step, &tell).await, step) {
            (Ok(()), _) => {}
            // What was stored is there, only not more room for it.
            (Err(error), Step::GrowPartition { .. }) => notes.push(not_grown(step, &error)),
            // It may have been stopped half way: what it left is not mounted unseen.
            (Err(error), Step::GrowFilesystem { device }) => {
                notes.push(not_grown(step, &error));
                do_step(&Step::Check { device: device.clone(), whole: true }, &tell).await?;
            }
            // It is as it was, or the backup counts, and it is tried again at the next boot.
            (Err(error), Step::RestoreTable { .. } | Step::OwnIds { .. }) => {
                notes.push(format!("{step} failed: {}", chain(&error)))
            }
            (Err(error), _) => return Err(error),
        }
    }
    Ok(Storage { summary, persistent: plan.persistent, notes })
}

/// Does a step, and tells it; when it takes long, also how far it is, which the console shows at a bound rate.
async fn do_step(step: &Step, tell: &(impl Fn(&str, Duration) + Sync)) -> Result<()> {
    if matches!(step, Step::Directory { .. }) {
        tracing::debug!("{step}");
        return apply::storage::apply(step, &|_| {}).await;
    }
    let within = apply::storage::within(step);
    tracing::info!("{step}");
    tell(&step.to_string(), within);
    let how_far = |text: &str| {
        tracing::info!("{step}: {text}; do not switch the machine off");
        tell(&format!("{step}: {text}"), within);
    };
    apply::storage::apply(step, &how_far).await
}

fn not_grown(step: &Step, error: &Error) -> String {
    format!("{step} failed, the space behind it is not used: {}", chain(error))
}

fn size(bytes: u64) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    if gib < 1000.0 { format!("{gib:.1} GiB") } else { format!("{:.1} TiB", gib / 1024.0) }
}
