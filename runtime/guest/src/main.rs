//! Entry point of `atoll-guest`.

fn main() {
    eprintln!("atoll-guest: not built yet");
    std::process::exit(1);
}
