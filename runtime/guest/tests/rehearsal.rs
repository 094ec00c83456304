//! The guest without its VM: real namespaces, mounts, users and signals, driven as the runtime drives it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod peer;

use atoll_spec::guest::*;
use peer::*;

fn sh(script: &str) -> Vec<&str> {
    vec!["sh", "-c", script]
}

#[test]
fn a_command_runs_and_its_output_and_exit_code_come_back() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let (output, exit) = peer.run_to_end(container("c1", &sh("echo out; echo err >&2; exit 3")));
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), exit.code), ("out\n", "err\n", 3));
    assert!(!exit.oom_killed);
}

#[test]
fn a_layer_that_an_image_names_twice_is_stacked_once() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let twice = ContainerSpec { layers: vec![BUSYBOX, BUSYBOX], ..container("c1", &sh("echo out")) };
    let (output, exit) = peer.run_to_end(twice);
    assert_eq!((output.stdout.as_str(), exit.code), ("out\n", 0), "{}", output.stderr);
}

#[test]
fn what_cannot_run_says_why() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let mut kind = |name: &str, args: &[&str]| {
        let failed = peer.run(container(name, args)).unwrap_err();
        peer.call(Call::RemoveContainer { container: name.parse().unwrap() }).unwrap();
        (failed.kind, failed.message)
    };
    let (not_found, message) = kind("c1", &["nosuch"]);
    assert_eq!(not_found, GuestErrorKind::CommandNotFound);
    assert!(message.contains("executable file not found in $PATH"), "{message}");
    assert_eq!(kind("c2", &["/no/such"]).0, GuestErrorKind::CommandNotFound);
    assert_eq!(kind("c3", &["/etc/plain"]).0, GuestErrorKind::CommandNotExecutable);
    assert_eq!(kind("c4", &["/bin/script"]).0, GuestErrorKind::CommandNotFound);
    assert_eq!(kind("c5", &["/etc"]).0, GuestErrorKind::CommandNotExecutable);
}

#[test]
fn a_container_sees_a_proper_machine() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let script = "echo $$; pwd; cat /etc/resolv.conf /etc/hostname; echo x > /dev/null; head -c 2 /dev/zero | wc -c; \
        readlink /dev/stdout; readlink /dev/ptmx; touch /dev/shm/x /written && echo wrote; \
        cat /proc/meminfo | wc -c; (echo x > /proc/sys/kernel/hostname) 2>&1; touch /sys/x 2>&1; \
        mknod /tmp/null c 1 3 && cat /tmp/null 2>&1; mknod /dev/null2 c 1 3 && cat /dev/null2 2>&1; \
        ls /dev/pts/ptmx /dev/mqueue -d; cat /proc/self/cgroup; grep -E 'Cap(Eff|Bnd)|NoNewPrivs' /proc/self/status; \
        cat /proc/self/oom_score_adj; echo $HOME $PATH; ls /proc/1/root/bin/busybox";
    let (output, exit) = peer.run_to_end(container("c1", &sh(script)));
    assert_eq!((exit.code, output.stderr.as_str()), (0, ""), "{output:?}");
    let expected = "1\n/\nnameserver 192.0.2.53\npod-1\n2\n/proc/self/fd/1\npts/ptmx\nwrote\n0\n\
        sh: can't create /proc/sys/kernel/hostname: Read-only file system\n";
    // The order of what follows is the script's; what differs between machines is looked at by its shape.
    let text = output.stdout.as_str();
    assert!(text.starts_with(expected), "{text}");
    assert_eq!(text.matches("Permission denied").count(), 2, "device nodes of its own stay closed: {text}");
    assert!(text.contains("0::/\n"), "its cgroup is the root of what it sees: {text}");
    assert!(text.contains("CapEff:\t00000000080000a1"), "{text}");
    assert!(text.contains("CapBnd:\t00000000080000a1"), "{text}");
    assert!(text.contains("NoNewPrivs:\t1\n"), "{text}");
    assert!(text.ends_with("100\n/root /bin\n/proc/1/root/bin/busybox\n"), "{text}");
}

#[test]
fn users_groups_and_working_directories() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let mut spec =
        container("c1", &sh("id; pwd; grep CapEff /proc/self/status; echo to > /dev/stdout; touch /x"));
    spec.process.user = User::Name { name: "web".into(), groups: vec![1234] };
    spec.process.cwd = "/srv/deep".into();
    let (output, exit) = peer.run_to_end(spec);
    assert_eq!(
        output.stdout,
        "uid=33(web) gid=34 groups=34,40(log),1234\n/srv/deep\nCapEff:\t0000000000000000\nto\n"
    );
    assert_eq!((exit.code, output.stderr.as_str()), (1, "touch: /x: Permission denied\n"));
    let mut spec = container("c2", &["true"]);
    spec.process.user = User::Name { name: "nobody".into(), groups: vec![] };
    let failed = peer.run(spec).unwrap_err();
    assert!(failed.kind == GuestErrorKind::Invalid && failed.message.contains("'nobody'"), "{failed:?}");
}

#[test]
fn the_default_filter_takes_system_calls_away_and_the_capabilities_stay() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    // A user namespace needs no capability: what refuses it is the filter.
    let script =
        "grep -c '^Seccomp:.*2' /proc/self/status; unshare -U true && echo may; mknod /n c 1 3 && echo made";
    let mut spec = container("c1", &sh(script));
    spec.process.system_calls = SystemCalls::Default;
    // Setuid programs go on working.
    spec.process.no_new_privileges = false;
    let (output, _) = peer.run_to_end(spec);
    assert_eq!(output.stdout, "1\nmade\n", "{}", output.stderr);
    assert!(output.stderr.contains("not permitted"), "{}", output.stderr);
    let (output, _) = peer.run_to_end(container(
        "c2",
        &sh("grep -c '^Seccomp:.*2' /proc/self/status; unshare -U true && echo may"),
    ));
    assert_eq!(output.stdout, "0\nmay\n", "{}", output.stderr);
}

#[test]
fn mounts_show_what_they_should() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let volume = tempfile::tempdir().unwrap();
    std::fs::create_dir(volume.path().join("..1")).unwrap();
    std::fs::write(volume.path().join("..1/key"), "one").unwrap();
    std::os::unix::fs::symlink("..1", volume.path().join("..data")).unwrap();
    std::os::unix::fs::symlink("..data/key", volume.path().join("key")).unwrap();
    peer.publish("config", &archive(volume.path())).unwrap();
    let mount = |target: &str, source: MountSource, read_only: bool| Mount {
        target: target.into(),
        source,
        read_only,
    };
    let scratch = |sub_path: &str, memory| MountSource::Scratch {
        volume: if memory { "mem".into() } else { "data".into() },
        sub_path: sub_path.into(),
        memory,
        size_bytes: memory.then_some(1 << 20),
    };
    let tree = |sub_path: &str| MountSource::Tree { tree: "config".into(), sub_path: sub_path.into() };
    let mut writer = container(
        "w",
        &sh("cat /etc/config/key /one; echo y > /data/x; echo z > /mem/z; echo bye > /log; \
        touch /etc/config/n 2>&1; touch /ro/n 2>&1; cat /etc/hosts; cat; cat /etc/config/key"),
    );
    writer.stdin = true;
    writer.mounts = vec![
        mount("/etc/config", tree(""), true),
        mount("/one", tree("key"), true),
        mount("/data", scratch("", false), false),
        mount("/mem", scratch("", true), false),
        mount("/ro", MountSource::Tmpfs { size_bytes: Some(4096) }, true),
        mount("/log", MountSource::File { base64: String::new(), mode: 0o666 }, false),
        mount("/etc/hosts", MountSource::File { base64: "aG9zdHMK".into(), mode: 0o644 }, true),
    ];
    writer.process.user = User::Ids { uid: 33, gid: None, groups: vec![] };
    let mut stream = peer.run(writer).unwrap();
    let (_, first) = receive(&mut stream).unwrap();
    let mut text = String::from_utf8(first).unwrap();
    while !text.ends_with("hosts\n") {
        text.push_str(&String::from_utf8(receive(&mut stream).unwrap().1).unwrap());
    }
    assert_eq!(
        text,
        "oneonetouch: /etc/config/n: Read-only file system\ntouch: /ro/n: Read-only file system\nhosts\n"
    );
    // The tree changes under the running container.
    std::fs::rename(volume.path().join("..1"), volume.path().join("..2")).unwrap();
    std::fs::write(volume.path().join("..2/key"), "two").unwrap();
    std::fs::remove_file(volume.path().join("..data")).unwrap();
    std::os::unix::fs::symlink("..2", volume.path().join("..data")).unwrap();
    peer.publish("config", &archive(volume.path())).unwrap();
    send(&mut stream, Channel::Stdin, b"");
    assert_eq!(read_to_end(stream, false, false).stdout, "two");
    assert_eq!(peer.exit_of("w").code, 0);
    let Reply::File { base64 } =
        peer.call(Call::ReadFile { container: "w".parse().unwrap(), target: "/log".into() }).unwrap()
    else {
        panic!("not a file");
    };
    assert_eq!(base64, "YnllCg==");
    let mut reader = container("r", &sh("cat /d/x /m; touch /n"));
    reader.mounts = vec![mount("/d", scratch("", false), true), mount("/m", scratch("", true), false)];
    reader.mounts[1].source = MountSource::Scratch {
        volume: "mem".into(),
        sub_path: String::new(),
        memory: true,
        size_bytes: None,
    };
    reader.process.args[2] = "cat /d/x /m/z; touch /n".into();
    reader.read_only_root = true;
    let (output, _) = peer.run_to_end(reader);
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("y\nz\n", "touch: /n: Read-only file system\n")
    );
}

fn archive(directory: &std::path::Path) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.follow_symlinks(false);
    builder.append_dir_all(".", directory).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn exec_enters_a_running_container() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let main = peer.run(container("c1", &sh("touch /tmp/here; echo up; sleep 1000"))).unwrap();
    let mut main_stream = main.try_clone().unwrap();
    assert_eq!(receive(&mut main_stream).unwrap().1, b"up\n");
    let stream = peer.exec("c1", "e1", process(&sh("ls /tmp; echo e >&2; exit 7")), false).unwrap();
    let output = read_to_end(stream, false, true);
    assert_eq!(output, Output { stdout: "here\n".into(), stderr: "e\n".into(), exit: Some(7) });
    let mut stream = peer.exec("c1", "e2", process(&["cat"]), true).unwrap();
    let big = vec![b'x'; 60_000];
    let mut writer = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        for _ in 0..20 {
            send(&mut writer, Channel::Stdin, &big);
        }
        send(&mut writer, Channel::Stdin, b"");
    });
    let output = read_to_end(stream.try_clone().unwrap(), false, true);
    sender.join().unwrap();
    assert_eq!((output.stdout.len(), output.exit), (1_200_000, Some(0)));
    stream = peer.exec("c1", "e3", process(&sh("sleep 1000 & sleep 1000")), false).unwrap();
    peer.call(Call::KillExec { exec: "e3".parse().unwrap() }).unwrap();
    assert_eq!(read_to_end(stream, false, true).exit, Some(137));
    let failed = peer.exec("c1", "e4", process(&["nosuch"]), false).unwrap_err();
    assert_eq!(failed.kind, GuestErrorKind::CommandNotFound);
    // Something left behind keeps its output open: the exec ends all the same.
    let stream = peer.exec("c1", "e5", process(&sh("echo a; sleep 1000 & exit 4")), false).unwrap();
    assert_eq!(
        read_to_end(stream, false, true),
        Output { stdout: "a\n".into(), stderr: String::new(), exit: Some(4) }
    );
    peer.call(Call::SignalContainer { container: "c1".parse().unwrap(), signal: 9, all: false }).unwrap();
    assert_eq!(peer.exit_of("c1").code, 137);
    assert_eq!(read_to_end(main, false, false).stdout, "");
    let failed = peer.exec("c1", "e6", process(&["true"]), false).unwrap_err();
    assert_eq!(failed.kind, GuestErrorKind::WrongState);
}

#[test]
fn terminals() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let mut spec = container(
        "c1",
        &sh("ls -l /dev/console | head -c 1; tty; read line; stty size; echo \"got $line\"; exit 8"),
    );
    spec.process.tty = true;
    spec.stdin = true;
    let mut stream = peer.run(spec).unwrap();
    let mut first = String::new();
    while !first.ends_with('\n') {
        first.push_str(&String::from_utf8(receive(&mut stream).unwrap().1).unwrap());
    }
    assert_eq!(first, "c/dev/pts/0\r\n");
    send(&mut stream, Channel::Resize, &[132, 0, 50, 0]);
    send(&mut stream, Channel::Stdin, b"hello\n");
    let output = read_to_end(stream, true, false);
    assert_eq!(output.stdout, "hello\r\n50 132\r\ngot hello\r\n");
    assert_eq!(peer.exit_of("c1").code, 8);
    peer.run(container("c2", &["sleep", "1000"])).unwrap();
    let mut shell = process(&sh("trap 'echo caught; exit 5' INT; tty; while :; do sleep 1; done"));
    shell.tty = true;
    let mut stream = peer.exec("c2", "e1", shell, true).unwrap();
    assert_eq!(receive(&mut stream).unwrap().1, b"/dev/pts/0\r\n");
    send(&mut stream, Channel::Stdin, &[3]);
    let output = read_to_end(stream, true, true);
    assert!(output.stdout.ends_with("caught\r\n"), "{output:?}");
    assert_eq!(output.exit, Some(5));
}

#[test]
fn signals_reach_the_first_process_or_all() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let script = sh("trap 'echo term; exit 9' TERM; echo up; while :; do sleep 1; done");
    let mut stream = peer.run(container("c1", &script)).unwrap();
    assert_eq!(receive(&mut stream).unwrap().1, b"up\n");
    let name = || "c1".parse().unwrap();
    peer.call(Call::SignalContainer { container: name(), signal: 15, all: false }).unwrap();
    assert_eq!(peer.exit_of("c1").code, 9);
    peer.call(Call::SignalContainer { container: name(), signal: 15, all: false }).unwrap();
    peer.call(Call::RemoveContainer { container: name() }).unwrap();
    let failed = peer.call(Call::SignalContainer { container: name(), signal: 15, all: false }).unwrap_err();
    assert_eq!(failed.kind, GuestErrorKind::NotFound);
    let _stream = peer.run(container("c2", &sh("sleep 1000 & sleep 1000"))).unwrap();
    peer.call(Call::SignalContainer { container: "c2".parse().unwrap(), signal: 9, all: true }).unwrap();
    assert_eq!(peer.exit_of("c2").code, 137);
    // Removing kills what runs.
    let _stream = peer.run(container("c3", &["sleep", "1000"])).unwrap();
    peer.call(Call::RemoveContainer { container: "c3".parse().unwrap() }).unwrap();
    assert_eq!(peer.exit_of("c3").code, 137);
}

#[test]
fn a_runtime_that_restarts_misses_nothing() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let script = "read go; echo first; read go; echo second; exit 6";
    let mut spec = container("c1", &sh(script));
    spec.stdin = true;
    let stream = peer.run(spec).unwrap();
    drop(stream);
    peer.reconnect();
    let number = peer.stream_number();
    peer.call(Call::OpenStdio { container: "c1".parse().unwrap(), stream: number }).unwrap();
    let mut stream = peer.stream(number);
    send(&mut stream, Channel::Stdin, b"\n");
    assert_eq!(receive(&mut stream).unwrap(), (Channel::Stdout, b"first\n".to_vec()));
    peer.acknowledge("c1", number, 6, 0);
    send(&mut stream, Channel::Stdin, b"\n");
    drop(stream);
    // It ends while nobody listens: output and event wait.
    peer.reconnect();
    assert_eq!(peer.exit_of("c1").code, 6);
    peer.reconnect();
    assert_eq!(peer.exit_of("c1").code, 6, "not acknowledged, so told again");
    peer.call(Call::AckEvents { sequence: 1 }).unwrap();
    let number = peer.stream_number();
    peer.call(Call::OpenStdio { container: "c1".parse().unwrap(), stream: number }).unwrap();
    assert_eq!(read_to_end(peer.stream(number), false, false).stdout, "second\n");
    // Read, but not acknowledged: said again.
    let number = peer.stream_number();
    peer.call(Call::OpenStdio { container: "c1".parse().unwrap(), stream: number }).unwrap();
    assert_eq!(read_to_end(peer.stream(number), false, false).stdout, "second\n");
    peer.acknowledge("c1", number, 7, 0);
    let number = peer.stream_number();
    peer.call(Call::OpenStdio { container: "c1".parse().unwrap(), stream: number }).unwrap();
    assert_eq!(read_to_end(peer.stream(number), false, false).stdout, "");
    let Reply::Containers { containers } = peer.call(Call::List).unwrap() else { panic!("not a list") };
    assert!(matches!(containers[0].phase, ContainerPhase::Exited { exit: Exit { code: 6, .. } }));
}

#[test]
fn containers_may_share_their_processes() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(GuestConfig { share_process_namespace: true, ..config() });
    let _first = peer.run(container("c1", &["sleep", "1234"])).unwrap();
    let (output, _) = peer.run_to_end(container("c2", &sh("cat /proc/1/comm; ps; ls /proc/1/root 2>&1")));
    assert!(output.stdout.starts_with("pause\n"), "{output:?}");
    assert!(output.stdout.contains("sleep 1234"), "{output:?}");
    assert!(output.stdout.contains("Permission denied"), "{output:?}");
    let mut spec = container("c3", &sh("sleep 4321 & echo up; exit 2"));
    spec.stdio_stream = 0;
    let (_, exit) = peer.run_to_end(spec);
    assert_eq!(exit.code, 2);
    let (output, _) = peer.run_to_end(container("c4", &["ps"]));
    assert!(!output.stdout.contains("sleep 4321"), "its children went with it: {output:?}");
}

#[test]
fn statistics_and_bad_calls() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let mut stream =
        peer.run(container("c1", &sh("head -c 100000 /dev/zero > /f; echo up; sleep 1000"))).unwrap();
    receive(&mut stream).unwrap();
    let Reply::Stats(stats) = peer.call(Call::Stats).unwrap() else { panic!("not statistics") };
    assert!(stats.containers["c1"].writable_bytes >= 100_000, "{stats:?}");
    let again = peer.call(Call::Configure(Box::new(GuestConfig { unix_ns: 5, ..config() })));
    assert_eq!(again, Ok(Reply::Done));
    let other = GuestConfig { hostname: "other".into(), ..config() };
    assert_eq!(peer.call(Call::Configure(Box::new(other))).unwrap_err().kind, GuestErrorKind::WrongState);
    let twice = peer.call(Call::CreateContainer(Box::new(container("c1", &["true"]))));
    assert_eq!(twice.unwrap_err().kind, GuestErrorKind::WrongState);
    let mut missing = container("c2", &["true"]);
    let source = MountSource::Tree { tree: "nosuch".into(), sub_path: String::new() };
    missing.mounts = vec![Mount { target: "/x".into(), source, read_only: true }];
    assert_eq!(peer.run(missing).unwrap_err().kind, GuestErrorKind::NotFound);
    assert!(peer.publish("bad", b"not a tar, not at all").is_err());
    peer.call(Call::PowerOff).unwrap();
}

#[test]
fn much_output_waits_for_a_slow_reader_and_none_is_lost() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let script = "i=0; while [ $i -lt 20000 ]; do echo \"line $i of a text that is long enough to fill pipes\"; \
        i=$((i+1)); done; head -c 3000000 /dev/zero >&2; exit 4";
    let mut stream = peer.run(container("c1", &sh(script))).unwrap();
    // Nobody reads: the process must wait, and the guest must go on answering.
    let first = receive(&mut stream).unwrap();
    assert!(matches!(peer.call(Call::Stats), Ok(Reply::Stats(_))));
    let Reply::Containers { containers } = peer.call(Call::List).unwrap() else { panic!("not a list") };
    assert!(matches!(containers[0].phase, ContainerPhase::Running { .. }), "it waits for its reader");
    let number = peer.stdio();
    let (mut out, mut err, mut open) = (first.1, Vec::new(), 2);
    while open > 0 {
        match receive(&mut stream).expect("the stream goes on until all has ended") {
            (_, payload) if payload.is_empty() => open -= 1,
            (Channel::Stdout, payload) => out.extend(payload),
            (_, payload) => err.extend(payload),
        }
        // Without this it would stop after what the guest keeps.
        peer.acknowledge("c1", number, out.len() as u64, err.len() as u64);
    }
    let text = String::from_utf8(out).unwrap();
    assert_eq!(text.lines().count(), 20_000);
    assert!(text.lines().enumerate().all(|(n, line)| line.starts_with(&format!("line {n} of"))));
    assert_eq!(err.len(), 3_000_000);
    assert_eq!(peer.exit_of("c1").code, 4);
}

#[test]
fn many_containers_start_at_once_and_leave_nothing() {
    if !possible() {
        return;
    }
    let mut peer = Peer::start(config());
    let mut streams = Vec::new();
    for number in 0..30 {
        let name = format!("c{number}");
        streams.push((
            name.clone(),
            peer.run(container(&name, &sh(&format!("echo {number}; exit {number}")))).unwrap(),
        ));
    }
    for (number, (name, stream)) in streams.into_iter().enumerate() {
        assert_eq!(read_to_end(stream, false, false).stdout, format!("{number}\n"));
        assert_eq!(peer.exit_of(&name).code, number as i32);
        peer.call(Call::RemoveContainer { container: name.parse().unwrap() }).unwrap();
    }
    let Reply::Containers { containers } = peer.call(Call::List).unwrap() else { panic!("not a list") };
    assert!(containers.is_empty());
    assert_eq!(peer.leftovers(), Vec::<String>::new());
}
