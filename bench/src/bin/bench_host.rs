//! `atoll-bench-host`: in the bench image only. Is the control plane and the registry of the host that it runs in,
//! measures, and prints each figure as a line. The last line says that the bench is done, or what went wrong.

use anyhow::Context;
use atoll_bench::figure::{Figure, Unit};
use atoll_bench::host::clock::{firmware, ms, power_on};
use atoll_bench::host::control::Runtime;
use atoll_bench::host::pods::Pods;
use atoll_bench::host::registry::Registry;
use atoll_bench::host::{memory, microvm, traffic, unpack};
use atoll_bench::scripted::{SCOPE_FILE, SERVER, Scope, authority};
use atoll_qemu_test::oci::{Image, Layer};
use atoll_scripted_cluster::Cluster;
use serde_json::json;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match runtime.block_on(measure()) {
        Ok(()) => println!("the bench is done"),
        Err(error) => println!("the bench failed: {error:#}"),
    }
    // Whoever booted the machine ends it; leaving would start this program again.
    runtime.block_on(std::future::pending())
}

fn print(figures: impl IntoIterator<Item = Figure>) {
    figures.into_iter().for_each(|figure| println!("{figure}"));
}

async fn measure() -> anyhow::Result<()> {
    let scope = format!("/sys/firmware/qemu_fw_cfg/by_name/{SCOPE_FILE}/raw");
    let scope =
        Scope::parse(&std::fs::read_to_string(&scope).with_context(|| format!("cannot read {scope}"))?)?;
    let full = scope == Scope::Full;
    let cluster = Cluster::start_at(SERVER, authority()).await;
    let registry = Registry::start().await?;
    let program = std::fs::read("/usr/bin/atoll-bench-pod").context("cannot read the workload")?;
    let layer = Layer::default().file("bench", 0o755, &program)?;
    let image = registry.push("bench", &Image::new(vec![layer], json!({ "Cmd": ["/bench", "paced"] }))?);

    let mut pods = Pods { cluster, runtime: wait_for_runtime().await?, image, started: 0 };
    pods.wait_ready().await?;
    print([
        Figure::new("boot.firmware", ms(firmware()), Unit::Ms),
        Figure::new("boot.ready", ms(power_on()), Unit::Ms),
    ]);
    print(microvm::measure(Pods::samples(full)).await?);
    let image = pods.image.clone();
    pods.runtime.pull(&image).await?;
    // The first pod finds nothing in memory; it is not what is measured.
    pods.starts(0, 1).await?;
    print(memory::services(0)?);
    print(pods.starts(0, Pods::samples(full)).await?);
    print(pods.count().await?);
    if full {
        print(traffic::measure(&pods).await?);
        print(unpack::measure(&mut pods.runtime, &registry).await?);
        full_host(&mut pods).await?;
    }
    Ok(())
}

/// The figures that need a host full of pods.
async fn full_host(pods: &mut Pods) -> anyhow::Result<()> {
    let empty = memory::in_use();
    let mut have = 0;
    for count in [1, 10, 40] {
        pods.fill(have, count).await?;
        have = count;
        print(memory::services(count)?);
        if count == 40 {
            let each = (memory::in_use() - empty) / count as f64 / 1024.0;
            print([Figure::new("memory.pod.in-all", each, Unit::Mib)]);
            print(memory::pods()?);
        }
        print(pods.starts(count, Pods::samples(true)).await?);
    }
    pods.empty(have).await
}

/// The runtime starts at the same time as the bench.
async fn wait_for_runtime() -> anyhow::Result<Runtime> {
    for _ in 0..1200 {
        if let Ok(runtime) = Runtime::connect().await {
            return Ok(runtime);
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    Runtime::connect().await
}
