//! PID 1 inside an Atoll microVM.
