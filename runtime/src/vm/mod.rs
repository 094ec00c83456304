//! One microVM per sandbox: launched, reached, taken down.
//!
//! Called by `service`; knows nothing of CRI. Imports point downwards: `launch` and `pod` use the rest.

pub mod address;
pub mod client;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod guest;
pub mod host;
pub mod jail;
mod keeper;
pub mod launch;
pub mod network;
pub mod pod;
pub mod scratch;
pub mod window;
pub mod wire;
