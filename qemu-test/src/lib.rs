//! Harness that boots Atoll in QEMU beside a real Supervisor and registry.
