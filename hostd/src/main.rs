//! Entry point of `atoll-hostd`.

fn main() {
    eprintln!("atoll-hostd: not built yet");
    std::process::exit(1);
}
