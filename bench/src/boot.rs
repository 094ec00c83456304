//! The boot's phases, read off the console of the measured host. Pure.

use crate::figure::{Figure, Unit};

/// Figures of the lines that PID 1 writes: `phase NAME done in N ms`, `service NAME ready N ms into the services phase`,
/// `host is up N s after power-on`.
pub fn figures(console: &str) -> Vec<Figure> {
    let mut figures = Vec::new();
    for line in console.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let figure = words.windows(5).find_map(|window| match window {
            ["phase", name, "done", "in", ms] => Some((format!("boot.phase.{name}"), ms.parse().ok()?)),
            ["service", name, "ready", ms, "ms"] => Some((format!("boot.service.{name}"), ms.parse().ok()?)),
            ["host", "is", "up", seconds, "s"] => {
                Some(("boot.kernel-to-up".to_owned(), seconds.parse::<f64>().ok()? * 1000.0))
            }
            _ => None,
        });
        let Some((name, value)) = figure else { continue };
        // A service that was started again is ready again: the first time is the boot.
        if !figures.iter().any(|known: &Figure| known.name == name) {
            figures.push(Figure::new(name, value, Unit::Ms));
        }
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_services_and_the_whole_are_read() {
        let console = "atoll: [   2.472s] phase modules done in 326 ms\r\n\
                       atoll: [  51.690s] service hostd ready 45143 ms into the services phase\r\n\
                       atoll: [  51.835s] service hostd ready 50000 ms into the services phase\r\n\
                       atoll: [  51.835s] host is up 51.835 s after power-on\r\n";
        let read: Vec<(String, f64)> = figures(console).into_iter().map(|f| (f.name, f.value)).collect();
        assert_eq!(
            read,
            [
                ("boot.phase.modules".to_owned(), 326.0),
                ("boot.service.hostd".to_owned(), 45143.0),
                ("boot.kernel-to-up".to_owned(), 51835.0),
            ]
        );
    }
}
