//! Entry point of `atoll-runtime`.

fn main() {
    eprintln!("atoll-runtime: not built yet");
    std::process::exit(1);
}
