//! Asks the name servers whether they are there: a name that cannot be looked up shows in many places, far from its
//! cause. The question is for `localhost`, which every resolver answers by itself (RFC 6761), so a server without a way
//! out counts as alive.
//!
//! Called by the app, which sends the list of servers and is told each time the verdict changes.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// How long a server may take, and how often it is asked before it counts as dead.
const ANSWER: (Duration, u32) = (Duration::from_secs(2), 2);
/// Between two rounds while a server answers, and while none does.
const PAUSE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(5));
const PORT: u16 = 53;

/// Reports why no server answers, or `None` when one does or none is known. Never returns before the app ends.
pub async fn run(mut servers: watch::Receiver<Vec<IpAddr>>, changes: mpsc::Sender<Option<String>>) {
    let mut told = None;
    loop {
        let list = servers.borrow_and_update().clone();
        let verdict = if list.is_empty() { None } else { round(&list).await.err() };
        let pause = if verdict.is_none() { PAUSE.0 } else { PAUSE.1 };
        // What was found out of servers that are not in use any more is nobody's news.
        let outdated = servers.has_changed().unwrap_or(true);
        if !outdated && verdict != told {
            told.clone_from(&verdict);
            if changes.send(verdict).await.is_err() {
                return;
            }
        }
        // Cancel-safe: sleeping and `changed` lose nothing when dropped.
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = servers.changed() => if changed.is_err() { return },
        }
    }
}

/// Whether one of the servers answers, and why the others do not.
async fn round(servers: &[IpAddr]) -> Result<(), String> {
    let mut reasons = Vec::new();
    for server in servers {
        match ask((*server, PORT).into()).await {
            Ok(()) => return Ok(()),
            Err(why) => reasons.push(format!("{server}: {why}")),
        }
    }
    Err(reasons.join(", "))
}

async fn ask(server: SocketAddr) -> Result<(), String> {
    let mut reason = String::new();
    for _ in 0..ANSWER.1 {
        match timeout(ANSWER.0, exchange(server)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => reason = error.to_string(),
            Err(_) => reason = format!("no answer within {} s", ANSWER.0.as_secs()),
        }
    }
    Err(reason)
}

async fn exchange(server: SocketAddr) -> std::io::Result<()> {
    let local: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(local).await?;
    socket.connect(server).await?;
    let mut id = [0; 2];
    // Even without randomness the answer must come from the address that was asked.
    let _ = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty());
    socket.send(&question(id)).await?;
    let mut buffer = [0; 512];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if is_answer(&buffer[..length], id) {
            return Ok(());
        }
    }
}

/// A question for the address of `localhost` (RFC 1035).
fn question(id: [u8; 2]) -> Vec<u8> {
    let mut packet = id.to_vec();
    // Recursion desired; one question.
    packet.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    packet.extend(b"\x09localhost\0");
    // Type A, class IN.
    packet.extend([0, 1, 0, 1]);
    packet
}

/// Whatever it says, a server that answers is there: also "refused" and "no such name" are answers.
fn is_answer(packet: &[u8], id: [u8; 2]) -> bool {
    packet.len() >= 12 && packet[..2] == id && packet[2] & 0x80 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_to_the_question_counts() {
        let mut packet = question([7, 8]);
        assert!(!is_answer(&packet, [7, 8]), "the question itself");
        packet[2] |= 0x80;
        packet[3] = 5;
        assert!(is_answer(&packet, [7, 8]), "refused, and there");
        assert!(!is_answer(&packet, [7, 9]));
        assert!(!is_answer(&packet[..11], [7, 8]));
    }

    #[tokio::test]
    async fn a_server_that_is_there_is_told_from_one_that_is_not() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let answering = tokio::spawn(async move {
            let mut buffer = [0; 512];
            let (length, from) = server.recv_from(&mut buffer).await.unwrap();
            buffer[2] |= 0x80;
            server.send_to(&buffer[..length], from).await.unwrap();
        });
        assert_eq!(ask(address).await, Ok(()));
        answering.await.unwrap();
        assert!(ask(address).await.unwrap_err().contains("refused"), "its port is closed now");
    }
}
