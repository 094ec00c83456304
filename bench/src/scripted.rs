//! What both sides of the bench know of the scripted control plane and registry: keys, addresses, the machine config.

use atoll_scripted_cluster::{Ca, TOKEN, authority_of};
use std::sync::Arc;

/// Name of the node.
pub const NODE: &str = "bench";
/// The control plane, inside the host.
pub const SERVER: &str = "127.0.0.1:6443";
/// The registry, inside the host.
pub const REGISTRY: &str = "127.0.0.1:5000";
/// fw_cfg file that says how much is measured.
pub const SCOPE_FILE: &str = "opt/dev.atoll/bench";

/// Key of the control plane's authority. It is no secret: it signs for loopback of a machine that is thrown away, and has
/// to be the same in each run, for the machine config names it.
const AUTHORITY_KEY: &str = include_str!("authority.pem");

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Scope {
    /// One boot, one microVM, one pod.
    Quick,
    /// Everything.
    Full,
}

impl Scope {
    /// As the fw_cfg file has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Full => "full",
        }
    }

    /// From the content of the fw_cfg file.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        match text.trim() {
            "quick" => Ok(Self::Quick),
            "full" => Ok(Self::Full),
            other => anyhow::bail!("the scope of the bench is quick or full, not '{other}'"),
        }
    }
}

/// The control plane's authority.
pub fn authority() -> Arc<Ca> {
    authority_of("kubernetes", AUTHORITY_KEY)
}

/// The machine config that makes the host join.
pub fn machine_config() -> String {
    let pin = atoll_scripted_cluster::pin(&authority());
    format!(
        "apiVersion: atoll.dev/v1\nkind: Machine\nhostname: {NODE}\nnetwork:\n  links:\n    - match: {{driver: virtio_net}}\n      addresses: [192.0.2.10/24]\njoin:\n  server: https://{SERVER}\n  token: {TOKEN}\n  caPins: ['{pin}']\nregistries:\n  \"{REGISTRY}\":\n    plainHttp: true\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_config_is_one() {
        atoll_spec::machine::document::parse(machine_config().as_bytes()).expect("a good config");
    }
}
