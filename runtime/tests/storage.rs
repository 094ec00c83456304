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
