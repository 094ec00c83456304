//! Entry point of `atollctl`.

fn main() {
    eprintln!("atollctl: not built yet");
    std::process::exit(1);
}
