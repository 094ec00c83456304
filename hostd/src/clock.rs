//! Keeps the clock right: asks the time servers, steps the clock once, then adjusts it gradually.
//!
//! Called by the app, which sends the lists of servers and reads [`Clock`]. TLS needs the time, so hostd is not ready
//! before the first answer, or a deadline.

use crate::error::{Context, Result};
use crate::sntp::{self, Sample};
use crate::sys;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

/// How long one server may take.
const ANSWER: Duration = Duration::from_secs(2);
/// How long looking up a server's name may take.
const LOOKUP: Duration = Duration::from_secs(5);
/// Offsets beyond this are stepped, not slewed; the kernel slews no more than half a second.
const STEP: i128 = 400_000_000;
/// Before this moment (2025-01-01) no Atoll existed, so no clock is right that says so.
const NOT_BEFORE: i128 = 1_735_689_600_000_000_000;
/// Pause after a round without an answer: doubles up to the second value.
const RETRY: (u64, u64) = (2, 64);
/// Seconds between two rounds when all is well, as powers of two.
const POLL: (u8, u8) = (6, 10);

/// What is known of the clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Clock {
    /// No server is known: the machine's own clock is trusted.
    NoServer,
    /// Servers are being asked.
    Asking,
    /// None of the servers gave a usable answer, and why the last did not.
    Unreachable(String),
    /// Set from a server.
    Synchronised {
        /// Which.
        server: String,
    },
}

/// Whom to ask: names or addresses, with an optional port after a colon.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Servers {
    /// Those of the config.
    pub configured: Vec<String>,
    /// Those that DHCP names: asked only when none of the config's gives a usable answer.
    pub leased: Vec<String>,
}

impl Servers {
    /// Whether there is nobody to ask.
    pub fn is_empty(&self) -> bool {
        self.configured.is_empty() && self.leased.is_empty()
    }
}

/// Whether this process may change the machine's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authority {
    /// It sets the clock.
    Set,
    /// It only says what it would do: on a development machine.
    Report,
}

/// Asks for ever.
pub async fn run(authority: Authority, mut servers: watch::Receiver<Servers>, changes: mpsc::Sender<Clock>) {
    let mut stepped = false;
    let mut poll = POLL.0;
    let mut retry = RETRY.0;
    loop {
        let list = servers.borrow_and_update().clone();
        let (clock, pause) = match round(&list).await {
            _ if list.is_empty() => (Clock::NoServer, Duration::from_secs(3600)),
            Ok((server, sample)) => {
                let result = adjust(authority, sample, stepped, poll);
                stepped = true;
                poll = if sample.offset.abs() < STEP / 8 { (poll + 1).min(POLL.1) } else { POLL.0 };
                retry = RETRY.0;
                let clock = match result {
                    Ok(()) => Clock::Synchronised { server },
                    Err(error) => Clock::Unreachable(crate::error::chain(&error)),
                };
                (clock, Duration::from_secs(1 << poll))
            }
            Err(reason) => {
                let pause = Duration::from_secs(retry);
                retry = (retry * 2).min(RETRY.1);
                (Clock::Unreachable(reason), pause)
            }
        };
        if changes.send(clock).await.is_err() {
            return;
        }
        // Cancel-safe: sleeping and `changed` lose nothing when dropped.
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = servers.changed() => if changed.is_err() { return },
        }
    }
}

/// Asks the config's servers, and those that DHCP names when there is none or none answered.
async fn round(servers: &Servers) -> Result<(String, Sample), String> {
    let mut reasons = Vec::new();
    for group in [&servers.configured, &servers.leased].into_iter().filter(|group| !group.is_empty()) {
        match ask_all(group).await {
            Ok(answer) => return Ok(answer),
            Err(reason) => reasons.push(reason),
        }
    }
    Err(reasons.join("; "))
}

/// Asks all of these at once and takes the answer with the least delay.
async fn ask_all(servers: &[String]) -> Result<(String, Sample), String> {
    let mut tasks = tokio::task::JoinSet::new();
    for server in servers.iter().take(8) {
        let server = server.clone();
        tasks.spawn(async move {
            let result = ask(&server).await;
            (server, result)
        });
    }
    let (mut best, mut reason): (Option<(String, Sample)>, String) = (None, "no time server answered".into());
    while let Some(joined) = tasks.join_next().await {
        match joined {
            Ok((server, Ok(sample))) if best.as_ref().is_none_or(|(_, b)| sample.delay < b.delay) => {
                best = Some((server, sample));
            }
            Ok((_, Ok(_))) => {}
            Ok((server, Err(why))) => reason = format!("{server}: {why}"),
            Err(error) => reason = error.to_string(),
        }
    }
    best.ok_or(reason)
}

async fn ask(server: &str) -> Result<Sample, String> {
    let has_port = server.parse::<SocketAddr>().is_ok() || (server.matches(':').count() == 1);
    let bare = server.parse::<std::net::Ipv6Addr>().is_ok();
    let name = if has_port {
        server.to_owned()
    } else if bare {
        format!("[{server}]:123")
    } else {
        format!("{server}:123")
    };
    let found = timeout(LOOKUP, tokio::net::lookup_host(name)).await;
    let found = found.map_err(|_| "its name was not found in time".to_owned())?;
    let addresses: Vec<SocketAddr> =
        found.map_err(|error| format!("its name is not known: {error}"))?.take(2).collect();
    let mut reason = "its name has no address".to_owned();
    for address in addresses {
        match timeout(ANSWER, exchange(address)).await {
            Ok(Ok(sample)) => return Ok(sample),
            Ok(Err(why)) => reason = why,
            Err(_) => reason = format!("no answer within {} s", ANSWER.as_secs()),
        }
    }
    Err(reason)
}

async fn exchange(server: SocketAddr) -> Result<Sample, String> {
    let local: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let io = |error: std::io::Error| error.to_string();
    let socket = UdpSocket::bind(local).await.map_err(io)?;
    socket.connect(server).await.map_err(io)?;
    let mut nonce = [0; 8];
    // Even without randomness the answer must come from the address that was asked.
    let _ = rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty());
    let nonce = u64::from_ne_bytes(nonce);
    let (asked, began) = (now(), Instant::now());
    socket.send(&sntp::request(nonce)).await.map_err(io)?;
    let mut buffer = [0; 128];
    loop {
        let length = socket.recv(&mut buffer).await.map_err(io)?;
        // Measured on the clock that nobody sets meanwhile.
        let answered = asked + began.elapsed().as_nanos() as i128;
        match sntp::parse(&buffer[..length], nonce) {
            Ok(answer) => {
                let sample = answer.sample(asked, answered, NOT_BEFORE);
                return sample.map_err(|refusal| refusal.to_string());
            }
            Err(sntp::Refusal::NotOurs) => {}
            Err(refusal) => return Err(refusal.to_string()),
        }
    }
}

/// Whether the machine's clock says a time at which this system did not exist yet.
pub fn is_impossible() -> bool {
    now() < NOT_BEFORE
}

/// Nanoseconds since 1970 on our clock.
fn now() -> i128 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_nanos() as i128,
        Err(before) => -(before.duration().as_nanos() as i128),
    }
}

fn adjust(authority: Authority, sample: Sample, stepped: bool, poll: u8) -> Result<()> {
    let seconds = sample.offset as f64 / 1e9;
    let step = !stepped || sample.offset.abs() > STEP;
    if authority == Authority::Report {
        tracing::info!(seconds, step, "the clock would be adjusted; this process may not");
        return Ok(());
    }
    if step {
        let target = now() + sample.offset;
        let time = rustix::time::Timespec {
            tv_sec: target.div_euclid(1_000_000_000) as i64,
            tv_nsec: target.rem_euclid(1_000_000_000) as i64,
        };
        rustix::time::clock_settime(rustix::time::ClockId::Realtime, time).context("set", "the clock")?;
        tracing::info!(seconds = format!("{seconds:+.3}"), "clock set");
    }
    let rest = if step { 0.0 } else { seconds };
    sys::slew_clock(rest, poll).context("adjust", "the clock")
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn bound() -> (UdpSocket, String) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap().to_string();
        (socket, address)
    }

    /// A server whose clock is `ahead` of ours.
    async fn server(ahead: i128) -> String {
        let (socket, address) = bound().await;
        tokio::spawn(async move {
            let mut packet = [0; 128];
            while let Ok((_, from)) = socket.recv_from(&mut packet).await {
                let time = sntp::to_ntp(now() + ahead).to_be_bytes();
                let mut answer = [0; sntp::PACKET];
                (answer[0], answer[1]) = ((4 << 3) | 4, 2);
                answer[24..32].copy_from_slice(&packet[40..48]);
                answer[32..40].copy_from_slice(&time);
                answer[40..48].copy_from_slice(&time);
                socket.send_to(&answer, from).await.unwrap();
            }
        });
        address
    }

    fn servers(configured: &[&str], leased: &[&str]) -> Servers {
        let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        Servers { configured: owned(configured), leased: owned(leased) }
    }

    /// From now to a year long before any Atoll.
    const DECADE_AGO: i128 = -15 * 365 * 86_400 * 1_000_000_000;

    #[tokio::test]
    async fn servers_of_dhcp_are_not_asked_while_one_of_the_config_answers() {
        let configured = server(0).await;
        let (silent, leased) = bound().await;
        let (answered, _) = round(&servers(&[&configured], &[&leased])).await.unwrap();
        assert_eq!(answered, configured);
        // A packet on the loopback is there as soon as it is sent.
        let asked = silent.try_recv(&mut [0; 128]).unwrap_err();
        assert_eq!(asked.kind(), std::io::ErrorKind::WouldBlock, "it was asked all the same");
    }

    #[tokio::test]
    async fn servers_of_dhcp_stand_in_for_those_of_the_config() {
        let (gone, dead) = bound().await;
        drop(gone);
        let (wrong, leased) = (server(DECADE_AGO).await, server(0).await);
        for configured in [&[][..], &[dead.as_str()], &[wrong.as_str()], &[dead.as_str(), wrong.as_str()]] {
            let (answered, sample) = round(&servers(configured, &[&leased])).await.unwrap();
            assert_eq!(answered, leased, "{configured:?}");
            assert!(sample.offset.abs() < 60_000_000_000, "{sample:?}");
        }
        let reason = round(&servers(&[&dead], &[&wrong])).await.unwrap_err();
        assert!(reason.starts_with(&format!("{dead}: ")), "{reason}");
        assert!(reason.ends_with(&format!("; {wrong}: {}", sntp::Refusal::Implausible)), "{reason}");
    }
}
