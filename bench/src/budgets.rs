//! What the figures may be at most: `bench/budgets.toml`, one table for each.

use crate::figure::Figure;
use anyhow::Context;
use serde::Deserialize;

/// A bound of one figure, or of one against another.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Budget {
    /// Name of the figure.
    pub figure: String,
    /// The bound is in units of this other figure; without it, in those of the figure itself.
    pub against: Option<String>,
    /// The largest number that is good.
    pub most: f64,
    /// Why the figure is larger and stays so, when it is; `docs/performance.md` says how that was measured.
    pub floor: Option<String>,
}

/// How a figure stands to its budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// At most the bound.
    Met,
    /// More, for a known reason.
    Floor,
    /// More.
    Missed,
    /// Nobody measured it.
    Unknown,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    budget: Vec<Budget>,
}

/// Reads the file.
///
/// # Errors
/// When it is no such file.
pub fn parse(text: &str) -> anyhow::Result<Vec<Budget>> {
    Ok(toml::from_str::<Document>(text).context("cannot read bench/budgets.toml")?.budget)
}

impl Budget {
    /// What counts, and how that stands to the bound.
    pub fn judge(&self, figures: &[Figure]) -> (Option<f64>, Verdict) {
        let find = |name: &str| figures.iter().find(|figure| figure.name == name).map(|figure| figure.value);
        let value = match &self.against {
            None => find(&self.figure),
            Some(other) => find(&self.figure).zip(find(other)).map(|(value, other)| value / other),
        };
        let verdict = match value {
            None => Verdict::Unknown,
            Some(value) if value <= self.most => Verdict::Met,
            Some(_) if self.floor.is_some() => Verdict::Floor,
            Some(_) => Verdict::Missed,
        };
        (value, verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figure::Unit;

    #[test]
    fn the_file_of_the_repository_is_one() {
        assert!(parse(include_str!("../budgets.toml")).unwrap().len() >= 8);
        assert!(parse("[[budget]]\nfigure = 'a'\nmost = 1\nmore = 2\n").is_err());
    }

    #[test]
    fn figures_are_judged_alone_and_against_each_other() {
        let figures = [Figure::new("a", 10.0, Unit::Ms), Figure::new("b", 5.0, Unit::Ms)];
        let budget = |figure: &str, against: Option<&str>, most: f64| Budget {
            figure: figure.into(),
            against: against.map(str::to_owned),
            most,
            floor: None,
        };
        assert_eq!(budget("a", None, 10.0).judge(&figures), (Some(10.0), Verdict::Met));
        assert_eq!(budget("a", Some("b"), 1.9).judge(&figures), (Some(2.0), Verdict::Missed));
        assert_eq!(budget("c", None, 1.0).judge(&figures).1, Verdict::Unknown);
        let floor = Budget { floor: Some("physics".into()), ..budget("a", None, 1.0) };
        assert_eq!(floor.judge(&figures).1, Verdict::Floor);
    }
}
