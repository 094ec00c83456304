//! Places for work on layers: so many for all pulls together, and as many again for each pull of its own.
//!
//! Who waits for a place among all has one of its pull already. So an image of many layers leaves the next place that
//! gets free to another pull, where all of its layers would wait in front of that one's otherwise.

use super::error::ImageError;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Downloads at once.
const DOWNLOADS: usize = 4;
/// Layers unpacked at once.
const UNPACKS: usize = 2;

/// The places of all pulls, or those of one.
pub(super) struct Slots {
    downloads: Semaphore,
    unpacks: Semaphore,
}

/// A place of a pull's own, and one among all.
pub(super) type Taken<'a> = (SemaphorePermit<'a>, SemaphorePermit<'a>);

impl Default for Slots {
    fn default() -> Self {
        Self { downloads: Semaphore::new(DOWNLOADS), unpacks: Semaphore::new(UNPACKS) }
    }
}

impl Slots {
    /// Waits for a place to download in, for a pull that has `own` places.
    pub(super) async fn download<'a>(&'a self, own: &'a Self) -> Result<Taken<'a>, ImageError> {
        Ok((place(&own.downloads).await?, place(&self.downloads).await?))
    }

    /// Waits for a place to unpack in, for a pull that has `own` places.
    pub(super) async fn unpack<'a>(&'a self, own: &'a Self) -> Result<Taken<'a>, ImageError> {
        Ok((place(&own.unpacks).await?, place(&self.unpacks).await?))
    }
}

async fn place(places: &Semaphore) -> Result<SemaphorePermit<'_>, ImageError> {
    // Never closed; the error type asks for an answer all the same.
    let closed = |_| ImageError::Deadline { what: "waiting for a free slot".into(), seconds: 0 };
    places.acquire().await.map_err(closed)
}
