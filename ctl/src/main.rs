//! Entry point of `atollctl`.

use clap::Parser;

fn main() -> std::process::ExitCode {
    let command = atollctl::Cli::parse();
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    atollctl::run(command, &mut std::io::stdin().lock(), &mut out, &mut std::io::stderr().lock()).into()
}
