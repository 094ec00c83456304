//! Structure rules of the source tree that the compiler does not know.

use std::path::{Path, PathBuf};

const MAX_FILE_LINES: usize = 500;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the checkout").to_owned()
}

/// Every Rust source that git knows, with its text.
fn sources() -> Vec<(String, String)> {
    let output = std::process::Command::new("git")
        .current_dir(root())
        .args(["ls-files", "*.rs"])
        .output()
        .expect("git is there");
    assert!(output.status.success(), "git ls-files failed");
    String::from_utf8(output.stdout)
        .expect("paths are UTF-8")
        .lines()
        .filter_map(|path| {
            std::fs::read_to_string(root().join(path)).ok().map(|text| (path.to_owned(), text))
        })
        .collect()
}

/// The part of a source before its tests.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap_or(text)
}

fn is_test(path: &str) -> bool {
    path.contains("/tests/") || path.ends_with("/tests.rs") || path.contains("/fuzz/")
}

fn report(failures: &[String]) {
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

#[test]
fn files_stay_readable_in_one_sitting() {
    let failures: Vec<String> = sources()
        .iter()
        .filter(|(path, _)| !is_test(path))
        .map(|(path, text)| (path, without_tests(text).lines().count()))
        .filter(|(_, lines)| *lines > MAX_FILE_LINES)
        .map(|(path, lines)| {
            format!("{path}: {lines} lines, at most {MAX_FILE_LINES}: give a part of it a file of its own")
        })
        .collect();
    report(&failures);
}

#[test]
fn every_file_says_why_it_exists() {
    let failures: Vec<String> = sources()
        .iter()
        .filter(|(path, text)| !path.contains("/fuzz/") && !text.starts_with("//!"))
        .map(|(path, _)| format!("{path}: begin with `//!`: why it exists, who calls it"))
        .collect();
    report(&failures);
}

#[test]
fn names_are_nouns_of_the_field() {
    let failures: Vec<String> = sources()
        .iter()
        .filter(|(path, _)| {
            let stem = Path::new(path).file_stem().and_then(|s| s.to_str()).unwrap_or_default();
            ["util", "utils", "common", "helper", "helpers", "misc"].contains(&stem)
        })
        .map(|(path, _)| format!("{path}: name it after what is in it"))
        .collect();
    report(&failures);
}

#[test]
fn unsafe_stands_only_where_it_is_expected() {
    let allowed = |path: &str| {
        ["/sys.rs", "/jail.rs", "/process.rs"].iter().any(|end| path.ends_with(end))
            || path.starts_with("runtime/vmm/")
    };
    let failures: Vec<String> = sources()
        .iter()
        .filter(|(path, _)| !allowed(path) && !is_test(path))
        .flat_map(|(path, text)| {
            text.lines()
                .enumerate()
                .filter(|(_, line)| {
                    let code = line.split("//").next().unwrap_or_default();
                    code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
                })
                .map(|(number, _)| {
                    format!(
                        "{path}:{}: unsafe belongs into sys.rs, jail.rs, process.rs or runtime/vmm",
                        number + 1
                    )
                })
                .collect::<Vec<_>>()
        })
        .collect();
    report(&failures);
}

#[test]
fn crates_meet_only_at_sockets() {
    let crates = [
        ("init", &["atoll-spec"][..]),
        ("hostd", &["atoll-spec"]),
        ("runtime", &["atoll-spec", "atoll-cri"]),
        ("runtime/vmm", &["atoll-spec"]),
        ("runtime/guest", &["atoll-spec"]),
        ("agent", &["atoll-spec", "atoll-cri"]),
        ("ctl", &["atoll-spec"]),
        ("spec", &[]),
    ];
    let mut failures = Vec::new();
    for (directory, allowed) in crates {
        let manifest = std::fs::read_to_string(root().join(directory).join("Cargo.toml")).unwrap();
        let dependencies = manifest.split("[dependencies]").nth(1).unwrap_or_default();
        let dependencies = dependencies.split("[dev-dependencies]").next().unwrap_or_default();
        for line in dependencies.lines().filter(|line| line.starts_with("atoll")) {
            let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if !allowed.contains(&name) {
                failures.push(format!(
                    "{directory}/Cargo.toml: must not depend on {name}: they meet at a socket"
                ));
            }
        }
    }
    report(&failures);
}

#[test]
fn no_runtime_of_tasks_where_a_loop_will_do() {
    let failures: Vec<String> = ["init", "runtime/vmm", "runtime/guest"]
        .iter()
        .filter(|directory| {
            let manifest = std::fs::read_to_string(root().join(directory).join("Cargo.toml")).unwrap();
            manifest
                .split("[dev-dependencies]")
                .next()
                .unwrap_or_default()
                .lines()
                .any(|line| line.starts_with("tokio"))
        })
        .map(|directory| format!("{directory}/Cargo.toml: no tokio here"))
        .collect();
    report(&failures);
}

#[test]
fn lints_are_expected_never_allowed() {
    let failures: Vec<String> = sources()
        .iter()
        .filter(|(path, _)| !path.ends_with("tidy.rs") && !path.starts_with("runtime/api/"))
        .flat_map(|(path, text)| {
            text.lines()
                .enumerate()
                .filter(|(_, line)| {
                    line.trim_start().starts_with("#[allow(") || line.trim_start().starts_with("#![allow(")
                })
                .map(|(number, _)| format!("{path}:{}: use #[expect(…, reason = …)]", number + 1))
                .collect::<Vec<_>>()
        })
        .collect();
    report(&failures);
}

/// Files with end-to-end tests that docs/reliability.md must name, every one.
const RELIABILITY: [&str; 10] = [
    "containers.rs",
    "control_plane.rs",
    "host_config.rs",
    "host_disks.rs",
    "host_network.rs",
    "images.rs",
    "join.rs",
    "power.rs",
    "processes.rs",
    "scale.rs",
];

/// Names of the tests in a source: the function after each `#[test]`, whatever stands between.
fn tests_in(text: &str) -> Vec<&str> {
    let after = text.split("#[test]").skip(1).chain(text.split("#[tokio::test").skip(1));
    after.filter_map(|rest| rest.split("fn ").nth(1)?.split('(').next()).collect()
}

#[test]
fn reliability_names_tests_that_exist_and_leaves_none_out() {
    let document = std::fs::read_to_string(root().join("docs/reliability.md")).unwrap();
    let mut failures = Vec::new();
    // `path/to/file.rs::name` in backticks.
    for word in document.split('`').skip(1).step_by(2).filter(|word| word.contains(".rs::")) {
        let (path, name) = word.split_once("::").unwrap_or_default();
        let text = std::fs::read_to_string(root().join(path)).unwrap_or_default();
        if !text.contains(&format!("fn {name}(")) {
            failures.push(format!("docs/reliability.md: there is no {word}"));
        }
    }
    for file in RELIABILITY {
        let path = format!("qemu-test/tests/e2e/{file}");
        let text = std::fs::read_to_string(root().join(&path)).unwrap_or_default();
        for name in tests_in(&text) {
            if !document.contains(&format!("{path}::{name}`")) {
                failures.push(format!("docs/reliability.md: does not name {path}::{name}"));
            }
        }
    }
    for line in document.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| case")) {
        if !line.contains(".rs::") && !line.contains("not tested:") {
            failures.push(format!("docs/reliability.md: a case without a test: {line}"));
        }
    }
    report(&failures);
}
