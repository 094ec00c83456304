//! The status screen: what a person at the console needs to know, and what to do next. ◇

use crate::clock::Clock;
use crate::config::Origin;
use crate::status::{LinkStatus, Status};
use atoll_spec::control::ServiceState;
use atoll_spec::node::JoinState;

/// The screen as lines, the same for a serial console and a monitor.
pub fn lines(status: &Status) -> Vec<String> {
    let mut out = vec![title(&status.system)];
    let mut row = |name: &str, text: String| {
        if !text.is_empty() {
            out.push(format!("  {name:<9} {text}"));
        }
    };
    row("node", status.node.clone());
    row("address", addresses(status));
    row("names", join(&status.dns));
    row("clock", clock(&status.clock));
    row("storage", status.storage.clone());
    row("config", status.config.clone());
    row("services", services(status));
    row("cluster", cluster(status));
    row("booted", status.boot_reason.clone());
    let todo = todo(status);
    out.extend(todo.iter().map(|text| format!("  ! {text}")));
    out.push(title(""));
    out
}

fn title(text: &str) -> String {
    let text = if text.is_empty() { String::new() } else { format!(" {text} ") };
    format!("---{text:-<67}")
}

fn join<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

fn addresses(status: &Status) -> String {
    let describe = |link: &LinkStatus| {
        let origin = if link.dhcp { "DHCP" } else { "static" };
        match (link.addresses.is_empty(), link.carrier) {
            (false, true) => format!("{} ({}, {origin})", join(&link.addresses), link.name),
            (false, false) => format!("{} ({}, {origin}, no cable)", join(&link.addresses), link.name),
            (true, true) if link.dhcp => format!("none yet ({}, asking by DHCP)", link.name),
            (true, true) => format!("none ({})", link.name),
            (true, false) => format!("none ({}, no cable)", link.name),
        }
    };
    let links: Vec<String> = status.links.iter().map(describe).collect();
    let gateway = if status.gateways.is_empty() {
        String::new()
    } else {
        format!(", gateway {}", join(&status.gateways))
    };
    if links.is_empty() { "no network card found".into() } else { links.join("; ") + &gateway }
}

fn clock(clock: &Clock) -> String {
    match clock {
        Clock::Asking => "asking for the time".into(),
        Clock::NoServer => "no time server known, the machine's own clock is trusted".into(),
        Clock::Unreachable(why) => format!("not synchronised: {why}"),
        Clock::Synchronised { server } => format!("synchronised with {server}"),
    }
}

fn services(status: &Status) -> String {
    let each = status.services.iter().map(|service| {
        let restarts = match service.restarts {
            0 => String::new(),
            1 => " (1 restart)".into(),
            n => format!(" ({n} restarts)"),
        };
        format!("{} {}{restarts}", service.name, service.state)
    });
    each.collect::<Vec<_>>().join(", ")
}

fn cluster(status: &Status) -> String {
    let server = status.join_server.as_deref().unwrap_or("the stored identity's server");
    match &status.agent {
        None if status.join_server.is_some() => format!("{server}: not started yet"),
        None => String::new(),
        Some(agent) => match agent.join {
            JoinState::NotConfigured => "not joined".into(),
            JoinState::Joining => format!("joining {server}"),
            JoinState::Failed => format!("cannot join {server}"),
            JoinState::Joined => {
                let ready = if agent.node_ready { "node is Ready" } else { "node is not Ready" };
                format!("joined {server}, {ready}, {} pods running", agent.pods_running)
            }
        },
    }
}

/// What is wrong and what to do, the root of it first.
fn todo(status: &Status) -> Vec<String> {
    let mut out: Vec<String> = status.problems.iter().map(|p| p.text.clone()).collect();
    if !status.links.is_empty() && status.ready {
        if status.links.iter().all(|l| !l.carrier) {
            out.push("no link has a peer: plug in a cable, or check the switch port".into());
        } else if status.links.iter().all(|l| l.addresses.is_empty()) {
            out.push(
                "no address: check the DHCP server, or give 'network.links' with 'addresses' in machine.yaml"
                    .into(),
            );
        }
    }
    if status.links.is_empty() && status.ready {
        out.push(
            "no usable network card: 'network.links' matches none, or its driver is not in this image".into(),
        );
    }
    if let Some(error) = status.agent.as_ref().and_then(|a| a.last_error.clone()) {
        out.push(format!("agent: {error}"));
    }
    // Until the agent has spoken, only a host without any config is known to belong nowhere.
    let alone = match &status.agent {
        Some(agent) => agent.join == JoinState::NotConfigured,
        None => status.config == Origin::None.to_string(),
    };
    if status.ready && alone {
        out.push(
            "not part of a cluster: put a 'join' section into machine.yaml ('atoll-supervisor token create' prints \
             one) and boot again"
                .into(),
        );
    }
    let failing = status.services.iter().filter(|s| s.state == ServiceState::BackingOff);
    out.extend(failing.map(|s| format!("{} keeps failing: {}", s.name, s.last_failure)));
    out
}

/// The screen for a terminal: clears it, and cuts lines to its width.
pub fn terminal(status: &Status, width: usize) -> String {
    let mut out = String::from("\x1b[H\x1b[2J");
    for line in lines(status) {
        out.extend(line.chars().filter(|c| !c.is_control()).take(width));
        out.push_str("\r\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Area;
    use atoll_spec::control::ServiceStatus;
    use atoll_spec::node::AgentStatus;

    fn service(name: &str, state: ServiceState) -> ServiceStatus {
        ServiceStatus {
            name: name.into(),
            state,
            pid: 0,
            since_ms: 0,
            restarts: 2,
            status: String::new(),
            last_failure: "exit code 1".into(),
        }
    }

    #[test]
    fn a_healthy_host_fits_on_a_screen() {
        let mut status = Status::new("Atoll 0.1.0".into());
        status.node = "node-1".into();
        status.ready = true;
        status.links = vec![LinkStatus {
            name: "eth0".into(),
            carrier: true,
            dhcp: true,
            addresses: vec!["10.0.0.7".parse().unwrap()],
        }];
        status.gateways = vec!["10.0.0.1".parse().unwrap()];
        status.clock = Clock::Synchronised { server: "10.0.0.1".into() };
        status.join_server = Some("https://10.0.0.1:6443".into());
        status.agent = Some(AgentStatus {
            join: JoinState::Joined,
            node_ready: true,
            pods_running: 3,
            last_error: None,
        });
        let text = lines(&status).join("\n");
        assert!(text.contains("  address   10.0.0.7 (eth0, DHCP), gateway 10.0.0.1\n"), "{text}");
        assert!(text.contains("joined https://10.0.0.1:6443, node is Ready, 3 pods running"), "{text}");
        assert!(!text.contains('!'), "{text}");
    }

    #[test]
    fn what_is_wrong_comes_with_what_to_do() {
        let mut status = Status::new("Atoll 0.1.0".into());
        status.ready = true;
        status.links =
            vec![LinkStatus { name: "eth0".into(), carrier: false, dhcp: true, addresses: vec![] }];
        status.config = "none".into();
        status.services = vec![service("runtime", ServiceState::BackingOff)];
        status.set_problems(Area::Config, ["hostname: wrong".into()]);
        let text = lines(&status).join("\n");
        for part in
            ["! hostname: wrong", "plug in a cable", "'join' section", "runtime keeps failing: exit code 1"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        status.links[0].addresses = vec!["10.0.0.7".parse().unwrap()];
        let text = lines(&status).join("\n");
        assert!(
            text.contains("10.0.0.7 (eth0, DHCP, no cable)") && text.contains("plug in a cable"),
            "{text}"
        );
        status.links[0] = LinkStatus { carrier: true, addresses: vec![], ..status.links[0].clone() };
        let text = lines(&status).join("\n");
        assert!(text.contains("check the DHCP server") && !text.contains("plug in"), "{text}");
        status.set_problems(Area::Config, []);
        assert!(!lines(&status).join("\n").contains("hostname"));
    }
}
