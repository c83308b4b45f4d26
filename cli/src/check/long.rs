//! `egmla check --long`: errors against the number of cached tokens, as a table, as JSON and as a plot.

use std::path::Path;

use comfy_table::{CellAlignment, Table};
use egmla::bench::report::slug;
use egmla::check::long::{Curve, DRIFT, DRIFT_FROM, LENGTHS, LIMIT, SPREADS, Way, measure};
use plotters::prelude::*;
use serde::Serialize;

use crate::adapter::Gpu;
use crate::bench::plots::{self, Area, COLOURS, DASH, INK, Mark, drawn, font, legend};
use crate::console;
use crate::failure::Failure;
use crate::interrupt;

#[derive(Serialize)]
struct Report<'a> {
    adapter: &'a str,
    driver: &'a str,
    limit: f64,
    /// By Ctrl-C: the curves that had been measured until then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    interrupted: bool,
    curves: &'a [Curve],
}

/// Measures, prints and draws; a curve of the device that is too high or that drifts fails, and so does a control that does not. A
/// run that is interrupted prints the curves that it has, and draws none.
pub fn run(gpu: &Gpu, json: bool, svg: Option<&Path>) -> Result<(), Failure> {
    if let Some(folder) = svg {
        plots::check(folder)?;
    }
    let bar = console::interruptible(3 * SPREADS.len() as u64, "configurations");
    let mut interrupted = false;
    let curves = measure(&gpu.kernels, &LENGTHS, |what| {
        interrupted = interrupt::asked();
        bar.set_message(what.to_owned());
        bar.inc(1);
        !interrupted
    })
    .map_err(Failure::run)?;
    bar.finish_and_clear();
    gpu.check()?;
    let adapter = &gpu.info.name;
    let text = if json {
        let report = Report { adapter, driver: &gpu.info.driver_info, limit: LIMIT, interrupted, curves: &curves };
        serde_json::to_string_pretty(&report).map_err(Failure::run)? + "\n"
    } else {
        format!("{}\n", table(&curves))
    };
    let printed = console::print(&text);
    if interrupted {
        return printed.and(Err(Failure::Interrupted));
    }
    if let Some(folder) = svg {
        let name = format!("{}-long-context.svg", slug(&format!("{adapter} {:?}", gpu.info.backend)));
        crate::bench::write(&folder.join(name), &drawn(|area| plot(area, adapter, &curves))?)?;
    }
    printed?;
    for curve in &curves {
        match (curve.way, curve.problem()) {
            (Way::HalfSums, Some(_)) | (Way::Absorbed | Way::Expanded | Way::Prefill | Way::Rounding, None) => {}
            // Of few keys that take all weight even a sum in f16 is right.
            (Way::HalfSums, None) if curve.spread > 1.0 => {}
            (Way::HalfSums, None) => return Err(Failure::run("the control passes: this measurement tells nothing")),
            (_, Some(problem)) => return Err(Failure::run(problem)),
        }
    }
    Ok(())
}

fn table(curves: &[Curve]) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    let heads = ["configuration", "way", "logits"].map(str::to_owned);
    table.set_header(heads.into_iter().chain(LENGTHS.map(|tokens| format!("T = {tokens}"))));
    for curve in curves {
        let spread = format!("±{}", curve.spread);
        let cells = [curve.configuration.to_owned(), curve.way.name().to_owned(), spread];
        table.add_row(cells.into_iter().chain(curve.errors.iter().map(|(_, error)| format!("{error:.1e}"))));
    }
    table.column_iter_mut().skip(2).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

/// One panel a spread, a colour a way; the three configurations are marks of their own.
fn plot(area: &Area<'_>, adapter: &str, curves: &[Curve]) -> Result<(), Failure> {
    const NAMES: u32 = 250;
    const LEAST: f64 = 1e-8;
    let (width, _) = area.dim_in_pixel();
    let title = format!("Relative error against f64, f16 cache: {adapter}");
    let (head, body) = area.split_vertically(34);
    head.draw(&Text::new(title, (16, 10), font(20))).map_err(Failure::run)?;
    let (panels, names) = body.split_horizontally(width.saturating_sub(NAMES));
    for (panel, spread) in panels.split_evenly((1, SPREADS.len())).iter().zip(SPREADS) {
        let mut chart = ChartBuilder::on(panel)
            .caption(format!("logits of deviation {spread}"), font(15))
            .margin(10)
            .x_label_area_size(46)
            .y_label_area_size(if spread == SPREADS[0] { 76 } else { 52 })
            .build_cartesian_2d((900f64..75_000f64).log_scale().base(2.0), (LEAST..10f64).log_scale())
            .map_err(Failure::run)?;
        chart
            .configure_mesh()
            .x_desc("cached tokens T")
            .y_desc(if spread == SPREADS[0] { "relative error" } else { "" })
            .x_label_formatter(&|tokens| format!("{:.0}k", tokens / 1024.0))
            .y_label_formatter(&|error| format!("{error:.0e}"))
            .label_style(font(13))
            .axis_desc_style(font(15))
            .axis_style(INK)
            .bold_line_style(INK.mix(0.35))
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(Failure::run)?;
        let limit = [(900.0, LIMIT), (75_000.0, LIMIT)];
        chart.draw_series(DashedLineSeries::new(limit, DASH.0, DASH.1, INK.stroke_width(2))).map_err(Failure::run)?;
        for curve in curves.iter().filter(|curve| curve.spread == spread) {
            let (colour, size) = (colour(curve.way), mark(curve.configuration));
            let points = || curve.errors.iter().map(|&(tokens, error)| (f64::from(tokens), error.max(LEAST)));
            chart.draw_series(LineSeries::new(points(), colour.stroke_width(2))).map_err(Failure::run)?;
            chart
                .draw_series(points().map(|point| Circle::new(point, size, colour.stroke_width(2))))
                .map_err(Failure::run)?;
        }
    }
    let ways = [Way::Absorbed, Way::Expanded, Way::Prefill, Way::Rounding, Way::HalfSums];
    let mut entries: Vec<_> = ways.map(|way| (way.name().to_owned(), colour(way), Mark::Line(3))).into();
    for name in ["MLA", "gate at latent", "gate at up_projected"] {
        entries.push((name.to_owned(), INK, Mark::Point(mark(name), INK.stroke_width(2))));
    }
    entries.push((format!("{LIMIT:.0e}, the most that is right;"), INK, Mark::Dashed(2)));
    entries.push((format!("past {DRIFT_FROM} at most {DRIFT}× that there"), INK, Mark::Nothing));
    legend(&names, &entries)
}

/// Radius of a configuration's marks.
fn mark(configuration: &str) -> i32 {
    match configuration {
        "MLA" => 2,
        "gate at latent" => 4,
        _ => 6,
    }
}

fn colour(way: Way) -> RGBColor {
    match way {
        Way::Absorbed => COLOURS[0],
        Way::Expanded => COLOURS[1],
        Way::Prefill => COLOURS[3],
        Way::Rounding => COLOURS[4],
        Way::HalfSums => COLOURS[2],
    }
}
