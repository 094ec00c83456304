//! Entry point of `atoll-init`.

fn main() {
    eprintln!("atoll-init: not built yet");
    std::process::exit(1);
}
