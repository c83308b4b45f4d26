//! `egmla export`: the case table, and a model's first layer on texts of any length up to a limit, as data for a host
//! without Rust. `web/` is such a host.

mod layer;

use std::path::{Path, PathBuf};

use clap::Args;
use egmla::check::capture::Blobs;
use egmla::check::export::{verdicts, webgpu};
use egmla::check::guarded::POISON;
use serde::Serialize;

use crate::adapter::{self, AdapterOption, Backend, LimitsOption};
use crate::console;
use crate::failure::Failure;
use crate::interrupt;

/// Options of `egmla export`.
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// Where to write; the folder is made. Files of an earlier export are replaced
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    adapter: AdapterOption,
    /// Only the cases whose id contains S
    #[arg(long, value_name = "S")]
    filter: Option<String>,
    /// Plan for a device whose subgroups all have from MIN to MAX invocations; without this, kernels that use subgroups are
    /// left out
    #[arg(long, value_name = "MIN:MAX", value_parser = subgroups)]
    subgroups: Option<(u32, u32)>,
    /// Folder of the model whose first layer is exported as well
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
}

/// `--subgroups`
fn subgroups(text: &str) -> Result<(u32, u32), String> {
    let size = |text: &str| text.parse().ok().filter(|size: &u32| size.is_power_of_two() && (4..=128).contains(size));
    let sizes = text.split_once(':').and_then(|(min, max)| Some((size(min)?, size(max)?)));
    sizes.filter(|(min, max)| min <= max).ok_or_else(|| "expected two powers of two from 4 to 128, as 8:32".to_owned())
}

/// The list of the cases, `index.json`.
#[derive(Debug, Serialize)]
struct Index {
    version: &'static str,
    /// Sizes of subgroups that the plans count on; null where none use them.
    subgroups: Option<(u32, u32)>,
    /// The guard word.
    poison: u32,
    cases: Vec<IndexedCase>,
    /// Whether `layer.json` is there.
    layer: bool,
}

/// A case of the list; `cases/<file>.json` and `cases/<file>.bin` hold it.
#[derive(Debug, Serialize)]
struct IndexedCase {
    id: String,
    kernel: &'static str,
    file: String,
}

/// Writes the files.
pub fn run(args: ExportArgs) -> Result<(), Failure> {
    let mut cases = egmla::check::cases();
    let of = cases.len();
    if let Some(filter) = &args.filter {
        cases.retain(|case| case.id().contains(filter.as_str()));
    }
    if cases.is_empty() {
        let filter = args.filter.unwrap_or_default();
        return Err(Failure::usage(format!("no case contains `{filter}` (--filter); there are {of} cases")));
    }
    // Before the cases, which take a while.
    let model = args.model.as_deref().map(layer::Source::open).transpose()?;
    interrupt::watch();
    let Backend::Gpu(gpu) = adapter::open_with(&args.adapter, LimitsOption::Adapter)? else {
        return Err(Failure::run(
            "an adapter is needed to hold the buffers, though nothing runs on it; install a driver, for instance Mesa's \
             software Vulkan (mesa-vulkan-drivers)",
        ));
    };
    let folder = args.out.join("cases");
    std::fs::create_dir_all(&folder).map_err(|error| Failure::usage(format!("{}: {error}", folder.display())))?;
    // A list means that the rest is whole: the earlier list is removed first, the new one is written last.
    let list = args.out.join("index.json");
    match std::fs::remove_file(&list) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Failure::usage(format!("{}: {error}", list.display())));
        }
        _ => {}
    }
    let mut total = 0;
    let mut listed = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        interrupt::check()?;
        let (data, blobs) = case.export(&gpu.kernels, webgpu(args.subgroups))?;
        gpu.check()?;
        let file = format!("{number:04}");
        total += write(&folder, &file, &data, &blobs)?;
        listed.push(IndexedCase { id: data.id, kernel: data.kernel, file });
    }
    let (verdicts, blobs) = verdicts();
    total += write(&args.out, "verdicts", &verdicts, &blobs)?;
    let has_layer = model.is_some();
    if let Some(model) = model {
        interrupt::check()?;
        total += layer::write(&gpu, model, &args.out)?;
        gpu.check()?;
    }
    let index = Index {
        version: env!("CARGO_PKG_VERSION"),
        subgroups: args.subgroups,
        poison: POISON,
        cases: listed,
        layer: has_layer,
    };
    let (count, layer) = (index.cases.len(), if index.layer { " and a layer" } else { "" });
    total += write_json(&args.out, "index", &index)?;
    console::print(&format!("{count} cases{layer}, {total} bytes, in {}\n", args.out.display()))
}

/// Writes `<name>.json` and `<name>.bin`; returns their bytes.
fn write(folder: &Path, name: &str, data: &impl Serialize, blobs: &Blobs) -> Result<u64, Failure> {
    let path = folder.join(name).with_extension("bin");
    std::fs::write(&path, blobs.bytes()).map_err(|error| Failure::run(format!("{}: {error}", path.display())))?;
    Ok(blobs.bytes().len() as u64 + write_json(folder, name, data)?)
}

/// Writes `<name>.json`; returns its bytes.
fn write_json(folder: &Path, name: &str, data: &impl Serialize) -> Result<u64, Failure> {
    let path = folder.join(name).with_extension("json");
    let text = serde_json::to_string(data).map_err(Failure::run)?;
    std::fs::write(&path, &text).map_err(|error| Failure::run(format!("{}: {error}", path.display())))?;
    Ok(text.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::subgroups;

    #[test]
    fn sizes_of_subgroups_are_two_powers_of_two_in_order() {
        assert_eq!(subgroups("4:64"), Ok((4, 64)));
        assert_eq!(subgroups("8:8"), Ok((8, 8)));
        for text in ["", "8", "8:", "64:4", "6:8", "2:4", "8:256", "8:8:8"] {
            assert!(subgroups(text).is_err(), "{text}");
        }
    }
}
