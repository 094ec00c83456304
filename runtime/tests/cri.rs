//! The runtime through its real gRPC socket, on a host that is a test.

mod fake;

use atoll_cri::v1::*;
use atoll_spec::guest::OUTPUT_WINDOW;
use fake::{Fault, Fixture, IMAGE};
use std::time::Duration;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn one_pod_through_its_life() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let mut events = client.runtime.get_container_events(GetEventsRequest {}).await.unwrap().into_inner();
    let sandbox = client.sandbox("life").await;
    let status = client.sandbox_status(&sandbox).await;
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    assert_eq!(status.network.unwrap().ip, "10.9.0.1");

    let done = client.run(&sandbox, "done", &["echo", "hello"]).await;
    let ended = client.ended(&done).await;
    assert_eq!((ended.exit_code, ended.reason.as_str()), (0, "Completed"));
    // This guest's clock is in 1970: the container ended when it was made at the earliest.
    assert_eq!(ended.finished_at, ended.created_at);
    let log = std::fs::read_to_string(&ended.log_path).unwrap();
    assert!(log.contains(" stdout F hello\n") && log.contains(" stderr F oops\n"), "{log}");

    let main = client.run(&sandbox, "main", &["sleep"]).await;
    let answer = client.exec(&main, &["echo", "exec"], 5).await.unwrap();
    assert_eq!((answer.stdout, answer.stderr, answer.exit_code), (b"exec\n".to_vec(), b"oops\n".to_vec(), 0));
    assert_eq!(client.exec(&main, &["exit", "3"], 5).await.unwrap().exit_code, 3);
    client.stop_container(&main, 5).await;
    assert_eq!(client.status(&main).await.exit_code, 143);
    for _ in 0..2 {
        client.stop_container(&main, 5).await;
        client.remove_container(&main).await;
        client.stop_sandbox(&sandbox).await;
    }
    assert_eq!(client.sandbox_status(&sandbox).await.state(), PodSandboxState::SandboxNotready);
    for _ in 0..2 {
        client.remove_sandbox(&sandbox).await;
    }
    assert!(fixture.host.is_clean());
    assert_eq!(
        std::fs::read_dir(fixture.config.sandboxes())
            .unwrap()
            .filter(|e| e.as_ref().unwrap().path().is_dir())
            .count(),
        0
    );

    let mut kinds = Vec::new();
    while kinds.len() < 11 {
        let event = tokio::time::timeout(Duration::from_secs(5), events.message()).await;
        let Ok(Ok(Some(event))) = event else { break };
        kinds.push((event.container_id == sandbox, event.container_event_type()));
    }
    use ContainerEventType::*;
    assert_eq!(kinds[..2], [(true, ContainerCreatedEvent), (true, ContainerStartedEvent)]);
    assert_eq!(kinds.last(), Some(&(true, ContainerDeletedEvent)));
    let own = |kind| kinds.iter().filter(|k| **k == (false, kind)).count();
    assert_eq!(
        (own(ContainerCreatedEvent), own(ContainerStartedEvent), own(ContainerStoppedEvent)),
        (2, 2, 2)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_ignores_its_signal_is_killed_and_an_oom_is_seen() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("kill").await;
    let stubborn = client.run(&sandbox, "stubborn", &["stubborn"]).await;
    client.stop_container(&stubborn, 1).await;
    assert_eq!(client.status(&stubborn).await.exit_code, 137);
    let oom = client.run(&sandbox, "oom", &["exit", "99"]).await;
    assert_eq!(client.ended(&oom).await.reason, "OOMKilled");
    let missing = client.create(&sandbox, "missing", &["missing"]).await;
    let request = StartContainerRequest { container_id: missing.clone() };
    assert!(client.runtime.start_container(request).await.is_err());
    let status = client.status(&missing).await;
    assert_eq!(
        (status.state(), status.exit_code, status.reason.as_str()),
        (ContainerState::ContainerExited, 127, "StartError")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_acknowledged_once_it_is_in_the_log() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("receipts").await;
    // The first receipt is lost with its connection, and there is no more output that would bring another.
    fixture.host.vmm(&sandbox).inject(Fault::Receipt);
    let main = client.run(&sandbox, "main", &["echo", "hello"]).await;
    let log = client.ended(&main).await.log_path;
    assert!(std::fs::read_to_string(log).unwrap().contains("stdout F hello"));
    let acknowledged = fixture.host.vmm(&sandbox).acknowledged;
    // "hello\n" and, as error output, "oops\n".
    let all = async {
        while acknowledged.load(std::sync::atomic::Ordering::SeqCst) != 11 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), all).await.expect("the output was never acknowledged");
    assert!(!fixture.host.vmm(&sandbox).is_waiting(Fault::Receipt));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_receipt_does_not_stop_a_container_that_waits_for_it() {
    const BYTES: usize = 4 * OUTPUT_WINDOW;
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("window").await;
    fixture.host.vmm(&sandbox).inject(Fault::Receipt);
    let main = client.run(&sandbox, "main", &["flow", &BYTES.to_string()]).await;
    let log = client.ended(&main).await.log_path;
    assert!(!fixture.host.vmm(&sandbox).is_waiting(Fault::Receipt));
    let log = std::fs::read_to_string(log).unwrap();
    assert_eq!(log.lines().map(|line| line.rsplit(' ').next().unwrap().len()).sum::<usize>(), BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_fails_changes_nothing_and_can_be_asked_for_again() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("removal").await;
    let main = client.run(&sandbox, "main", &["exit", "4"]).await;
    let before = client.ended(&main).await;
    assert_ne!(before.started_at, 0);
    fixture.host.vmm(&sandbox).inject(Fault::Remove);
    let request = RemoveContainerRequest { container_id: main.clone() };
    assert!(client.runtime.remove_container(request).await.is_err());
    assert_eq!(client.status(&main).await, before);
    client.remove_container(&main).await;
    assert_eq!(fixture.host.containers_of(&sandbox), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_of_which_nobody_knows_what_became_is_taken_back() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("unsure").await;
    let main = client.create(&sandbox, "main", &["sleep"]).await;
    fixture.host.vmm(&sandbox).inject(Fault::Start);
    // The guest refuses once, as if it were still starting it.
    fixture.host.vmm(&sandbox).inject(Fault::Remove);
    let request = StartContainerRequest { container_id: main.clone() };
    assert!(client.runtime.start_container(request).await.is_err());
    // The answer comes when the guest no longer has it.
    assert_eq!(fixture.host.containers_of(&sandbox), 0);
    let status = client.status(&main).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"));
    client.remove_container(&main).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_has_a_deadline() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("exec").await;
    let main = client.run(&sandbox, "main", &["sleep"]).await;
    let error = client.exec(&main, &["sleep"], 1).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(client.exec(&main, &["missing"], 1).await.is_err());
    let big = client.exec(&main, &["spew", "20000000"], 30).await.unwrap();
    assert_eq!(big.stdout.len(), (16 << 20) - (64 << 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launch_that_fails_at_any_step_leaves_nothing() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    for step in ["check", "network", "spawn", "boot"] {
        *fixture.host.broken.lock().unwrap() = Some(step);
        let config = client.sandbox_config("broken");
        let error = client.sandbox_with(config).await.unwrap_err();
        assert!(!error.message().is_empty(), "{step}");
        assert!(fixture.host.is_clean(), "{step} leaks");
        let left = client.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap();
        assert_eq!(left.into_inner().items.len(), 0, "{step}");
    }
    let status = client.runtime.status(StatusRequest::default()).await.unwrap().into_inner().status.unwrap();
    assert!(status.conditions.iter().all(|c| c.status));
    *fixture.host.broken.lock().unwrap() = Some("check");
    let status = client.runtime.status(StatusRequest::default()).await.unwrap().into_inner().status.unwrap();
    assert!(!status.conditions[0].status && status.conditions[0].message.contains("/dev/kvm"));
    *fixture.host.broken.lock().unwrap() = None;
    client.sandbox("broken").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launch_can_be_stopped() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    *fixture.host.broken.lock().unwrap() = Some("silent");
    let (mut other, config) = (fixture.client().await, client.sandbox_config("silent"));
    let launch = tokio::spawn(async move { other.sandbox_with(config).await });
    let id = loop {
        let list =
            client.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner();
        if let Some(sandbox) = list.items.first() {
            break sandbox.id.clone();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    client.stop_sandbox(&id).await;
    assert!(launch.await.unwrap().unwrap_err().message().contains("stopped during its launch"));
    client.remove_sandbox(&id).await;
    assert!(fixture.host.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_a_vm_is_seen_at_once() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("death").await;
    let main = client.run(&sandbox, "main", &["sleep"]).await;
    fixture.host.vmm(&sandbox).end(2);
    let status = client.ended(&main).await;
    assert_eq!(status.exit_code, 255);
    assert!(status.message.contains("status 2"), "{}", status.message);
    assert_eq!(client.sandbox_status(&sandbox).await.state(), PodSandboxState::SandboxNotready);
    assert!(client.exec(&main, &["echo"], 1).await.is_err());
    client.remove_sandbox(&sandbox).await;
    assert!(fixture.host.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_survive_a_restart_of_the_runtime() {
    let mut fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("survivor").await;
    let dead = client.sandbox("dead").await;
    let victim = client.run(&dead, "main", &["sleep"]).await;
    let running = client.run(&sandbox, "running", &["cat"]).await;
    let made = client.create(&sandbox, "made", &["echo", "after"]).await;
    let ended = client.run(&sandbox, "ended", &["exit", "4"]).await;
    client.ended(&ended).await;
    let half = client.run(&sandbox, "half", &["sleep"]).await;
    let unsure = client.create(&sandbox, "unsure", &["echo", "never"]).await;

    fixture.app.take().unwrap().stop().await;
    // As if the runtime had been killed while it removed this one.
    let state = fixture.config.sandboxes().join(&sandbox).join("state.json");
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&state).unwrap()).unwrap();
    record["containers"].as_array_mut().unwrap().retain(|c| c["id"] != half);
    // And while it started this one.
    for container in record["containers"].as_array_mut().unwrap().iter_mut().filter(|c| c["id"] == unsure) {
        assert_eq!(container["phase"], "created");
        container["phase"] = "starting".into();
    }
    std::fs::write(&state, record.to_string()).unwrap();
    let vmm = fixture.host.taken.lock().unwrap().vmms.remove(&dead).unwrap();
    vmm.end(0);
    fixture.start().await;

    let mut client = fixture.client().await;
    assert_eq!(client.sandbox_status(&sandbox).await.state(), PodSandboxState::SandboxReady);
    assert_eq!(client.sandbox_status(&dead).await.state(), PodSandboxState::SandboxNotready);
    assert_eq!(client.status(&victim).await.exit_code, 255);
    assert_eq!(client.status(&running).await.state(), ContainerState::ContainerRunning);
    assert_eq!(client.status(&ended).await.exit_code, 4);
    let gone = async {
        while fixture.host.containers_of(&sandbox) != 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone)
        .await
        .expect("the half-removed container, or the half-started one, is still there");
    let status = client.ended(&unsure).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"));
    assert_eq!(client.exec(&running, &["echo", "still there"], 5).await.unwrap().stdout, b"still there\n");
    client.start(&made).await;
    let status = client.ended(&made).await;
    assert!(std::fs::read_to_string(&status.log_path).unwrap().contains("stdout F after"));
    // A new pod gets an address of its own.
    let other = client.sandbox("other").await;
    let (ours, theirs) = (
        client.sandbox_status(&sandbox).await.network.unwrap().ip,
        client.sandbox_status(&other).await.network.unwrap().ip,
    );
    assert_ne!(ours, theirs);
    client.stop_container(&running, 5).await;
    assert_eq!(client.status(&running).await.exit_code, 143);
    for id in [&sandbox, &dead, &other] {
        client.remove_sandbox(id).await;
    }
    assert!(fixture.host.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_fails_once_after_a_restart_of_the_runtime_is_asked_again() {
    let mut fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("patience").await;
    client.run(&sandbox, "running", &["cat"]).await;
    let ended = client.run(&sandbox, "ended", &["echo", "last words"]).await;
    let before = client.ended(&ended).await;

    fixture.app.take().unwrap().stop().await;
    // As if this one had ended, and had said all that it said, while the runtime was away.
    let state = fixture.config.sandboxes().join(&sandbox).join("state.json");
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&state).unwrap()).unwrap();
    for container in record["containers"].as_array_mut().unwrap().iter_mut().filter(|c| c["id"] == ended) {
        container["phase"] = serde_json::json!({ "running": { "started_ns": 1 } });
    }
    std::fs::write(&state, record.to_string()).unwrap();
    std::fs::remove_file(&before.log_path).unwrap();
    fixture.host.vmm(&sandbox).inject(Fault::List);
    fixture.host.vmm(&sandbox).inject(Fault::Stdio);
    fixture.start().await;

    let mut client = fixture.client().await;
    let after = client.ended(&ended).await;
    assert_eq!((after.exit_code, after.reason.as_str()), (0, "Completed"));
    let log = std::fs::read_to_string(&after.log_path).unwrap();
    assert!(log.contains("stdout F last words"), "{log}");
    for fault in [Fault::List, Fault::Stdio] {
        assert!(!fixture.host.vmm(&sandbox).is_waiting(fault));
    }
    // And again for one that runs on.
    fixture.app.take().unwrap().stop().await;
    let vmm = fixture.host.vmm(&sandbox);
    let before = vmm.reopened.load(std::sync::atomic::Ordering::SeqCst);
    vmm.inject(Fault::Stdio);
    fixture.start().await;
    let open = async {
        while vmm.reopened.load(std::sync::atomic::Ordering::SeqCst) == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), open).await.expect("the output was never opened again");
    assert!(!vmm.is_waiting(Fault::Stdio));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_container_is_on_disk_before_its_guest_may_forget_it() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("end").await;
    let file = fixture.pods().join("message");
    std::fs::write(&file, "").unwrap();
    let mut config = client.container_config("main", &["exit", "4"]);
    config.mounts = vec![Mount {
        host_path: file.display().to_string(),
        container_path: "/dev/termination-log".into(),
        ..Default::default()
    }];
    let main = client.create_with(&sandbox, config).await.unwrap();
    // Between the end and its record there is work to do, which takes a while.
    fixture.host.vmm(&sandbox).inject(Fault::File);
    client.start(&main).await;
    let mut records = fixture.host.vmm(&sandbox).records.subscribe();
    let acknowledged = records.wait_for(|records| !records.is_empty());
    let records = tokio::time::timeout(Duration::from_secs(10), acknowledged).await;
    let records = records.expect("the end was never acknowledged").unwrap().clone();
    let record: serde_json::Value = serde_json::from_str(&records[0]).unwrap();
    assert_eq!(record["containers"][0]["phase"]["exited"]["code"], 4, "{record}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "late");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_cannot_be_written_stays_with_the_guest_until_it_can() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("stuck").await;
    let main = client.run(&sandbox, "main", &["sleep"]).await;
    // In the place of the new record is a directory: writing it fails.
    let obstacle = fixture.config.sandboxes().join(&sandbox).join("state.new");
    std::fs::create_dir(&obstacle).unwrap();
    client.stop_container(&main, 5).await;
    assert_eq!(client.ended(&main).await.exit_code, 143);
    assert!(fixture.host.vmm(&sandbox).records.borrow().is_empty());
    std::fs::remove_dir(&obstacle).unwrap();
    let mut records = fixture.host.vmm(&sandbox).records.subscribe();
    let acknowledged = records.wait_for(|records| !records.is_empty());
    let records = tokio::time::timeout(Duration::from_secs(10), acknowledged).await;
    let records = records.expect("the end was never acknowledged").unwrap().clone();
    let record: serde_json::Value = serde_json::from_str(&records[0]).unwrap();
    assert_eq!(record["containers"][0]["phase"]["exited"]["code"], 143, "{record}");
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_sent_and_sent_again_and_copied_back() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("volumes").await;
    let tree = fixture.pods().join("tree");
    std::fs::create_dir_all(tree.join("..1")).unwrap();
    std::os::unix::fs::symlink("..1", tree.join("..data")).unwrap();
    let file = fixture.pods().join("termination");
    std::fs::write(&file, "").unwrap();
    let mount = |host: &std::path::Path, to: &str, readonly| Mount {
        host_path: host.display().to_string(),
        container_path: to.into(),
        readonly,
        ..Default::default()
    };
    let mut config = client.container_config("main", &["sleep"]);
    config.mounts = vec![mount(&tree, "/config", true), mount(&file, "/dev/termination-log", false)];
    let id = client.create_with(&sandbox, config).await.unwrap();
    client.start(&id).await;

    // The fake counts published trees in the number of processes.
    let published = async |client: &mut fake::Client, expected: u64| {
        loop {
            let request = PodSandboxStatsRequest { pod_sandbox_id: sandbox.clone() };
            let stats = client.runtime.pod_sandbox_stats(request).await.unwrap().into_inner().stats.unwrap();
            if stats.linux.unwrap().process.unwrap().process_count.unwrap().value == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let deadline = Duration::from_secs(10);
    tokio::time::timeout(deadline, published(&mut client, 1)).await.expect("not published");
    std::os::unix::fs::symlink("..1", tree.join("..data_tmp")).unwrap();
    std::fs::rename(tree.join("..data_tmp"), tree.join("..data")).unwrap();
    tokio::time::timeout(deadline, published(&mut client, 2)).await.expect("not published again");
    // A change that was on its way when the connection broke.
    fixture.host.vmm(&sandbox).inject(Fault::Publish);
    std::os::unix::fs::symlink("..1", tree.join("..data_tmp")).unwrap();
    std::fs::rename(tree.join("..data_tmp"), tree.join("..data")).unwrap();
    tokio::time::timeout(2 * deadline, published(&mut client, 3)).await.expect("the change was lost");
    assert!(!fixture.host.vmm(&sandbox).is_waiting(Fault::Publish));

    client.stop_container(&id, 5).await;
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "from the container");
    let mut config = client.container_config("refused", &["sleep"]);
    config.mounts = vec![mount(&tree, "/config", false)];
    let error = client.create_with(&sandbox, config).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("emptyDir"), "{}", error.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_host_beyond_the_roots_reaches_a_pod_or_is_written_for_one() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let outside = fixture.directory.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "of root").unwrap();
    std::os::unix::fs::symlink(&outside, fixture.pods().join("link")).unwrap();
    let sandbox = client.sandbox("curious").await;
    for path in [outside.clone(), outside.join("secret"), fixture.pods().join("link/secret")] {
        for readonly in [true, false] {
            let mut config = client.container_config("curious", &["sleep"]);
            config.mounts = vec![Mount {
                host_path: path.display().to_string(),
                container_path: "/x".into(),
                readonly,
                ..Default::default()
            }];
            let error = client.create_with(&sandbox, config).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument);
            assert!(error.message().contains(&fixture.pods().display().to_string()), "{}", error.message());
        }
    }
    for log in ["/secret", "../../outside/secret"] {
        let mut config = client.container_config("writer", &["echo", "x"]);
        config.log_path =
            format!("{}{log}", if log.starts_with('/') { outside.to_str().unwrap() } else { "" });
        assert_eq!(client.create_with(&sandbox, config).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let mut config = client.sandbox_config("elsewhere");
    config.log_directory = outside.display().to_string();
    let error = client.sandbox_with(config).await.unwrap_err();
    assert!(error.message().contains("--log-root"), "{}", error.message());
    assert_eq!(fixture.host.containers_of(&sandbox), 0);
    assert_eq!(std::fs::read_to_string(outside.join("secret")).unwrap(), "of root");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_exchanged_for_a_link_while_its_container_runs_is_not_written_through() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("exchange").await;
    let outside = fixture.directory.path().join("secret");
    std::fs::write(&outside, "of root").unwrap();
    let message = fixture.pods().join("message");
    std::fs::write(&message, "").unwrap();
    let mut config = client.container_config("main", &["sleep"]);
    config.mounts = vec![Mount {
        host_path: message.display().to_string(),
        container_path: "/dev/termination-log".into(),
        ..Default::default()
    }];
    let main = client.create_with(&sandbox, config).await.unwrap();
    client.start(&main).await;
    std::fs::remove_file(&message).unwrap();
    std::os::unix::fs::symlink(&outside, &message).unwrap();
    client.stop_container(&main, 5).await;
    assert_eq!(std::fs::read_to_string(&outside).unwrap(), "of root");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_pods_at_once() {
    let fixture = Fixture::new().await;
    let client = fixture.client().await;
    let pods = (0..20).map(|n| {
        let mut runtime = client.runtime.clone();
        let config = client.sandbox_config(&format!("pod-{n}"));
        async move {
            let request = RunPodSandboxRequest { config: Some(config), ..Default::default() };
            let id = runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
            let request = RemovePodSandboxRequest { pod_sandbox_id: id };
            runtime.remove_pod_sandbox(request).await.unwrap();
        }
    });
    futures_util::future::join_all(pods).await;
    assert!(fixture.host.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_pod_networks_at_once_the_last_one_stays_with_every_pod_in_its_filter() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let runtime = client.runtime.clone();
    let set = |cidr: &'static str| {
        let network = NetworkConfig { pod_cidr: cidr.into() };
        let runtime_config = Some(RuntimeConfig { network_config: Some(network) });
        let mut runtime = runtime.clone();
        async move { runtime.update_runtime_config(UpdateRuntimeConfigRequest { runtime_config }).await }
    };
    let mut installing = fixture.host.installing.subscribe();
    let begun = *installing.borrow();
    fixture.host.held.send_replace(Some("10.10.0.0/24".into()));
    let older = tokio::spawn(set("10.10.0.0/24"));
    let deadline = Duration::from_secs(10);
    let waited = installing.wait_for(|now| *now > begun);
    drop(tokio::time::timeout(deadline, waited).await.expect("not installed").unwrap());
    // While the older one is under way, another network is wanted, and a pod comes.
    let newer = tokio::spawn(set("10.11.0.0/24"));
    client.sandbox("meanwhile").await;
    let taken = async {
        while !fixture.config.sandboxes().join("pod-cidr").exists()
            || std::fs::read_to_string(fixture.config.sandboxes().join("pod-cidr")).unwrap() != "10.11.0.0/24"
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(deadline, taken).await.expect("the newer one was not taken up");
    fixture.host.held.send_replace(None);
    for call in [older, newer] {
        tokio::time::timeout(deadline, call).await.expect("no answer").unwrap().unwrap();
    }
    let (cidr, taps) = fixture.host.filter.lock().unwrap().clone();
    assert_eq!(cidr, "10.11.0.0/24");
    assert_eq!(taps.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_statistics_images_and_what_is_not_there() {
    let fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("lists").await;
    let main = client.run(&sandbox, "main", &["sleep"]).await;
    let config = client.sandbox_config("lists");
    assert_eq!(client.sandbox_with(config).await.unwrap_err().code(), Code::AlreadyExists);

    let filter = ContainerFilter {
        state: Some(ContainerStateValue { state: ContainerState::ContainerRunning.into() }),
        ..Default::default()
    };
    let list = client.runtime.list_containers(ListContainersRequest { filter: Some(filter) }).await.unwrap();
    assert_eq!(list.into_inner().containers[0].id, main);
    let mut stream =
        client.runtime.stream_containers(StreamContainersRequest::default()).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().containers.len(), 1);
    assert!(stream.message().await.unwrap().is_none());
    let stats =
        client.runtime.container_stats(ContainerStatsRequest { container_id: main.clone() }).await.unwrap();
    assert_eq!(stats.into_inner().stats.unwrap().memory.unwrap().usage_bytes.unwrap().value, 11);
    let images = client.images.list_images(ListImagesRequest::default()).await.unwrap().into_inner().images;
    assert_eq!(images[0].repo_tags, [IMAGE]);
    let request = CheckpointContainerRequest { container_id: main.clone(), ..Default::default() };
    let error = client.runtime.checkpoint_container(request).await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);
    let request = UpdateContainerResourcesRequest {
        container_id: main.clone(),
        linux: Some(LinuxContainerResources { memory_limit_in_bytes: 77, ..Default::default() }),
        ..Default::default()
    };
    client.runtime.update_container_resources(request).await.unwrap();
    assert_eq!(client.status(&main).await.resources.unwrap().linux.unwrap().memory_limit_in_bytes, 77);
    let request = ContainerStatusRequest { container_id: "nothing".into(), verbose: false };
    assert_eq!(client.runtime.container_status(request).await.unwrap_err().code(), Code::NotFound);
    client.runtime.reopen_container_log(ReopenContainerLogRequest { container_id: main }).await.unwrap();
}
