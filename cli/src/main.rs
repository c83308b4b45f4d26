//! The command-line program `egmla`: the only owner of a device in this crate.
//!
//! Exit status: 0 done, 2 bad usage or input, 1 failed while running, 130 interrupted. Every error is one line on stderr that
//! begins `error:`.

mod adapter;
mod attend;
mod bench;
mod cache_folder;
mod chat;
mod check;
mod console;
mod convert;
mod engine;
mod eval;
mod export;
mod failure;
mod generate;
mod info;
mod interrupt;
mod options;
mod output;
mod profile;
mod prove;
mod stop;
mod tune;
mod unchecked;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::Failure;

/// Multi-head Latent Attention and Embedding-Gated MLA on any adapter that wgpu reaches
#[derive(Parser, Debug)]
#[command(name = "egmla", version, arg_required_else_help = false)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Continue a prompt with a language model
    Generate(generate::GenerateArgs),
    /// Measure a language model on a text
    Eval(eval::EvalArgs),
    /// Make a model with keys and values per head (GQA) into one of latents (MLA, EG-MLA), without training
    Convert(convert::ConvertArgs),
    /// Run one attention layer on a file
    Attend(attend::AttendArgs),
    /// Show adapters, tile settings of the larger kernels, and cache sizes
    Info(info::InfoArgs),
    /// Compare every kernel and the layer with the reference on an adapter
    Check(check::CheckArgs),
    /// Write the cases and a model's first layer as data, for a host without Rust
    Export(export::ExportArgs),
    /// Time kernels and decode paths against what the adapter reaches at best
    Bench(bench::BenchArgs),
    /// Measure tile settings on an adapter and keep the fastest
    Tune(tune::TuneArgs),
    /// Run the kernels that need optional features, for the process that waits
    #[command(hide = true)]
    Prove(prove::ProveArgs),
}

fn main() -> ExitCode {
    // A defect must not look like a crash to a script: one line, exit 1.
    std::panic::set_hook(Box::new(|info| {
        if !egmla::decoder::panics_are_caught() {
            console::error(&format!("internal error: {info}"));
        }
    }));
    console::start_logging();
    match std::panic::catch_unwind(run) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            console::error(failure.message());
            ExitCode::from(failure.exit_code())
        }
        Err(_) => ExitCode::from(1),
    }
}

fn run() -> Result<(), Failure> {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => return console::print(&error.render().to_string()),
        Err(error) => return Err(usage(&error)),
    };
    match cli.command {
        Command::Generate(args) => generate::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Attend(args) => attend::run(args),
        Command::Info(args) => info::run(args),
        Command::Check(args) => check::run(args),
        Command::Export(args) => export::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Tune(args) => tune::run(args),
        Command::Prove(args) => prove::run(args),
    }
}

/// clap's first paragraph, which says what is wrong and names the options; its tips and usage are left to `--help`.
fn usage(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let message = paragraph.strip_prefix("error: ").unwrap_or(paragraph);
    Failure::usage(format!("{} (see egmla --help)", console::one_line(message)))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::{Cli, usage};

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_usage_error_names_the_options_on_one_line() {
        let error = Cli::try_parse_from(["egmla", "attend", "--input", "x"]).unwrap_err();
        let failure = usage(&error);
        assert_eq!(failure.exit_code(), 2);
        assert!(failure.message().contains("--output <FILE> --config <FILE> --weights <FILE>"), "{failure:?}");
        assert!(failure.message().ends_with("(see egmla --help)"), "{failure:?}");
        assert!(!failure.message().contains('\n'), "{failure:?}");
    }
}
