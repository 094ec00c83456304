//! `bench`: builds the bench image, boots it under QEMU's repeatable clock, prints the figures as a table, judges them by
//! `bench/budgets.toml`, and writes `bench.json` and the chart.

use anyhow::Context;
use atoll_bench::budgets::{self, Verdict};
use atoll_bench::figure::{Figure, Unit};
use atoll_bench::scripted::Scope;
use atoll_bench::{boot, chart, machine, reference};
use atoll_qemu_test::artifacts::{Artifacts, Profile};
use atoll_qemu_test::progress::Progress;
use clap::Parser;
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(about = "Measures Atoll under QEMU's repeatable clock: one instruction is one nanosecond")]
struct Arguments {
    /// How much: quick is one boot, one microVM, one pod (minutes); full takes up to half an hour.
    #[arg(default_value = "full")]
    scope: Scope,
    /// Measure twice and show how far each figure moves.
    #[arg(long)]
    twice: bool,
    /// Print the figures as JSON instead of a table.
    #[arg(short, long, value_name = "FORMAT")]
    output: Option<Format>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Json,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let artifacts = Artifacts::locate()?;
    let mut progress = Progress::default();
    progress.step("build the host's programs", || artifacts.build_binaries())?;
    progress.step("build the bench's programs", || artifacts.build_bench())?;
    progress
        .step("pack the build machine's QEMU", || reference::pack(&artifacts.binary(reference::ARCHIVE)))?;
    progress.step("build the release image", || artifacts.build_image(Profile::Release))?;
    progress.step("build the bench image", || artifacts.build_image(Profile::Bench))?;
    let directory = artifacts.out().join("bench");
    let mut measure = |name: &str| {
        let mut last = String::new();
        let console = progress.step(&format!("measure ({name})"), || {
            machine::run(&artifacts.uki(Profile::Bench), &directory.join(name), arguments.scope, |line| {
                if let Some(figure) = Figure::parse(line) {
                    last = figure.to_string();
                    eprintln!("    {last}");
                }
            })
        })?;
        let mut figures = boot::figures(&console);
        figures.extend(console.lines().filter_map(Figure::parse));
        figures.extend(size(&artifacts)?);
        anyhow::Ok(figures)
    };
    let figures = measure("run-1")?;
    let again = if arguments.twice { Some(measure("run-2")?) } else { None };
    let json = serde_json::to_string_pretty(&figures)?;
    std::fs::write(directory.join("bench.json"), &json).context("cannot write bench.json")?;
    std::fs::write(directory.join("pod-start.svg"), chart::draw(&figures))
        .context("cannot write the chart")?;
    if arguments.output == Some(Format::Json) {
        println!("{json}");
    } else {
        table(&figures, again.as_deref());
    }
    let rows = budgets::parse(&std::fs::read_to_string(artifacts.root().join("bench/budgets.toml"))?)?;
    Ok(judge(&rows, &figures, arguments))
}

fn size(artifacts: &Artifacts) -> anyhow::Result<Vec<Figure>> {
    let uki = artifacts.uki(Profile::Release);
    let bytes = std::fs::metadata(&uki).with_context(|| format!("cannot find {}", uki.display()))?.len();
    Ok(vec![Figure::new("size.uki", bytes as f64 / f64::from(1 << 20), Unit::Mib)])
}

fn table(figures: &[Figure], again: Option<&[Figure]>) {
    for figure in figures {
        let other = again.and_then(|again| again.iter().find(|other| other.name == figure.name));
        let moved = match other {
            None => String::new(),
            Some(other) if other.value == figure.value => "  the same twice".to_owned(),
            Some(other) => {
                format!("  moves by {:.3} %", (other.value / figure.value - 1.0).abs() * 100.0)
            }
        };
        println!("{:<34} {:>12} {:<18}{moved}", figure.name, figure.number(), figure.unit.symbol());
    }
}

/// Prints the budgets; answers whether none is missed.
fn judge(rows: &[budgets::Budget], figures: &[Figure], arguments: &Arguments) -> bool {
    let mut good = true;
    eprintln!();
    for row in rows {
        let (value, verdict) = row.judge(figures);
        // A quick run does not measure everything.
        if verdict == Verdict::Unknown && arguments.scope == Scope::Quick {
            continue;
        }
        good &= matches!(verdict, Verdict::Met | Verdict::Floor);
        let against = row.against.as_ref().map(|other| format!(" / {other}")).unwrap_or_default();
        let value = value.map_or("not measured".to_owned(), |value| format!("{value:.2}"));
        let why = row.floor.as_deref().filter(|_| verdict == Verdict::Floor).unwrap_or_default();
        eprintln!(
            "{:<52} {value:>12}, at most {:<6} {verdict:?} {why}",
            format!("{}{against}", row.figure),
            row.most
        );
    }
    good
}
