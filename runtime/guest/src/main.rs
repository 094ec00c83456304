//! `atoll-guest`: the program around the library, whose documentation says what it does.
//!
//! The symbol `main` is given here: the standard library's start-up aborts when the three standard descriptors are closed
//! and `/dev/null` is missing, which is how the kernel starts us.

#![no_main]

use std::ffi::{c_char, c_int};

/// Entry of the program. The C runtime calls it once; no other crate defines the symbol because of `no_main`.
#[unsafe(no_mangle)]
pub extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    atoll_guest::start(argc, argv)
}
