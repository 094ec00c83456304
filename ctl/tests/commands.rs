//! Commands as a person types them: output and exit code.
#![expect(clippy::unwrap_used, reason = "in a test, what cannot go wrong ends it when it does")]

use atollctl::{Cli, Outcome, run};
use clap::Parser;

fn atollctl(arguments: &[&str], input: &str) -> (Outcome, String, String) {
    let cli = Cli::try_parse_from(std::iter::once(&"atollctl").chain(arguments)).unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let outcome = run(cli, &mut input.as_bytes(), &mut out, &mut err);
    (outcome, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

const GOOD: &str = "apiVersion: atoll.dev/v1\nkind: Machine\n";

#[test]
fn a_good_config_has_no_problems() {
    let found = atollctl(&["config", "validate", "-"], GOOD);
    assert_eq!(found, (Outcome::Good, "standard input: no problems\n".into(), String::new()));
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/machine-full.yaml");
    assert_eq!(atollctl(&["config", "validate", file], "").0, Outcome::Good);
}

#[test]
fn every_problem_is_printed() {
    let bad = format!("{GOOD}hostnam: a\nnode: {{maxPods: lots}}\n");
    let (outcome, out, _) = atollctl(&["config", "validate", "-"], &bad);
    assert_eq!(outcome, Outcome::Bad);
    assert_eq!(
        out,
        "standard input: hostnam: unknown field: did you mean 'hostname'?\nstandard input: node.maxPods: must be a whole \
         number, not text\n2 problems; 'atollctl config explain PATH' tells more about a field\n"
    );
    let (outcome, out, _) = atollctl(&["config", "validate", "-", "-o", "json"], &bad);
    assert_eq!(outcome, Outcome::Bad);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["valid"], false);
    assert_eq!(json["problems"][1]["path"], "node.maxPods");
}

#[test]
fn a_missing_file_is_a_failure_of_its_own() {
    let (outcome, _, err) = atollctl(&["config", "validate", "/no/such.yaml"], "");
    assert_eq!(outcome, Outcome::Failed);
    assert!(err.starts_with("atollctl: cannot read /no/such.yaml: No such file"), "{err}");
}

#[test]
fn fields_are_explained() {
    let (outcome, out, _) = atollctl(&["config", "explain", "network.links.match"], "");
    assert_eq!(outcome, Outcome::Good);
    assert!(out.starts_with("network.links.match  (section, required)\n"), "{out}");
    assert!(out.contains("  mac  (text)\n      Hardware address"), "{out}");
    assert!(out.lines().all(|line| line.chars().count() <= 80), "{out}");
    let (outcome, _, err) = atollctl(&["config", "explain", "network.linkz"], "");
    assert_eq!(
        (outcome, err.as_str()),
        (Outcome::Failed, "atollctl: there is no 'linkz' in 'network': did you mean 'links'?\n")
    );
}

#[test]
fn schema_version_and_completion_are_printed() {
    let schema: serde_json::Value = serde_json::from_str(&atollctl(&["config", "schema"], "").1).unwrap();
    assert_eq!(schema["properties"]["apiVersion"]["const"], "atoll.dev/v1");
    assert!(atollctl(&["version"], "").1.starts_with("atollctl 0."));
    for shell in ["bash", "zsh", "fish"] {
        assert!(atollctl(&["completion", shell], "").1.contains("validate"), "{shell}");
    }
}
