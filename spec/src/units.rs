//! Quantities with their unit in the type.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Mebibytes (2^20 bytes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MiB(pub u32);

impl MiB {
    /// The same quantity in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0) << 20
    }

    /// The smallest number of whole mebibytes that holds `bytes`; saturates at `u32::MAX`.
    pub fn holding(bytes: u64) -> Self {
        Self(u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX))
    }
}

impl fmt::Display for MiB {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

/// The vsock address of a guest. 0 to 2 are reserved (vsock(7)), so a guest's is at least 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct GuestCid(u32);

impl GuestCid {
    /// The first address a guest may have.
    pub const FIRST: Self = Self(3);

    /// `None` for the reserved addresses (0 to 2 and `VMADDR_CID_ANY`).
    pub fn new(cid: u32) -> Option<Self> {
        (3..u32::MAX).contains(&cid).then_some(Self(cid))
    }

    /// The address as the kernel takes it.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for GuestCid {
    type Error = String;
    fn try_from(cid: u32) -> Result<Self, String> {
        Self::new(cid).ok_or_else(|| format!("vsock address {cid} is reserved: a guest's is 3 or more"))
    }
}

impl From<GuestCid> for u32 {
    fn from(cid: GuestCid) -> u32 {
        cid.0
    }
}
