//! Where the machine config comes from, and what is kept of it.
//!
//! Sources in order: a URL on the kernel command line, the hypervisor (fw_cfg), the EFI system partition. The first
//! that has a file decides; when that file is wrong, or cannot be had, the last good config is used instead and the
//! console says so. A file that was read without a problem becomes the last good config.

use crate::error::{Result, chain};
use crate::fetch;
use crate::files::{self, Durability};
use atoll_spec::machine::document::{self, MAX_BYTES};
use atoll_spec::machine::domain::Machine;
use std::fmt;
use std::path::PathBuf;

/// Where files are; other directories in tests.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The kernel's command line.
    pub cmdline: PathBuf,
    /// The hypervisor's file.
    pub fw_cfg: PathBuf,
    /// The file on the EFI system partition.
    pub esp: PathBuf,
    /// The last good config.
    pub last_good: PathBuf,
    /// Authorities to trust for an https URL.
    pub certificates: PathBuf,
}

/// Where the config in use came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// There is none: DHCP on every card, no join.
    None,
    /// The URL on the kernel command line.
    Url,
    /// The hypervisor.
    FwCfg,
    /// The EFI system partition.
    Esp,
    /// The copy of the last one without a problem.
    LastGood,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Url => "URL on the kernel command line",
            Self::FwCfg => "fw_cfg of the hypervisor",
            Self::Esp => "machine.yaml on the ESP",
            Self::LastGood => "last good config",
        })
    }
}

/// A config, where it came from, and what was wrong on the way.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The config to use.
    pub machine: Machine,
    /// Where it came from.
    pub origin: Origin,
    /// One line each; empty when all is well.
    pub problems: Vec<String>,
    /// The file, to be kept as the last good one; `None` when it is not new.
    keep: Option<Vec<u8>>,
}

/// The URL on the kernel command line, if any.
pub fn url(sources: &Sources) -> Option<String> {
    let line = std::fs::read_to_string(&sources.cmdline).ok()?;
    line.split_ascii_whitespace().find_map(|word| word.strip_prefix("atoll.config=")).map(str::to_owned)
}

/// Loads what is on this machine: fw_cfg, ESP, or the last good config.
pub fn load_local(sources: &Sources) -> Loaded {
    let mut problems = Vec::new();
    for (path, origin) in [(&sources.fw_cfg, Origin::FwCfg), (&sources.esp, Origin::Esp)] {
        match files::read(path, MAX_BYTES as u64) {
            Ok(None) => {}
            Ok(Some(bytes)) => return judge(bytes, origin, problems, sources),
            Err(error) => problems.push(chain(&error)),
        }
    }
    fall_back(problems, sources)
}

/// Loads the config from the URL. An error means that it could not be had; a file with problems is no error, it falls
/// back to the last good config.
pub async fn load_url(url: &str, sources: &Sources) -> Result<Loaded> {
    let bytes = fetch::get(url, &sources.certificates, MAX_BYTES).await?;
    Ok(judge(bytes, Origin::Url, Vec::new(), sources))
}

/// What to use when the URL's config cannot be had: the last good one, or none.
pub fn without_url(reason: &str, sources: &Sources) -> Loaded {
    fall_back(vec![reason.to_owned()], sources)
}

fn judge(bytes: Vec<u8>, origin: Origin, mut problems: Vec<String>, sources: &Sources) -> Loaded {
    match document::parse(&bytes) {
        Ok(machine) => Loaded { machine, origin, problems, keep: Some(bytes) },
        Err(found) => {
            problems
                .push(format!("the machine config ({origin}) has {} and is not used:", count(found.count())));
            problems.extend(found.iter().map(|p| format!("  {p}")));
            fall_back(problems, sources)
        }
    }
}

fn count(problems: usize) -> String {
    if problems == 1 { "1 problem".into() } else { format!("{problems} problems") }
}

fn fall_back(mut problems: Vec<String>, sources: &Sources) -> Loaded {
    let kept = files::read(&sources.last_good, MAX_BYTES as u64).ok().flatten();
    let (machine, origin) = match kept.map(|bytes| document::parse(&bytes)) {
        Some(Ok(machine)) => (machine, Origin::LastGood),
        // Written by another version, perhaps: no reason to stop.
        Some(Err(_)) | None => (Machine::default(), Origin::None),
    };
    if !problems.is_empty() && origin == Origin::LastGood {
        problems.push("the last good config is used instead; mend this and boot again".into());
    }
    Loaded { machine, origin, problems, keep: None }
}

impl Loaded {
    /// Keeps the file as the last good config, whole even after a power cut.
    pub fn remember(&self, sources: &Sources) -> Result<()> {
        match &self.keep {
            Some(bytes) => files::keep(&sources.last_good, bytes, 0o600, None, Durability::Durable).map(drop),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const GOOD: &str = "apiVersion: atoll.dev/v1\nkind: Machine\nhostname: good\n";

    fn sources(directory: &tempfile::TempDir) -> Sources {
        let at = |name: &str| directory.path().join(name);
        Sources {
            cmdline: at("cmdline"),
            fw_cfg: at("fw_cfg"),
            esp: at("esp.yaml"),
            last_good: at("last.yaml"),
            certificates: at("ca.pem"),
        }
    }

    #[test]
    fn the_hypervisor_wins_over_the_esp_and_a_good_file_is_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let sources = sources(&directory);
        assert_eq!(load_local(&sources).origin, Origin::None);
        fs::write(&sources.esp, GOOD.replace("good", "esp")).unwrap();
        assert_eq!(load_local(&sources).machine.hostname.as_deref(), Some("esp"));
        fs::write(&sources.fw_cfg, GOOD).unwrap();
        let loaded = load_local(&sources);
        assert_eq!(
            (loaded.origin.clone(), loaded.machine.hostname.as_deref()),
            (Origin::FwCfg, Some("good"))
        );
        loaded.remember(&sources).unwrap();
        assert_eq!(fs::read_to_string(&sources.last_good).unwrap(), GOOD);
    }

    #[test]
    fn a_wrong_file_falls_back_to_the_last_good_and_lists_everything() {
        let directory = tempfile::tempdir().unwrap();
        let sources = sources(&directory);
        fs::write(&sources.last_good, GOOD).unwrap();
        fs::write(&sources.esp, GOOD.replace("good", "BAD") + "kindd: a\n").unwrap();
        let loaded = load_local(&sources);
        assert_eq!(
            (loaded.origin.clone(), loaded.machine.hostname.as_deref()),
            (Origin::LastGood, Some("good"))
        );
        assert_eq!(
            loaded.problems,
            [
                "the machine config (machine.yaml on the ESP) has 1 problem and is not used:",
                "  kindd: unknown field: did you mean 'kind'?",
                "the last good config is used instead; mend this and boot again",
            ]
        );
        loaded.remember(&sources).unwrap();
        assert_eq!(fs::read_to_string(&sources.last_good).unwrap(), GOOD);
    }

    #[test]
    fn the_url_is_found_on_the_command_line() {
        let directory = tempfile::tempdir().unwrap();
        let sources = sources(&directory);
        fs::write(&sources.cmdline, "quiet atoll.config=http://a/b console=ttyS0\n").unwrap();
        assert_eq!(url(&sources).as_deref(), Some("http://a/b"));
    }
}
