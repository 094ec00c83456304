//! A developer's tool: boots one microVM with `atoll-vmm` the way the runtime does, shows what its guest says on vsock,
//! and prints how it ended and its counters. As `/init` of a guest it tries every device instead.
//!
//! ```text
//! boot --vmm atoll-vmm --kernel vmlinux --initramfs guest.cpio --layer a.erofs --scratch scratch.img
//! ```

mod guest;
mod host;
mod vsock;

fn main() {
    let result = if std::process::id() == 1 && std::path::Path::new("/init").exists() {
        guest::main()
    } else {
        host::main()
    };
    if let Err(error) = result {
        eprintln!("boot: {error}");
        std::process::exit(1);
    }
}
