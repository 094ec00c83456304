//! Does the steps that `plan` decided, and says how each went. Decides nothing itself.

pub mod network;
pub mod program;
pub mod storage;
