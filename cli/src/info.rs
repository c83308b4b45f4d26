//! `egmla info`: the machine's adapters, the settings chosen on them, and cache sizes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use comfy_table::{CellAlignment, Table};
use egmla::config::{DecoderAttention, GateNorm, GqaConfig, ModelSummary};
use egmla::gguf::read_config;
use egmla::low_level::kernels::REGISTRY;
use egmla::low_level::{AdapterClass, PlanContext, Tuning, Tunings};
use egmla::weights::model_folder;
use egmla::{Error, Storage, wgpu};
use serde::Serialize;

use crate::adapter;
use crate::console;
use crate::failure::Failure;
use crate::options::ModelOption;
use crate::unchecked;

/// Options of `egmla info`.
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Folder with config.json, such a file, a GGUF file, or a name in Hugging Face's cache (org/name), of any model with latent or
    /// grouped-query attention; without it, the model of the project's own repository
    #[arg(long, value_name = "DIR|FILE|NAME")]
    model: Option<PathBuf>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    adapters: Vec<Adapter>,
    /// Folder or file of the model in `caches`; null when there is none.
    model: Option<String>,
    /// Why there is no model.
    model_problem: Option<String>,
    /// Parameters of the model's attention per layer, and what runs it; null when there is none.
    commands: Option<Commands>,
    caches: Vec<CacheTable>,
}

/// Which commands run a model.
#[derive(Debug, Serialize)]
struct Commands {
    model_type: Option<String>,
    attention_parameters: u64,
    /// Why `attend` does not compute a layer; null when it does.
    attend: Option<String>,
    /// Why `generate` and `eval` do not run the model; null when they do.
    generate: Option<String>,
}

#[derive(Debug, Serialize)]
struct Adapter {
    name: String,
    backend: String,
    driver: String,
    r#type: String,
    class: &'static str,
    max_storage_buffer_binding_size: u64,
    max_buffer_size: u64,
    max_compute_workgroup_storage_size: u32,
    max_compute_invocations_per_workgroup: u32,
    max_storage_buffers_per_shader_stage: u32,
    shader_f16: bool,
    subgroups: bool,
    subgroup_min_size: u32,
    subgroup_max_size: u32,
    timestamp_query: bool,
    cooperative_matrix: bool,
    /// Cooperative matrices that the kernels use.
    cooperative: Vec<&'static str>,
    pipeline_cache: bool,
    /// Settings that `egmla tune` kept for this adapter and driver.
    tunings: Tunings,
    variants: Vec<Variant>,
}

/// The plan of `Tuning::Auto` for a sample problem.
#[derive(Debug, Serialize)]
struct Variant {
    kernel: &'static str,
    /// Values of the shader's `override` constants.
    overrides: BTreeMap<&'static str, f64>,
    workgroup_size: u32,
    workgroup_bytes: u32,
    /// Why the kernel cannot run here.
    problem: Option<String>,
}

/// Cache sizes of one model shape.
#[derive(Debug, Serialize)]
struct CacheTable {
    title: String,
    n_layer: u32,
    rows: Vec<CacheRow>,
    /// Bytes per token that are not in the paper's count: ids, and norm statistics of every layer.
    bookkeeping_bytes: u64,
}

#[derive(Debug, PartialEq, Serialize)]
struct CacheRow {
    attention: String,
    /// Elements per token, all layers.
    elements: u64,
    bytes_f32: u64,
    bytes_f16: u64,
    /// Per cent; null for MHA itself.
    below_mha: Option<f64>,
    /// Per cent; null for MHA and MLA itself.
    below_mla: Option<f64>,
}

/// Shows it all.
pub fn run(args: InfoArgs) -> Result<(), Failure> {
    let option = ModelOption { model: args.model };
    // A folder that was asked for must be there; the committed one may be missing.
    let (model, model_problem) = match (option.folder(), &option.model) {
        (Ok(path), _) => (Some(path), None),
        (Err(failure), Some(_)) => return Err(failure),
        (Err(failure), None) => (None, Some(failure.message().to_owned())),
    };
    let mut caches = Vec::new();
    let mut commands = None;
    if let Some(path) = &model {
        let found = model_folder(path)?;
        let file = if found.is_dir() { found.join("config.json") } else { found };
        let summary = ModelSummary::from_json(&read_config(&file)?).map_err(|error| error.in_file(file))?;
        caches.push(CacheTable::of_model(path, &summary));
        commands = Some(Commands::of(summary));
    }
    caches.push(CacheTable::of_paper());
    let adapters = adapter::adapters()?.iter().map(Adapter::of).collect();
    let model = model.map(|folder| folder.display().to_string());
    let report = Report { adapters, model, model_problem, commands, caches };
    let text =
        if args.json { serde_json::to_string_pretty(&report).map_err(Failure::run)? + "\n" } else { report.text() };
    console::print(&text)
}

impl Commands {
    fn of(summary: ModelSummary) -> Self {
        let attention_parameters = summary.attention.parameters();
        let said = |problem: Option<Error>| problem.map(|problem| problem.to_string());
        Commands {
            model_type: summary.model_type,
            attention_parameters,
            attend: said(summary.attention_problem),
            generate: said(summary.decoder_problem),
        }
    }

    fn text(&self) -> String {
        let runs = |problem: &Option<String>| match problem {
            None => "yes".to_owned(),
            Some(problem) => format!("no: {problem}"),
        };
        format!(
            "model_type {}, {} parameters of attention per layer\negmla attend, one layer: {}\negmla generate, egmla eval: {}",
            self.model_type.as_deref().unwrap_or("(none)"),
            self.attention_parameters,
            runs(&self.attend),
            runs(&self.generate)
        )
    }
}

impl Adapter {
    fn of(adapter: &wgpu::Adapter) -> Self {
        let info = adapter.get_info();
        let offered = adapter.limits();
        let features = adapter.features();
        let class = AdapterClass::of(&info);
        let tunings = adapter::tunings(&info);
        let (cooperative_features, _, cooperative) = unchecked::cooperative(adapter);
        let context = PlanContext {
            tunings: tunings.clone(),
            features: adapter::features(adapter) | cooperative_features,
            subgroup_min_size: info.subgroup_min_size,
            subgroup_max_size: info.subgroup_max_size,
            cooperative,
            ..PlanContext::new(adapter::limits(adapter), class)
        };
        Adapter {
            driver: [info.driver.as_str(), info.driver_info.as_str()].join(" ").trim().to_owned(),
            backend: format!("{:?}", info.backend),
            r#type: format!("{:?}", info.device_type),
            class: match class {
                AdapterClass::Software => "software",
                AdapterClass::Integrated => "integrated",
                AdapterClass::Discrete => "discrete",
                AdapterClass::Apple => "apple",
            },
            max_storage_buffer_binding_size: offered.max_storage_buffer_binding_size,
            max_buffer_size: offered.max_buffer_size,
            max_compute_workgroup_storage_size: offered.max_compute_workgroup_storage_size,
            max_compute_invocations_per_workgroup: offered.max_compute_invocations_per_workgroup,
            max_storage_buffers_per_shader_stage: offered.max_storage_buffers_per_shader_stage,
            shader_f16: features.contains(wgpu::Features::SHADER_F16),
            subgroups: features.contains(wgpu::Features::SUBGROUP),
            subgroup_min_size: info.subgroup_min_size,
            subgroup_max_size: info.subgroup_max_size,
            timestamp_query: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            cooperative_matrix: features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
            cooperative: cooperative.names(),
            pipeline_cache: features.contains(wgpu::Features::PIPELINE_CACHE),
            tunings,
            variants: variants(&context),
            name: info.name,
        }
    }

    fn lines(&self) -> Vec<(&'static str, String)> {
        let yes = |offered: bool| if offered { "yes".to_owned() } else { "no".to_owned() };
        let subgroups = match (self.subgroups, self.subgroup_min_size, self.subgroup_max_size) {
            (false, ..) => "no".to_owned(),
            (true, low, high) if low == high => format!("{low} lanes"),
            (true, low, high) => format!("{low} to {high} lanes"),
        };
        let cooperative = match (self.cooperative_matrix, &self.cooperative[..]) {
            (false, _) => "no".to_owned(),
            (true, []) => "of no size that is used".to_owned(),
            (true, sizes) => sizes.join(", "),
        };
        vec![
            ("backend", self.backend.clone()),
            ("driver", self.driver.clone()),
            ("type, class", format!("{}, {}", self.r#type, self.class)),
            ("storage binding", console::bytes(self.max_storage_buffer_binding_size)),
            ("buffer", console::bytes(self.max_buffer_size)),
            ("workgroup memory", console::bytes(self.max_compute_workgroup_storage_size.into())),
            ("workgroup invocations", self.max_compute_invocations_per_workgroup.to_string()),
            ("storage buffers", self.max_storage_buffers_per_shader_stage.to_string()),
            ("shader-f16", yes(self.shader_f16)),
            ("subgroups", subgroups),
            ("timestamp query", yes(self.timestamp_query)),
            ("cooperative matrix", cooperative),
            ("pipeline cache", yes(self.pipeline_cache)),
            ("tuned kernels", self.tunings.0.len().to_string()),
        ]
    }
}

/// The setting of every shader that has several, for the largest sample that it takes.
fn variants(context: &PlanContext) -> Vec<Variant> {
    let mut variants = Vec::new();
    for operation in REGISTRY {
        let samples = operation.samples();
        for (index, spec) in operation.shaders().into_iter().enumerate().filter(|(_, spec)| spec.tunings > 1) {
            let planned = samples.iter().rev().map(|sample| sample.plan(index, context, Tuning::Auto));
            // The last that was refused says why.
            let planned = planned.reduce(|first, other| if first.is_ok() { first } else { other });
            let problem = spec.missing(context).map(|missing| format!("{missing} not offered"));
            variants.push(match (planned, problem) {
                (Some(Ok(plan)), None) => Variant {
                    kernel: spec.name,
                    overrides: plan.overrides.into_iter().collect(),
                    workgroup_size: plan.workgroup_size,
                    workgroup_bytes: plan.workgroup_bytes,
                    problem: None,
                },
                (planned, problem) => Variant {
                    kernel: spec.name,
                    overrides: BTreeMap::new(),
                    workgroup_size: 0,
                    workgroup_bytes: 0,
                    problem: problem.or_else(|| planned.and_then(Result::err).map(|error| error.to_string())),
                },
            });
        }
    }
    variants
}

/// Heads of keys and values of the grouped-query attention that a model is compared with.
const GROUPS: u32 = 8;

/// Tokens of the sequences whose caches are shown.
const LENGTHS: [(&str, u64); 3] = [("4k", 4 << 10), ("32k", 32 << 10), ("128k", 128 << 10)];

/// Widths that decide what is cached.
struct Shape {
    n_layer: u32,
    n_head: u32,
    d_nope: u32,
    d_value: u32,
    d_rope: u32,
}

impl Shape {
    /// Elements of all layers: as many as a number holds.
    fn layers(&self, elements: u64) -> u64 {
        u64::from(self.n_layer).saturating_mul(elements)
    }

    /// Elements of keys and values of some heads.
    fn heads(&self, heads: u32) -> u64 {
        self.layers(u64::from(heads).saturating_mul(u64::from(self.d_nope) + u64::from(self.d_value)))
    }

    /// Grouped-query attention.
    fn grouped(&self, heads: u32) -> CacheRow {
        CacheRow::new(format!("GQA {heads} heads"), self.heads(heads), Some(self.heads(self.n_head)), None)
    }

    /// MHA, then MLA of latent width `mla`, then EG-MLA of the others, each compared with the first two.
    fn rows(&self, mla: u32, gated: &[u32]) -> Vec<CacheRow> {
        let mha = self.heads(self.n_head);
        let latent = |width: u32| self.layers(u64::from(width) + u64::from(self.d_rope));
        let row = CacheRow::new;
        let mut rows =
            vec![row("MHA".to_owned(), mha, None, None), row(format!("MLA r={mla}"), latent(mla), Some(mha), None)];
        rows.extend(
            gated.iter().map(|&width| row(format!("EG-MLA r={width}"), latent(width), Some(mha), Some(latent(mla)))),
        );
        rows
    }
}

impl CacheRow {
    /// Of elements per token, beside those of MHA and of MLA.
    fn new(attention: String, elements: u64, mha: Option<u64>, mla: Option<u64>) -> Self {
        let [below_mha, below_mla] =
            [mha, mla].map(|base| base.map(|base| 100.0 * (1.0 - elements as f64 / base as f64)));
        let [bytes_f32, bytes_f16] =
            [Storage::F32, Storage::F16].map(|storage| elements.saturating_mul(storage.bytes()));
        CacheRow { attention, elements, bytes_f32, bytes_f16, below_mha, below_mla }
    }
}

impl CacheTable {
    /// The 120M configuration of arXiv 2509.16686.
    fn of_paper() -> Self {
        let shape = Shape { n_layer: 12, n_head: 12, d_nope: 64, d_value: 64, d_rope: 64 };
        CacheTable {
            title: "paper, 120M (12 layers, 12 heads × 64, rope 64)".to_owned(),
            n_layer: shape.n_layer,
            rows: shape.rows(256, &[64, 16]),
            bookkeeping_bytes: bookkeeping(shape.n_layer, true, true),
        }
    }

    fn of_model(path: &Path, summary: &ModelSummary) -> Self {
        let n_layer = &summary.n_layer;
        let c = match &summary.attention {
            DecoderAttention::Latent(config) => config,
            DecoderAttention::Heads(config) => return CacheTable::of_heads(path, *n_layer, config),
        };
        let shape =
            Shape { n_layer: *n_layer, n_head: c.n_head, d_nope: c.d_nope, d_value: c.d_value, d_rope: c.d_rope };
        // The paper compares EG-MLA with MLA of four times the latent width (64 against 256); a plain MLA is its own.
        let mut rows = match c.gate {
            Some(_) => shape.rows(c.d_latent.saturating_mul(4), &[c.d_latent]),
            None => shape.rows(c.d_latent, &[]),
        };
        if c.n_head > GROUPS && c.n_head.is_multiple_of(GROUPS) {
            rows.insert(1, shape.grouped(GROUPS));
        }
        let gate = c.up_projected_gate();
        CacheTable {
            title: format!(
                "model {} ({} layers, {} heads, content {}, value {}, rope {})",
                path.display(),
                n_layer,
                c.n_head,
                c.d_nope,
                c.d_value,
                c.d_rope
            ),
            n_layer: *n_layer,
            rows,
            bookkeeping_bytes: bookkeeping(
                *n_layer,
                gate.is_some(),
                gate.is_some_and(|gate| gate.norm != GateNorm::None),
            ),
        }
    }

    /// A model with keys and values per head.
    fn of_heads(path: &Path, n_layer: u32, c: &GqaConfig) -> Self {
        let shape = Shape { n_layer, n_head: c.n_head, d_nope: c.head_dim, d_value: c.head_dim, d_rope: 0 };
        let mut rows = vec![CacheRow::new("MHA".to_owned(), shape.heads(c.n_head), None, None)];
        if c.n_kv_head < c.n_head {
            rows.push(shape.grouped(c.n_kv_head));
        }
        CacheTable {
            title: format!(
                "model {} ({n_layer} layers, {} heads of {}, keys and values of {})",
                path.display(),
                c.n_head,
                c.head_dim,
                c.n_kv_head
            ),
            n_layer,
            rows,
            bookkeeping_bytes: 0,
        }
    }

    /// Bytes of one sequence at some lengths.
    fn lengths(&self) -> Table {
        let header = LENGTHS.into_iter().flat_map(|(name, _)| [format!("{name} f32"), format!("{name} f16")]);
        let mut table = new_table(std::iter::once("a sequence of".to_owned()).chain(header));
        for row in &self.rows {
            let bytes = LENGTHS
                .into_iter()
                .flat_map(|(_, tokens)| [row.bytes_f32, row.bytes_f16].map(|of| of.saturating_mul(tokens)));
            table.add_row(std::iter::once(row.attention.clone()).chain(bytes.map(console::bytes)));
        }
        right_align(&mut table, 1..1 + 2 * LENGTHS.len());
        table
    }

    fn table(&self) -> Table {
        let mut table = new_table(["per token", "elements", "bytes f32", "bytes f16", "below MHA", "below MLA"]);
        let percent = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2} %"));
        for row in &self.rows {
            table.add_row([
                row.attention.clone(),
                row.elements.to_string(),
                row.bytes_f32.to_string(),
                row.bytes_f16.to_string(),
                percent(row.below_mha),
                percent(row.below_mla),
            ]);
        }
        right_align(&mut table, 1..6);
        table
    }
}

/// 4 bytes of id per token, and 8 bytes of mean and reciprocal deviation per token and layer.
fn bookkeeping(n_layer: u32, ids: bool, statistics: bool) -> u64 {
    4 * u64::from(ids) + 8 * u64::from(n_layer) * u64::from(statistics)
}

impl Report {
    fn text(&self) -> String {
        let mut parts = Vec::new();
        if self.adapters.is_empty() {
            parts.push("No adapter: `--adapter auto` computes with the f64 reference on the CPU.".to_owned());
        } else {
            parts.push(self.adapter_table().to_string());
        }
        for adapter in &self.adapters {
            parts.push(format!("Chosen on {} ({}):\n{}", adapter.name, adapter.backend, variant_table(adapter)));
        }
        if let Some(problem) = &self.model_problem {
            parts.push(format!("No model: {problem}"));
        }
        if let (Some(model), Some(commands)) = (&self.model, &self.commands) {
            parts.push(format!("Model {model}: {}", commands.text()));
        }
        for cache in &self.caches {
            parts.push(format!(
                "Cache of {}:\n{}\n{}\nBookkeeping beside that count (ids, norm statistics): {} bytes per token",
                cache.title,
                cache.table(),
                cache.lengths(),
                cache.bookkeeping_bytes
            ));
        }
        parts.join("\n\n") + "\n"
    }

    /// One column per adapter.
    fn adapter_table(&self) -> Table {
        let mut table = new_table(
            std::iter::once("adapter".to_owned()).chain(self.adapters.iter().map(|adapter| adapter.name.clone())),
        );
        let columns: Vec<_> = self.adapters.iter().map(Adapter::lines).collect();
        for (line, (what, _)) in columns.first().into_iter().flatten().enumerate() {
            let values = columns.iter().map(|column| column[line].1.clone());
            table.add_row(std::iter::once((*what).to_owned()).chain(values));
        }
        table
    }
}

fn variant_table(adapter: &Adapter) -> Table {
    let mut table = new_table(["kernel", "workgroup", "workgroup bytes", "overrides"]);
    for variant in &adapter.variants {
        let overrides: Vec<_> = variant.overrides.iter().map(|(name, value)| format!("{name}={value}")).collect();
        table.add_row([
            variant.kernel.to_owned(),
            variant.workgroup_size.to_string(),
            variant.workgroup_bytes.to_string(),
            variant.problem.clone().unwrap_or_else(|| overrides.join(" ")),
        ]);
    }
    right_align(&mut table, 2..4);
    table
}

fn new_table<T: Into<comfy_table::Cell>>(header: impl IntoIterator<Item = T>) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(header.into_iter().map(Into::into).collect::<Vec<comfy_table::Cell>>());
    table
}

fn right_align(table: &mut Table, columns: std::ops::Range<usize>) {
    for column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{CacheTable, bookkeeping, variants};
    use egmla::low_level::kernels::shaders;
    use egmla::low_level::{AdapterClass, PlanContext};

    #[test]
    fn the_papers_cache_sizes() {
        let table = CacheTable::of_paper();
        let elements: Vec<_> = table.rows.iter().map(|row| (row.attention.as_str(), row.elements)).collect();
        let expected = [("MHA", 18432), ("MLA r=256", 3840), ("EG-MLA r=64", 1536), ("EG-MLA r=16", 960)];
        assert_eq!(elements, expected);
        let printed: Vec<_> = table
            .rows
            .iter()
            .map(|row| {
                (row.below_mha.map(|below| format!("{below:.2}")), row.below_mla.map(|below| format!("{below:.1}")))
            })
            .collect();
        let text = |value: &str| Some(value.to_owned());
        let expected =
            [(None, None), (text("79.17"), None), (text("91.67"), text("60.0")), (text("94.79"), text("75.0"))];
        assert_eq!(printed, expected);
        assert_eq!((table.rows[2].bytes_f32, table.rows[2].bytes_f16), (6144, 3072));
    }

    #[test]
    fn bookkeeping_counts_ids_once_and_statistics_per_layer() {
        assert_eq!(bookkeeping(12, true, true), 4 + 12 * 8);
        assert_eq!(bookkeeping(12, true, false), 4);
        assert_eq!(bookkeeping(12, false, false), 0);
    }

    #[test]
    fn every_kernel_has_its_settings_on_every_class_of_adapter_that_offers_it() {
        for class in AdapterClass::ALL {
            let context = PlanContext::webgpu_defaults(class);
            for variant in variants(&context) {
                let spec = shaders().find(|spec| spec.name == variant.kernel).unwrap();
                let here = format!("{} on {class:?}: {:?}", variant.kernel, variant.problem);
                assert_eq!(variant.problem.is_some(), spec.missing(&context).is_some(), "{here}");
                assert_eq!(variant.workgroup_size > 0, variant.problem.is_none(), "{here}");
            }
        }
    }
}
