//! Plots of a report as SVG, without a background and in colours of middling lightness: readable on light and dark pages.

use std::path::Path;

use egmla::bench::paper_120m;
use egmla::bench::report::{Measured, Report};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::failure::Failure;
use crate::output::Output;

const SIZE: (u32, u32) = (1080, 480);
/// Pixels of the plot itself; the rest is its legend, where it hides no point.
const PLOT: u32 = 740;
/// As far from white as from black.
pub const INK: RGBColor = RGBColor(118, 124, 132);
pub const COLOURS: [RGBColor; 6] = [
    RGBColor(214, 90, 60),
    RGBColor(52, 128, 210),
    RGBColor(160, 110, 30),
    RGBColor(30, 150, 100),
    RGBColor(150, 90, 200),
    RGBColor(200, 70, 130),
];

/// The compared decode paths: part of the id, and a reader's name.
const DECODE: [(&str, &str); 6] = [
    ("mha_120m", "MHA, keys and values of every head"),
    ("mla_120m_r256", "MLA r 256, absorbed"),
    ("egmla_120m_r64/expanded", "EG-MLA r 64, expanded"),
    ("egmla_120m_r64/absorbed_recompute", "EG-MLA r 64, absorbed, gates recomputed"),
    ("egmla_120m_r64/absorbed_pool", "EG-MLA r 64, absorbed, gates from a pool"),
    ("egmla_120m_r64/absorbed_table", "EG-MLA r 64, absorbed, gates from a table"),
];

/// Cached tokens of the plots' axes.
const LENGTHS: [u32; 3] = [1024, 8192, 32_768];

type Line = (String, RGBColor, Vec<(f64, f64)>);
pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// File name and content of every plot.
pub fn all(report: &Report) -> Result<Vec<(String, String)>, Failure> {
    let adapter = report.slug();
    Ok(vec![
        (format!("{adapter}-decode.svg"), drawn(|area| decode(area, report))?),
        (format!("{adapter}-roofline.svg"), drawn(|area| roofline(area, report))?),
        ("cache.svg".to_owned(), drawn(cache)?),
    ])
}

/// Fails where a plot cannot be written to a folder, which is made.
pub fn check(folder: &Path) -> Result<(), Failure> {
    Output::check_with_folders(&folder.join("plot.svg")).map(drop)
}

pub fn drawn(draw: impl FnOnce(&Area<'_>) -> Result<(), Failure>) -> Result<String, Failure> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        draw(&area)?;
        area.present().map_err(Failure::run)?;
    }
    if !svg.ends_with('\n') {
        svg.push('\n');
    }
    Ok(svg)
}

pub fn font(size: i32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}

/// Powers of ten (or of two) around the values.
fn span(values: impl Iterator<Item = f64>, base: f64) -> std::ops::Range<f64> {
    let (low, high) = values
        .filter(|value| *value > 0.0)
        // No axis reaches further: a file of results may hold any number.
        .map(|value| value.clamp(1e-12, 1e15))
        .fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), value| (low.min(value), high.max(value)));
    if low > high {
        return 1.0..base;
    }
    let low = base.powf(low.log(base).floor());
    low..base.powf(high.log(base).ceil()).max(low * base)
}

/// Dashes and gaps of a line, in pixels.
pub const DASH: (i32, i32) = (6, 5);

/// A mark of a legend, as it is in the plot: a line of some width, or a point of some radius that is full or hollow.
#[derive(Clone, Copy)]
pub enum Mark {
    Line(u32),
    Dashed(u32),
    Point(i32, ShapeStyle),
    /// A line of text that continues the line above.
    Nothing,
}

/// Names of what is drawn, one below the other.
pub fn legend(area: &Area<'_>, entries: &[(String, RGBColor, Mark)]) -> Result<(), Failure> {
    for (place, (name, colour, mark)) in (0..).zip(entries) {
        let y = 70 + 24 * place;
        match mark {
            Mark::Line(width) => area.draw(&PathElement::new([(4, y), (24, y)], colour.stroke_width(*width))),
            Mark::Dashed(width) => {
                let (dash, gap) = DASH;
                (4..24).step_by((dash + gap) as usize).try_for_each(|x| {
                    let end = (x + dash).min(24);
                    area.draw(&PathElement::new([(x, y), (end, y)], colour.stroke_width(*width)))
                })
            }
            Mark::Point(radius, style) => area.draw(&Circle::new((14, y), *radius, *style)),
            Mark::Nothing => Ok(()),
        }
        .and_then(|()| area.draw(&Text::new(name.clone(), (32, y - 8), font(15))))
        .map_err(Failure::run)?;
    }
    Ok(())
}

/// Lines of points over the number of cached tokens, and thin ones that have one name together.
fn over_tokens(
    area: &Area<'_>,
    title: &str,
    axis: &str,
    y_label: &dyn Fn(&f64) -> String,
    lines: &[Line],
    (thin_name, thin): (&str, &[Line]),
) -> Result<(), Failure> {
    let y = span(lines.iter().chain(thin).flat_map(|(.., points)| points).map(|point| point.1), 10.0);
    let x = f64::from(LENGTHS[0]) / 1.2..f64::from(LENGTHS[2]) * 1.2;
    let (plot, names) = area.split_horizontally(PLOT);
    let mut chart = ChartBuilder::on(&plot)
        .caption(title, font(20))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(84)
        .build_cartesian_2d(x.log_scale().base(2.0), y.log_scale())
        .map_err(Failure::run)?;
    chart
        .configure_mesh()
        .x_desc("cached tokens T")
        .y_desc(axis)
        .x_label_formatter(&|tokens| format!("{tokens:.0}"))
        .y_label_formatter(&|value| y_label(value))
        .label_style(font(14))
        .axis_desc_style(font(15))
        .axis_style(INK)
        .bold_line_style(INK.mix(0.35))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(Failure::run)?;
    for (_, colour, points) in lines {
        let colour = *colour;
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(4))
            .map_err(Failure::run)?;
    }
    for (_, colour, points) in thin {
        let colour = *colour;
        chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(1))).map_err(Failure::run)?;
    }
    let mut entries: Vec<_> = lines.iter().map(|(name, colour, _)| (name.clone(), *colour, Mark::Line(3))).collect();
    if !thin.is_empty() {
        entries.push((thin_name.to_owned(), INK, Mark::Line(1)));
    }
    legend(&names, &entries)
}

fn decode(area: &Area<'_>, report: &Report) -> Result<(), Failure> {
    let lines = |time: &dyn Fn(&Measured) -> Option<f64>| -> Vec<Line> {
        let paths = DECODE.iter().zip(COLOURS).map(|((path, name), colour)| {
            let point = |&tokens: &u32| {
                let row = report.row(&format!("decode/{path}/t{tokens}"))?;
                Some((f64::from(tokens), time(row)? / 1e3))
            };
            ((*name).to_owned(), colour, LENGTHS.iter().filter_map(point).collect::<Vec<_>>())
        });
        paths.filter(|(.., points)| !points.is_empty()).collect()
    };
    let title = format!("One token through one 120M layer: {}", report.adapter);
    let thin = ("thin: the same in plain f64, one CPU core", &lines(&|row| row.cpu_reference_us)[..]);
    over_tokens(area, &title, "median time, ms", &|ms| number(*ms), &lines(&|row| Some(row.median_us)), thin)
}

/// Bytes of one layer's f16 cache; ids and norm statistics are counted where they are kept.
fn cache(area: &Area<'_>) -> Result<(), Failure> {
    let (mla, gated) = (paper_120m(256, false), paper_120m(64, true));
    let lines = [
        ("MHA", COLOURS[0], 2 * mla.mha_cache_elements()),
        ("MLA r 256", COLOURS[1], 2 * mla.cache_elements()),
        // 4 bytes of id, 8 of (μ, ρ).
        ("EG-MLA r 64, ids, statistics", COLOURS[4], 2 * gated.cache_elements() + 12),
        ("EG-MLA r 64", COLOURS[3], 2 * gated.cache_elements()),
    ];
    let lines = lines.map(|(name, colour, bytes)| {
        let points = LENGTHS.map(|tokens| (f64::from(tokens), f64::from(tokens) * f64::from(bytes) / 1e6));
        (format!("{name}: {bytes} bytes a token"), colour, points.to_vec())
    });
    over_tokens(area, "Cache of one 120M layer in f16", "megabytes", &|mb| number(*mb), &lines, ("", &[]))
}

/// Without trailing zeros: 0.01, 1, 100.
fn number(value: f64) -> String {
    if value < 1.0 { format!("{value:.3}").trim_end_matches('0').to_owned() } else { format!("{value:.0}") }
}

fn roofline(area: &Area<'_>, report: &Report) -> Result<(), Failure> {
    let point = |row: &Measured| (row.flops as f64 / row.bytes.max(1) as f64, row.gflop_s);
    let computing: Vec<_> = report.rows.iter().filter(|row| row.flops > 0 && row.bytes > 0).collect();
    let roof = &report.roofline;
    let knee = roof.fma_gflop_s / roof.copy_gb_s;
    let x = span(computing.iter().map(|row| point(row).0).chain([knee, 1.0]), 10.0);
    let low = x.start;
    let y = span(computing.iter().map(|row| point(row).1).chain([roof.fma_gflop_s, roof.ceiling(low)]), 10.0);
    let (plot, names) = area.split_horizontally(PLOT);
    let mut chart = ChartBuilder::on(&plot)
        .caption(format!("Roofline: {}", report.adapter), font(20))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(84)
        .build_cartesian_2d(x.clone().log_scale(), y.log_scale())
        .map_err(Failure::run)?;
    chart
        .configure_mesh()
        .x_desc("FLOPs a byte of compulsory traffic")
        .y_desc("GFLOP/s")
        .x_label_formatter(&|value| number(*value))
        .y_label_formatter(&|value| number(*value))
        .label_style(font(14))
        .axis_desc_style(font(15))
        .axis_style(INK)
        .bold_line_style(INK.mix(0.35))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(Failure::run)?;
    let line = [low, knee, x.end].map(|at| (at, roof.ceiling(at)));
    let roof_label = format!("copy {:.1} GB/s, f32 multiply-adds {:.0} GFLOP/s", roof.copy_gb_s, roof.fma_gflop_s);
    chart.draw_series(LineSeries::new(line, INK.stroke_width(3))).map_err(Failure::run)?;
    let mut entries = vec![(roof_label, INK, Mark::Line(3))];
    let mut families: Vec<&str> = Vec::new();
    for row in &computing {
        if !families.contains(&family(&row.id)) {
            families.push(family(&row.id));
        }
    }
    for (number, name) in families.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        // A second round of the colours is hollow.
        let style = if number < COLOURS.len() { colour.filled() } else { colour.stroke_width(2) };
        let rows = computing.iter().filter(|row| family(&row.id) == *name);
        chart.draw_series(rows.map(|row| Circle::new(point(row), 5, style))).map_err(Failure::run)?;
        entries.push(((*name).to_owned(), colour, Mark::Point(5, style)));
    }
    legend(&names, &entries)
}

/// An id without its last part, the size.
fn family(id: &str) -> &str {
    id.rsplit_once('/').map_or(id, |(family, _)| family)
}
