//! Output of the program: results on stdout, everything else on stderr, one line each.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal as _, Write as _};

use indicatif::{ProgressBar, ProgressStyle};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::failure::Failure;
use crate::interrupt;

/// Writes a result to stdout. A reader that has gone away is no error: the program ends as if all had been read.
pub fn print(text: &str) -> Result<(), Failure> {
    write(text.as_bytes())
}

/// The same of bytes.
pub fn write(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::run(format!("stdout: {error}"))),
        _ => Ok(()),
    }
}

/// Writes a line about the run to stderr, and ignores a closed stderr.
pub fn note(text: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes the one line that every failed run ends with.
pub fn error(text: &str) {
    note(format_args!("error: {}", one_line(text)));
}

/// Line breaks and control characters become spaces; nothing else changes, so that paths and names stay as given.
pub fn one_line(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join(" ").replace(|c: char| c.is_control(), " ")
}

/// Warnings of the library go to stderr as `warning: …`, one line each.
pub fn start_logging() {
    // Set but empty is as good as not set: warnings must not vanish by it.
    let wanted = std::env::var("RUST_LOG").ok().filter(|filter| !filter.trim().is_empty());
    // Unless it says otherwise: our own warnings, other crates' errors.
    let default = || Targets::new().with_default(Level::ERROR).with_target("egmla", Level::WARN);
    let filter = wanted.and_then(|filter| filter.parse().ok()).unwrap_or_else(default);
    let lines = tracing_subscriber::fmt::layer().event_format(Line).with_writer(io::stderr);
    // Fails only where a subscriber is set already, and then there is one.
    let _ = tracing_subscriber::registry().with(lines).with(filter).try_init();
}

/// `warning: message`, or the level's own name below warnings.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut text = String::new();
        context.format_fields(Writer::new(&mut text), event)?;
        let level = match *event.metadata().level() {
            // `error:` is kept for the line that ends a failed run.
            Level::ERROR | Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        writeln!(writer, "{level}: {}", one_line(&text))
    }
}

/// A bar on stderr when that is a terminal.
pub fn progress(length: u64, what: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(&format!("{{bar:30}} {{pos}}/{{len}} {what}, {{elapsed}} {{msg}}"));
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// The same, and the bar is cleared where a run is ended from outside.
pub fn interruptible(length: u64, what: &str) -> ProgressBar {
    let bar = progress(length, what);
    let shown = bar.clone();
    interrupt::undo(move || shown.finish_and_clear());
    bar
}

/// Bytes for a reader: `1.50 KiB`.
pub fn bytes(count: u64) -> String {
    let mut text = String::new();
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut scaled = count as f64;
    let mut unit = "B";
    for next in units {
        if scaled < 1024.0 {
            break;
        }
        (scaled, unit) = (scaled / 1024.0, next);
    }
    let digits = if unit == "B" { 0 } else { 2 };
    // Writing to a String cannot fail.
    let _ = write!(text, "{scaled:.digits$} {unit}");
    text
}

#[cfg(test)]
mod tests {
    use super::{bytes, one_line};

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(one_line("first\n  second\r\n\nthird\tend"), "first second third end");
        assert_eq!(one_line("two  spaces stay"), "two  spaces stay");
    }

    #[test]
    fn bytes_are_scaled() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(3 << 40), "3.00 TiB");
    }
}
