//! Entry point of `atoll-agent`: arguments, log, run.

use atoll_agent::config::Options;
use atoll_agent::{app, error};
use clap::Parser as _;
use std::process::ExitCode;

/// Threads of the async runtime, and for what blocks. A server may have hundreds of processors, and all threads of the
/// service count against its limit of processes.
const THREADS: (usize, usize) = (8, 64);

fn main() -> ExitCode {
    let options = Options::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("ATOLL_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .init();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers(processors))
        .max_blocking_threads(THREADS.1)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!("cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(app::run(options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", error::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn workers(processors: usize) -> usize {
    processors.clamp(1, THREADS.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_bounded_however_many_processors_there_are() {
        assert_eq!([1, 2, 8, 256].map(workers), [1, 2, 8, 8]);
        assert!(workers(1024) + THREADS.1 < 512 / 2, "the service's limit of processes, in init's table");
    }
}
