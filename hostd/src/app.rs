//! Builds hostd and runs it. One task, one loop: everything that happens comes in as an [`Event`], after each the host
//! is brought to what config and leases say, and the status goes out.
//!
//! ```text
//! storage ─► config ─► network ─► (URL config) ─► address and time, or deadline ─► READY ─► keep it so
//! ```

use crate::clock::{self, Authority};
use crate::error::{Result, chain};
use crate::host::{Asked, Event, Host};
use crate::links::{Links, Senders};
use crate::notify::Notifier;
use crate::options::{ClockMode, Options};
use crate::status::{Area, Status};
use crate::{agent_status, bus, config, console, metrics, names, prepare};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Between two attempts to prepare the storage.
const STORAGE_RETRY: Duration = Duration::from_secs(30);
/// What init is asked for beyond the deadline of a storage step.
const STORAGE_MARGIN: Duration = Duration::from_secs(60);
/// Between two attempts to fetch the config: the first pause, and the longest.
const URL_RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Prints what would be done, in order.
pub async fn dry_run(options: &Options) -> Result<()> {
    let (plan, summary) = prepare::plan_storage(options).await?;
    println!("storage: {summary}");
    plan.steps.iter().for_each(|step| println!("  {step}"));
    plan.notes.iter().for_each(|note| println!("  ! {note}"));
    let loaded = config::load_local(&options.config_sources());
    println!("config: {}", loaded.origin);
    loaded.problems.iter().for_each(|problem| println!("  ! {problem}"));
    let senders = Senders { leases: mpsc::channel(1).0, names: mpsc::channel(1).0, wake: mpsc::channel(1).0 };
    let steps = Links::open(options.sys.clone(), senders)?.plan(&loaded.machine).await?;
    println!("network:");
    steps.iter().for_each(|step| println!("  {step}"));
    Ok(())
}

/// Runs until `stop` resolves.
pub async fn run(options: Options, stop: impl Future<Output = ()>) -> Result<()> {
    let mut stop = std::pin::pin!(stop);
    let notifier = Notifier::from_environment();
    let mut status = Status::new(crate::host::system_name(&options.os_release));
    let (told, heard) = watch::channel(status.clone());
    // Everything spawned here ends with this function.
    let mut tasks = JoinSet::new();
    tasks.spawn(console::run(options.screen.clone(), heard.clone()));
    match metrics::listen(&options.run.join("hostd/metrics.sock")) {
        Ok(listener) => {
            tasks.spawn(metrics::serve(listener, heard, options.data.clone()));
        }
        Err(error) => tracing::warn!("no metrics: {}", chain(&error)),
    }
    // Stopping in the middle of a step is what a power cut would be, and is as safe.
    tokio::select! {
        () = prepare_storage(&options, &mut status, &told, &notifier) => {}
        () = &mut stop => return Ok(()),
    }
    notifier.status("setting up the network");
    let (sender, mut events) = mpsc::channel(64);
    let asked = spawn_watchers(&options, &sender, &mut tasks);
    let senders = Senders {
        leases: forward(&mut tasks, &sender, Event::Lease),
        names: forward(&mut tasks, &sender, Event::Heard),
        wake: forward(&mut tasks, &sender, |()| Event::Wake),
    };
    let links = Links::open(options.sys.clone(), senders)?;
    let mut host = Host::new(options, status, links, asked);
    host.refresh(&told, &notifier).await;
    loop {
        notifier.alive();
        let look = host.next_look();
        let next = notifier.alive_every().map_or(look, |pause| look.min(Instant::now() + pause));
        // Cancel-safe: `recv` and sleeping lose nothing when dropped; `stop` is polled on by reference.
        let event = tokio::select! {
            event = events.recv() => event,
            () = tokio::time::sleep_until(next) => None,
            () = &mut stop => break,
        };
        match event {
            Some(event) => {
                host.handle(event);
                while let Ok(event) = events.try_recv() {
                    host.handle(event);
                }
            }
            // Woken only to say that it is alive.
            None if Instant::now() < look => continue,
            None => {}
        }
        host.refresh(&told, &notifier).await;
    }
    host.stop();
    Ok(())
}

/// Tries until the storage is there: without it nothing else may start.
async fn prepare_storage(
    options: &Options,
    status: &mut Status,
    told: &watch::Sender<Status>,
    notifier: &Notifier,
) {
    notifier.status("preparing storage");
    loop {
        let tell = |text: &str, within| {
            notifier.status(text);
            notifier.takes_longer(within + STORAGE_MARGIN);
            told.send_modify(|status| text.clone_into(&mut status.storage));
        };
        match prepare::prepare(options, tell).await {
            Ok(storage) => {
                status.storage = storage.summary;
                status.persistent = storage.persistent;
                status.set_problems(Area::Storage, storage.notes);
                return;
            }
            Err(error) => {
                let text = chain(&error);
                tracing::error!("storage is not ready: {text}");
                notifier.status(&format!("storage is not ready: {text}"));
                // A person has to do something first; to be started again would mend nothing.
                let disk = Duration::from_secs(options.disk_deadline);
                notifier.takes_longer(STORAGE_RETRY + disk + STORAGE_MARGIN);
                status.storage = "not ready, tried again every half minute".into();
                status.set_problems(Area::Storage, [text]);
                told.send_replace(status.clone());
                tokio::time::sleep(STORAGE_RETRY).await;
            }
        }
    }
}

/// Starts the tasks that watch what hostd does not do itself. Returns where the servers to ask go.
fn spawn_watchers(options: &Options, events: &mpsc::Sender<Event>, tasks: &mut JoinSet<()>) -> Asked {
    let (time_servers, servers) = watch::channel(clock::Servers::default());
    let (name_servers, names) = watch::channel(Vec::new());
    let authority = match options.clock {
        ClockMode::Set => Authority::Set,
        ClockMode::Report => Authority::Report,
    };
    let changes = forward(tasks, events, Event::Clock);
    tasks.spawn(clock::run(authority, servers, changes));
    let changes = forward(tasks, events, Event::Names);
    tasks.spawn(names::run(names, changes));
    let changes = forward(tasks, events, Event::Agent);
    tasks.spawn(agent_status::run(options.run.join("agent/status.json"), changes));
    let changes = forward(tasks, events, Event::Services);
    tasks.spawn(bus::run(options.run.join("init/bus.sock"), changes));
    let sources = options.config_sources();
    if let Some(url) = config::url(&sources) {
        let events = events.clone();
        tasks.spawn(fetch_config(url, sources, events));
    }
    Asked { time: time_servers, names: name_servers }
}

/// Fetches the config at the URL until there is one without a problem.
async fn fetch_config(url: String, sources: config::Sources, events: mpsc::Sender<Event>) {
    let mut pause = URL_RETRY.0;
    loop {
        let fetched = config::load_url(&url, &sources).await;
        let done = fetched.as_ref().is_ok_and(|loaded| loaded.origin == config::Origin::Url);
        let event = Event::Fetched(fetched.map(Box::new).map_err(|error| chain(&error)));
        if events.send(event).await.is_err() || done {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(URL_RETRY.1);
    }
}

/// Carries what a task reports into the one stream of events.
fn forward<T: Send + 'static>(
    tasks: &mut JoinSet<()>,
    events: &mpsc::Sender<Event>,
    event: fn(T) -> Event,
) -> mpsc::Sender<T> {
    let (sender, mut receiver) = mpsc::channel(8);
    let events = events.clone();
    tasks.spawn(async move {
        while let Some(item) = receiver.recv().await {
            if events.send(event(item)).await.is_err() {
                return;
            }
        }
    });
    sender
}
