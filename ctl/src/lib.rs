//! The Atoll command line client: the tree of commands, one file per verb beside it.
//!
//! A command gets its input and outputs passed in, and returns how it went; nothing here ends the process. Exit codes:
//! 0 all is well, 1 the answer is no (a config has problems), 2 it could not be done (a file is missing, wrong usage).

pub mod complete;
pub mod config;
pub mod error;
pub mod output;
pub mod version;

use error::Error;
use output::Format;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Work with Atoll hosts.
#[derive(Debug, clap::Parser)]
#[command(name = "atollctl", version, about, disable_help_subcommand = true)]
pub struct Cli {
    /// How to print what is found.
    #[arg(short, long, global = true, value_enum, default_value = "text")]
    pub output: Format,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Check, explain and describe machine configs
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the version of this program
    Version,
    /// Print a completion script: add 'source <(atollctl completion bash)' to ~/.bashrc
    Completion {
        /// For which shell.
        #[arg(value_enum)]
        shell: complete::Shell,
    },
}

/// What to do with machine configs.
#[derive(Debug, clap::Subcommand)]
pub enum ConfigCommand {
    /// Check a machine config and print every problem, each with its path and what would be right
    Validate {
        /// The file; '-' is standard input.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Print the JSON schema of the machine config, for editors
    Schema,
    /// Explain a field of the machine config, such as 'network.links.match'; without one, the whole file
    Explain {
        /// The field's path.
        #[arg(value_name = "PATH", default_value = "", hide_default_value = true)]
        path: String,
    },
}

/// How a command went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All is well.
    Good,
    /// The answer is no.
    Bad,
    /// It could not be done.
    Failed,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Good => Self::SUCCESS,
            Outcome::Bad => Self::from(1),
            Outcome::Failed => Self::from(2),
        }
    }
}

/// Runs one command.
pub fn run(cli: Cli, input: &mut dyn Read, out: &mut dyn Write, err: &mut dyn Write) -> Outcome {
    let result = match cli.command {
        Command::Config(ConfigCommand::Validate { file }) => config::validate(&file, cli.output, input, out),
        Command::Config(ConfigCommand::Schema) => config::schema(out),
        Command::Config(ConfigCommand::Explain { path }) => config::explain(&path, cli.output, out),
        Command::Version => version::print(cli.output, out),
        Command::Completion { shell } => complete::print(shell, out),
    };
    let result = result.and_then(|outcome| out.flush().map(|()| outcome).map_err(Error::Output));
    match result {
        Ok(outcome) => outcome,
        // The reader has seen enough (`| head`): that is not a failure.
        Err(Error::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => Outcome::Good,
        Err(error) => {
            // Where nobody can be told, the exit code still says it.
            let _ = writeln!(err, "atollctl: {}", error::chain(&error));
            Outcome::Failed
        }
    }
}
