//! A guest that lies, floods or says nothing hurts itself alone: beside it another pod works as ever.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod fake;

use atoll_cri::v1::*;
use atoll_runtime::vm::wire::frame;
use atoll_spec::guest::{Event, Exit, FromGuest, Hello, PROTOCOL};
use fake::{Client, Fixture};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::RwLock;

/// Held by each test; alone by those that measure this process, in which all of them run.
static PROCESS: RwLock<()> = RwLock::const_new(());

/// Two pods with a running container each: the hostile one's sandbox, and container and sandbox of the other.
async fn two_pods(client: &mut Client) -> (String, String, String) {
    let hostile = client.sandbox("hostile").await;
    client.run(&hostile, "own", &["sleep"]).await;
    let other = client.sandbox("other").await;
    let container = client.run(&other, "main", &["sleep"]).await;
    (hostile, other, container)
}

/// A control connection of a guest, beside the one that its fake has.
async fn control(fixture: &Fixture, sandbox: &str) -> UnixStream {
    let mut stream = fixture.host.exchange.dial(fixture.host.vmm(sandbox).cid).await;
    stream.write_all(&frame(&Hello::Control { protocol: PROTOCOL, ready_us: 1 }).unwrap()).await.unwrap();
    stream
}

fn exited(container: &str, sequence: u64) -> Vec<u8> {
    let exit = Exit { code: 66, oom_killed: false, at_unix_ns: 1 };
    let event = Event::Exited { container: container.parse().unwrap(), exit };
    frame(&FromGuest::Event { sequence, event }).unwrap()
}

async fn works(client: &mut Client, container: &str) {
    let started = Instant::now();
    let answer = client.exec(container, &["echo", "hello"], 10).await.unwrap();
    assert_eq!(answer.stdout, b"hello\n");
    assert!(started.elapsed() < Duration::from_secs(5), "it took {:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_cannot_end_the_container_of_another_pod() {
    let _beside = PROCESS.read().await;
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let (hostile, _, container) = two_pods(&mut client).await;
    let mut stream = control(&fixture, &hostile).await;
    stream.write_all(&exited(&container, 1000)).await.unwrap();
    // Its acknowledgement says that the event has been looked at.
    let mut acknowledged = Vec::new();
    let read = async {
        while !String::from_utf8_lossy(&acknowledged).contains("ack-events") {
            let mut piece = [0; 4096];
            let count = stream.read(&mut piece).await.unwrap();
            assert!(count > 0, "the connection ended");
            acknowledged.extend_from_slice(&piece[..count]);
        }
    };
    tokio::time::timeout(Duration::from_secs(10), read).await.expect("no acknowledgement");
    assert_eq!(client.status(&container).await.state(), ContainerState::ContainerRunning);
    works(&mut client, &container).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_events_is_held_back_and_hurts_no_other_pod() {
    let _alone = PROCESS.write().await;
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let (hostile, other, container) = two_pods(&mut client).await;
    let mut stream = control(&fixture, &hostile).await;
    // As many as the runtime takes, for as long as it is looked at; no answer is ever read.
    let flood = tokio::spawn(async move {
        let events: Vec<u8> = (1..1000).flat_map(|n| exited("nobody", n)).collect();
        while stream.write_all(&events).await.is_ok() {}
    });
    let before = resident();
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        works(&mut client, &container).await;
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more");
    flood.abort();
    let more = client.run(&other, "more", &["echo", "x"]).await;
    client.ended(&more).await;
}

/// Resident memory of this process, in which the runtime runs, in bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_are_bounded_and_hurt_no_other_pod() {
    let _beside = PROCESS.read().await;
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let (hostile, _, container) = two_pods(&mut client).await;
    let cid = fixture.host.vmm(&hostile).cid;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(fixture.host.exchange.dial(cid).await);
    }
    // What is too much has been closed by the runtime: reading gives the end at once.
    let mut closed = 0;
    for stream in &mut silent {
        let end = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut [0])).await;
        closed += usize::from(matches!(end, Ok(Ok(0) | Err(_))));
    }
    assert!((200..300).contains(&closed), "{closed} were closed");
    works(&mut client, &container).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_too_large_or_unreadable_end_the_connection_and_nothing_else() {
    let _beside = PROCESS.read().await;
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let (hostile, _, container) = two_pods(&mut client).await;
    for bytes in [&[0xff; 4][..], b"\x03\0\0\0{]}", b"\x02\0\0\0{}"] {
        let mut stream = control(&fixture, &hostile).await;
        stream.write_all(bytes).await.unwrap();
        let end = async { while stream.read(&mut [0; 4096]).await.is_ok_and(|count| count > 0) {} };
        tokio::time::timeout(Duration::from_secs(10), end).await.expect("the connection goes on");
    }
    works(&mut client, &container).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_end_its_container_loses_its_machine() {
    let _beside = PROCESS.read().await;
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let (sandbox, other, witness) = two_pods(&mut client).await;
    let immortal = client.run(&sandbox, "immortal", &["immortal"]).await;
    client.stop_container(&immortal, 1).await;
    assert_eq!(client.status(&immortal).await.exit_code, 255);
    assert_eq!(client.sandbox_status(&sandbox).await.state(), PodSandboxState::SandboxNotready);
    works(&mut client, &witness).await;
    for id in [&sandbox, &other] {
        client.remove_sandbox(id).await;
    }
    assert!(fixture.host.is_clean());
}

/// Starts a pod whose guest does not do its part; answers why that failed. Another pod beside it works as ever, and
/// nothing of the failed one is left.
async fn launch_fails(broken: &'static str) -> String {
    let mut fixture = Fixture::new().await;
    fixture.config.launch_seconds = 3;
    fixture.restart().await;
    let mut client = fixture.client().await;
    let other = client.sandbox("other").await;
    let witness = client.run(&other, "main", &["sleep"]).await;
    *fixture.host.broken.lock().unwrap() = Some(broken);
    let (mut starter, config) = (fixture.client().await, client.sandbox_config(broken));
    let started = Instant::now();
    let launch = tokio::spawn(async move { starter.sandbox_with(config).await });
    works(&mut client, &witness).await;
    let error = launch.await.unwrap().unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(10), "it took {:?}", started.elapsed());
    works(&mut client, &witness).await;
    let left = client.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner();
    assert_eq!(left.items.len(), 1, "{:?}", left.items);
    client.remove_sandbox(&other).await;
    assert!(fixture.host.is_clean());
    error.message().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_never_calls_is_given_up_with_a_reason() {
    let _beside = PROCESS.read().await;
    let why = launch_fails("silent").await;
    assert!(why.contains("it did not call the runtime within 3 s"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_never_answers_is_given_up_with_a_reason() {
    let _beside = PROCESS.read().await;
    let why = launch_fails("mute").await;
    assert!(why.contains("it called the runtime and did not answer it within 3 s"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_execs_in_a_row_leak_nothing() {
    let _alone = PROCESS.write().await;
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let (_, _, container) = two_pods(&mut client).await;
    for _ in 0..20 {
        works(&mut client, &container).await;
    }
    let (open, memory) = (descriptors(), resident());
    for _ in 0..200 {
        works(&mut client, &container).await;
    }
    let until = Instant::now() + Duration::from_secs(10);
    while descriptors() > open + 4 && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(descriptors() <= open + 4, "{open} descriptors before, {} after", descriptors());
    let grown = resident().saturating_sub(memory);
    assert!(grown < 16 << 20, "{grown} bytes more");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_into_a_dead_container_is_refused_with_a_reason() {
    let _beside = PROCESS.read().await;
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("dead").await;
    let container = client.run(&sandbox, "done", &["exit", "3"]).await;
    client.ended(&container).await;
    let error = client.exec(&container, &["echo", "x"], 5).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
    let request =
        ExecRequest { container_id: container, cmd: vec!["sh".into()], stdout: true, ..Default::default() };
    assert_eq!(client.runtime.exec(request).await.unwrap_err().code(), tonic::Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn output_without_a_line_end_is_cut_and_takes_no_memory() {
    let _alone = PROCESS.write().await;
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("spew").await;
    let before = resident();
    const BYTES: usize = 64 << 20;
    let container = client.run(&sandbox, "spew", &["spew", &BYTES.to_string()]).await;
    let status = client.ended(&container).await;
    let log = std::fs::File::open(&status.log_path).unwrap();
    let (mut lines, mut message) = (0, 0);
    for line in std::io::BufRead::split(std::io::BufReader::new(log), b'\n') {
        let line = line.unwrap();
        let at = line.windows(3).position(|w| w == b" P " || w == b" F ").unwrap() + 3;
        assert!(line.len() - at <= 16 << 10);
        message += line.len() - at;
        lines += 1;
    }
    assert_eq!((message, lines), (BYTES, BYTES.div_ceil(16 << 10)));
    // The fake guest, in this process too, holds the output once and in packets.
    let grown = resident().saturating_sub(before);
    assert!(grown < 2 * BYTES as u64 + (32 << 20), "{grown} bytes more");
}
