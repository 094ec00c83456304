//! How fast a pod moves bytes, against the same program on the host itself, and how many exits that takes.

use super::control::Runtime;
use super::pods::Pods;
use crate::figure::{Figure, Unit};
use anyhow::{Context, ensure};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;

/// Mebibytes moved for one figure.
const AMOUNT: usize = 64;
/// The host's address on its link; pods reach it through their gateway.
const HOST: &str = "192.0.2.10";
/// Where the host takes and gives bytes.
const SINK: u16 = 7001;
/// See [`SINK`].
const SOURCE: u16 = 7002;
/// What the workload is called in the image and on the host.
const PROGRAM: (&str, &str) = ("/bench", "/usr/bin/atoll-bench-pod");

/// Measures disk and network of a pod against the host.
///
/// # Errors
/// When a pod or the host's own run fails.
pub async fn measure(pods: &Pods) -> anyhow::Result<Vec<Figure>> {
    serve(SINK, |mut stream| {
        let mut chunk = vec![0_u8; 1 << 20];
        while stream.read(&mut chunk).is_ok_and(|read| read > 0) {}
    })?;
    serve(SOURCE, |mut stream| {
        let chunk = vec![0x5a_u8; 1 << 20];
        while stream.write_all(&chunk).is_ok() {}
    })?;
    let operations = |scratch: &str| {
        [
            format!("write,{scratch},{AMOUNT}"),
            format!("read,{scratch},{AMOUNT}"),
            format!("send,{HOST}:{SINK},{AMOUNT}"),
            format!("receive,{HOST}:{SOURCE},{AMOUNT}"),
        ]
    };
    let outside = on_host(&operations("/data/bench-scratch"))?;
    let _ = std::fs::remove_file("/data/bench-scratch"); // it takes memory, and nothing else needs it gone
    let inside = in_pod(pods, &operations("/scratch")).await?;
    let mut figures = Vec::new();
    for ((what, host), (guest, exits)) in
        ["write", "read", "send", "receive"].into_iter().zip(outside).zip(inside)
    {
        figures.push(Figure::new(format!("traffic.{what}"), host / guest, Unit::Ratio));
        figures.push(Figure::new(
            format!("traffic.{what}.exits-per-mib"),
            exits / AMOUNT as f64,
            Unit::Ratio,
        ));
    }
    Ok(figures)
}

fn serve(port: u16, handle: fn(TcpStream)) -> anyhow::Result<()> {
    let listener =
        TcpListener::bind(("0.0.0.0", port)).with_context(|| format!("cannot listen on {port}"))?;
    std::thread::spawn(move || listener.incoming().flatten().for_each(handle));
    Ok(())
}

/// Nanoseconds of each operation in a pod, and exits to the VMM meanwhile.
async fn in_pod(pods: &Pods, operations: &[String]) -> anyhow::Result<Vec<(f64, f64)>> {
    const NAME: &str = "traffic";
    let mut runtime: Runtime = pods.runtime.clone();
    let command: Vec<&str> =
        [PROGRAM.0, "paced"].into_iter().chain(operations.iter().map(String::as_str)).collect();
    pods.bind(NAME, &command);
    pods.wait_running(NAME).await?;
    let mut before = exits(&mut runtime, NAME).await?;
    let mut all = Vec::new();
    for line in 1..=operations.len() {
        let time = took(&pods.wait_line(NAME, line).await?)?;
        let after = exits(&mut runtime, NAME).await?;
        all.push((time, after - before));
        before = after;
    }
    pods.delete(NAME).await?;
    Ok(all)
}

async fn exits(runtime: &mut Runtime, pod: &str) -> anyhow::Result<f64> {
    Ok(runtime.inspect(pod).await?.exits.iter().map(|(_, count)| count).sum())
}

/// Nanoseconds of each operation on the host itself.
fn on_host(operations: &[String]) -> anyhow::Result<Vec<f64>> {
    let output = Command::new(PROGRAM.1)
        .args(operations)
        .output()
        .with_context(|| format!("cannot run {}", PROGRAM.1))?;
    ensure!(output.status.success(), "{}: {}", PROGRAM.1, String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(took).collect()
}

fn took(line: &str) -> anyhow::Result<f64> {
    let number = line.strip_prefix("took ").with_context(|| format!("the workload said '{line}'"))?;
    number.parse().with_context(|| format!("'{number}' is no number"))
}
