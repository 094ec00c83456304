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
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
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
