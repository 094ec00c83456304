//! The body is in `runtime/src/images/fuzz.rs`, where `cargo test` calls it too.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| atoll_runtime::images::fuzz::documents(data));
