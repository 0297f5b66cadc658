//! Draws charts as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

const WIDTH: u32 = 900;
const COLORS: [RGBColor; 6] = [
    RGBColor(0, 90, 160),
    RGBColor(120, 170, 60),
    RGBColor(200, 90, 30),
    RGBColor(150, 60, 140),
    RGBColor(90, 90, 90),
    RGBColor(0, 140, 130),
];

/// Draws a horizontal bar chart, with one labeled bar per value.
pub(super) fn bars(title: &str, values: &[(String, f64)]) -> Result<String> {
    let height = 80 + 26 * values.len().max(1) as u32;
    let most = values.iter().map(|(_, value)| *value).fold(0.0, f64::max).max(f64::MIN_POSITIVE) * 1.15;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        drawn(root.fill(&WHITE))?;
        let area = drawn(root.titled(title, ("sans-serif", 18)))?;
        let label = TextStyle::from(("sans-serif", 14).into_font());
        for (i, (name, value)) in values.iter().enumerate() {
            let top = 10 + 26 * i as i32;
            let end = 200 + (f64::from(WIDTH - 300) * value / most) as i32;
            drawn(area.draw(&Text::new(name.clone(), (10, top + 2), label.clone())))?;
            drawn(area.draw(&Rectangle::new([(200, top), (end, top + 18)], COLORS[0].filled())))?;
            drawn(area.draw(&Text::new(format!("{value:.2}"), (end + 6, top + 2), label.clone())))?;
        }
        drawn(root.present())?;
    }
    Ok(svg)
}

/// Draws a line chart, with one named series per line, over the number of Services on a logarithmic axis.
pub(super) fn lines(title: &str, lines: &[(&str, Vec<(f64, f64)>)]) -> Result<String> {
    let points = || lines.iter().flat_map(|(_, line)| line);
    let most = points().map(|(_, y)| *y).fold(0.0, f64::max).max(1.0) * 1.1;
    let widest = points().map(|(x, _)| *x).fold(1.0, f64::max) * 1.2;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, 420)).into_drawing_area();
        drawn(root.fill(&WHITE))?;
        let mut builder = ChartBuilder::on(&root);
        builder.caption(title, ("sans-serif", 18)).margin(15).x_label_area_size(30).y_label_area_size(50);
        let mut chart = drawn(builder.build_cartesian_2d((0.9..widest).log_scale(), 0.0..most))?;
        drawn(chart.configure_mesh().x_desc("services").draw())?;
        for (i, (name, line)) in lines.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let series = drawn(chart.draw_series(LineSeries::new(line.iter().copied(), color.stroke_width(2))))?;
            series.label(*name).legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        }
        drawn(chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw())?;
        drawn(root.present())?;
    }
    Ok(svg)
}

fn drawn<T, E: std::fmt::Debug>(result: Result<T, E>) -> Result<T> {
    result.map_err(|error| anyhow!("cannot draw a chart: {error:?}"))
}
