//! One pod at a time: runs, logs, volumes, environment, probes, failure modes.

use crate::shared::{apply_pod, ready_lab, shell_pod};
use anyhow::Context;
use atoll_qemu_test::lab::BUSYBOX;
use atoll_qemu_test::process::{Background, wait_for};
use std::time::Duration;

#[test]
fn example_runs_logs_and_goes() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let yaml = std::fs::read_to_string(crate::shared::lab().0.root().join("examples/hello.yaml"))?;
    lab.supervisor.apply(&yaml)?;
    let pod = crate::shared::Pod { lab: lab.clone(), name: "hello".to_owned() };
    pod.wait_phase("Running")?;
    wait_for("its greeting", Duration::from_secs(30), || {
        Ok(pod.logs()?.contains("hello from hello").then_some(()))
    })?;
    let wide = lab.supervisor.kubectl_ok(&["get", "pods", "hello", "-o", "wide"])?;
    assert!(wide.contains("1/1") && wide.contains("node-1"), "{wide}");
    assert!(!pod.field("{.status.podIP}")?.is_empty());
    pod.delete()?;
    assert_eq!(pod.field("{.metadata.name}")?, "");
    Ok(())
}

#[test]
fn container_that_exits_at_once_says_so() -> anyhow::Result<()> {
    let lab = ready_lab();
    let mut watch = Watch::start(&lab, "exits")?;
    let pod = shell_pod(&lab, "exits", "echo about to fail; exit 3", "Always")?;
    // The wait before the third restart has begun: two of them have been seen.
    let message = wait_for("the third wait", crate::shared::POD, || {
        let message = pod.field("{.status.containerStatuses[0].state.waiting.message}")?;
        Ok(message.starts_with("back-off 20s restarting failed container=main pod=exits_").then_some(message))
    });
    let shown = watch.shown()?;
    message.with_context(|| format!("shown: {shown:#?}"))?;
    pod.wait_event("BackOff")?;
    wait_for("the log of the run before", crate::shared::POD, || {
        let previous = pod.lab.supervisor.kubectl(&["logs", "exits", "--previous"])?;
        Ok(previous.stdout.contains("about to fail").then_some(()))
    })?;
    // What may be shown, in this order; a state that is over at once may be left out.
    let legal = [
        (false, "ContainerCreating 0 -"),
        (false, "running 0 -"),
        (true, "Error(3) 0 -"),
        (false, "running 1 Error(3)"),
        (false, "Error(3) 1 Error(3)"),
        (true, "CrashLoopBackOff 10s 1 Error(3)"),
        (false, "running 2 Error(3)"),
        (false, "Error(3) 2 Error(3)"),
        (true, "CrashLoopBackOff 20s 2 Error(3)"),
    ];
    let mut next = legal.iter();
    for one in &shown {
        let found = next.any(|(_, state)| state == one);
        assert!(found, "{one:?} is not what comes next in {shown:#?}");
    }
    for (_, state) in legal.iter().filter(|(needed, _)| *needed) {
        assert!(shown.iter().any(|one| one == state), "{state:?} is missing in {shown:#?}");
    }
    Ok(())
}

/// Watches what a pod's first container shows, from before the pod is there.
struct Watch {
    kubectl: Background,
    output: std::path::PathBuf,
}

impl Watch {
    fn start(lab: &crate::shared::Shared, pod: &str) -> anyhow::Result<Self> {
        let fields = [
            ".state.running.startedAt",
            ".state.terminated.reason",
            ".state.terminated.exitCode",
            ".state.waiting.reason",
            ".state.waiting.message",
            ".restartCount",
            ".lastState.terminated.reason",
            ".lastState.terminated.exitCode",
        ];
        // No {range}: kubectl prints that for the first object of a watch only.
        let fields = fields.map(|field| format!("|{{.status.containerStatuses[*]{field}}}")).concat();
        let format = format!("jsonpath=shown{fields}{{\"\\n\"}}");
        let selector = format!("metadata.name={pod}");
        let mut command = lab.supervisor.kubectl_command(&["get", "pods", "--field-selector", &selector]);
        let output = lab.directory().join(format!("watch-{pod}.log"));
        let kubectl =
            Background::spawn("the watch", command.args(["--watch", "--output", &format]), &output)?;
        Ok(Self { kubectl, output })
    }

    /// Each state so far, once.
    fn shown(&mut self) -> anyhow::Result<Vec<String>> {
        self.kubectl.check_alive()?;
        let text = std::fs::read_to_string(&self.output)?;
        let whole = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let shown = whole.filter_map(|line| line.strip_prefix("shown|"));
        // Nothing in any field: nothing is said of the container yet.
        let shown = shown.filter(|fields| fields.chars().any(|letter| letter != '|'));
        let mut shown: Vec<String> = shown.map(Self::state).collect();
        shown.dedup();
        Ok(shown)
    }

    fn state(line: &str) -> String {
        let fields: Vec<&str> = line.split('|').collect();
        let [running, ended, code, waiting, message, restarts, last, last_code] = fields[..] else {
            return line.to_owned();
        };
        let ending = |reason: &str, code: &str| match reason {
            "" => "-".to_owned(),
            _ => format!("{reason}({code})"),
        };
        let wait = message.strip_prefix("back-off ").and_then(|rest| rest.split(' ').next());
        let state = match (running, ended, wait) {
            ("", "", Some(wait)) => format!("{waiting} {wait}"),
            ("", "", None) => waiting.to_owned(),
            ("", ..) => ending(ended, code),
            _ => "running".to_owned(),
        };
        format!("{state} {restarts} {}", ending(last, last_code))
    }
}

#[test]
fn missing_image_says_so() -> anyhow::Result<()> {
    let pod = apply_pod(
        &ready_lab(),
        "no-image",
        "  containers:\n  - name: main\n    image: registry.lab:5000/nothing:1\n",
    )?;
    wait_for("the pull to fail", crate::shared::POD, || {
        let reason = pod.field("{.status.containerStatuses[0].state.waiting.reason}")?;
        Ok(["ErrImagePull", "ImagePullBackOff"].contains(&reason.as_str()).then_some(()))
    })?;
    let message = pod.wait_event("Failed")?;
    assert!(message.contains("registry.lab:5000 has no image nothing:1"), "{message}");
    Ok(())
}

#[test]
fn missing_command_exits_as_elsewhere() -> anyhow::Result<()> {
    let pod = apply_pod(
        &ready_lab(),
        "no-command",
        &format!(
            "  restartPolicy: Never\n  containers:\n  - name: main\n    image: {BUSYBOX}\n    command: [/no/such]\n"
        ),
    )?;
    pod.wait_phase("Failed")?;
    assert_eq!(pod.field("{.status.containerStatuses[0].state.terminated.exitCode}")?, "127");
    let message = pod.field("{.status.containerStatuses[0].state.terminated.message}")?;
    assert!(message.contains("/no/such"), "{message}");
    Ok(())
}

#[test]
fn init_container_and_two_containers_share_an_empty_dir() -> anyhow::Result<()> {
    let pod = apply_pod(
        &ready_lab(),
        "shares",
        &format!(
            "  restartPolicy: Never
  volumes:
  - name: shared
    emptyDir: {{}}
  initContainers:
  - name: first
    image: {BUSYBOX}
    command: [/bin/sh, -c, 'echo one > /shared/log']
    volumeMounts: [{{name: shared, mountPath: /shared}}]
  containers:
  - name: writer
    image: {BUSYBOX}
    command: [/bin/sh, -c, 'echo two >> /shared/log; echo done > /shared/flag']
    volumeMounts: [{{name: shared, mountPath: /shared}}]
  - name: reader
    image: {BUSYBOX}
    command: [/bin/sh, -c, 'until [ -e /shared/flag ]; do sleep 0.2; done; cat /shared/log']
    volumeMounts: [{{name: shared, mountPath: /shared}}]
"
        ),
    )?;
    pod.wait_phase("Succeeded")?;
    let log = pod.lab.supervisor.kubectl_ok(&["logs", "shares", "-c", "reader"])?;
    assert_eq!(log, "one\ntwo\n");
    Ok(())
}

#[test]
fn environment_comes_from_everywhere() -> anyhow::Result<()> {
    let lab = &ready_lab();
    lab.supervisor
        .apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: env-config}\ndata: {colour: blue}\n")?;
    lab.supervisor.apply(
        "apiVersion: v1\nkind: Secret\nmetadata: {name: env-secret}\nstringData: {password: hunter2}\n",
    )?;
    let pod = apply_pod(
        lab,
        "environment",
        &format!(
            "  restartPolicy: Never
  containers:
  - name: main
    image: {BUSYBOX}
    command: [/bin/sh, -c, 'echo $COLOUR $PASSWORD $POD $NODE $BOTH $PRE_colour; cat /config/colour /secret/password /info/labels']
    resources: {{limits: {{memory: 64Mi, cpu: 500m}}}}
    env:
    - {{name: COLOUR, valueFrom: {{configMapKeyRef: {{name: env-config, key: colour}}}}}}
    - {{name: PASSWORD, valueFrom: {{secretKeyRef: {{name: env-secret, key: password}}}}}}
    - {{name: POD, valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}}}
    - {{name: NODE, valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}}}
    - {{name: BOTH, value: $(POD)-$(COLOUR)-$$(X)}}
    envFrom:
    - {{prefix: PRE_, configMapRef: {{name: env-config}}}}
    volumeMounts:
    - {{name: config, mountPath: /config}}
    - {{name: secret, mountPath: /secret}}
    - {{name: info, mountPath: /info}}
  volumes:
  - {{name: config, configMap: {{name: env-config}}}}
  - {{name: secret, secret: {{secretName: env-secret}}}}
  - {{name: info, downwardAPI: {{items: [{{path: labels, fieldRef: {{fieldPath: metadata.labels}}}}]}}}}
"
        ),
    )?;
    pod.wait_phase("Succeeded")?;
    let log = pod.logs()?;
    assert!(log.starts_with("blue hunter2 environment node-1 environment-blue-$(X) blue\n"), "{log}");
    assert!(log.contains("bluehunter2app=\"environment\""), "{log}");
    Ok(())
}

#[test]
fn nothing_of_a_secret_reaches_the_disk() -> anyhow::Result<()> {
    const SAYS: &str = "unsaid-7c41e09b";
    let lab = &ready_lab();
    lab.supervisor.apply(&format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: unsaid}}\nstringData: {{word: {SAYS}}}\n"
    ))?;
    let pod = apply_pod(
        lab,
        "discreet",
        &format!(
            "  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: {BUSYBOX}
    command: [/bin/sh, -c, 'test -n \"$1\" && exec sleep 3600', sh, $(WORD)]
    env:
    - {{name: WORD, valueFrom: {{secretKeyRef: {{name: unsaid, key: word}}}}}}
    volumeMounts:
    - {{name: whole, mountPath: /whole}}
    - {{name: whole, mountPath: /one, subPath: word}}
    - {{name: projected, mountPath: /projected}}
  volumes:
  - {{name: whole, secret: {{secretName: unsaid}}}}
  - {{name: projected, projected: {{sources: [{{secret: {{name: unsaid}}}}]}}}}
"
        ),
    )?;
    pod.wait_phase("Running")?;
    let seen = pod.exec(&["/bin/sh", "-c", "echo $(cat /whole/word /one /projected/word)$WORD"])?;
    assert_eq!(seen.trim(), SAYS.repeat(4));
    let host = lab.inspector();
    for place in ["/data", "/state"] {
        assert_eq!(host.holders(place, SAYS)?, "", "below {place}");
    }
    let in_memory = host.holders("/run/atoll", SAYS)?;
    assert!(in_memory.contains("/run/atoll/volumes/"), "the search finds what is there: {in_memory}");
    pod.delete()?;
    wait_for("nothing of it to be left in memory", Duration::from_secs(30), || {
        Ok(host.holders("/run/atoll", SAYS)?.is_empty().then_some(()))
    })
}

#[test]
fn probes_gate_readiness_and_restart() -> anyhow::Result<()> {
    let pod = apply_pod(
        &ready_lab(),
        "probes",
        &format!(
            "  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: {BUSYBOX}
    command: [/bin/sh, -c, 'touch /tmp/live; (sleep 4; touch /tmp/ready) & mkdir -p /www; echo ok > /www/index.html; exec httpd -f -p 8080 -h /www']
    readinessProbe: {{exec: {{command: [test, -e, /tmp/ready]}}, periodSeconds: 1}}
    livenessProbe: {{exec: {{command: [test, -e, /tmp/live]}}, periodSeconds: 1, failureThreshold: 2}}
    startupProbe: {{httpGet: {{path: /index.html, port: 8080}}, periodSeconds: 1, failureThreshold: 60}}
"
        ),
    )?;
    pod.wait_field("{.status.containerStatuses[0].started}", "true")?;
    pod.wait_field("{.status.conditions[?(@.type==\"Ready\")].status}", "True")?;
    pod.exec(&["rm", "/tmp/live"])?;
    pod.wait_field("{.status.containerStatuses[0].restartCount}", "1")?;
    pod.wait_event("Unhealthy")?;
    Ok(())
}

#[test]
fn hooks_run_and_grace_is_kept() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let pod = apply_pod(
        lab,
        "hooks",
        &format!(
            "  terminationGracePeriodSeconds: 20
  containers:
  - name: main
    image: {BUSYBOX}
    command: [/bin/sh, -c, 'trap \"echo got TERM; exit 0\" TERM; until [ -e /tmp/started ]; do sleep 0.1; done; echo hook ran; while true; do sleep 0.2; done']
    lifecycle:
      postStart: {{exec: {{command: [touch, /tmp/started]}}}}
      preStop: {{exec: {{command: [/bin/sh, -c, 'echo stopping > /proc/1/fd/1']}}}}
"
        ),
    )?;
    pod.wait_phase("Running")?;
    wait_for("the postStart hook", crate::shared::POD, || {
        Ok(lab.supervisor.kubectl(&["logs", "hooks"])?.stdout.contains("hook ran").then_some(()))
    })?;
    let log = lab.directory().join("hooks.log");
    let mut follow = Background::spawn(
        "kubectl logs -f",
        &mut lab.supervisor.kubectl_command(&["logs", "-f", "hooks"]),
        &log,
    )?;
    let followed = || std::fs::read_to_string(&log).unwrap_or_default();
    wait_for("kubectl logs -f to follow", crate::shared::POD, || {
        Ok(followed().contains("hook ran").then_some(()))
    })?;
    pod.delete()?;
    follow.wait(crate::shared::POD)?;
    let text = followed();
    assert!(text.contains("stopping") && text.contains("got TERM"), "{text}");
    Ok(())
}

#[test]
fn out_of_memory_is_seen() -> anyhow::Result<()> {
    let pod = apply_pod(
        &ready_lab(),
        "hungry",
        &format!(
            "  restartPolicy: Never
  containers:
  - name: main
    image: {BUSYBOX}
    command: [/bin/sh, -c, 'x=aaaaaaaaaaaaaaaa; while true; do x=$x$x; done']
    resources: {{limits: {{memory: 32Mi}}}}
"
        ),
    )?;
    pod.wait_phase("Failed")?;
    assert_eq!(pod.field("{.status.containerStatuses[0].state.terminated.reason}")?, "OOMKilled");
    assert_eq!(pod.field("{.status.containerStatuses[0].state.terminated.exitCode}")?, "137");
    Ok(())
}
