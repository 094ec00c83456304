//! `atollctl completion`.

use crate::error::Error;
use crate::{Cli, Outcome};
use clap::CommandFactory;
use std::io::Write;

/// Shells with a completion script.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Shell {
    /// GNU Bash.
    Bash,
    /// Z shell.
    Zsh,
    /// fish.
    Fish,
}

/// Prints the script.
pub fn print(shell: Shell, out: &mut dyn Write) -> Result<Outcome, Error> {
    let generator = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    // Into memory first: the generator panics when it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(generator, &mut Cli::command(), "atollctl", &mut script);
    out.write_all(&script).map_err(Error::Output)?;
    Ok(Outcome::Good)
}
