//! Proves the kernels that need optional features when an adapter, a driver or this version is new, in a process of its own:
//! what a kernel takes along is that process. The verdicts are kept in the cache folder.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use clap::Args;
use egmla::check::{Proofs, prove_kernel};
use egmla::files::read;
use egmla::low_level::WhyLeftOut;
use egmla::{Kernels, wgpu};

use crate::adapter::{self, Backend};
use crate::cache_folder;
use crate::console;
use crate::failure::Failure;

/// Most bytes of kept proofs that are read.
const MOST_PROOFS: u64 = 1 << 20;

/// A kernel that takes longer is left out: its compiler or its loop does not end.
const LIMIT: Duration = Duration::from_secs(90);

/// Options of the process that runs the kernels; for the program itself.
#[derive(Args, Debug)]
pub struct ProveArgs {
    /// Number of the adapter, real GPUs first
    adapter: usize,
    /// The device runs its shaders with wgpu's checks
    #[arg(long)]
    shader_checks: bool,
    /// Kernels that are known
    #[arg(long, value_delimiter = ',')]
    known: Vec<String>,
}

/// Writes `begin KERNEL` and `end KERNEL`, with what is wrong behind it, for each kernel; `lost KERNEL` with the reason where the
/// device is gone; at last `done`.
pub fn run(args: ProveArgs) -> Result<(), Failure> {
    let Backend::Gpu(gpu) = adapter::open_unproven(args.adapter, args.shader_checks)? else {
        return Err(Failure::usage(format!("there is no adapter {}", args.adapter)));
    };
    let all = Proofs::default().unknown(&gpu.kernels);
    for kernel in all.into_iter().filter(|kernel| !args.known.iter().any(|known| known == kernel)) {
        console::print(&format!("begin {kernel}\n"))?;
        let lost = |why: &str| console::print(&format!("lost {kernel} {}\n", console::one_line(why)));
        let verdict = match prove_kernel(&gpu.kernels, kernel) {
            Ok(verdict) => verdict,
            Err(error) => return lost(&error.to_string()),
        };
        if let Err(error) = gpu.check() {
            return lost(error.message());
        }
        let why = verdict.map_or_else(String::new, |why| console::one_line(&why.to_string()));
        console::print(&format!("end {kernel} {why}\n"))?;
    }
    console::print("done\n")
}

/// The kernels without those that are wrong on this adapter, and one line for each of these. Kernels that are new here run now,
/// in a process of their own; those that nothing is known of after it are left out this time.
pub fn proven(kernels: Kernels, info: &wgpu::AdapterInfo, number: usize) -> Kernels {
    let file = cache_folder::proofs_file(info);
    let kept = file.as_ref().and_then(|file| read(file, MOST_PROOFS).ok());
    let mut proofs: Proofs = kept.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    proofs.renew(&kernels);
    if !proofs.unknown(&kernels).is_empty() {
        let ended = supervise(&kernels, &mut proofs, LIMIT, |known| child(number, kernels.shader_checks(), known));
        let text = serde_json::to_string_pretty(&proofs).unwrap_or_default();
        if let Some(file) = file
            && let Err(error) = cache_folder::write(&file, text.as_bytes())
        {
            tracing::debug!("{}: {error}", file.display());
        }
        // This time only, and not kept.
        for kernel in proofs.unknown(&kernels) {
            let why = ended.as_ref().err().map_or("not proven", String::as_str);
            proofs.add(kernel, Some(WhyLeftOut::Wrong(why.to_owned())));
        }
    }
    for (kernel, why) in &proofs.left_out.0 {
        console::note(format_args!("left out on this adapter: {kernel}: {why}"));
    }
    kernels.leaving_out(proofs.left_out)
}

fn child(number: usize, shader_checks: bool, known: &[String]) -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["prove", &number.to_string()]);
    if shader_checks {
        command.arg("--shader-checks");
    }
    if !known.is_empty() {
        command.args(["--known", &known.join(",")]);
    }
    Ok(command)
}

/// Runs processes until every kernel has a verdict: one that ends or hangs in a kernel leaves this one out, and the next goes on
/// behind it. Fails with the reason where processes prove nothing; the next run of the program asks again.
fn supervise(
    kernels: &Kernels,
    proofs: &mut Proofs,
    limit: Duration,
    mut command: impl FnMut(&[String]) -> std::io::Result<Command>,
) -> Result<(), String> {
    let mut waiting = proofs.unknown(kernels).len();
    let of = waiting as u64;
    let bar = console::progress(of, "kernels on this adapter for the first time");
    while waiting > 0 {
        let known: Vec<String> = proofs.right.iter().chain(proofs.left_out.0.keys()).cloned().collect();
        let lines = |line: &str| {
            let mut words = line.splitn(3, ' ');
            let (word, kernel, why) =
                (words.next(), words.next().unwrap_or_default(), words.next().unwrap_or_default());
            match word {
                Some("begin") => bar.set_message(kernel.to_owned()),
                Some("end") => proofs.add(kernel, (!why.is_empty()).then(|| WhyLeftOut::Wrong(why.to_owned()))),
                Some("lost") => proofs.add(kernel, Some(WhyLeftOut::Fatal(why.to_owned()))),
                _ => {}
            }
        };
        match command(&known).map_err(Ended::NotBegun).and_then(|command| follow(command, limit, lines)) {
            Ok(()) | Err(Ended::In(None, _)) => {}
            Err(Ended::Interrupted) => return Err("not proven: interrupted".to_owned()),
            Err(Ended::NotBegun(error)) => return Err(format!("not proven, no process for it: {error}")),
            Err(Ended::In(Some(kernel), why)) => proofs.add(&kernel, Some(WhyLeftOut::Fatal(why))),
        }
        let before = waiting;
        waiting = proofs.unknown(kernels).len();
        if waiting == before {
            return Err("not proven: the process for it ended before".to_owned());
        }
        bar.set_position(of - waiting as u64);
    }
    bar.finish_and_clear();
    Ok(())
}

/// How a process failed.
#[derive(Debug)]
enum Ended {
    NotBegun(std::io::Error),
    /// In a kernel, or between two.
    In(Option<String>, String),
    /// By the user, or by who ends all processes.
    Interrupted,
}

#[cfg(unix)]
fn was_interrupted(status: std::process::ExitStatus) -> bool {
    // SIGHUP, SIGINT, SIGTERM
    std::os::unix::process::ExitStatusExt::signal(&status).is_some_and(|signal| [1, 2, 15].contains(&signal))
}

#[cfg(not(unix))]
fn was_interrupted(_: std::process::ExitStatus) -> bool {
    false
}

/// Follows the lines of a process to `done`.
fn follow(mut command: Command, limit: Duration, mut each: impl FnMut(&str)) -> Result<(), Ended> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(Ended::NotBegun)?;
    let (sender, receiver) = channel();
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
    }
    let mut current = None;
    loop {
        match receiver.recv_timeout(limit) {
            Ok(line) if line == "done" => {
                // It has nothing left to do but to leave its driver, where a broken one may hang.
                let _ = child.kill();
                let _ = child.wait();
                return Ok(());
            }
            Ok(line) => {
                current = line.strip_prefix("begin ").map(str::to_owned);
                each(&line);
            }
            Err(RecvTimeoutError::Timeout) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Ended::In(current, format!("it did not end within {} s", limit.as_secs_f32())));
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = child.wait();
                if status.as_ref().is_ok_and(|&status| was_interrupted(status)) {
                    return Err(Ended::Interrupted);
                }
                let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                return Err(Ended::In(current, format!("it took its process along ({status})")));
            }
        }
    }
}

#[cfg(all(test, unix))]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// What a process that prints this leaves behind.
    fn ran(script: &str, limit: u64) -> (Vec<String>, Result<(), Ended>) {
        let mut lines = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let ended = follow(command, Duration::from_millis(limit), |line| lines.push(line.to_owned()));
        (lines, ended)
    }

    #[test]
    fn what_ends_a_process_is_known() {
        let (lines, ended) = ran("echo begin a; echo 'end a '; echo done", 10_000);
        assert_eq!(lines, ["begin a", "end a "]);
        ended.unwrap();
        let (lines, ended) = ran("echo begin a; echo 'end a NaN'; echo begin b; kill -SEGV $$", 10_000);
        assert_eq!(lines, ["begin a", "end a NaN", "begin b"]);
        let Err(Ended::In(Some(kernel), why)) = ended else { unreachable!("{ended:?}") };
        assert!(kernel == "b" && why.contains("signal: 11"), "{why}");
        let (_, ended) = ran("echo begin c; sleep 60", 200);
        let Err(Ended::In(Some(kernel), why)) = ended else { unreachable!("{ended:?}") };
        assert_eq!((&kernel[..], &why[..]), ("c", "it did not end within 0.2 s"));
        let (_, ended) = ran("echo begin c; kill -INT $$; sleep 60", 10_000);
        assert!(matches!(ended, Err(Ended::Interrupted)), "{ended:?}");
        let (_, ended) = ran("echo begin c; echo 'lost c the device'; exit 3", 10_000);
        let Err(Ended::In(None, why)) = ended else { unreachable!("{ended:?}") };
        assert!(why.contains("exit status: 3"), "{why}");
        let missing = follow(Command::new("/nonexistent/egmla"), Duration::from_secs(1), |_| {});
        assert!(matches!(missing, Err(Ended::NotBegun(_))));
    }

    /// The first process dies in its second kernel, the next one finds a wrong one, and no kernel is asked for twice.
    #[test]
    fn every_kernel_gets_its_verdict() {
        // Kernels of this machine's adapter; the processes are stand-ins.
        let Some(adapter) = adapter::adapters().unwrap().into_iter().next() else { return };
        let Backend::Gpu(gpu) = adapter::open_unproven(0, false).unwrap() else { unreachable!() };
        let mut proofs = Proofs::default();
        proofs.renew(&gpu.kernels);
        let all = proofs.unknown(&gpu.kernels);
        if all.len() < 4 {
            assert!(!adapter.features().contains(wgpu::Features::SUBGROUP), "{all:?}");
            return;
        }
        let mut asked = Vec::new();
        let ended = supervise(&gpu.kernels, &mut proofs, Duration::from_secs(10), |known| {
            asked.push(known.len());
            let script = match asked.len() {
                1 => format!("echo begin {0}; echo 'end {0} '; echo begin {1}; kill -KILL $$", all[0], all[1]),
                2 => format!("echo begin {0}; echo 'end {0} a NaN'; echo done", all[2]),
                // Says nothing of the others.
                _ => "echo done".to_owned(),
            };
            let mut command = Command::new("sh");
            command.args(["-c", &script]);
            Ok(command)
        });
        assert_eq!(asked, [0, 2, 3]);
        assert_eq!(ended, Err("not proven: the process for it ended before".to_owned()));
        assert!(proofs.right.contains(all[0]));
        assert!(matches!(&proofs.left_out.0[all[1]], WhyLeftOut::Fatal(why) if why.contains("signal: 9")));
        assert_eq!(proofs.left_out.0[all[2]], WhyLeftOut::Wrong("a NaN".to_owned()));
        // The next run asks for the others.
        assert_eq!(proofs.unknown(&gpu.kernels), all[3..]);
    }
}
