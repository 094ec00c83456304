//! Entry point of `atoll-agent`.

fn main() {
    eprintln!("atoll-agent: not built yet");
    std::process::exit(1);
}
