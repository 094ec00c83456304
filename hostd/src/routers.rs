//! Listens to the IPv6 routers of one link for what the kernel does not keep: name servers (RFC 8106). Started by
//! `links` on each link that a rule selects, whatever it has of IPv4.
//!
//! Not done: DHCPv6. A network that wants it is told of, so that nobody looks for the reason elsewhere.

use crate::advert::{Advert, solicitation};
use crate::error::{Context, Result};
use crate::sys;
use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::os::fd::AsFd;
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// How often routers are asked, and the pause between (RFC 4861 10): they speak by themselves only every few minutes.
const QUESTIONS: (u32, Duration) = (3, Duration::from_secs(4));
/// Most name servers of a link; a neighbour may name any number.
const MOST: usize = 8;

/// What the routers of a link say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// On which link.
    pub link: u32,
    /// Name servers, each as long as it is good.
    pub servers: Vec<Ipv6Addr>,
    /// What a person should know.
    pub note: Option<String>,
}

/// Listens until the task is dropped, or the link goes away. `changes` gets all that holds, each time that it changes.
pub async fn run(link: u32, name: String, changes: mpsc::Sender<Names>) -> Result<()> {
    let raw = sys::advert_socket(link).context("open a socket for IPv6 routers on", &name)?;
    // Not UDP to the kernel; see the DHCP client.
    let socket = UdpSocket::from_std(raw.into()).context("watch the socket for IPv6 routers of", &name)?;
    let mut heard = Heard::default();
    let mut told = Names { link, ..Names::default() };
    let (mut questions, mut ask_at) = (0, Some(Instant::now()));
    let mut buffer = [0; 2048];
    loop {
        let wake = [ask_at, heard.first_end()].into_iter().flatten().min();
        // Cancel-safe: a packet is read only when the socket is readable, and returned in the same poll.
        tokio::select! {
            received = socket.recv(&mut buffer) => match received {
                Ok(length) => {
                    if let Some(advert) = Advert::parse(&buffer[..length]) {
                        heard.take(&advert, Instant::now());
                        ask_at = None;
                    }
                }
                // The link went down; what comes after it is up again matters.
                Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => {}
                Err(error) => return Err(error).context("receive from", &name),
            },
            () = until(wake) => {}
        }
        let now = Instant::now();
        if ask_at.is_some_and(|at| at <= now) {
            questions += 1;
            ask_at = (questions < QUESTIONS.0).then(|| now + QUESTIONS.1);
            if let Err(error) = sys::send_to_routers(socket.as_fd(), link, &solicitation()) {
                tracing::debug!(link = name, %error, "IPv6 routers not asked");
            }
        }
        let names = heard.names(link, &name, now);
        if names != told {
            told.clone_from(&names);
            if changes.send(names).await.is_err() {
                return Ok(());
            }
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What was heard on a link.
#[derive(Debug, Default)]
struct Heard {
    /// Each server in the order it was first heard of, and when it ends.
    servers: Vec<(Ipv6Addr, Option<Instant>)>,
    /// What each router wants asked by DHCPv6: addresses, the rest.
    wants: BTreeMap<Ipv6Addr, (bool, bool)>,
    /// Whether one of its servers cannot be used.
    unusable: bool,
}

impl Heard {
    fn take(&mut self, advert: &Advert, now: Instant) {
        self.wants.insert(advert.router, (advert.managed, advert.other));
        while self.wants.len() > MOST {
            self.wants.pop_first();
        }
        self.unusable = false;
        for (server, seconds) in &advert.name_servers {
            // An address of the link means nothing without the link's name, least of all inside a pod.
            if server.is_unicast_link_local() || server.is_multicast() || server.is_unspecified() {
                self.unusable = true;
                continue;
            }
            let end = (*seconds != u32::MAX).then(|| now + Duration::from_secs(u64::from(*seconds)));
            match self.servers.iter().position(|(ip, _)| ip == server) {
                Some(known) => self.servers[known].1 = end,
                None if self.servers.len() < MOST => self.servers.push((*server, end)),
                None => {}
            }
        }
        self.forget(now);
    }

    fn forget(&mut self, now: Instant) {
        self.servers.retain(|(_, end)| end.is_none_or(|end| end > now));
    }

    fn first_end(&self) -> Option<Instant> {
        self.servers.iter().filter_map(|(_, end)| *end).min()
    }

    fn names(&mut self, link: u32, name: &str, now: Instant) -> Names {
        self.forget(now);
        let servers: Vec<Ipv6Addr> = self.servers.iter().map(|(ip, _)| *ip).collect();
        let managed = self.wants.values().any(|(managed, _)| *managed);
        let other = self.wants.values().any(|(_, other)| *other);
        let note = if managed {
            Some(format!("the IPv6 router on {name} gives addresses by DHCPv6, which is not spoken"))
        } else if servers.is_empty() && other {
            Some(format!("the IPv6 router on {name} names name servers by DHCPv6, which is not spoken"))
        } else if servers.is_empty() && self.unusable {
            Some(format!(
                "the IPv6 router on {name} names only name servers with link-local addresses, which are not used"
            ))
        } else {
            None
        };
        Names { link, servers, note }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advert(flags: (bool, bool), servers: &[(&str, u32)]) -> Advert {
        Advert {
            router: "fe80::1".parse().unwrap(),
            managed: flags.0,
            other: flags.1,
            name_servers: servers.iter().map(|(ip, seconds)| (ip.parse().unwrap(), *seconds)).collect(),
        }
    }

    #[test]
    fn servers_hold_as_long_as_the_router_says() {
        let (mut heard, now) = (Heard::default(), Instant::now());
        heard.take(&advert((false, false), &[("2001:db8::1", 60), ("2001:db8::2", u32::MAX)]), now);
        let at = |heard: &mut Heard, seconds| {
            let names = heard.names(1, "eth0", now + Duration::from_secs(seconds));
            names.servers.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(at(&mut heard, 59), ["2001:db8::1", "2001:db8::2"]);
        assert_eq!(heard.first_end(), Some(now + Duration::from_secs(60)));
        assert_eq!(at(&mut heard, 61), ["2001:db8::2"]);
        heard.take(&advert((false, false), &[("2001:db8::2", 0)]), now);
        assert_eq!(at(&mut heard, 0), [""; 0], "taken back");
        let many: Vec<String> = (1..100).map(|n| format!("2001:db8::{n}")).collect();
        let many: Vec<(&str, u32)> = many.iter().map(|ip| (ip.as_str(), 60)).collect();
        heard.take(&advert((false, false), &many), now);
        assert_eq!(at(&mut heard, 0).len(), MOST);
    }

    #[test]
    fn what_is_not_done_is_told() {
        let note = |flags, servers: &[(&str, u32)]| {
            let mut heard = Heard::default();
            heard.take(&advert(flags, servers), Instant::now());
            heard.names(1, "eth0", Instant::now()).note.unwrap_or_default()
        };
        let good = [("2001:db8::1", 60)];
        assert!(note((true, true), &good).contains("gives addresses by DHCPv6, which is not spoken"));
        assert!(note((false, true), &[]).contains("names name servers by DHCPv6"));
        assert!(note((false, false), &[("fe80::1", 60)]).contains("link-local"));
        assert_eq!(note((false, true), &good), "");
        assert_eq!(note((false, false), &[]), "");
    }
}
