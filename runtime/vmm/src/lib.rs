//! The Atoll virtual machine monitor: one process per microVM.
