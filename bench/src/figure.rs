//! One measured number, as a line on the console of the measured host, in a table, and as JSON. Pure.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What a line with a figure begins with, after the name of the service that prints it.
const MARK: &str = "figure ";

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Virtual milliseconds: a million instructions each.
    Ms,
    /// 2^20 bytes.
    Mib,
    /// 2^10 bytes.
    Kib,
    /// How often.
    Count,
    /// One number by another.
    Ratio,
    /// Instructions for each byte.
    PerByte,
}

impl Unit {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Ms, "ms"),
        (Self::Mib, "MiB"),
        (Self::Kib, "KiB"),
        (Self::Count, "times"),
        (Self::Ratio, "x"),
        (Self::PerByte, "instructions/byte"),
    ];

    /// As people write it.
    pub fn symbol(self) -> &'static str {
        Self::ALL.iter().find(|(unit, _)| *unit == self).map_or("", |(_, symbol)| symbol)
    }
}

/// A measured number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// `part.what`, such as `pod.total`.
    pub name: String,
    /// The number.
    pub value: f64,
    /// What it counts.
    pub unit: Unit,
}

impl Figure {
    /// From its parts.
    pub fn new(name: impl Into<String>, value: f64, unit: Unit) -> Self {
        Self { name: name.into(), value, unit }
    }

    /// Reads the line that [`fmt::Display`] writes, wherever in a console line it begins.
    pub fn parse(line: &str) -> Option<Self> {
        let (_, rest) = line.split_once(MARK)?;
        let mut words = rest.split_whitespace();
        let (name, value, symbol) = (words.next()?, words.next()?, words.next()?);
        let unit = Unit::ALL.iter().find(|(_, known)| *known == symbol)?.0;
        Some(Self::new(name, value.parse().ok()?, unit))
    }

    /// The number with as many digits as mean something.
    pub fn number(&self) -> String {
        match self.unit {
            Unit::Count | Unit::Kib => format!("{:.0}", self.value),
            Unit::Ms | Unit::Ratio | Unit::PerByte => format!("{:.3}", self.value),
            Unit::Mib => format!("{:.2}", self.value),
        }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MARK}{} {} {}", self.name, self.number(), self.unit.symbol())
    }
}

/// The middle of some numbers; of an even count the lower one, so that it was measured. Zero of none.
pub fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read() {
        for (unit, _) in Unit::ALL {
            let figure = Figure::new("pod.total", 12.0, unit);
            assert_eq!(Figure::parse(&format!("bench: [ 1.0s] {figure}")), Some(figure));
        }
        for bad in ["", "figure", "figure a", "figure a 1", "figure a x ms", "figure a 1 parsec"] {
            assert_eq!(Figure::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_middle_was_measured() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.0);
        assert_eq!(median(&[]), 0.0);
    }
}
