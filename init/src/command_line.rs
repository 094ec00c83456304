//! What the kernel command line tells init. Pure.
//!
//! | option | meaning |
//! |---|---|
//! | `atoll.boot-failure=reboot` (default), `power-off`, `hold` | what follows a boot that failed, after its countdown |
//! | `atoll.log=LEVEL` | `ATOLL_LOG` of all services, for example `debug` |

/// What follows a failed boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BootFailurePolicy {
    /// Boot again: the boot loader counts tries and goes back to the image before.
    #[default]
    Reboot,
    /// Stay off.
    PowerOff,
    /// Stay as it is, for a person to read the console. The watchdog is kept from biting.
    Hold,
}

/// Options of init.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// See [`BootFailurePolicy`].
    pub boot_failure: BootFailurePolicy,
    /// Log filter of the services.
    pub log: Option<String>,
}

impl Options {
    /// Reads a command line; what is unknown or malformed counts as not given, since a boot must not fail by it.
    pub fn parse(line: &str) -> Self {
        let mut options = Self::default();
        for word in line.split_whitespace() {
            match word.split_once('=') {
                Some(("atoll.boot-failure", "power-off")) => {
                    options.boot_failure = BootFailurePolicy::PowerOff
                }
                Some(("atoll.boot-failure", "hold")) => options.boot_failure = BootFailurePolicy::Hold,
                Some(("atoll.boot-failure", "reboot")) => options.boot_failure = BootFailurePolicy::Reboot,
                Some(("atoll.log", filter)) if !filter.is_empty() => options.log = Some(filter.to_owned()),
                _ => {}
            }
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_valid_word_counts() {
        let options =
            Options::parse("quiet atoll.boot-failure=hold atoll.boot-failure=nonsense atoll.log=debug\n");
        assert_eq!(options, Options { boot_failure: BootFailurePolicy::Hold, log: Some("debug".into()) });
        assert_eq!(Options::parse(""), Options::default());
    }
}
