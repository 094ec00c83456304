//! `atollctl config`: validate, schema, explain.

use crate::Outcome;
use crate::error::Error;
use crate::output::{self, Format};
use atoll_spec::machine::document::{self, MAX_BYTES};
use atoll_spec::machine::problem::Problem;
use atoll_spec::machine::shape::{self, Explanation};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// Width of explanations.
const WIDTH: usize = 80;

#[derive(serde::Serialize)]
struct Validation<'a> {
    file: &'a str,
    valid: bool,
    problems: Vec<&'a Problem>,
}

/// Checks a file and prints every problem.
pub fn validate(
    file: &Path,
    format: Format,
    input: &mut dyn Read,
    out: &mut dyn Write,
) -> Result<Outcome, Error> {
    let name = if file == Path::new("-") { "standard input".to_owned() } else { file.display().to_string() };
    let bytes = read(file, input).map_err(|source| Error::Read { file: name.clone(), source })?;
    let result = document::parse(&bytes);
    let problems: Vec<&Problem> = result.as_ref().err().into_iter().flat_map(|found| found.iter()).collect();
    let valid = problems.is_empty();
    match format {
        Format::Json => output::json(&Validation { file: &name, valid, problems }, out)?,
        Format::Text if valid => writeln!(out, "{name}: no problems").map_err(Error::Output)?,
        Format::Text => {
            for problem in &problems {
                writeln!(out, "{name}: {problem}").map_err(Error::Output)?;
            }
            let what = if problems.len() == 1 { "problem" } else { "problems" };
            writeln!(
                out,
                "{} {what}; 'atollctl config explain PATH' tells more about a field",
                problems.len()
            )
            .map_err(Error::Output)?;
        }
    }
    Ok(if valid { Outcome::Good } else { Outcome::Bad })
}

fn read(file: &Path, input: &mut dyn Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more than is allowed, so that the parser sees that it is too long.
    let limit = MAX_BYTES as u64 + 1;
    if file == Path::new("-") {
        input.take(limit).read_to_end(&mut bytes)?;
    } else {
        File::open(file)?.take(limit).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// Prints the JSON schema.
pub fn schema(out: &mut dyn Write) -> Result<Outcome, Error> {
    output::json(&shape::schema(), out)?;
    Ok(Outcome::Good)
}

/// Explains a field.
pub fn explain(path: &str, format: Format, out: &mut dyn Write) -> Result<Outcome, Error> {
    let explanation = shape::explain(path).map_err(Error::NoSuchField)?;
    match format {
        Format::Json => output::json(&explanation, out)?,
        Format::Text => out.write_all(as_text(&explanation).as_bytes()).map_err(Error::Output)?,
    }
    Ok(Outcome::Good)
}

fn as_text(explanation: &Explanation) -> String {
    let name = if explanation.path.is_empty() { "machine.yaml" } else { &explanation.path };
    let mut text = format!("{name}  ({})\n\n", kind(explanation));
    for line in output::wrap(&explanation.description, WIDTH - 2) {
        text += &format!("  {line}\n");
    }
    if !explanation.fields.is_empty() {
        text += "\nFIELDS\n";
    }
    for field in &explanation.fields {
        let name = field.path.rsplit('.').next().unwrap_or_default();
        text += &format!("\n  {name}  ({})\n", kind(field));
        for line in output::wrap(&field.description, WIDTH - 6) {
            text += &format!("      {line}\n");
        }
    }
    text
}

fn kind(explanation: &Explanation) -> String {
    let required = if explanation.required { ", required" } else { "" };
    format!("{}{required}", explanation.kind)
}
