//! Flags of hostd. Every path has the default of a running host, and can be another in a test.

use crate::{config, observe, plan};
use std::path::PathBuf;

/// The Atoll host daemon.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "atoll-hostd", version, about)]
pub struct Options {
    /// Print the steps that are to be done, in order, and do none of them.
    #[arg(long)]
    pub dry_run: bool,
    /// Where the EFI system partition is mounted.
    #[arg(long, default_value = "/esp", value_name = "DIR")]
    pub esp: PathBuf,
    /// Where STATE is mounted.
    #[arg(long, default_value = "/state", value_name = "DIR")]
    pub state: PathBuf,
    /// Where DATA is mounted.
    #[arg(long, default_value = "/data", value_name = "DIR")]
    pub data: PathBuf,
    /// Where hostd, agent, runtime and init leave files for each other.
    #[arg(long, default_value = "/run/atoll", value_name = "DIR")]
    pub run: PathBuf,
    /// sysfs.
    #[arg(long, default_value = "/sys", value_name = "DIR")]
    pub sys: PathBuf,
    /// Device nodes.
    #[arg(long, default_value = "/dev", value_name = "DIR")]
    pub dev: PathBuf,
    /// The kernel's command line.
    #[arg(long, default_value = "/proc/cmdline", value_name = "FILE")]
    pub cmdline: PathBuf,
    /// What the system calls itself.
    #[arg(long, default_value = "/etc/os-release", value_name = "FILE")]
    pub os_release: PathBuf,
    /// Authorities to trust when the config is fetched over https.
    #[arg(long, default_value = "/etc/ssl/certs/ca-certificates.crt", value_name = "FILE")]
    pub certificates: PathBuf,
    /// Terminal for the status screen; left alone when it does not exist.
    #[arg(long, default_value = "/dev/tty1", value_name = "DEVICE")]
    pub screen: PathBuf,
    /// What to do about disks.
    #[arg(long, default_value = "disk", value_enum)]
    pub storage: StorageMode,
    /// What to do about the clock.
    #[arg(long, default_value = "set", value_enum)]
    pub clock: ClockMode,
    /// Seconds to wait for the boot disk to appear.
    #[arg(long, default_value_t = 15, value_name = "SECONDS")]
    pub disk_deadline: u64,
    /// Seconds to wait for an address and the time before going on without.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub network_deadline: u64,
}

/// What to do about disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum StorageMode {
    /// Find, format, check, grow and mount the boot disk's partitions.
    Disk,
    /// Use the directories as they are: on a development machine.
    Directories,
}

/// What to do about the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ClockMode {
    /// Set it.
    Set,
    /// Only say how far it is off: on a development machine.
    Report,
}

impl Options {
    /// Where the config may be.
    pub fn config_sources(&self) -> config::Sources {
        config::Sources {
            cmdline: self.cmdline.clone(),
            fw_cfg: self.sys.join("firmware/qemu_fw_cfg/by_name/opt/dev.atoll/machine.yaml/raw"),
            esp: self.esp.join("machine.yaml"),
            last_good: self.state.join("machine/machine.yaml"),
            certificates: self.certificates.clone(),
        }
    }

    /// Where storage belongs.
    pub fn storage_targets(&self) -> plan::storage::Targets {
        plan::storage::Targets {
            esp: self.esp.clone(),
            state: self.state.clone(),
            data: self.data.clone(),
            changed_ids: self.changed_ids(),
        }
    }

    /// Where storage is looked for.
    pub fn storage_sources(&self) -> observe::storage::Sources {
        observe::storage::Sources {
            sys: self.sys.clone(),
            dev: self.dev.clone(),
            mountinfo: "/proc/self/mountinfo".into(),
            changed_ids: self.changed_ids(),
        }
    }

    /// In memory: at the next boot the firmware sees what is on the disk.
    fn changed_ids(&self) -> PathBuf {
        self.run.join("hostd/changed-ids")
    }
}
