//! Entry point of `atoll-image`.

fn main() {
    eprintln!("atoll-image: not built yet");
    std::process::exit(1);
}
