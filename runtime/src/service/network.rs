//! The pod network of the host, as the owner has it installed.
//!
//! ```text
//! wanted ──► installing ──done──► installed
//!               ▲    │ another CIDR was asked for, or other pods have come or gone meanwhile
//!               └────┘
//! ```
//!
//! Called by the owner. Invariant: one installation at a time, and the last one is of what is wanted then: each replaces the
//! whole packet filter, so that an older one that came later would leave the filter of a network that is no more.

use crate::error::{Error, Result};
use crate::service::owner::{Done, Owner, answer};
use crate::service::{Reply, recover};
use crate::vm::address::PodCidr;
use crate::vm::network::Port;

/// What is being installed, and who waits for it.
#[derive(Default)]
pub(super) struct Installation {
    running: bool,
    waiters: Vec<Reply<()>>,
}

/// What an installation was of.
pub(super) struct Installed {
    cidr: PodCidr,
    ports: Vec<Port>,
    result: Result<()>,
}

impl Owner {
    pub(super) fn set_pod_cidr(&mut self, cidr: PodCidr, reply: Reply<()>) {
        let known = self.pool.cidr() == Some(cidr) && self.network.is_ok() && !self.installation.running;
        self.pool.set_cidr(cidr);
        if known {
            return answer(reply, Ok(()));
        }
        if let Err(error) = recover::save_cidr(&self.shared.config.sandboxes(), cidr) {
            tracing::error!(%error, "cannot keep the pod CIDR over a restart");
        }
        self.installation.waiters.push(reply);
        if !self.installation.running {
            self.install_network(cidr);
        }
    }

    fn install_network(&mut self, cidr: PodCidr) {
        self.installation.running = true;
        let (shared, ports) = (self.shared.clone(), self.ports());
        self.jobs.spawn(async move {
            let result = shared.launcher.host.install_network(cidr, &ports).await;
            Done::NetworkInstalled(Installed { cidr, ports, result })
        });
    }

    /// The devices of the pods that there are.
    fn ports(&self) -> Vec<Port> {
        self.sandboxes.values().filter(|s| s.phase.has_vm()).map(|s| s.port.clone()).collect()
    }

    pub(super) fn network_installed(&mut self, installed: Installed) {
        self.installation.running = false;
        let Installed { cidr, ports, result } = installed;
        match self.pool.cidr() {
            // A pod that came meanwhile may have been let in before its filter was replaced.
            Some(wanted) if wanted != cidr || (result.is_ok() && ports != self.ports()) => {
                return self.install_network(wanted);
            }
            _ => {}
        }
        self.network = result.as_ref().copied().map_err(ToString::to_string);
        if let Err(error) = &result {
            tracing::error!(%error, "pods have no network");
        }
        for waiter in std::mem::take(&mut self.installation.waiters) {
            answer(waiter, self.network.clone().map_err(Error::State));
        }
    }

    /// Installs the network that a predecessor had, or that the settings give. Waited for: the first pod may come as soon
    /// as the socket is open.
    pub(super) async fn recover_network(&mut self, cidr: PodCidr) {
        self.pool.set_cidr(cidr);
        let ports = self.ports();
        let result = self.shared.launcher.host.install_network(cidr, &ports).await;
        self.network_installed(Installed { cidr, ports, result });
    }
}
