//! A small CRI client, for development and tests: drives one pod through its life.
//!
//! ```text
//! cri --socket /run/atoll/runtime/cri.sock smoke IMAGE -- COMMAND…   run, log, exec, statistics, stop, remove
//! cri … status | pods | ps | images | stats | pull IMAGE | cidr CIDR | sandbox NAME
//! cri … [--stdin yes] run NAME IMAGE -- COMMAND…
//! cri … exec ID -- COMMAND… | stop ID | rm ID | stopp ID | rmp ID | events
//! ```

use anyhow::{Context, Result, bail};
use atoll_cri::v1::*;
use atoll_cri::{ImageServiceClient, RuntimeServiceClient};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tonic::transport::Channel;

struct Client {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    logs: PathBuf,
    stdin: bool,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run(args))
}

async fn run(mut args: Vec<String>) -> Result<()> {
    let mut socket = "/run/atoll/runtime/cri.sock".to_owned();
    let mut logs = PathBuf::from("/data/log/cri-example");
    let mut stdin = false;
    while let Some(flag) = args.first().filter(|a| a.starts_with("--")).cloned() {
        let value = args.get(1).context("a flag lacks its value")?.clone();
        match flag.as_str() {
            "--socket" => socket = value,
            "--logs" => logs = value.into(),
            "--stdin" => stdin = value == "yes",
            other => bail!("unknown flag {other}"),
        }
        args.drain(..2);
    }
    let split = args.iter().position(|a| a == "--").unwrap_or(args.len());
    let command: Vec<String> = args.iter().skip(split + 1).cloned().collect();
    let words: Vec<&str> = args[..split].iter().map(String::as_str).collect();
    let channel = tonic::transport::Endpoint::try_from(format!("unix://{socket}"))?.connect().await?;
    let mut client = Client {
        runtime: RuntimeServiceClient::new(channel.clone()),
        images: ImageServiceClient::new(channel),
        logs,
        stdin,
    };
    match words[..] {
        ["smoke", image] => client.smoke(image, command).await,
        ["status"] => client.status().await,
        ["cidr", cidr] => client.cidr(cidr).await,
        ["pull", image] => {
            println!("{}", client.pull(image).await?);
            Ok(())
        }
        ["run", name, image] => {
            let (sandbox, container) = client.run_pod(name, image, command).await?;
            println!("{sandbox} {container}");
            Ok(())
        }
        ["sandbox", name] => {
            println!("{}", client.sandbox(name).await?.0);
            Ok(())
        }
        ["exec", id] => client.exec(id, command).await.map(|code| std::process::exit(code)),
        ["stop", id] => {
            let request = StopContainerRequest { container_id: id.into(), timeout: 5 };
            client.runtime.stop_container(request).await?;
            Ok(())
        }
        ["rm", id] => {
            let request = RemoveContainerRequest { container_id: id.into() };
            client.runtime.remove_container(request).await?;
            Ok(())
        }
        ["stopp", id] => {
            let request = StopPodSandboxRequest { pod_sandbox_id: id.into() };
            client.runtime.stop_pod_sandbox(request).await?;
            Ok(())
        }
        ["rmp", id] => {
            let request = RemovePodSandboxRequest { pod_sandbox_id: id.into() };
            client.runtime.remove_pod_sandbox(request).await?;
            Ok(())
        }
        ["pods"] | ["ps"] | ["images"] | ["stats"] => client.list(words[0]).await,
        ["events"] => client.events().await,
        _ => bail!("usage: see the top of examples/cri.rs"),
    }
}

impl Client {
    async fn status(&mut self) -> Result<()> {
        let version = self.runtime.version(VersionRequest::default()).await?.into_inner();
        println!("{} {} CRI {}", version.runtime_name, version.runtime_version, version.runtime_api_version);
        let status = self.runtime.status(StatusRequest { verbose: true }).await?.into_inner();
        for condition in status.status.unwrap_or_default().conditions {
            println!("{}: {} {} {}", condition.r#type, condition.status, condition.reason, condition.message);
        }
        for (key, value) in status.info {
            println!("{key}: {value}");
        }
        Ok(())
    }

    async fn cidr(&mut self, cidr: &str) -> Result<()> {
        let network_config = Some(NetworkConfig { pod_cidr: cidr.to_owned() });
        let runtime_config = Some(RuntimeConfig { network_config });
        self.runtime.update_runtime_config(UpdateRuntimeConfigRequest { runtime_config }).await?;
        Ok(())
    }

    async fn pull(&mut self, image: &str) -> Result<String> {
        let image = Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() });
        let request = PullImageRequest { image, ..PullImageRequest::default() };
        Ok(self.images.pull_image(request).await?.into_inner().image_ref)
    }

    async fn sandbox(&mut self, name: &str) -> Result<(String, PodSandboxConfig)> {
        let directory = self.logs.join(name);
        std::fs::create_dir_all(&directory)?;
        let metadata = PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "default".to_owned(),
            attempt: 0,
        };
        let config = PodSandboxConfig {
            metadata: Some(metadata),
            hostname: name.to_owned(),
            log_directory: directory.display().to_string(),
            ..PodSandboxConfig::default()
        };
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let id = self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        Ok((id, config))
    }

    async fn run_pod(&mut self, name: &str, image: &str, command: Vec<String>) -> Result<(String, String)> {
        let (sandbox, sandbox_config) = self.sandbox(name).await?;
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() }),
            command,
            log_path: "main/0.log".to_owned(),
            stdin: self.stdin,
            ..ContainerConfig::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let container = self.runtime.create_container(request).await?.into_inner().container_id;
        self.runtime.start_container(StartContainerRequest { container_id: container.clone() }).await?;
        Ok((sandbox, container))
    }

    async fn exec(&mut self, id: &str, cmd: Vec<String>) -> Result<i32> {
        let request = ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: 60 };
        let answer = self.runtime.exec_sync(request).await?.into_inner();
        print!("{}", String::from_utf8_lossy(&answer.stdout));
        eprint!("{}", String::from_utf8_lossy(&answer.stderr));
        Ok(answer.exit_code)
    }

    async fn state(&mut self, id: &str) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        self.runtime.container_status(request).await?.into_inner().status.context("no status")
    }

    async fn list(&mut self, what: &str) -> Result<()> {
        match what {
            "pods" => {
                let pods = self.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await?;
                for pod in pods.into_inner().items {
                    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
                    let status = self.runtime.pod_sandbox_status(request).await?.into_inner();
                    let ip = status.status.and_then(|s| s.network).map(|n| n.ip).unwrap_or_default();
                    let name = pod.metadata.clone().unwrap_or_default().name;
                    println!("{} {name} {:?} {ip} {:?}", pod.id, pod.state(), status.info.get("info"));
                }
            }
            "ps" => {
                let containers = self.runtime.list_containers(ListContainersRequest::default()).await?;
                for container in containers.into_inner().containers {
                    let status = self.state(&container.id).await?;
                    let name = container.metadata.clone().unwrap_or_default().name;
                    println!(
                        "{} {name} {:?} exit={} {} {}",
                        container.id,
                        container.state(),
                        status.exit_code,
                        status.reason,
                        status.message
                    );
                }
            }
            "images" => {
                let images = self.images.list_images(ListImagesRequest::default()).await?.into_inner().images;
                for image in images {
                    println!("{} {:?} {:?} {}", image.id, image.repo_tags, image.repo_digests, image.size);
                }
            }
            _ => {
                let request = ListPodSandboxStatsRequest::default();
                for stats in self.runtime.list_pod_sandbox_stats(request).await?.into_inner().stats {
                    println!("{stats:#?}");
                }
            }
        }
        Ok(())
    }

    async fn events(&mut self) -> Result<()> {
        let mut events = self.runtime.get_container_events(GetEventsRequest {}).await?.into_inner();
        while let Some(event) = events.message().await? {
            println!("{} {:?}", event.container_id, event.container_event_type());
        }
        Ok(())
    }

    /// One pod through its life, with the time of each step.
    async fn smoke(&mut self, image: &str, command: Vec<String>) -> Result<()> {
        let start = Instant::now();
        let step = |what: &str| println!("[{:>6} ms] {what}", start.elapsed().as_millis());
        println!("pulled {}", self.pull(image).await?);
        step("pulled");
        let (sandbox, container) = self.run_pod("smoke", image, command).await?;
        step("running");
        let code = self
            .exec(&container, vec!["/bin/sh".into(), "-c".into(), "echo exec works; exit 3".into()])
            .await?;
        step(&format!("exec ended with {code}"));
        self.list("pods").await?;
        self.list("ps").await?;
        self.list("stats").await?;
        step("listed");
        let request = StopContainerRequest { container_id: container.clone(), timeout: 2 };
        self.runtime.stop_container(request).await?;
        let status = self.state(&container).await?;
        step(&format!("stopped: exit code {} {}", status.exit_code, status.reason));
        tokio::time::sleep(Duration::from_millis(1)).await;
        print!("{}", std::fs::read_to_string(&status.log_path).context("no log")?);
        self.runtime.remove_container(RemoveContainerRequest { container_id: container }).await?;
        step("container removed");
        self.runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() }).await?;
        step("sandbox stopped");
        self.runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: sandbox }).await?;
        step("sandbox removed");
        Ok(())
    }
}
