//! Where the time of a pod's start goes, as a bar of its phases (SVG). Pure.

use crate::figure::Figure;
use std::fmt::Write as _;

/// Phases of a pod's start, in their order, with their colours.
const PHASES: [(&str, &str); 8] = [
    ("agent", "#4e79a7"),
    ("claim", "#f28e2b"),
    ("jail", "#e15759"),
    ("guest", "#76b7b2"),
    ("configure", "#59a14f"),
    ("container-create", "#edc948"),
    ("container-start", "#b07aa1"),
    ("status", "#9c755f"),
];
/// Width of the bars, in pixels.
const WIDTH: f64 = 640.0;

/// One bar for each number of pods that ran beside the one that was started.
pub fn draw(figures: &[Figure]) -> String {
    let value = |name: &str| figures.iter().find(|figure| figure.name == name).map(|figure| figure.value);
    let rows: Vec<(u32, f64)> = [0, 1, 10, 40]
        .into_iter()
        .filter_map(|n| Some((n, value(&format!("pod.beside-{n}.total"))?)))
        .collect();
    let longest = rows.iter().map(|(_, total)| *total).fold(1.0, f64::max);
    let height = 40 * rows.len() + 60;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"860\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n"
    );
    for (row, (pods, total)) in rows.iter().enumerate() {
        let y = 10 + 40 * row;
        let mut x = 110.0;
        // Writing into a string cannot fail.
        let _ = writeln!(svg, "<text x=\"4\" y=\"{}\">beside {pods}</text>", y + 19);
        for (phase, colour) in PHASES {
            let width = value(&format!("pod.beside-{pods}.{phase}")).unwrap_or_default() / longest * WIDTH;
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"28\" fill=\"{colour}\"><title>{phase}</title></rect>"
            );
            x += width;
        }
        let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{}\">{total:.1} ms</text>", x + 6.0, y + 19);
    }
    for (at, (phase, colour)) in PHASES.iter().enumerate() {
        let (x, y) = (110 + 180 * (at % 4), height - 44 + 20 * (at / 4));
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{}\" y=\"{}\">{phase}</text>",
            x + 18,
            y + 11
        );
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figure::Unit;

    #[test]
    fn each_bar_is_as_long_as_its_time() {
        let figures = [
            Figure::new("pod.beside-0.total", 200.0, Unit::Ms),
            Figure::new("pod.beside-0.guest", 100.0, Unit::Ms),
            Figure::new("pod.beside-40.total", 400.0, Unit::Ms),
        ];
        let svg = draw(&figures);
        assert!(svg.contains("width=\"160.0\" height=\"28\" fill=\"#76b7b2\""), "{svg}");
        assert!(svg.contains("beside 40") && !svg.contains("beside 10"));
    }
}
