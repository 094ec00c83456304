//! From the bytes of `machine.yaml` to a checked [`Machine`], with every problem reported at once.
//!
//! Bytes → YAML as a tree (bounded: size, depth, nodes, aliases) → shape against the schema of the wire types →
//! [`MachineFile`] → [`Machine`]. A later stage runs only when the earlier found nothing, because its messages would
//! only repeat theirs.

use super::MachineFile;
use super::domain::Machine;
use super::problem::{Findings, Problems};
use super::shape;
use serde_json::Value;
use serde_saphyr::Error as YamlError;
use serde_saphyr::options::{DuplicateKeyPolicy, MergeKeyPolicy};

/// Largest machine config, in bytes.
pub const MAX_BYTES: usize = 256 * 1024;
/// Deepest nesting.
const MAX_DEPTH: usize = 16;
/// Most scalars, sequences and mappings, aliases expanded.
const MAX_NODES: usize = 20_000;
/// Most uses of aliases.
const MAX_ALIASES: usize = 100;

/// Reads and checks a whole machine config.
pub fn parse(bytes: &[u8]) -> Result<Machine, Problems> {
    Machine::try_from(read(bytes)?)
}

/// Reads a machine config and checks its shape, not its values.
pub fn read(bytes: &[u8]) -> Result<MachineFile, Problems> {
    let mut tree = tree(bytes)?;
    let mut found = Findings::default();
    shape::check(&mut tree, &mut found);
    found.or(())?;
    // The shape was checked against the same types, so what is left to go wrong is a disagreement of the two.
    serde_json::from_value(tree).map_err(|error| Problems::whole(error.to_string()))
}

fn tree(bytes: &[u8]) -> Result<Value, Problems> {
    if bytes.len() > MAX_BYTES {
        return Err(Problems::whole(format!(
            "the file has {} bytes: at most {MAX_BYTES} are read",
            bytes.len()
        )));
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|error| Problems::whole(format!("byte {} is not UTF-8 text", error.valid_up_to())))?;
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_events: 3 * MAX_NODES,
            max_aliases: MAX_ALIASES,
            max_anchors: MAX_ALIASES,
            max_documents: 1,
            max_total_scalar_bytes: MAX_BYTES,
            max_recorded_anchor_events: MAX_NODES,
            max_recorded_anchor_bytes: MAX_BYTES,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_NODES,
            max_replay_stack_depth: 8,
            max_alias_expansions_per_anchor: MAX_ALIASES,
        },
        duplicate_keys: DuplicateKeyPolicy::Error,
        merge_keys: MergeKeyPolicy::Error,
        // Snippets would print the lines around an error, and with them a token or a password.
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<Option<Value>>(text, options) {
        Ok(Some(tree)) => Ok(tree),
        Ok(None) => Err(Problems::whole("the file is empty: it begins with 'apiVersion: atoll.dev/v1'")),
        Err(error) => Err(Problems::whole(yaml_message(&error))),
    }
}

fn yaml_message(error: &YamlError) -> String {
    let place = match error.location() {
        Some(at) if at.line() > 0 => format!("line {}, column {}: ", at.line(), at.column()),
        _ => String::new(),
    };
    let first = error.to_string();
    let first = first.lines().next().unwrap_or_default();
    format!("{place}not readable as YAML: {first}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WHOLE: &str = include_str!("../../../examples/machine-full.yaml");

    fn problems(text: &str) -> Vec<String> {
        parse(text.as_bytes()).expect_err("has problems").iter().map(ToString::to_string).collect()
    }

    fn with(rest: &str) -> String {
        format!("apiVersion: atoll.dev/v1\nkind: Machine\n{rest}")
    }

    #[test]
    fn the_examples_are_right() {
        let machine = parse(WHOLE.as_bytes()).unwrap();
        assert_eq!(machine.hostname.as_deref(), Some("node-1"));
        assert!(machine.links[1].dhcp4 && !machine.links[0].dhcp4);
        parse(include_bytes!("../../../examples/machine.yaml")).unwrap();
        assert_eq!(parse(with("").as_bytes()).unwrap(), Machine::default());
    }

    #[test]
    fn an_empty_section_is_one_left_out() {
        assert_eq!(parse(with("network:\nnode:\n  labels:\n").as_bytes()).unwrap(), Machine::default());
    }

    #[test]
    fn every_problem_is_listed_with_its_path() {
        let mut found = problems(&with(
            "hostnme: a\nnetwork:\n  links:\n  - match: {nam: eth0}\n    addresses: [1, 2]\n  - dhcp4: yes please\nnode:\n  \
             maxPods: -1\n  labels: {rack: 12}\ntime: [a]\n",
        ));
        found.sort();
        assert_eq!(
            found,
            [
                "hostnme: unknown field: did you mean 'hostname'?",
                "network.links[0].addresses[0]: must be text, not a number: write \"1\" in quotes",
                "network.links[0].addresses[1]: must be text, not a number: write \"2\" in quotes",
                "network.links[0].match.nam: unknown field: did you mean 'name'?",
                "network.links[1].dhcp4: must be true or false, not text",
                "network.links[1].match: is missing",
                "node.labels[\"rack\"]: must be text, not a number: write \"12\" in quotes",
                "node.maxPods: must be a whole number from 0 to 4294967295",
                "time: must be a mapping, not a list",
            ]
        );
    }

    #[test]
    fn every_wrong_value_is_listed_with_what_would_be_right() {
        let found = problems(
            "apiVersion: atoll.dev/v2\nkind: Machine\nhostname: Node_1\nnetwork:\n  links:\n  - match: {}\n    addresses: \
             [10.0.0.1, 10.0.0.0/24, 10.0.0.5/24]\n    mtu: 20\n  - match: {mac: 'zz'}\n    addresses: [10.0.0.5/24]\n    \
             routes: [{to: 10.1.2.3/8, via: 10.0.0.1}, {to: default, via: 192.168.0.1}]\njoin: {server: 'http://a:1', \
             token: secret, caPins: []}\nnode: {taints: ['a=b:NoSchedul'], labels: {'node-role.kubernetes.io/x': ''}}\n",
        );
        assert_eq!(
            found,
            [
                "apiVersion: must be 'atoll.dev/v1', not 'atoll.dev/v2'",
                "hostname: 'Node_1' is not a host name (a-z, 0-9, '-' and '.', such as 'node-1')",
                "network.links[0].addresses[0]: '10.0.0.1' lacks its prefix length: write '10.0.0.1/24' if that is the network's",
                "network.links[0].addresses[1]: 10.0.0.0 is the network's own or its broadcast address: give the host's, \
             10.0.0.1 to 10.0.0.254 are left",
                "network.links[0].mtu: 20 is out of range: 576 to 9216",
                "network.links[0].match: says nothing: give 'name', 'mac' or 'driver' (name: \"*\" matches every link)",
                "network.links[1].addresses[0]: 10.0.0.5 stands at network.links[0].addresses[2] already",
                "network.links[1].routes[0].to: '10.1.2.3/8' has host bits set: write '10.0.0.0/8'",
                "network.links[1].match.mac: 'zz' is not a hardware address such as '52:54:00:12:34:56'",
                "join.server: must use TLS: write 'https://a:1'",
                "join.token: is not a bootstrap token: 6 and 16 characters of a-z and 0-9 with a dot between, such as \
             'abcdef.0123456789abcdef'",
                "join.caPins: needs at least one pin: the token is never sent to a server that no pin vouches for; \
             'atoll-supervisor token create' prints it",
                "node.labels[\"node-role.kubernetes.io/x\"]: a node may not set this label on itself: set it with kubectl, or \
             use a domain of your own",
                "node.taints[0]: 'NoSchedul' is none of NoSchedule, PreferNoSchedule, NoExecute: did you mean 'NoSchedule'?",
            ]
        );
        assert!(!found.join("\n").contains("secret"));
    }

    #[test]
    fn broken_yaml_says_where_and_shows_no_secret() {
        let found = problems(&with("join:\n  token: abcdef.0123456789abcdef\n   server: x\n"));
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("line "), "{found:?}");
        assert!(!found[0].contains("0123456789abcdef"), "{found:?}");
        assert!(problems(&with("hostname: a\nhostname: b\n"))[0].contains("uplicate"));
        assert!(problems("")[0].contains("empty"));
    }

    #[test]
    fn bombs_are_refused_quickly() {
        let mut bomb = String::from("a: &a [x,x,x,x,x,x,x,x,x,x]\n");
        for (previous, name) in ('a'..='i').zip('b'..='j') {
            bomb += &format!("{name}: &{name} [{}]\n", vec![format!("*{previous}"); 10].join(","));
        }
        let started = std::time::Instant::now();
        assert!(parse(bomb.as_bytes()).is_err());
        assert!(parse("[".repeat(MAX_BYTES).as_bytes()).is_err());
        assert!(parse("a: ".repeat(MAX_BYTES / 3).as_bytes()).is_err());
        assert!(parse(&vec![b'a'; MAX_BYTES + 1]).is_err());
        assert!(started.elapsed() < std::time::Duration::from_secs(5));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn no_mutation_of_a_good_file_makes_it_panic(
            edits in proptest::collection::vec((0..WHOLE.len(), any::<u8>(), any::<bool>()), 1..12)
        ) {
            let mut bytes = WHOLE.as_bytes().to_vec();
            for (at, byte, insert) in edits {
                let at = at.min(bytes.len() - 1);
                if insert { bytes.insert(at, byte) } else { bytes[at] = byte }
            }
            let _ = parse(&bytes);
        }

        #[test]
        fn any_scalar_anywhere_is_either_taken_or_named(value in "[ -~]{0,40}", field in 0usize..8) {
            let quoted = serde_json::to_string(&value).unwrap();
            let line = [
                format!("hostname: {quoted}"), format!("network: {{dns: {{servers: [{quoted}]}}}}"),
                format!("network: {{links: [{{match: {{mac: {quoted}}}}}]}}"),
                format!("network: {{links: [{{match: {{name: a}}, addresses: [{quoted}]}}]}}"),
                format!("network: {{links: [{{match: {{name: a}}, routes: [{{to: {quoted}, via: {quoted}}}]}}]}}"),
                format!("node: {{taints: [{quoted}], labels: {{{quoted}: {quoted}}}}}"),
                format!("join: {{server: {quoted}, token: {quoted}, caPins: [{quoted}]}}"),
                format!("registries: {{{quoted}: {{caPem: {quoted}, username: {quoted}}}}}"),
            ][field].clone();
            if let Err(found) = parse(with(&line).as_bytes()) {
                prop_assert!(found.iter().all(|p| !p.path.is_empty()), "{found}");
            }
        }
    }
}
