//! logs, exec and attach as kubectl uses them.

use crate::shared::{POD, apply_pod, ready_lab, shell_pod};
use atoll_qemu_test::lab::BUSYBOX;
use atoll_qemu_test::process::{run, run_with_input, wait_for};
use std::process::Command;
use std::time::Duration;

#[test]
fn exec_carries_output_input_and_exit_code() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let pod = shell_pod(lab, "exec", "sleep 1000000", "Never")?;
    pod.wait_phase("Running")?;
    assert_eq!(pod.exec(&["echo", "hello"])?, "hello\n");
    let output =
        lab.supervisor.kubectl(&["exec", "exec", "--", "sh", "-c", "echo out; echo err >&2; exit 7"])?;
    assert_eq!(output.stdout, "out\n");
    assert!(output.stderr.contains("err") && output.stderr.contains("exit code 7"), "{output:?}");
    assert_eq!(output.code, 7);
    let input = vec![b'x'; 300_000];
    let output = run_with_input(
        &mut lab.supervisor.kubectl_command(&["exec", "-i", "exec", "--", "wc", "-c"]),
        &input,
        POD,
    )?;
    assert_eq!(output.stdout.trim(), "300000", "{output:?}");
    let output = lab.supervisor.kubectl(&["exec", "exec", "--", "no-such-command"])?;
    assert_ne!(output.code, 0);
    assert!(output.stderr.contains("no-such-command"), "{output:?}");
    Ok(())
}

/// Runs kubectl with a terminal of its own (`script` of util-linux) and types `input`.
fn with_terminal(lab: &atoll_qemu_test::lab::Lab, arguments: &str, input: &str) -> anyhow::Result<String> {
    let kubectl = lab.supervisor.kubectl_command(&[]);
    let line = format!("{} kubectl {arguments}", kubectl.get_program().to_string_lossy());
    let mut command = Command::new("script");
    command
        .args(["-q", "-e", "-c", &line, "/dev/null"])
        .envs(kubectl.get_envs().filter_map(|(k, v)| Some((k, v?))))
        .env("TERM", "dumb");
    let output = run_with_input(&mut command, input.as_bytes(), Duration::from_secs(60))?;
    Ok(output.stdout)
}

#[test]
fn exec_with_a_terminal_is_a_shell() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let pod = shell_pod(lab, "terminal", "sleep 1000000", "Never")?;
    pod.wait_phase("Running")?;
    let text = with_terminal(lab, "exec -it terminal -- sh", "tty; stty size; echo $((40 + 2)); exit\n")?;
    assert!(text.contains("/dev/pts/") && text.contains("42"), "{text}");
    Ok(())
}

#[test]
fn attach_talks_to_the_first_process() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let pod = apply_pod(
        lab,
        "attach",
        &format!(
            "  restartPolicy: Never\n  containers:\n  - name: main\n    image: {BUSYBOX}\n    stdin: true\n    stdinOnce: true\n    command: [/bin/sh, -c, 'read line; echo you said $line; sleep 2']\n"
        ),
    )?;
    pod.wait_phase("Running")?;
    let output =
        run_with_input(&mut lab.supervisor.kubectl_command(&["attach", "-i", "attach"]), b"hello\n", POD)?;
    assert!(output.stdout.contains("you said hello"), "{output:?}");
    pod.wait_phase("Succeeded")
}

#[test]
fn logs_follow_tail_since_and_timestamps() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let pod = shell_pod(
        lab,
        "logs",
        "for i in 1 2 3 4 5; do echo line $i; done; sleep 6; echo last; sleep 2",
        "Never",
    )?;
    pod.wait_phase("Running")?;
    let follow = run(&mut lab.supervisor.kubectl_command(&["logs", "-f", "logs"]), POD)?;
    assert_eq!(follow.stdout, "line 1\nline 2\nline 3\nline 4\nline 5\nlast\n");
    assert_eq!(lab.supervisor.kubectl_ok(&["logs", "logs", "--tail=2"])?, "line 5\nlast\n");
    assert_eq!(lab.supervisor.kubectl_ok(&["logs", "logs", "--since=1h", "--tail=1"])?, "last\n");
    assert_eq!(lab.supervisor.kubectl_ok(&["logs", "logs", "--limit-bytes=6"])?, "line 1");
    let stamped = lab.supervisor.kubectl_ok(&["logs", "logs", "--timestamps", "--tail=1"])?;
    assert!(stamped.starts_with("20") && stamped.trim_end().ends_with("Z last"), "{stamped}");
    Ok(())
}

#[test]
fn port_forward_reaches_the_pod() -> anyhow::Result<()> {
    let lab = &ready_lab();
    let pod = shell_pod(
        lab,
        "forward",
        "mkdir /www; echo forwarded > /www/index.html; exec httpd -f -p 8080 -h /www",
        "Never",
    )?;
    pod.wait_phase("Running")?;
    // kubectl ends at the first refused connection, so the server must listen before.
    wait_for("the pod's web server", POD, || {
        Ok(lab
            .supervisor
            .kubectl(&["exec", "forward", "--", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/"])?
            .stdout
            .contains("forwarded")
            .then_some(()))
    })?;
    let log = lab.directory().join("port-forward.log");
    let mut forward = atoll_qemu_test::process::Background::spawn(
        "kubectl port-forward",
        &mut lab.supervisor.kubectl_command(&["port-forward", "pod/forward", "18080:8080"]),
        &log,
    )?;
    let body = wait_for("the forwarded port to answer", Duration::from_secs(60), || {
        forward.check_alive()?;
        let answer = run(
            Command::new("curl").args(["-s", "--max-time", "10", "http://127.0.0.1:18080/"]),
            Duration::from_secs(15),
        )?;
        Ok((!answer.stdout.is_empty()).then_some(answer.stdout))
    })?;
    assert_eq!(body, "forwarded\n");
    Ok(())
}
