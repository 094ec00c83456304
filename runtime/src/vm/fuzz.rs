//! Fuzz targets of what a guest says: frames, packets, and a whole control connection.
//!
//! Called by the tests below (the corpus and a second of mutations) and by `fuzz/targets` (hours).

use super::guest::{GuestLink, GuestNews};
use super::wire;
use atoll_spec::guest::{Call, FromGuest, Hello, MAX_PACKET};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc;

fn block<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime of one thread can be made").block_on(work)
}

/// Everything that comes on a connection: a hello, messages, packets of a stream.
pub fn frames(data: &[u8]) {
    block(async {
        let mut rest = data;
        let _ = wire::read_frame::<Hello>(&mut rest).await;
        while let Ok(Some(_)) = wire::read_frame::<FromGuest>(&mut rest).await {}
        let mut rest = data;
        while let Ok(Some((_, payload))) = wire::read_packet(&mut rest).await {
            assert!(payload.len() <= MAX_PACKET);
        }
    });
}

/// A control connection to the runtime while a call waits: whatever the guest says, the call ends, the events are those
/// that were sent, and nothing is kept.
pub fn control(data: &[u8]) {
    block(async {
        let sandbox = "fuzz".parse().expect("a name");
        let (sender, mut news) = mpsc::channel(4);
        let link = GuestLink::new(sandbox, sender);
        let (guest, ours) = tokio::io::duplex(1 << 16);
        let call = link.call(Call::List, Duration::from_secs(5));
        let speak = async {
            let (mut from, mut to) = tokio::io::split(guest);
            // The answer to the request, whose number the guest has not read: only luck makes it an answer.
            let _ = to.write_all(data).await;
            let _ = to.shutdown().await;
            let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
        };
        let listen = tokio::spawn(async move {
            let mut count = 0usize;
            while let Some(told) = news.recv().await {
                count += usize::from(matches!(told, GuestNews::Event { .. }));
            }
            count
        });
        let serve = async {
            link.clone().serve(Box::new(ours), 0).await;
            link.close();
        };
        let (_, (), ()) = tokio::join!(call, speak, serve);
        assert!(link.is_empty(), "a call or a stream is still waited for");
        drop(link);
        // Every event takes some bytes of the input.
        assert!(listen.await.expect("it only counts") <= data.len() / 20);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_fuzz::replay;
    use atoll_spec::guest::{Channel, Event, Exit, GuestError, GuestErrorKind, PROTOCOL, Reply};

    fn messages() -> Vec<Vec<u8>> {
        let exit = Exit { code: 137, oom_killed: true, at_unix_ns: 42 };
        let event = Event::Exited { container: "c1".parse().unwrap(), exit };
        let error = GuestError { kind: GuestErrorKind::NotFound, message: "no such container".into() };
        let answers = [
            FromGuest::Answer { id: 1, result: Ok(Reply::Done) },
            FromGuest::Answer { id: 1, result: Err(error) },
            FromGuest::Answer { id: 2, result: Ok(Reply::Started { pid: 7 }) },
            FromGuest::Answer { id: 2, result: Ok(Reply::File { base64: "YQ==".into() }) },
            FromGuest::Answer { id: 3, result: Ok(Reply::Containers { containers: vec![] }) },
            FromGuest::Answer { id: 3, result: Ok(Reply::Stats(Box::default())) },
            FromGuest::Event { sequence: 1, event },
        ];
        answers.iter().map(|answer| wire::frame(answer).unwrap()).collect()
    }

    #[test]
    fn frames_and_packets_are_read_or_refused() {
        let hellos = [Hello::Control { protocol: PROTOCOL, ready_us: 9 }, Hello::Stream { stream: 3 }];
        let mut seeds: Vec<Vec<u8>> =
            hellos.iter().map(|hello| [wire::frame(hello).unwrap(), messages().concat()].concat()).collect();
        for channel in [Channel::Stdout, Channel::Stderr, Channel::Exit] {
            let mut wire_bytes = Vec::new();
            block(wire::write_packets(&mut wire_bytes, channel, &[1, 2, 3, 4])).unwrap();
            block(wire::write_packets(&mut wire_bytes, channel, &[])).unwrap();
            seeds.push(wire_bytes);
        }
        seeds.push(vec![0xff; 8]);
        replay("guest_frames", seeds, frames);
    }

    #[test]
    fn control_connections_end_and_leave_nothing() {
        let mut seeds = messages();
        seeds.push(messages().concat());
        seeds.push(messages()[6].repeat(50));
        replay("guest_control", seeds, control);
    }
}
