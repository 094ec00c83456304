//! The body is in `runtime/guest/src/fuzz.rs`, where `cargo test` calls it too.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| atoll_guest::fuzz::trees(data));
