//! The packet filter of pods, loaded by the real `nft` into namespaces of its own: a pod, a host, and a server that is
//! reached by a link narrower than the pod's.
#![expect(clippy::unwrap_used, reason = "in a test, what cannot go wrong ends it when it does")]

use atoll_runtime::vm::address::PodCidr;
use atoll_runtime::vm::network::{Filter, Port};
use std::path::Path;
use std::process::Command;

const ROLE: &str = "ATOLL_TEST_LINK_MTU";
const NFT: &str = "/usr/sbin/nft";

/// Sees what a pod and a server tell each other of their segments, after the filter of pods has passed it on.
const WATCH: &str = "table inet watch {
  chain seen {
    type filter hook forward priority 10; policy accept;
    tcp flags & (syn | rst) == syn tcp option maxseg size 1360 counter
    tcp flags & (syn | rst) == syn tcp option maxseg size 1460 counter
  }
}
";

fn run(words: &str) -> String {
    let words: Vec<&str> = words.split_whitespace().collect();
    let mut command = Command::new(words[0]);
    let output = command.args(&words[1..]).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Not a test by itself: the host, run by the tests in namespaces of its own.
#[tokio::test]
async fn role() {
    let Ok(mtu) = std::env::var(ROLE) else { return };
    run("mount -t tmpfs tmpfs /run");
    for name in ["pod", "server"] {
        run(&format!("ip netns add {name}"));
    }
    run("ip link add atoll1 type veth peer name eth0 netns pod");
    run(&format!("ip link add up0 mtu {mtu} type veth peer name eth0 netns server"));
    for (link, address) in [("atoll1", "10.9.0.1/24"), ("up0", "192.168.9.1/24")] {
        run(&format!("ip addr add {address} dev {link}"));
        run(&format!("ip link set {link} up"));
    }
    for (name, address, gateway) in
        [("pod", "10.9.0.5/24", "10.9.0.1"), ("server", "192.168.9.2/24", "192.168.9.1")]
    {
        run(&format!("ip -n {name} link set lo up"));
        run(&format!("ip -n {name} addr add {address} dev eth0"));
        run(&format!("ip -n {name} link set eth0 up"));
        run(&format!("ip -n {name} route add default via {gateway}"));
    }
    let port = Port { tap: "atoll1".into(), address: "10.9.0.5".parse().unwrap(), mac: [2, 0, 0, 0, 0, 1] };
    Filter::new(Path::new(NFT)).install(PodCidr::parse("10.9.0.0/24").unwrap(), &[port]).await.unwrap();
    let watch = Path::new("/run/watch");
    std::fs::write(watch, WATCH).unwrap();
    run(&format!("{NFT} -f {}", watch.display()));
    // Nobody listens there: the server's refusal says that both ways are open.
    let exe = std::env::current_exe().unwrap();
    let pod = run(&format!(
        "ip netns exec pod env -u {ROLE} ATOLL_TEST_CONNECT=1 {} --exact connect --nocapture",
        exe.display()
    ));
    assert!(pod.contains("refused"), "{pod}");
    println!("{}", run(&format!("{NFT} list table inet watch")));
}

/// Not a test by itself: the pod.
#[test]
fn connect() {
    if std::env::var_os("ATOLL_TEST_CONNECT").is_some() {
        let server = "192.168.9.2:80".parse().unwrap();
        let outcome = std::net::TcpStream::connect_timeout(&server, std::time::Duration::from_secs(10));
        println!("{}", outcome.unwrap_err());
    }
}

/// What the server reads as the largest segment that the pod takes, when the host's link has this MTU.
fn segment(mtu: u32) -> u32 {
    let output = Command::new("unshare")
        .args(["-Urnm", "--", std::env::current_exe().unwrap().to_str().unwrap()])
        .args(["--exact", "role", "--nocapture"])
        .env(ROLE, mtu.to_string())
        .output()
        .expect("unshare is installed");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let seen = text.lines().filter(|line| line.contains("maxseg size") && !line.contains("packets 0 "));
    let sizes: Vec<u32> =
        seen.filter_map(|line| line.split("maxseg size ").nth(1)?.split(' ').next()?.parse().ok()).collect();
    assert_eq!(sizes.len(), 1, "{text}");
    sizes[0]
}

#[test]
fn segments_of_a_pod_fit_the_link_that_they_take() {
    assert_eq!(segment(1400), 1360);
    // And are as large as the pod's own link allows when there is room for them.
    assert_eq!(segment(1500), 1460);
}
