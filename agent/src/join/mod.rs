//! From a token to a client certificate: kubeadm's flow.

/// Why joining failed.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No CA of the cluster matches a pin.
    #[error("no CA of the cluster matches a pin in the machine config")]
    Pin,
}
