//! The Atoll host daemon: machine config to plan to applied state.
