//! The runtime in the booted host, driven through CRI as any client would.

use crate::shared::{machine, ready_lab};
use anyhow::Context;
use atoll_cri::v1 as cri;
use atoll_qemu_test::lab::BUSYBOX;
use cri::image_service_client::ImageServiceClient;
use cri::runtime_service_client::RuntimeServiceClient;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

async fn connect() -> anyhow::Result<Channel> {
    let address = { machine().address() };
    Endpoint::from_shared(format!("http://{address}:10350"))?
        .timeout(Duration::from_secs(120))
        .connect()
        .await
        .context("cannot connect to the CRI bridge of the shared host")
}

fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

fn sandbox_config(name: &str) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.into(),
            uid: format!("{name}-uid"),
            namespace: "cri-test".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory: format!("/data/log/pods/cri-test_{name}"),
        ..Default::default()
    }
}

#[test]
fn version_and_status() -> anyhow::Result<()> {
    let _lab = ready_lab();
    block_on(async {
        let mut runtime = RuntimeServiceClient::new(connect().await?);
        let version = runtime.version(cri::VersionRequest { version: "v1".into() }).await?.into_inner();
        assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("atoll", "v1"));
        let status = runtime
            .status(cri::StatusRequest { verbose: false })
            .await?
            .into_inner()
            .status
            .context("no status")?;
        for condition in status.conditions {
            assert!(condition.status, "{condition:?}");
        }
        Ok(())
    })
}

#[test]
fn container_lifecycle() -> anyhow::Result<()> {
    let _lab = ready_lab();
    block_on(async {
        let channel = connect().await?;
        let mut images = ImageServiceClient::new(channel.clone());
        let mut runtime = RuntimeServiceClient::new(channel);
        let image = cri::ImageSpec { image: BUSYBOX.into(), ..Default::default() };
        let pulled = images
            .pull_image(cri::PullImageRequest { image: Some(image.clone()), ..Default::default() })
            .await?
            .into_inner();
        assert!(!pulled.image_ref.is_empty());
        let config = sandbox_config("lifecycle");
        let pod = runtime
            .run_pod_sandbox(cri::RunPodSandboxRequest {
                config: Some(config.clone()),
                runtime_handler: String::new(),
            })
            .await?
            .into_inner()
            .pod_sandbox_id;
        let container = runtime
            .create_container(cri::CreateContainerRequest {
                pod_sandbox_id: pod.clone(),
                config: Some(cri::ContainerConfig {
                    metadata: Some(cri::ContainerMetadata { name: "main".into(), attempt: 0 }),
                    image: Some(image),
                    command: vec!["/bin/sh".into(), "-c".into(), "echo out; sleep 1000000".into()],
                    log_path: "main.log".into(),
                    ..Default::default()
                }),
                sandbox_config: Some(config),
            })
            .await?
            .into_inner()
            .container_id;
        runtime.start_container(cri::StartContainerRequest { container_id: container.clone() }).await?;
        let exec = runtime
            .exec_sync(cri::ExecSyncRequest {
                container_id: container.clone(),
                cmd: vec!["sh".into(), "-c".into(), "echo hi; exit 5".into()],
                timeout: 30,
            })
            .await?
            .into_inner();
        assert_eq!((exec.stdout.as_slice(), exec.exit_code), (&b"hi\n"[..], 5));
        let timeout = runtime
            .exec_sync(cri::ExecSyncRequest {
                container_id: container.clone(),
                cmd: vec!["sleep".into(), "60".into()],
                timeout: 1,
            })
            .await;
        assert_eq!(
            timeout.expect_err("an exec past its timeout must fail").code(),
            tonic::Code::DeadlineExceeded
        );
        let stats = runtime
            .container_stats(cri::ContainerStatsRequest { container_id: container.clone() })
            .await?
            .into_inner();
        assert!(
            stats.stats.and_then(|s| s.memory).and_then(|m| m.working_set_bytes).is_some_and(|m| m.value > 0)
        );
        for _ in 0..2 {
            runtime
                .stop_container(cri::StopContainerRequest { container_id: container.clone(), timeout: 1 })
                .await?;
        }
        let status = runtime
            .container_status(cri::ContainerStatusRequest { container_id: container.clone(), verbose: false })
            .await?
            .into_inner()
            .status
            .context("no status")?;
        assert_eq!((status.state(), status.exit_code), (cri::ContainerState::ContainerExited, 137));
        for _ in 0..2 {
            runtime.remove_container(cri::RemoveContainerRequest { container_id: container.clone() }).await?;
            runtime.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
        }
        for _ in 0..2 {
            runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
        }
        Ok(())
    })
}

#[test]
fn refused_calls_say_why() -> anyhow::Result<()> {
    let _lab = ready_lab();
    block_on(async {
        let mut runtime = RuntimeServiceClient::new(connect().await?);
        let mut config = sandbox_config("hostnet");
        config.linux = Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(cri::NamespaceOption {
                    network: cri::NamespaceMode::Node.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        });
        let error = runtime
            .run_pod_sandbox(cri::RunPodSandboxRequest {
                config: Some(config),
                runtime_handler: String::new(),
            })
            .await
            .expect_err("a pod in its own VM cannot have the host's network");
        assert!(error.message().contains("network"), "{error:?}");
        let error = runtime
            .container_status(cri::ContainerStatusRequest { container_id: "nothing".into(), verbose: false })
            .await
            .expect_err("no such container");
        assert_eq!(error.code(), tonic::Code::NotFound);
        Ok(())
    })
}
