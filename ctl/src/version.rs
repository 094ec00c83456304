//! `atollctl version`.

use crate::Outcome;
use crate::error::Error;
use crate::output::{self, Format};
use std::io::Write;

#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    client: &'static str,
    machine_config: &'static str,
}

/// Prints the version of this program and of the config format it knows.
pub fn print(format: Format, out: &mut dyn Write) -> Result<Outcome, Error> {
    let version =
        Version { client: env!("CARGO_PKG_VERSION"), machine_config: atoll_spec::machine::API_VERSION };
    match format {
        Format::Json => output::json(&version, out)?,
        Format::Text => {
            writeln!(out, "atollctl {}\nmachine config {}", version.client, version.machine_config)
                .map_err(Error::Output)?;
        }
    }
    Ok(Outcome::Good)
}
