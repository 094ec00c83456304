//! What pods write, and how much of it there may be.

mod fake;

use atoll_cri::v1::*;
use fake::Fixture;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_limited_storage_gets_a_disk_of_its_size_and_its_volumes_are_counted() {
    let mut fixture = Fixture::new().await;
    fixture.config.scratch_mib = 1024;
    fixture.restart().await;
    let mut client = fixture.client().await;
    let mut config = client.sandbox_config("limited");
    let volumes = r#"[{"path":"/pods/1/v","medium":"","sizeLimitBytes":5},{"path":"/pods/1/unused"}]"#;
    config.annotations.insert("atoll.dev/scratch-volumes".into(), volumes.into());
    config.annotations.insert("atoll.dev/storage-limit-bytes".into(), (1 << 20).to_string());
    let mut refused = config.clone();
    let limited = client.sandbox_with(config).await.unwrap();
    let open = client.sandbox("open").await;
    let disk = |id: &str| {
        std::fs::metadata(fixture.config.sandboxes().join(id).join("scratch.img")).unwrap().len() >> 20
    };
    assert_eq!((disk(&limited), disk(&open)), (128, 1024));
    let mut config = client.container_config("main", &["sleep"]);
    config.mounts =
        vec![Mount { host_path: "/pods/1/v".into(), container_path: "/v".into(), ..Default::default() }];
    let id = client.create_with(&limited, config).await.unwrap();
    client.start(&id).await;
    let request = PodSandboxStatsRequest { pod_sandbox_id: limited.clone() };
    let stats = client.runtime.pod_sandbox_stats(request).await.unwrap().into_inner().stats.unwrap();
    // The fake has as many bytes in a volume as its name has letters.
    let usage = &stats.attributes.unwrap().annotations["atoll.dev/scratch-usage"];
    assert_eq!(usage, r#"{"/pods/1/v":26}"#);
    refused.annotations.insert("atoll.dev/storage-limit-bytes".into(), "much".into());
    let error = client.sandbox_with(refused).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
}

/// Whether a file below this directory has these bytes in it.
fn holds(directory: &std::path::Path, what: &str) -> bool {
    std::fs::read_dir(directory).into_iter().flatten().flatten().any(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => holds(&entry.path(), what),
        Ok(kind) if kind.is_file() => {
            String::from_utf8_lossy(&std::fs::read(entry.path()).expect("a file")).contains(what)
        }
        _ => false,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_secret_says_in_a_containers_environment_or_command_reaches_no_disk() {
    let mut fixture = Fixture::new().await;
    let mut client = fixture.client().await;
    let sandbox = client.sandbox("discreet").await;
    let mut config = client.container_config("main", &["sleep", "hunter2-argument"]);
    config.envs = vec![KeyValue { key: "PASSWORD".into(), value: b"hunter2-variable".into() }];
    let id = client.create_with(&sandbox, config).await.unwrap();
    client.start(&id).await;
    let (data, run) = (fixture.config.data.clone(), fixture.config.run.clone());
    let state = fixture.config.sandboxes().join(&sandbox).join("state.json");
    assert!(std::fs::read_to_string(&state).unwrap().contains(&id), "that there is a container is kept");
    assert!(!holds(&data, "hunter2"), "in a file below {}", data.display());
    assert!(holds(&run, "hunter2-argument") && holds(&run, "hunter2-variable"), "in memory, for a restart");
    fixture.restart().await;
    let mut client = fixture.client().await;
    let state = client.status(&id).await.state();
    assert_eq!(state, ContainerState::ContainerRunning);
    assert_eq!(
        client.exec(&id, &["echo", "there"], 5).await.unwrap().stdout,
        b"there\n",
        "it needs the words"
    );
    assert!(!holds(&data, "hunter2"), "nor after a restart");
    // A boot: memory is empty, no machine is there.
    fixture.app.take().unwrap().stop().await;
    std::fs::remove_dir_all(run.join("confidential")).unwrap();
    fixture.host.taken.lock().unwrap().vmms.remove(&sandbox).unwrap().end(0);
    fixture.start().await;
    let mut client = fixture.client().await;
    assert_eq!(client.status(&id).await.exit_code, 255, "it is known to have been, and to have ended");
    client.remove_sandbox(&sandbox).await;
    let other = client.sandbox("other").await;
    client.run(&other, "main", &["sleep"]).await;
    assert!(run.join("confidential").join(&other).exists());
    client.remove_sandbox(&other).await;
    assert_eq!(std::fs::read_dir(run.join("confidential")).unwrap().count(), 0);
}
