//! The serial console of a machine, as QEMU writes it to a file: expect a text by a deadline, from a position on.

use crate::process::{tail, wait_for};
use anyhow::Context;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Reads the log of one serial line.
#[derive(Debug)]
pub struct Serial {
    log: PathBuf,
}

impl Serial {
    /// The console logged at `log`.
    pub fn new(log: &Path) -> Self {
        Self { log: log.to_owned() }
    }

    /// Everything so far; colour sequences taken out.
    pub fn text(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        strip_escapes(&String::from_utf8_lossy(&bytes))
    }

    /// Length of the text so far, to pass as `from` later.
    pub fn position(&self) -> usize {
        self.text().len()
    }

    /// Waits until `needle` stands in the text after `from`, and returns the line it stands in.
    ///
    /// # Errors
    /// At the deadline, with the end of the console.
    pub fn expect(&self, needle: &str, from: usize, deadline: Duration) -> anyhow::Result<String> {
        wait_for(&format!("{needle:?} on the serial console"), deadline, || {
            let text = self.text();
            Ok(text
                .get(from..)
                .unwrap_or_default()
                .lines()
                .find(|line| line.contains(needle))
                .map(str::to_owned))
        })
        .with_context(|| format!("end of {}:\n{}", self.log.display(), tail(&self.log, 30)))
    }
}

/// Removes ANSI control sequences (ECMA-48 CSI) and carriage returns.
fn strip_escapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => {
                if chars.next() == Some('[') {
                    chars.by_ref().find(|c| ('@'..='~').contains(c));
                }
            }
            '\r' => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_sequences_are_taken_out() {
        assert_eq!(strip_escapes("\u{1b}[2J\u{1b}[01;01Hatoll\r\n"), "atoll\n");
    }
}
