//! hostd against real servers: dnsmasq for DHCP, an SNTP server, an HTTP server, in namespaces of their own.
#![expect(clippy::unwrap_used, reason = "in a test, what cannot go wrong ends it when it does")]

mod lab;

use lab::{Lab, Notify, wait_for};
use std::io::{Read, Write};

const JOIN: &str = "join: {server: 'https://10.9.0.1:6443', token: abcdef.0123456789abcdef, caPins: \
                    ['sha256:0000000000000000000000000000000000000000000000000000000000000000']}\n";

fn machine(rest: &str) -> String {
    format!("apiVersion: atoll.dev/v1\nkind: Machine\n{rest}")
}

/// Not a test by itself: the servers that the tests start at the other end of the cable.
#[test]
fn role() {
    match std::env::var("ATOLL_TEST_ROLE").as_deref() {
        Ok("time") => time_server(),
        Ok("web") => web_server(),
        _ => {}
    }
}

/// A clock that is one hour ahead.
fn time_server() {
    let socket = std::net::UdpSocket::bind("10.9.0.1:123").unwrap();
    let mut packet = [0; 256];
    while let Ok((length, from)) = socket.recv_from(&mut packet) {
        assert!(length >= 48 && packet[0] & 7 == 3);
        let unix =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as i128;
        let time = atoll_hostd::sntp::to_ntp(unix + 3_600_000_000_000).to_be_bytes();
        let mut answer = [0; 48];
        (answer[0], answer[1]) = ((4 << 3) | 4, 2);
        answer[24..32].copy_from_slice(&packet[40..48]);
        answer[32..40].copy_from_slice(&time);
        answer[40..48].copy_from_slice(&time);
        socket.send_to(&answer, from).unwrap();
    }
}

fn web_server() {
    let listener = std::net::TcpListener::bind("10.9.0.1:80").unwrap();
    let body = machine("hostname: from-url\n");
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let _ = stream.read(&mut [0; 1024]);
        let _ = write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    }
}

#[test]
fn a_host_with_dhcp_and_time_gets_ready_and_renews() {
    let mut lab = Lab::new();
    lab.dnsmasq(&[
        "--dhcp-range=10.9.0.50,10.9.0.60,255.255.255.0,2m",
        "--dhcp-option=option:ntp-server,10.9.0.1",
        "--dhcp-option=option:dns-server,10.9.0.53,10.9.0.54",
        "--dhcp-option=option:domain-name,lab.example",
        "--dhcp-option=option:mtu,1400",
        "--dhcp-option=option:T1,4",
        "--dhcp-option=121,192.168.77.0/24,10.9.0.9,0.0.0.0/0,10.9.0.1",
    ]);
    lab.role("time");
    std::fs::write(lab.path("esp/machine.yaml"), machine(JOIN)).unwrap();
    let notify = Notify::bind(&lab.path("notify"));
    let mut hostd = lab.hostd(&[]);
    let mut buffer = [0; 4096];
    loop {
        let Ok(length) = notify.recv(&mut buffer) else {
            panic!("READY=1 not within 20 s\n{}", lab.read("hostd.log"))
        };
        if buffer[..length].starts_with(b"READY=1\nSTATUS=1 address, clock synchronised") {
            break;
        }
    }
    let config = lab.agent_config();
    let address = config.addresses[0].to_string();
    assert!(address.starts_with("10.9.0.5") || address == "10.9.0.60", "{address}");
    assert_eq!(config.node_name, "atoll-01234567");
    assert_eq!(config.join.as_ref().unwrap().server, "https://10.9.0.1:6443");
    assert!(config.clock_synchronised);
    assert_eq!(lab.host(&["uname", "-n"]).trim(), "atoll-01234567");
    assert_eq!(
        lab.read("run/net/resolv.conf"),
        "search lab.example\nnameserver 10.9.0.53\nnameserver 10.9.0.54\noptions timeout:2 attempts:2\n"
    );
    let shown = lab.host(&["ip", "addr", "show", "dev", "eth0"]);
    assert!(shown.contains("mtu 1400") && shown.contains(&format!("inet {address}/24")), "{shown}");
    assert!(shown.contains("valid_lft 1"), "the kernel knows when the lease ends: {shown}");
    let routes = lab.host(&["ip", "route"]);
    assert!(routes.contains("default via 10.9.0.1 dev eth0 proto dhcp"), "{routes}");
    assert!(routes.contains("192.168.77.0/24 via 10.9.0.9 dev eth0 proto dhcp"), "{routes}");
    assert!(
        lab.read("hostd.log").contains("seconds=3600.0") || lab.read("hostd.log").contains("seconds=3599.9")
    );
    lab.expect("atoll:   address   ", 10);
    wait_for("a renewal", 20, || (lab.read("dnsmasq.log").matches("DHCPACK").count() >= 2).then_some(()));
    for (path, text) in
        [("/healthz", "text/plain"), ("/metrics", "atoll_clock_synchronised 1\n"), ("/x", "404")]
    {
        let mut stream = std::os::unix::net::UnixStream::connect(lab.path("run/hostd/metrics.sock")).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(text), "{answer}");
    }
    let status = r#"{"join":"joined","node_ready":true,"pods_running":0,"last_error":null}"#;
    std::fs::write(lab.path("run/agent/status.json"), status).unwrap();
    lab.expect("atoll: node atoll-01234567 joined and Ready\n", 10);
    assert!(hostd.terminate().success());
    let kept = lab.host(&["ip", "addr", "show", "dev", "eth0"]);
    assert!(kept.contains(&address), "pods that are being stopped still need the address: {kept}");
}

#[test]
fn an_address_that_somebody_has_is_declined_told_and_asked_for_again() {
    let mut lab = Lab::new();
    // The servers' end answers for an address of any of its links; the DHCP server does not look at this one.
    lab.outside(&["ip", "addr", "add", "10.9.0.50/32", "dev", "lo"]);
    lab.dnsmasq(&["--dhcp-range=10.9.0.50,10.9.0.50,255.255.255.0,2m", "--no-ping"]);
    let _hostd = lab.hostd(&[]);
    let link = lab.outside(&["ip", "-brief", "link", "show", "dev", "srv0"]);
    let mac = link.split_whitespace().nth(2).unwrap();
    lab.expect(&format!("gave the address 10.9.0.50, which {mac} has already: declined"), 20);
    let declined = std::time::Instant::now();
    wait_for("the server's word of it", 5, || lab.read("dnsmasq.log").contains("DHCPDECLINE").then_some(()));
    assert!(!lab.host(&["ip", "addr", "show", "dev", "eth0"]).contains("10.9.0.50"));
    lab.outside(&["ip", "addr", "del", "10.9.0.50/32", "dev", "lo"]);
    lab.expect("DHCP lease of 10.9.0.50/24", 30);
    assert!(declined.elapsed().as_secs() >= 9, "a server is not flooded: {:?}", declined.elapsed());
    wait_for("the address", 10, || {
        lab.host(&["ip", "addr", "show", "dev", "eth0"]).contains("10.9.0.50/24").then_some(())
    });
    lab.expect("atoll:   address   10.9.0.50", 20);
}

#[test]
fn a_link_with_ipv6_routers_alone_gets_an_address_and_name_servers_and_is_told_what_it_lacks() {
    let mut lab = Lab::new();
    lab.outside(&["ip", "addr", "add", "fd00:9::1/64", "dev", "srv0", "nodad"]);
    lab.dnsmasq(&[
        "--dhcp-range=fd00:9::,ra-only,64,10m",
        "--enable-ra",
        "--dhcp-option=option6:dns-server,[fd00:9::53]",
    ]);
    let _hostd = lab.hostd(&["--network-deadline", "8"]);
    lab.expect("name servers by IPv6 routers: fd00:9::53", 20);
    wait_for("the resolver's file", 10, || {
        lab.read("run/net/resolv.conf").contains("nameserver fd00:9::53").then_some(())
    });
    wait_for("the agent's config", 20, || lab.path("run/agent/config.json").exists().then_some(()));
    let addresses = lab.agent_config().addresses;
    assert!(addresses.iter().any(|ip| ip.to_string().starts_with("fd00:9::")), "{addresses:?}");
    lab.expect("no time server is configured, nor named by DHCP", 10);
    assert!(!lab.read("hostd.log").contains("no name server is known"), "{}", lab.read("hostd.log"));
}

#[test]
fn name_servers_of_dhcp_are_used_instead_of_those_of_ipv6_routers() {
    let mut lab = Lab::new();
    lab.outside(&["ip", "addr", "add", "fd00:9::1/64", "dev", "srv0", "nodad"]);
    lab.dnsmasq(&[
        "--dhcp-range=10.9.0.50,10.9.0.60,255.255.255.0,2m",
        "--dhcp-option=option:dns-server,10.9.0.53",
        "--dhcp-range=fd00:9::,ra-only,64,10m",
        "--enable-ra",
        "--dhcp-option=option6:dns-server,[fd00:9::53]",
    ]);
    let _hostd = lab.hostd(&["--network-deadline", "5"]);
    lab.expect("name servers by IPv6 routers: fd00:9::53", 20);
    lab.expect("DHCP lease of ", 20);
    wait_for("the resolver's file", 10, || {
        let text = lab.read("run/net/resolv.conf");
        (text.contains("nameserver 10.9.0.53") && !text.contains("fd00")).then_some(())
    });
}

#[test]
fn an_ipv6_router_that_wants_dhcpv6_is_told_of() {
    let mut lab = Lab::new();
    lab.outside(&["ip", "addr", "add", "fd00:9::1/64", "dev", "srv0", "nodad"]);
    lab.dnsmasq(&[
        "--dhcp-range=fd00:9::10,fd00:9::20,64,10m",
        "--enable-ra",
        "--dhcp-option=option6:dns-server",
    ]);
    let _hostd = lab.hostd(&["--network-deadline", "5"]);
    lab.expect("! the IPv6 router on eth0 gives addresses by DHCPv6, which is not spoken", 20);
    lab.expect("still trying", 20);
}

#[test]
fn a_kernel_crash_is_told_at_the_next_boot() {
    let lab = Lab::new();
    let pstore = lab.path("sys/fs/pstore");
    std::fs::create_dir_all(&pstore).unwrap();
    let text = "Panic#1 Part1\n<0>[   61.5] Kernel panic - not syncing: Fatal exception\n";
    std::fs::write(pstore.join("dmesg-efi_pstore-170000000001001"), text).unwrap();
    let _hostd = lab.hostd(&["--network-deadline", "1"]);
    lab.expect("the last boot ended in a kernel crash: Kernel panic - not syncing: Fatal exception; its log is in crashes/", 20);
    lab.expect("atoll:   booted    after a kernel crash: Kernel panic", 20);
    assert_eq!(std::fs::read_dir(&pstore).unwrap().count(), 0, "the firmware's memory is free again");
    let kept: Vec<_> = std::fs::read_dir(lab.path("state/crashes")).unwrap().flatten().collect();
    assert!(kept.len() == 1 && std::fs::read_to_string(kept[0].path()).unwrap().contains(text));
}

#[test]
fn a_static_host_needs_no_dhcp_and_a_changed_config_replaces_what_was() {
    let mut lab = Lab::new();
    lab.role("time");
    let network =
        "{match: {name: eth0}, addresses: [10.9.0.20/24], mtu: 1450, routes: [{to: default, via: 10.9.0.1}]}";
    let text = machine(&format!(
        "hostname: fixed\nnetwork: {{links: [{network}]}}\ntime: {{servers: [10.9.0.1]}}\n"
    ));
    std::fs::write(lab.path("esp/machine.yaml"), &text).unwrap();
    let mut hostd = lab.hostd(&[]);
    wait_for("the agent's config", 20, || lab.path("run/agent/config.json").exists().then_some(()));
    assert_eq!(lab.agent_config().addresses, ["10.9.0.20".parse::<std::net::IpAddr>().unwrap()]);
    assert!(lab.host(&["ip", "route"]).contains("default via 10.9.0.1 dev eth0 proto static"));
    assert!(hostd.terminate().success());
    std::fs::write(lab.path("esp/machine.yaml"), text.replace("10.9.0.20", "10.9.0.21")).unwrap();
    let _hostd = lab.hostd(&[]);
    wait_for("the other address", 20, || {
        let shown = lab.host(&["ip", "addr", "show", "dev", "eth0"]);
        (shown.contains("10.9.0.21/24") && !shown.contains("10.9.0.20")).then_some(())
    });
    wait_for("the route, made anew", 10, || {
        lab.host(&["ip", "route"]).contains("default via 10.9.0.1").then_some(())
    });
}

#[test]
fn without_servers_it_goes_on_after_the_deadline_and_says_why() {
    let lab = Lab::new();
    std::fs::write(lab.path("state/machine.yaml"), "").unwrap();
    std::fs::create_dir(lab.path("state/machine")).unwrap();
    std::fs::write(lab.path("state/machine/machine.yaml"), machine("hostname: good\n")).unwrap();
    std::fs::write(lab.path("esp/machine.yaml"), machine("hostname: good\nnetwrk: {}\nkindd: a\n")).unwrap();
    let notify = Notify::bind(&lab.path("notify"));
    let _hostd = lab.hostd(&["--network-deadline", "2"]);
    let mut buffer = [0; 4096];
    while !buffer.starts_with(b"READY=1") {
        notify.recv(&mut buffer).expect("READY=1 within 20 s");
    }
    for line in [
        "atoll: no address after 2 s: going on without, still trying",
        "the machine config (machine.yaml on the ESP) has 2 problems and is not used:",
        "netwrk: unknown field: did you mean 'network'?",
        "the last good config is used instead",
        "check the DHCP server",
    ] {
        lab.expect(line, 10);
    }
    assert_eq!(lab.agent_config().node_name, "good");
    // The server comes late: the address is taken then.
    let mut lab = lab;
    lab.dnsmasq(&["--dhcp-range=10.9.0.50,10.9.0.60,255.255.255.0,2m"]);
    wait_for("a late address", 30, || (!lab.agent_config().addresses.is_empty()).then_some(()));
}

#[test]
fn a_config_from_a_url_wins_and_is_kept() {
    let mut lab = Lab::new();
    lab.dnsmasq(&["--dhcp-range=10.9.0.50,10.9.0.60,255.255.255.0,2m"]);
    lab.role("web");
    std::fs::write(lab.path("cmdline"), "console=ttyS0 atoll.config=http://10.9.0.1/machine.yaml\n").unwrap();
    std::fs::write(lab.path("esp/machine.yaml"), machine("hostname: from-esp\n")).unwrap();
    let _hostd = lab.hostd(&[]);
    wait_for("the agent's config", 25, || lab.path("run/agent/config.json").exists().then_some(()));
    assert_eq!(lab.agent_config().node_name, "from-url");
    assert!(lab.read("state/machine/machine.yaml").contains("from-url"));
    lab.expect("atoll:   config    URL on the kernel command line", 10);
}

#[test]
fn a_url_that_does_not_answer_falls_back_to_the_last_good_config() {
    let mut lab = Lab::new();
    let dns = "--dhcp-option=option:dns-server,10.9.0.1";
    lab.dnsmasq(&["--dhcp-range=10.9.0.50,10.9.0.60,255.255.255.0,2m", dns]);
    std::fs::create_dir(lab.path("state/machine")).unwrap();
    std::fs::write(lab.path("state/machine/machine.yaml"), machine("hostname: kept\n")).unwrap();
    std::fs::write(lab.path("cmdline"), "atoll.config=http://10.9.0.1/machine.yaml\n").unwrap();
    std::fs::write(lab.path("esp/machine.yaml"), machine("hostname: from-esp\n")).unwrap();
    let _hostd = lab.hostd(&["--network-deadline", "12"]);
    wait_for("the resolver's file", 20, || {
        lab.read("run/net/resolv.conf").contains("nameserver").then_some(())
    });
    assert!(!lab.path("run/agent/config.json").exists(), "the URL may be a name: the resolver comes first");
    lab.expect("cannot fetch http://10.9.0.1/machine.yaml: cannot connect", 20);
    lab.expect("the last good config is used instead", 20);
    wait_for("the agent's config", 10, || lab.path("run/agent/config.json").exists().then_some(()));
    assert_eq!(lab.agent_config().node_name, "kept");
}

#[test]
fn a_cable_that_is_moved_to_another_network_gets_an_address_there() {
    let mut lab = Lab::new();
    lab.dnsmasq(&["--dhcp-range=10.9.0.50,10.9.0.60,255.255.255.0,1h"]);
    let _hostd = lab.hostd(&["--network-deadline", "5"]);
    let address = |lab: &Lab, prefix: &str| {
        let shown = lab.host(&["ip", "-4", "addr", "show", "dev", "eth0"]);
        (shown.contains(prefix) && shown.matches("inet ").count() == 1).then_some(())
    };
    wait_for("an address", 20, || address(&lab, "inet 10.9.0."));
    lab.outside(&["ip", "link", "set", "srv0", "down"]);
    lab.servers.clear();
    lab.outside(&["ip", "addr", "flush", "dev", "srv0"]);
    lab.outside(&["ip", "addr", "add", "10.77.0.1/24", "dev", "srv0"]);
    lab.dnsmasq(&["--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h"]);
    // Only when the server listens: otherwise this would measure the back-off of the client.
    wait_for("dnsmasq", 10, || lab.read("dnsmasq.log").contains("IP range 10.77.0.50").then_some(()));
    lab.outside(&["ip", "link", "set", "srv0", "up"]);
    wait_for("an address in the other network", 20, || address(&lab, "inet 10.77.0."));
}

#[test]
fn a_dry_run_prints_the_steps_and_does_none() {
    let lab = Lab::new();
    std::fs::write(lab.path("esp/machine.yaml"), machine("hostnme: a\n")).unwrap();
    let at = |name: &str| lab.path(name).display().to_string();
    let printed = lab.host(&[
        env!("CARGO_BIN_EXE_atoll-hostd"),
        "--dry-run",
        "--storage=directories",
        "--esp",
        &at("esp"),
        "--state",
        &at("state"),
        "--data",
        &at("data"),
        "--sys",
        &at("sys"),
    ]);
    assert!(printed.contains(&format!("  directory {} mode 0750 owner 800\n", at("data/pods"))), "{printed}");
    assert!(printed.contains("  !   hostnme: unknown field: did you mean 'hostname'?\n"), "{printed}");
    assert!(printed.contains("  eth0: switch on\n"), "{printed}");
    assert!(!lab.path("data/pods").exists());
    assert!(!lab.host(&["ip", "link", "show", "eth0"]).contains("state UP"));
}

#[test]
fn signs_of_life_come_as_often_as_init_wants_and_end_when_it_hangs() {
    let lab = Lab::new();
    let notify = Notify::bind(&lab.path("notify"));
    let hostd = lab.hostd_with(&["--network-deadline", "1"], &[("WATCHDOG_USEC", "1500000")]);
    let mut buffer = [0; 4096];
    let mut alive = || {
        loop {
            let length = notify.recv(&mut buffer)?;
            if buffer[..length] == b"WATCHDOG=1"[..] {
                return std::io::Result::Ok(());
            }
        }
    };
    // The first ones of a start wait for netlink, and for a machine that does much else.
    alive().unwrap();
    let began = std::time::Instant::now();
    for _ in 0..10 {
        alive().unwrap();
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(15), "{:?} for 10 of them", began.elapsed());
    hostd.signal(rustix::process::Signal::STOP);
    notify.within(std::time::Duration::from_secs(3));
    while alive().is_ok() {}
    hostd.signal(rustix::process::Signal::CONT);
    alive().unwrap();
}

#[test]
fn a_lease_renewed_with_another_address_reaches_the_agent_which_never_sees_none() {
    let mut lab = Lab::new();
    let hosts = lab.path("hosts");
    lab.host(&["ip", "link", "set", "eth0", "address", "02:00:00:00:09:01"]);
    std::fs::write(&hosts, "02:00:00:00:09:01,10.9.0.50\n").unwrap();
    lab.dnsmasq(&[
        "--dhcp-range=10.9.0.40,10.9.0.60,255.255.255.0,2m",
        "--dhcp-option=option:T1,4",
        &format!("--dhcp-hostsfile={}", hosts.display()),
    ]);
    let _hostd = lab.hostd(&["--network-deadline", "5"]);
    let address =
        |lab: &Lab| lab.agent_config().addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
    wait_for("the agent's config", 20, || lab.path("run/agent/config.json").exists().then_some(()));
    wait_for("the first address", 20, || (address(&lab) == ["10.9.0.50"]).then_some(()));
    std::fs::write(&hosts, "02:00:00:00:09:01,10.9.0.51\n").unwrap();
    lab.servers[0].signal(rustix::process::Signal::HUP);
    wait_for("the other address", 30, || {
        let now = address(&lab);
        assert!(!now.is_empty(), "a node without an address gets no certificate");
        (now == ["10.9.0.51"]).then_some(())
    });
    let shown = lab.host(&["ip", "-4", "addr", "show", "dev", "eth0"]);
    assert!(!shown.contains("10.9.0.50"), "{shown}");
}

#[test]
fn a_hostd_that_is_started_again_keeps_the_name_servers_until_dhcp_has_spoken() {
    let mut lab = Lab::new();
    let range = "--dhcp-range=10.9.0.50,10.9.0.60,255.255.255.0,2m";
    let domain = "--dhcp-option=option:domain-name,lab.example";
    lab.dnsmasq(&[range, domain, "--dhcp-option=option:dns-server,10.9.0.53"]);
    let hostd = lab.hostd(&["--network-deadline", "5"]);
    let before = wait_for("the name server", 20, || {
        Some(lab.read("run/net/resolv.conf")).filter(|text| text.contains("nameserver 10.9.0.53\n"))
    });
    drop(hostd);
    lab.servers.clear();
    let notify = Notify::bind(&lab.path("notify"));
    let _hostd = lab.hostd(&["--network-deadline", "2"]);
    let mut buffer = [0; 4096];
    while !buffer.starts_with(b"READY=1") {
        notify.recv(&mut buffer).expect("READY=1 within 20 s");
        assert_eq!(lab.read("run/net/resolv.conf"), before, "pods are made with it");
    }
    lab.dnsmasq(&[range, domain, "--dhcp-option=option:dns-server,10.9.0.54"]);
    wait_for("the other name server, and only that", 40, || {
        let text = lab.read("run/net/resolv.conf");
        (text.contains("nameserver 10.9.0.54\n") && !text.contains("10.9.0.53")).then_some(())
    });
}

#[test]
fn dead_dns_is_told_and_so_is_its_return() {
    let mut lab = Lab::new();
    let link = "{match: {name: eth0}, addresses: [10.9.0.20/24]}";
    let network = format!("network: {{links: [{link}], dns: {{servers: [10.9.0.1]}}}}\n");
    std::fs::write(lab.path("esp/machine.yaml"), machine(&network)).unwrap();
    let _hostd = lab.hostd(&["--network-deadline", "1"]);
    lab.expect("DNS is dead (10.9.0.1: ", 30);
    lab.expect("check the name server, or give 'network.dns.servers' in machine.yaml", 10);
    wait_for("bad health", 10, || lab.health()?.contains("DNS is dead").then_some(()));
    lab.dnsmasq(&["--port=53", "--no-resolv", "--no-hosts"]);
    lab.expect("DNS answers again", 30);
    wait_for("good health", 10, || lab.health()?.contains("200 OK").then_some(()));
}

#[test]
fn without_a_time_server_the_console_says_so() {
    let mut lab = Lab::new();
    lab.dnsmasq(&["--dhcp-range=10.9.0.50,10.9.0.60,255.255.255.0,2m", "--dhcp-option=option:ntp-server"]);
    let _hostd = lab.hostd(&["--network-deadline", "3"]);
    lab.expect("no time server is configured, nor named by DHCP: the clock of the machine is used", 20);
}

#[test]
fn a_time_server_that_does_not_answer_is_named() {
    let mut lab = Lab::new();
    lab.dnsmasq(&[
        "--dhcp-range=10.9.0.50,10.9.0.60,255.255.255.0,2m",
        "--dhcp-option=option:ntp-server,10.9.0.1",
    ]);
    let _hostd = lab.hostd(&["--network-deadline", "6"]);
    lab.expect("no time server answers (10.9.0.1: ", 25);
}
