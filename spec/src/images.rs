//! Who may use an image that is on the node: what the runtime keeps of each pull, for the agent.
//!
//! The agent names the secret of a pull in annotation [`PULL_SECRET`] of the image of PullImage; ImageStatus answers who
//! has pulled it from there under key [`ACCESS`] of its info, when the image was pulled at all and not put there by hand.
//! Invariant: neither holds a credential, only a hash.

use serde::{Deserialize, Serialize};

/// Annotation of an image to pull: a [`PullSecret`] as JSON.
pub const PULL_SECRET: &str = "atoll.dev/pull-secret";
/// Key in the info of an image's status: an [`Access`] as JSON.
pub const ACCESS: &str = "access";

/// A secret with credentials, by its coordinates, and a hash of the credentials.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullSecret {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid: another secret may come under its name.
    pub uid: String,
    /// SHA-256 of the credentials, in hexadecimal.
    pub hash: String,
}

impl PullSecret {
    /// Whether it is the same object, whatever is in it now.
    pub fn is(&self, other: &Self) -> bool {
        (&self.uid, &self.namespace, &self.name) == (&other.uid, &other.namespace, &other.name)
    }
}

/// Who has shown that an image may be had from one repository.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// Anybody on this node: it was had without credentials of a pod.
    #[serde(default)]
    pub everyone: bool,
    /// Those with one of these secrets, or with the same credentials in another.
    #[serde(default)]
    pub secrets: Vec<PullSecret>,
}

impl Access {
    /// Whether somebody with these secrets has access. A secret whose content was replaced keeps it.
    pub fn admits(&self, secrets: &[PullSecret]) -> bool {
        let known = |own: &PullSecret| self.secrets.iter().any(|s| s.is(own) || s.hash == own.hash);
        self.everyone || secrets.iter().any(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(name: &str, hash: &str) -> PullSecret {
        let text = |text: &str| text.to_owned();
        PullSecret { namespace: text("ns"), name: text(name), uid: format!("uid-{name}"), hash: text(hash) }
    }

    #[test]
    fn the_same_secret_or_the_same_credentials_are_admitted() {
        let access = Access { everyone: false, secrets: vec![secret("a", "1")] };
        assert!(access.admits(&[secret("a", "1")]));
        assert!(access.admits(&[secret("other", "9"), secret("copy", "1")]));
        assert!(access.admits(&[secret("a", "2")]), "its password was changed");
        assert!(!access.admits(&[secret("b", "2")]));
        assert!(!access.admits(&[]));
        let anew = PullSecret { uid: "anew".into(), ..secret("a", "2") };
        assert!(!access.admits(&[anew]), "another secret under the name of one that was deleted");
        assert!(Access { everyone: true, ..Access::default() }.admits(&[]));
        assert!(!Access::default().admits(&[secret("a", "1")]));
    }
}
