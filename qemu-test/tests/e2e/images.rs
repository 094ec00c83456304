//! Images and registries of strangers, pulled by the booted host: what is bad is refused with one clear line in the
//! pod's status and an event, what is odd runs, and nothing stays behind. The registry is the test's own; all images are
//! pulled at once, and each test looks at what came of one.

mod shelf;

use crate::own::story;
use crate::shared::{POD, Pod, Shared, alone, apply_pod};
use anyhow::{Context, ensure};
use atoll_odd_registry::{Server, identity};
use atoll_qemu_test::lab::OWN_REGISTRY;
use atoll_qemu_test::network::SERVER;
use atoll_qemu_test::process::wait_for;
use shelf::Shelf;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

/// Its certificate is its own, and the host has no reason to trust it.
const UNTRUSTED: &str = "registry.lab:5002";

/// Pods of images that are refused: few in each, for a pod's events are limited.
const REFUSED: [(&str, &[&str]); 4] = [
    ("images-lie", &["wrong-digest", "truncated", "oversized", "size-lies"]),
    ("images-escape", &["dot-dot", "symlinked", "hard-link", "long-name"]),
    ("images-swell", &["bomb", "entry-lies", "cut", "huge-manifest"]),
    ("images-away", &["missing-tag", "wrong-manifest", "untrusted"]),
];

/// Pods of images that run: what each does.
const RUN: [(&str, &[(&str, &str)]); 4] = [
    (
        "images-odd",
        &[
            ("absolute", "cat /etc/inside"),
            ("not-utf-8", "test -f \"$(printf '/odd/caf\\351-\\377\\376')\" && echo kept"),
            (
                "devices",
                "stat -c '%a %u %g' /su; stat -c '%t:%T' /zero /disk; \
                 for f in /zero /disk; do head -c1 $f 2>/dev/null || echo closed; done",
            ),
            ("whiteouts", "ls -d /etc/passwd /empty /no/such; find /empty /no /etc -name '.wh*'"),
            ("redirects", "cat /from"),
            ("busy", "echo ran"),
        ],
    ),
    ("images-eighty", &[("eighty", "cat /top; echo; ls /own | wc -l")]),
    ("images-one", &[("together", "wc -c < /noise"), ("hangs", "wc -c < /noise")]),
    ("images-same", &[("together", "wc -c < /noise")]),
];

/// What a pod shows of an image that was refused.
#[derive(Debug)]
struct Refusal {
    image: String,
    reason: String,
    message: String,
    events: String,
}

/// What came of all of them.
#[derive(Debug)]
struct Seen {
    refused: BTreeMap<&'static str, Refusal>,
    /// By pod and container.
    logs: BTreeMap<(&'static str, &'static str), String>,
    /// How often the layer of the image that several pods wanted was asked for.
    together: usize,
}

fn image(name: &str) -> String {
    match name {
        "missing-tag" => format!("{OWN_REGISTRY}/absolute:2"),
        "wrong-manifest" => format!("{OWN_REGISTRY}/absolute@{}", shelf::of_nothing()),
        "untrusted" => format!("{UNTRUSTED}/app:1"),
        name => format!("{OWN_REGISTRY}/{name}:1"),
    }
}

fn apply(lab: &Shared, pod: &str, containers: &[(&str, &str)]) -> anyhow::Result<Pod> {
    // A start that is late, where everything starts at once, is tried again.
    let mut spec =
        "  restartPolicy: OnFailure\n  terminationGracePeriodSeconds: 1\n  containers:\n".to_owned();
    for (name, script) in containers {
        let (image, script) = (image(name), serde_json::to_string(script)?);
        spec += &format!("  - {{name: {name}, image: '{image}', command: [/bin/sh, -c, {script}]}}\n");
    }
    apply_pod(lab, pod, &spec)
}

fn seen() -> anyhow::Result<&'static Seen> {
    static SEEN: OnceLock<Result<Seen, String>> = OnceLock::new();
    story(&SEEN, pull_all)
}

fn pull_all() -> anyhow::Result<Seen> {
    // Eight pods at once, and an image of eighty layers: more than enough for a host.
    let lab = alone();
    lab.registry.push("redirects", "1", &shelf::elsewhere()?)?;
    let shelf = Arc::new(Shelf::filled()?);
    let port = |name: &str| format!("{SERVER}:{}", name.rsplit(':').next().unwrap_or_default());
    let shown = Arc::clone(&shelf);
    let registry = Server::listen(&port(OWN_REGISTRY), None, move |request| shown.answer(request));
    let _untrusted = Server::listen(&port(UNTRUSTED), Some(&identity(&["registry.lab"], false)), |_| {
        ("200 OK".to_owned(), Vec::new())
    });
    let mut pods = Vec::new();
    for (pod, containers) in REFUSED {
        let containers: Vec<_> = containers.iter().map(|name| (*name, "echo never")).collect();
        pods.push(apply(&lab, pod, &containers)?);
    }
    for (pod, containers) in RUN {
        pods.push(apply(&lab, pod, containers)?);
    }
    let mut seen = Seen { refused: BTreeMap::new(), logs: BTreeMap::new(), together: 0 };
    for (pod, containers) in REFUSED {
        for name in containers {
            seen.refused.insert(*name, refusal(&lab, pod, name)?);
        }
    }
    for (pod, containers) in RUN {
        lab.supervisor.wait_field("pod", pod, "{.status.phase}", "Succeeded", POD)?;
        for (name, _) in containers {
            let log = lab.supervisor.kubectl_ok(&["logs", pod, "-c", name])?;
            seen.logs.insert((pod, *name), log);
        }
    }
    seen.together = registry.count(&shelf.layer("together"));
    let names: Vec<&str> = pods.iter().map(|pod| pod.name.as_str()).collect();
    atoll_qemu_test::process::run_ok(
        &mut lab.supervisor.kubectl_command(&[&["delete", "pod"], &names[..]].concat()),
        POD,
    )?;
    lab.inspector().nothing_leaked().context("after the pulls")?;
    Ok(seen)
}

/// Waits until a pod shows that this image was refused.
fn refusal(lab: &Shared, pod: &str, name: &str) -> anyhow::Result<Refusal> {
    let field = |field: &str| {
        let path = format!("{{.status.containerStatuses[?(@.name=={name:?})].state.waiting.{field}}}");
        lab.supervisor.field("pod", pod, &path)
    };
    let failed = ["ErrImagePull", "ImagePullBackOff"];
    let reason = wait_for(&format!("{name} of {pod} to be refused"), POD, || {
        let reason = field("reason")?;
        Ok(failed.contains(&reason.as_str()).then_some(reason))
    })
    .with_context(|| match lab.supervisor.kubectl(&["describe", "pod", pod]) {
        Ok(output) => output.stdout,
        Err(error) => format!("and kubectl describe failed: {error}"),
    })?;
    let image = image(name);
    let selector = format!("involvedObject.name={pod},reason=Failed");
    let path = "jsonpath={range .items[*]}{.message}{\"\\n\"}{end}";
    let told = format!("Failed to pull image \"{image}\": ");
    let events = wait_for(&format!("an event of {name} of {pod}"), POD, || {
        let events =
            lab.supervisor.kubectl_ok(&["get", "events", "--field-selector", &selector, "-o", path])?;
        Ok(events.contains(&told).then_some(events))
    })?;
    let events = events.lines().filter(|line| line.starts_with(&told)).collect::<Vec<_>>().join("\n");
    Ok(Refusal { image, reason, message: field("message")?, events })
}

/// The status and each event of a refused image are one line that names it and the cause.
fn refused(name: &str, cause: &[&str]) -> anyhow::Result<()> {
    let refusal = &seen()?.refused[name];
    ensure!(refusal.message.lines().count() == 1, "not one line: {refusal:#?}");
    // One event for each try whose words differ: what is free on the disk does.
    for line in refusal.events.lines().chain([refusal.message.as_str()]) {
        ensure!(line.contains(&refusal.image), "the image is not named: {refusal:#?}");
        for word in cause {
            ensure!(line.contains(word), "no {word:?} in {line:?}");
        }
    }
    ensure!(["ErrImagePull", "ImagePullBackOff"].contains(&refusal.reason.as_str()), "{refusal:#?}");
    Ok(())
}

/// An image that ran said this.
fn ran(pod: &'static str, name: &'static str, wanted: &str) -> anyhow::Result<()> {
    let log = &seen()?.logs[&(pod, name)];
    ensure!(log == wanted, "{name} said {log:?}, not {wanted:?}");
    Ok(())
}

#[test]
fn missing_tag_is_named() -> anyhow::Result<()> {
    refused("missing-tag", &["registry.lab:5001 has no image absolute:2: check the name and the tag"])
}

#[test]
fn wrong_digest_is_refused() -> anyhow::Result<()> {
    refused("wrong-digest", &["layer sha256:", "does not match its digest"])?;
    // Of a manifest that is asked for by its digest, there is none at all.
    refused("wrong-manifest", &["registry.lab:5001 has no image absolute:sha256:"])
}

#[test]
fn truncated_layer_is_refused() -> anyhow::Result<()> {
    refused("truncated", &["layer sha256:", "from registry.lab:5001: it ended after"])?;
    refused("cut", &["cannot unpack layer sha256:", "cut short"])
}

#[test]
fn oversized_layer_is_cut_off() -> anyhow::Result<()> {
    refused("oversized", &["layer sha256:", "is larger than"])
}

#[test]
fn layer_whose_size_lies_is_refused() -> anyhow::Result<()> {
    refused("size-lies", &["layer sha256:", "is larger than 34359738368 bytes"])?;
    refused("entry-lies", &["its file 'huge' has 1099511627776 bytes"])
}

#[test]
fn gzip_bomb_stops_at_the_room_there_is() -> anyhow::Result<()> {
    refused("bomb", &["no room for layer sha256:", "remove images or pods that are not needed"])
}

#[test]
fn dot_dot_paths_are_refused() -> anyhow::Result<()> {
    refused("dot-dot", &["cannot unpack layer sha256:", "leads out of the image"])
}

#[test]
fn absolute_paths_stay_inside_the_image() -> anyhow::Result<()> {
    ran("images-odd", "absolute", "inside\n")
}

#[test]
fn nothing_is_written_through_a_symbolic_link() -> anyhow::Result<()> {
    refused("symlinked", &["cannot unpack layer sha256:", "which is no directory"])
}

#[test]
fn hard_link_out_of_the_tree_is_refused() -> anyhow::Result<()> {
    refused("hard-link", &["its hard link 'shadow'", "leads out of the image"])
}

#[test]
fn name_of_4_kib_is_refused() -> anyhow::Result<()> {
    refused("long-name", &["cannot unpack layer sha256:", "too long a name"])
}

#[test]
fn names_that_are_not_utf_8_are_kept() -> anyhow::Result<()> {
    ran("images-odd", "not-utf-8", "kept\n")
}

#[test]
fn device_nodes_and_setuid_files_are_kept_for_the_guest() -> anyhow::Result<()> {
    ran("images-odd", "devices", "6755 0 7\n1:5\nfe:0\nclosed\nclosed\n")
}

#[test]
fn whiteouts_of_things_that_are_not_there_do_nothing() -> anyhow::Result<()> {
    ran("images-odd", "whiteouts", "/empty\n/etc/passwd\n/no/such\n")
}

#[test]
fn image_of_80_layers_runs() -> anyhow::Result<()> {
    ran("images-eighty", "eighty", "78\n79\n")
}

#[test]
fn manifest_of_10_mib_is_refused() -> anyhow::Result<()> {
    refused(
        "huge-manifest",
        &["the manifest of registry.lab:5001/huge-manifest:1 is larger than 4194304 bytes"],
    )
}

#[test]
fn registry_with_a_wrong_certificate_is_not_trusted() -> anyhow::Result<()> {
    refused("untrusted", &["cannot trust registry.lab:5002", "give its CA certificate in the machine config"])
}

#[test]
fn registry_that_redirects_elsewhere_is_followed() -> anyhow::Result<()> {
    ran("images-odd", "redirects", "elsewhere\n")
}

#[test]
fn registry_that_hangs_in_the_middle_is_asked_for_the_rest() -> anyhow::Result<()> {
    ran("images-one", "hangs", "1048576\n")
}

#[test]
fn registry_that_answers_429_is_given_the_time_it_asks_for() -> anyhow::Result<()> {
    ran("images-odd", "busy", "ran\n")
}

#[test]
fn two_pods_that_pull_one_image_at_once_share_the_download() -> anyhow::Result<()> {
    for pod in ["images-one", "images-same"] {
        ran(pod, "together", "2097152\n")?;
    }
    let together = seen()?.together;
    ensure!(together == 1, "the layer was asked for {together} times");
    Ok(())
}
