//! Entry point of `atoll-runtime`.

use anyhow::{Context, bail};
use atoll_runtime::app::App;
use atoll_runtime::config::Config;
use atoll_runtime::images::unpacker;
use atoll_runtime::notify::notify;
use clap::Parser;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The Atoll microVM runtime: a CRI v1 server.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

/// Threads of the async runtime, and for what blocks. A server may have hundreds of processors, and all threads of the
/// service count against its limit of processes, with the helpers that unpack layers.
const THREADS: (usize, usize) = (8, 256);

fn main() -> ExitCode {
    // The unpack helper is this very program, and must be one thread only.
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|role| role == unpacker::ROLE) {
        return unpacker::main(&arguments[2..]);
    }
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("ATOLL_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .with_env_filter(filter)
        .init();
    match run(cli.config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    if let Err(problems) = config.check() {
        bail!("bad arguments: {}", problems.join("; "));
    }
    raise_descriptor_limit();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers(processors))
        .max_blocking_threads(THREADS.1)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
        let app = App::start(config).await?;
        notify("READY=1");
        // Cancel-safe: signals are not lost.
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        notify("STOPPING=1");
        tracing::info!("stopping; pods go on");
        app.stop().await;
        Ok(())
    })
}

/// A pod takes about ten descriptors, a hundred pods more than the usual soft limit.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "cannot raise the limit of open files");
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
        assert!(workers(1024) + THREADS.1 < 4096 / 2, "the service's limit of processes, in init's table");
    }
}
