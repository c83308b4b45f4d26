//! `egmla tune`: measures the tile settings of each kernel on this adapter and keeps the choice.

use std::time::Duration;

use clap::Args;
use comfy_table::Table;
use egmla::bench::timer::Timer;
use egmla::bench::tuning::{Tuned, tune};
use egmla::bench::{self, Suite};
use egmla::low_level::Tunings;

use crate::adapter::{self, AdapterOption, LimitsOption};
use crate::bench::gpu;
use crate::cache_folder;
use crate::console;
use crate::failure::Failure;
use crate::interrupt;

/// Options of `egmla tune`.
#[derive(Args, Debug)]
pub struct TuneArgs {
    #[command(flatten)]
    adapter: AdapterOption,
    /// Stop after S seconds, or on Ctrl-C, and keep what was found; the kernels that take longest come first
    #[arg(long, value_name = "S", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..))]
    time_limit: u64,
    /// Forget what is kept for this adapter and measure nothing
    #[arg(long, conflicts_with = "time_limit")]
    forget: bool,
}

/// Measures and keeps.
pub fn run(args: TuneArgs) -> Result<(), Failure> {
    interrupt::watch_patiently();
    let backend = adapter::open_with(&args.adapter, LimitsOption::Adapter)?;
    let gpu = gpu(&backend)?;
    console::note(format_args!("adapter: {}", backend.describe()));
    let file = cache_folder::tunings_file(&gpu.info)
        .ok_or_else(|| Failure::run("there is no cache folder: neither XDG_CACHE_HOME nor HOME is an absolute path"))?;
    if args.forget {
        return match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::run(format!("{}: {error}", file.display())))
            }
            _ => Ok(()),
        };
    }
    let not_written = |error: std::io::Error| Failure::run(format!("{}: {error}", file.display()));
    cache_folder::check(&file).map_err(not_written)?;
    // The shortest caches are all overhead: what is chosen there would be noise.
    let rows: Vec<_> =
        bench::rows().into_iter().filter(|row| row.is_in(Suite::Quick) && !row.id().ends_with("/t1024")).collect();
    let timer = Timer::new(&gpu.kernels)?;
    let bar = console::interruptible(0, "kernels");
    let limit = Duration::from_secs(args.time_limit);
    let tuned = tune(&gpu.kernels, &timer, &rows, limit, |progress| {
        bar.set_length(progress.of as u64);
        bar.set_position(progress.done as u64);
        bar.set_message(progress.kernel);
        !interrupt::asked()
    })?;
    bar.finish_and_clear();
    gpu.check()?;
    if tuned.is_empty() {
        interrupt::check()?;
    }
    let kept = kept_with(&gpu.kernels.context().tunings, &tuned);
    let text = serde_json::to_string_pretty(&kept).map_err(Failure::run)? + "\n";
    cache_folder::write(&file, text.as_bytes()).map_err(not_written)?;
    console::note(format_args!("kept in {}", file.display()));
    console::note("kernels that are not listed need a longer --time-limit; theirs is as it was");
    console::print(&format!("{}\n", table(&tuned)))?;
    interrupt::check()
}

/// The settings that were kept before, those of the kernels that were measured now replaced.
fn kept_with(before: &Tunings, tuned: &[Tuned]) -> Tunings {
    let mut kept = before.clone();
    for Tuned { kernel, choice, .. } in tuned {
        match choice {
            Some(choice) => kept.0.insert((*kernel).to_owned(), *choice),
            None => kept.0.remove(*kernel),
        };
    }
    kept
}

fn table(tuned: &[Tuned]) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["kernel", "setting of the class", "fastest", "kept"]);
    for Tuned { kernel, of_class_us, best_us, choice } in tuned {
        table.add_row([
            (*kernel).to_owned(),
            format!("{of_class_us:.0} µs"),
            format!("{best_us:.0} µs"),
            choice.map_or_else(|| "that of the class".to_owned(), |choice| format!("setting {choice}")),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use egmla::bench::tuning::Tuned;
    use egmla::low_level::Tunings;

    use super::kept_with;

    #[test]
    fn kernels_that_were_not_measured_keep_their_setting() {
        let tunings =
            |of: &[(&str, usize)]| Tunings(of.iter().map(|&(kernel, choice)| (kernel.to_owned(), choice)).collect());
        let tuned = |kernel, choice| Tuned { kernel, of_class_us: 2.0, best_us: 1.0, choice };
        let before = tunings(&[("gate", 1), ("matmul", 1), ("norm", 2)]);
        let after = kept_with(&before, &[tuned("matmul", Some(0)), tuned("norm", None), tuned("rope", Some(1))]);
        assert_eq!(after, tunings(&[("gate", 1), ("matmul", 0), ("rope", 1)]));
    }
}
