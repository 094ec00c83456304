//! PID 1 of the Atoll host.
