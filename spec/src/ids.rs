//! Identifiers, each its own type so that a container id cannot be passed for a sandbox id.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Longest identifier accepted anywhere.
pub const MAX_ID_LEN: usize = 64;

/// Why a string is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{value}' is not a valid {kind}: use 1 to 64 of a-z, 0-9 and '-', starting with a letter or digit")]
pub struct InvalidId {
    kind: &'static str,
    value: String,
}

fn valid(value: &str) -> bool {
    let mut bytes = value.bytes();
    value.len() <= MAX_ID_LEN
        && bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The identifier as text; safe to use as a file name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(value: String) -> Result<Self, InvalidId> {
                if valid(&value) { Ok(Self(value)) } else { Err(InvalidId { kind: $kind, value }) }
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidId;
            fn from_str(value: &str) -> Result<Self, InvalidId> {
                Self::try_from(value.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A pod sandbox: one microVM.
    SandboxId,
    "sandbox id"
);
id!(
    /// A container inside a sandbox.
    ContainerId,
    "container id"
);
id!(
    /// One exec session inside a container.
    ExecId,
    "exec id"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_refuse_what_could_leave_a_directory() {
        for bad in ["", ".", "..", "a/b", "-a", "A", "a b", &"a".repeat(65)] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad:?}");
        }
        assert_eq!("a-1".parse::<SandboxId>().unwrap().as_str(), "a-1");
    }
}
