//! Every shader, at every override setting that a plan can choose, in the languages that drivers read: SPIR-V, HLSL and MSL as
//! wgpu 30 would write them for the kernel's pipeline.
//!
//! naga's own verdict is the test's. With `EGMLA_TRANSLATIONS=FOLDER` the translations stay there, beside `settings.json`, for
//! the compilers of those languages: see `scripts/verify`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod shaders;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

use egmla::low_level::kernels::attention_grouped::Widths;
use egmla::low_level::kernels::{AttentionGrouped, REGISTRY, attention_grouped, shaders};
use egmla::low_level::{Access, AdapterClass, AnyOp, Cooperative, Plan, PlanContext, Spec, Tuning};
use egmla::wgpu::Features;
use naga::back::{hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::ModuleInfo;
use naga::{ResourceBinding, ShaderStage};
use serde_json::{Value, json};
use shaders::{CLASSES, each_case, large_limits, parse, read, sample, shader, tunings, validate, validator};

/// SPIR-V with every check of loops and indices, for a device without `VK_EXT_robustness2`; and without any, as the library has
/// its shaders compiled.
const SPIRV: [(&str, (u8, u8), bool); 2] = [("vulkan1.1", (1, 3), true), ("vulkan1.3", (1, 6), false)];

/// The same in the oldest Metal with simdgroup matrices, and in the newest that wgpu knows.
const METAL: [(&str, (u8, u8), bool); 2] = [("metal2.3", (2, 3), true), ("metal4.0", (4, 0), false)];

/// The least shader model that wgpu opens with DXC. naga writes the same text for later ones.
const SHADER_MODEL: (&str, hlsl::ShaderModel) = ("cs_6_0", hlsl::ShaderModel::V6_0);

type Overrides = Vec<(&'static str, f64)>;

/// Every override setting of every kernel: what it may be planned as, and nothing twice.
fn settings() -> BTreeMap<&'static str, Vec<Overrides>> {
    let mut seen: BTreeMap<_, BTreeSet<Vec<u64>>> = BTreeMap::new();
    let mut settings: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let mut add = |name: &'static str, plan: Plan| {
        if seen.entry(name).or_default().insert(key(&plan.overrides)) {
            settings.entry(name).or_default().push(plan.overrides);
        }
    };
    each_case(|case| add(case.spec.name, case.plan));
    wide_tilings().for_each(|(spec, plan)| add(spec.name, plan));
    settings
}

fn key(overrides: &Overrides) -> Vec<u64> {
    overrides.iter().map(|(_, value)| value.to_bits()).collect()
}

/// Those that a GPU with subgroups of 32 to 64, as AMD's, is planned by itself.
fn settings_of_amd() -> BTreeSet<(&'static str, Vec<u64>)> {
    let mut found = BTreeSet::new();
    each_case(|case| {
        let PlanContext { class, subgroup_min_size, subgroup_max_size, .. } = *case.context;
        let any = case.spec.subgroup == 0 && case.spec.cooperative == Cooperative::NONE;
        let subgroups = any || (subgroup_min_size >= 32 && subgroup_max_size <= 64);
        if class == AdapterClass::Discrete && case.tuning == Tuning::Auto && subgroups {
            found.insert((case.spec.name, key(&case.plan.overrides)));
        }
    });
    found
}

/// The one plan that larger limits change: wide heads, whose groups share a tile where its memory allows.
fn wide_tilings() -> impl Iterator<Item = (&'static Spec, Plan)> {
    let widths = Widths { d_latent: 512, d_nope: 128, d_rope: 64, d_value: 128 };
    let variant = shader::<AttentionGrouped>("attention_grouped");
    CLASSES.into_iter().flat_map(move |class| {
        let context = PlanContext::new(large_limits(), class);
        let tiling = attention_grouped::tiling(&context, widths).unwrap();
        let op = AttentionGrouped { tiling, widths, ..sample(|op: &AttentionGrouped| op.n_head == 9) };
        tunings(&variant.spec).map(move |tuning| (&variant.spec, variant.plan(&op, &context, tuning).unwrap()))
    })
}

/// Whether each setting of a kernel is among the few that together hold every value of every override.
fn covering(settings: &[Vec<(&'static str, f64)>]) -> Vec<bool> {
    let mut met = BTreeSet::new();
    let new = |setting: &Vec<(&'static str, f64)>| {
        // Every value is looked at, new or not.
        let new: Vec<_> = setting.iter().map(|&(name, value)| met.insert((name, value.to_bits()))).collect();
        new.is_empty() || new.contains(&true)
    };
    settings.iter().map(new).collect()
}

/// A translation on its way to a file: the folder of its language, the ending of its name.
struct Written {
    folder: &'static str,
    ending: String,
    bytes: Vec<u8>,
}

/// wgpu's settings where a shader is checked, and where it is not.
fn policies(checked: bool) -> BoundsCheckPolicies {
    let policy = if checked { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
    BoundsCheckPolicies {
        index: policy,
        buffer: policy,
        image_load: policy,
        binding_array: BoundsCheckPolicy::Unchecked,
    }
}

/// How every binding of a shader is bound, params first.
fn accesses(spec: &Spec) -> Vec<Option<Access>> {
    let has = |operation: &&&dyn AnyOp| operation.shaders().iter().any(|other| other.name == spec.name);
    let operation = REGISTRY.iter().find(has).unwrap();
    std::iter::once(None).chain(operation.bindings().iter().map(|binding| Some(binding.access))).collect()
}

fn resource(binding: usize) -> ResourceBinding {
    ResourceBinding { group: 0, binding: binding as u32 }
}

fn to_spirv(spec: &Spec, module: &naga::Module, info: &ModuleInfo) -> Vec<Written> {
    let mut capabilities = vec![spv::Capability::Shader, spv::Capability::Matrix];
    if spec.features.contains(Features::SUBGROUP) {
        capabilities.extend([
            spv::Capability::GroupNonUniform,
            spv::Capability::GroupNonUniformVote,
            spv::Capability::GroupNonUniformArithmetic,
            spv::Capability::GroupNonUniformBallot,
            spv::Capability::GroupNonUniformShuffle,
            spv::Capability::GroupNonUniformShuffleRelative,
            spv::Capability::GroupNonUniformQuad,
        ]);
    }
    if spec.features.contains(Features::SHADER_F16) {
        capabilities.push(spv::Capability::Float16);
    }
    if spec.features.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        capabilities.extend([spv::Capability::CooperativeMatrixKHR, spv::Capability::VulkanMemoryModel]);
    }
    let pipeline = spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: "main".to_owned() };
    let write = |(target, lang_version, checked): (&str, (u8, u8), bool)| {
        let options = spv::Options {
            lang_version,
            flags: spv::WriterFlags::LABEL_VARYINGS | spv::WriterFlags::FORCE_POINT_SIZE,
            fake_missing_bindings: false,
            binding_map: (0..accesses(spec).len())
                .map(|number| {
                    let binding = number as u32;
                    (resource(number), spv::BindingInfo { descriptor_set: 0, binding, binding_array_size: None })
                })
                .collect(),
            capabilities: Some(capabilities.iter().copied().collect()),
            bounds_check_policies: policies(checked),
            zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
            force_loop_bounding: checked,
            use_storage_input_output_16: false,
            ..Default::default()
        };
        let words = spv::write_vec(module, info, &options, Some(&pipeline))
            .unwrap_or_else(|error| panic!("{} as SPIR-V for {target}: {error}", spec.name));
        let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Written { folder: "spirv", ending: format!("{target}.spv"), bytes }
    };
    SPIRV.into_iter().map(write).collect()
}

/// The text without checks, and its entry point; None for cooperative matrices, which naga does not write as HLSL.
fn to_hlsl(spec: &Spec, module: &naga::Module, info: &ModuleInfo) -> Option<(Written, String)> {
    if spec.features.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        return None;
    }
    // Registers are counted by kind, as wgpu counts them; the last constant buffer is the one for num_workgroups.
    let (mut constants, mut read, mut written) = (0, 0, 0);
    let target = |register: &mut u32| {
        *register += 1;
        hlsl::BindTarget { space: 0, register: *register - 1, restrict_indexing: false, ..Default::default() }
    };
    let binding_map = (0..)
        .zip(accesses(spec))
        .map(|(number, access)| {
            let target = match access {
                None => target(&mut constants),
                Some(Access::Read) => target(&mut read),
                Some(Access::Write) => target(&mut written),
            };
            (resource(number), target)
        })
        .collect();
    let options = hlsl::Options {
        shader_model: SHADER_MODEL.1,
        binding_map,
        fake_missing_bindings: false,
        special_constants_binding: Some(target(&mut constants)),
        zero_initialize_workgroup_memory: false,
        restrict_indexing: false,
        force_loop_bounding: false,
        ..Default::default()
    };
    let pipeline = hlsl::PipelineOptions { entry_point: Some((ShaderStage::Compute, "main".to_owned())) };
    let mut text = String::new();
    let mut reflection = hlsl::Writer::new(&mut text, &options, &pipeline)
        .write(module, info, None)
        .unwrap_or_else(|error| panic!("{} as HLSL: {error}", spec.name));
    let entry = reflection.entry_point_names.remove(0).unwrap_or_else(|error| panic!("{}: {error}", spec.name));
    Some((Written { folder: "hlsl", ending: "hlsl".to_owned(), bytes: text.into_bytes() }, entry))
}

/// Nothing for matrices of 16 × 16: Metal's are 8 × 8, and its adapters list no other.
fn to_msl(spec: &Spec, module: &naga::Module, info: &ModuleInfo) -> Vec<Written> {
    let resources = (0..)
        .zip(accesses(spec))
        .map(|(number, access)| {
            let (buffer, mutable) = (Some(number as u8), access == Some(Access::Write));
            (resource(number), msl::BindTarget { buffer, mutable, ..Default::default() })
        })
        .collect();
    let sizes_buffer = Some(accesses(spec).len() as u8);
    let resources = msl::EntryPointResources { resources, immediates_buffer: None, sizes_buffer };
    let pipeline = msl::PipelineOptions {
        entry_point: Some((ShaderStage::Compute, "main".to_owned())),
        vertex_pulling_transform: true,
        ..Default::default()
    };
    let write = |(target, lang_version, checked): (&str, (u8, u8), bool)| {
        let options = msl::Options {
            lang_version,
            per_entry_point_map: [("main".to_owned(), resources.clone())].into(),
            fake_missing_bindings: false,
            bounds_check_policies: policies(checked),
            zero_initialize_workgroup_memory: false,
            force_loop_bounding: checked,
            ..Default::default()
        };
        let (text, _) = msl::write_string(module, info, &options, &pipeline)
            .unwrap_or_else(|error| panic!("{} as MSL for {target}: {error}", spec.name));
        // The first line names the version: texts that differ in nothing else are one.
        let text = text.strip_prefix(&format!("// language: {target}\n")).expect("naga names the language");
        Written { folder: "msl", ending: format!("{target}.metal"), bytes: text.as_bytes().to_vec() }
    };
    if spec.cooperative.by_16 { Vec::new() } else { METAL.into_iter().map(write).collect() }
}

/// Keeps each translation once and names the file that holds it.
struct Files {
    folder: Option<PathBuf>,
    known: BTreeMap<(&'static str, u64), String>,
}

impl Files {
    fn keep(&mut self, shader: &str, index: usize, written: Written) -> String {
        let Written { folder, ending, bytes } = written;
        let mut hasher = DefaultHasher::new();
        (shader, &bytes).hash(&mut hasher);
        let name = format!("{folder}/{shader}.{index}.{ending}");
        let known = self.known.entry((folder, hasher.finish())).or_insert_with(|| {
            if let Some(root) = &self.folder {
                std::fs::create_dir_all(root.join(folder)).unwrap();
                std::fs::write(root.join(&name), &bytes).unwrap();
            }
            name
        });
        known.clone()
    }
}

/// What tint reads: naga has no word for subgroups, tint wants one.
fn for_tint(spec: &Spec) -> Option<Written> {
    if spec.features.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        return None;
    }
    let enable = if spec.features.contains(Features::SUBGROUP) { "enable subgroups;\n" } else { "" };
    let bytes = format!("{enable}{}", spec.source).into_bytes();
    Some(Written { folder: "wgsl", ending: "wgsl".to_owned(), bytes })
}

/// Before its silence counts: naga finds a wrong type, a write to what is read only, and a feature that was not asked for.
/// Barriers that some invocations miss are tint's to find.
#[test]
fn planted_faults_are_refused_in_translation() {
    let accepted = |body: &str, features: Features| {
        let source = format!(
            "@group(0) @binding(0) var<storage, read> given: array<u32>;
             @group(0) @binding(1) var<storage, read_write> made: array<u32>;
             @compute @workgroup_size(8) fn main(@builtin(local_invocation_index) lane: u32) {{ {body} }}"
        );
        naga::front::wgsl::parse_str(&source).is_ok_and(|module| validator(features).validate(&module).is_ok())
    };
    for (right, wrong) in
        [("let x: u32 = lane;", "let x: f32 = lane;"), ("made[lane] = given[lane];", "given[lane] = made[lane];")]
    {
        assert!(accepted(right, Features::empty()), "{right}");
        assert!(!accepted(wrong, Features::empty()), "{wrong}");
    }
    let shared = "let x = subgroupAdd(lane);";
    assert!(accepted(shared, Features::SUBGROUP) && !accepted(shared, Features::empty()));
}

#[test]
fn every_setting_of_every_shader_is_translated() {
    let folder = std::env::var_os("EGMLA_TRANSLATIONS").map(PathBuf::from);
    let mut files = Files { folder, known: BTreeMap::new() };
    let (settings, of_amd) = (settings(), settings_of_amd());
    let mut listed: Vec<Value> = Vec::new();
    for spec in shaders() {
        let parsed = parse(spec);
        let of_kernel = &settings[spec.name];
        let covering = covering(of_kernel);
        let wgsl = for_tint(spec).map(|written| files.keep(spec.name, 0, written));
        for (index, overrides) in of_kernel.iter().enumerate() {
            let constants = overrides.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
            let entry = Some((ShaderStage::Compute, "main"));
            let (module, info) =
                naga::back::pipeline_constants::process_overrides(&parsed.0, &parsed.1, entry, &constants)
                    .unwrap_or_else(|error| panic!("{} with {overrides:?}: {error}", spec.name));
            validate(spec.name, &module);
            let spirv: Vec<_> =
                to_spirv(spec, &module, &info).into_iter().map(|out| files.keep(spec.name, index, out)).collect();
            let msl: Vec<_> =
                to_msl(spec, &module, &info).into_iter().map(|out| files.keep(spec.name, index, out)).collect();
            let hlsl = to_hlsl(spec, &module, &info)
                .map(|(out, entry)| json!({ "file": files.keep(spec.name, index, out), "entry": entry }));
            listed.push(json!({
                "shader": spec.name,
                "overrides": overrides.iter().copied().collect::<BTreeMap<_, _>>(),
                "covering": covering[index],
                "matrices": spec.cooperative.names(),
                "amd": of_amd.contains(&(spec.name, key(overrides))),
                "wgsl": wgsl,
                "spirv": spirv,
                "hlsl": hlsl,
                "msl": msl,
            }));
        }
    }
    files.keep("planted", 0, planted_scratch());
    // As many as the plans make, and no language that lost all of its files.
    assert!(listed.len() > settings.len(), "{} settings", listed.len());
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (language, _) in files.known.keys() {
        *counts.entry(language).or_default() += 1;
    }
    assert_eq!(counts.keys().copied().collect::<Vec<_>>(), ["hlsl", "msl", "spirv", "wgsl"]);
    println!("{} settings of {} shaders: {counts:?}", listed.len(), settings.len());
    if let Some(root) = &files.folder {
        let naga = lock_version("naga");
        let manifest = json!({ "naga": naga, "shader_model": SHADER_MODEL.0, "settings": listed });
        std::fs::write(root.join("settings.json"), serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
    }
}

/// A shader whose private array no compiler keeps in registers: what a checker of registers must find.
fn planted_scratch() -> Written {
    let source = "@group(0) @binding(0) var<uniform> params: vec4<u32>;
        @group(0) @binding(1) var<storage, read_write> y: array<u32>;
        @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) lane: u32) {
            var kept: array<u32, 700>;
            for (var i = 0u; i < params.x; i++) { kept[y[i] % 700u] += y[i + lane]; }
            for (var i = 0u; i < 64u; i++) { y[lane * 64u + i] = kept[(i * params.y) % 700u]; }
        }";
    let module = naga::front::wgsl::parse_str(source).unwrap();
    let info = validator(Features::empty()).validate(&module).unwrap();
    let options = spv::Options { lang_version: (1, 6), bounds_check_policies: policies(false), ..Default::default() };
    let words = spv::write_vec(&module, &info, &options, None).unwrap();
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Written { folder: "spirv", ending: "vulkan1.3.spv".to_owned(), bytes }
}

/// The version of a package that this build is locked to.
fn lock_version(package: &str) -> String {
    let lock = read("Cargo.lock");
    let (_, after) = lock.split_once(&format!("name = \"{package}\"\nversion = \"")).unwrap();
    after.split('"').next().unwrap().to_owned()
}

#[test]
fn a_covering_choice_holds_every_value_of_every_override() {
    for (kernel, settings) in settings() {
        let covering = covering(&settings);
        let values = |settings: &mut dyn Iterator<Item = &Vec<(&'static str, f64)>>| -> BTreeSet<(&str, u64)> {
            settings.flatten().map(|&(name, value)| (name, value.to_bits())).collect()
        };
        let all = values(&mut settings.iter());
        let chosen = values(&mut settings.iter().zip(&covering).filter(|(_, chosen)| **chosen).map(|(one, _)| one));
        assert_eq!(chosen, all, "{kernel}");
        assert!(covering.contains(&true), "{kernel}");
    }
}

/// For the kernels that no adapter here runs, this is all that is known of their translation.
#[test]
fn every_shader_becomes_spirv() {
    for spec in shaders() {
        let (module, info) = parse(spec);
        let (module, info) =
            naga::back::pipeline_constants::process_overrides(&module, &info, None, &Default::default()).unwrap();
        let options = naga::back::spv::Options { lang_version: (1, 3), ..Default::default() };
        let words = naga::back::spv::write_vec(&module, &info, &options, None)
            .unwrap_or_else(|error| panic!("{}: {error}", spec.name));
        assert_eq!(words[0], 0x0723_0203, "{}", spec.name);
    }
}
