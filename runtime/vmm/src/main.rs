//! Entry point of `atoll-vmm`.

fn main() {
    eprintln!("atoll-vmm: not built yet");
    std::process::exit(1);
}
