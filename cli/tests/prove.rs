//! Kernels that need optional features are proven on the adapter at hand when it is new, in a process of their own; the verdicts are
//! kept, and one that was wrong is left out.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../tests/common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use egmla::check::Proofs;
use egmla::low_level::WhyLeftOut;

/// Runs the program; `folder` is its cache folder.
fn egmla(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_egmla"));
    command.args(arguments).env("XDG_CACHE_HOME", folder).env_remove("RUST_LOG");
    command.stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The proofs that the program keeps there.
fn kept(folder: &Path) -> (PathBuf, Proofs) {
    let files = std::fs::read_dir(folder.join("egmla")).unwrap().map(|entry| entry.unwrap().path());
    let is_proofs = |file: &PathBuf| file.file_name().unwrap().to_string_lossy().starts_with("proofs-");
    let [file] = &files.filter(is_proofs).collect::<Vec<_>>()[..] else { panic!("not one file of proofs") };
    (file.clone(), serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap())
}

/// Kernels of the program's adapter that need optional features; without any there is nothing to prove.
fn optional() -> Vec<&'static str> {
    let gpu = common::gpu();
    let all = Proofs::default().unknown(&gpu.kernels);
    gpu.assert_no_errors();
    if all.is_empty() {
        println!("not run: the adapter has no optional feature");
    }
    all
}

#[test]
fn a_new_adapter_is_proven_once_and_what_is_wrong_there_is_left_out() {
    let all = optional();
    let Some(&first) = all.first() else { return };
    let folder = tempfile::tempdir().unwrap();
    let check = |filter: &str| {
        let Output { status, stdout, stderr } = egmla(folder.path(), &["check", "--filter", filter]);
        (status.code(), text(&stdout), text(&stderr))
    };
    let (code, _, errors) = check("residual_add/");
    assert_eq!((code, errors.contains("left out")), (Some(0), false), "{errors}");
    let (file, proofs) = kept(folder.path());
    assert_eq!(proofs.right.iter().map(String::as_str).collect::<Vec<_>>(), {
        let mut sorted = all.clone();
        sorted.sort();
        sorted
    });
    // What is known is not proven again: a verdict that was planted stands.
    let plant = |why: WhyLeftOut| {
        let mut planted = proofs.clone();
        planted.right.remove(first);
        planted.add(first, Some(why));
        std::fs::write(&file, serde_json::to_vec(&planted).unwrap()).unwrap();
        planted
    };
    let said = format!("left out on this adapter: {first}: it gave a NaN");
    let planted = plant(WhyLeftOut::Wrong("it gave a NaN".to_owned()));
    let (code, _, errors) = check("residual_add/");
    assert_eq!((code, errors.matches(&said).count()), (Some(0), 1), "{errors}");
    assert_eq!(kept(folder.path()).1, planted);
    // What takes the device along is not even run to be checked: it is shown as wrong, other kernels are compared, the run fails.
    plant(WhyLeftOut::Fatal("it took the device along".to_owned()));
    let id = egmla::check::cases().into_iter().find(|case| case.kernel() == first).unwrap().id().to_owned();
    let sizes = id.strip_prefix(first).unwrap();
    let (code, table, errors) = check(sizes);
    assert_eq!(code, Some(1), "{errors}");
    assert!(table.contains(&format!("    {first} (-): not run: it took the device along\n")), "{table}");
    assert!(table.lines().any(|line| line.contains("  ok, ") && !line.starts_with(first)), "{table}");
    assert!(errors.contains(first), "{errors}");
}

/// The process that the program starts for it.
#[test]
fn a_process_tells_every_kernel_that_it_proves() {
    let all = optional();
    let Some((last, known)) = all.split_last() else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = egmla(folder.path(), &["prove", "0", "--known", &known.join(",")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), format!("begin {last}\nend {last} \ndone\n"));
}
