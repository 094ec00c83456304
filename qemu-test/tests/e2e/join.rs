//! What goes wrong before a host is a node gives one clear line on its console.

use crate::own::own_host;
use atoll_qemu_test::artifacts::Profile;
use atoll_qemu_test::machine::Machine;
use atoll_qemu_test::process::wait_for;
use std::time::Duration;

const INDEX: usize = 2;
const LINE: Duration = Duration::from_secs(240);

/// Boots a host with this config, waits for a line on its console, and checks that it never became a node.
fn console_says(change: impl Fn(&str) -> String, needle: &str, words: &[&str]) -> anyhow::Result<()> {
    let (_turn, artifacts, lab) = own_host(INDEX);
    let config = change(&lab.machine_config(INDEX)?);
    let mut spec = lab.machine_spec(artifacts, Profile::Release, INDEX, Some(config));
    spec.memory_mib = 1536;
    if spec.directory.exists() {
        std::fs::remove_dir_all(&spec.directory)?;
    }
    let host = Machine::boot(spec)?;
    let line = host.serial.expect(needle, 0, LINE)?;
    for word in words {
        assert!(line.contains(word), "no {word:?} in {line:?}");
    }
    assert_eq!(lab.supervisor.field("node", "node-3", "{.metadata.name}")?, "");
    Ok(())
}

/// Replaces what follows `key` on its line.
fn replace_after(config: &str, key: &str, value: &str) -> String {
    config
        .lines()
        .map(|line| match line.find(key) {
            Some(at) => format!("{}{value}\n", &line[..at + key.len()]),
            None => format!("{line}\n"),
        })
        .collect()
}

#[test]
fn malformed_config_names_every_error() -> anyhow::Result<()> {
    console_says(|config| format!("{config}\nnetwrok: {{}}\ntime: {{servers: 7}}\n"), "netwrok", &["network"])
}

#[test]
fn wrong_token_is_named() -> anyhow::Result<()> {
    console_says(
        |config| replace_after(config, "token: ", "abcdef.0123456789abcdef"),
        "cannot join",
        &["token"],
    )
}

#[test]
fn wrong_ca_pin_is_refused() -> anyhow::Result<()> {
    let wrong = format!("sha256:{}", "0".repeat(64));
    console_says(
        |config| {
            let at = config.find("sha256:").expect("the config has a pin");
            format!("{}{wrong}{}", &config[..at], &config[at + 71..])
        },
        "cannot join",
        &["pin"],
    )
}

/// A config with this token instead of its own.
fn with_token(config: &str, token: &str) -> String {
    replace_after(config, "token: ", token)
}

#[test]
fn expired_token_is_named() -> anyhow::Result<()> {
    let (_turn, _, lab) = own_host(INDEX);
    let supervisor = &lab.supervisor;
    let token = supervisor.create_token("1s")?;
    let id = token.split('.').next().unwrap_or_default().to_owned();
    // From then on nobody signs with it.
    let secret = format!("bootstrap-token-{id}");
    wait_for("the expired token to be cleaned up", LINE, || {
        let found = ["get", "secret", "-n", "kube-system", &secret, "--ignore-not-found", "-o", "name"];
        Ok(supervisor.kubectl_ok(&found)?.is_empty().then_some(()))
    })?;
    console_says(
        |config| with_token(config, &token),
        "cannot join",
        &["does not know the token", &id, "expired", "make a new token"],
    )
}

#[test]
fn revoked_token_is_named() -> anyhow::Result<()> {
    let (_turn, _, lab) = own_host(INDEX);
    let supervisor = &lab.supervisor;
    let token = supervisor.create_token("1h")?;
    supervisor.delete_token(&token)?;
    let id = token.split('.').next().unwrap_or_default();
    console_says(
        |config| with_token(config, &token),
        "cannot join",
        &["does not know the token", id, "was deleted", "make a new token"],
    )
}
