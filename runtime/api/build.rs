//! Compiles `proto/api.proto` to Rust without a `protoc` binary: protox parses, tonic-prost-build generates.

use std::io;

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=proto/api.proto");
    println!("cargo:rerun-if-changed=build.rs");
    let descriptors = protox::compile(["proto/api.proto"], ["proto"]).map_err(io::Error::other)?;
    tonic_prost_build::configure().build_client(true).build_server(true).compile_fds(descriptors)
}
