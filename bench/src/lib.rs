//! The bench: what the host costs, in virtual time that two runs agree on.
//!
//! ```text
//! bench (build machine) ──QEMU, one instruction = 1 ns──► booted bench image
//!    ▲                                                      │ atoll-bench-host: API server and registry of its own,
//!    └────── figures, one line each on the console ◄────────┘ launches, pods, memory, traffic, pulls
//!    └─► table, bench.json, chart, budgets
//! ```
//!
//! Under that clock nothing outside the machine may be waited for: whenever the processor is idle, the clock leaps to the
//! next timer. So the control plane and the registry are inside the host, and its disk is memory.

pub mod boot;
pub mod budgets;
pub mod chart;
pub mod figure;
pub mod host;
pub mod machine;
pub mod reference;
pub mod scripted;
