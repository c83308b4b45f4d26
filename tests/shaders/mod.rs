//! Shaders as naga reads them, and every plan that they may be given: what the tests without a GPU walk.

#![allow(dead_code, reason = "the tests that take this need a part of it")]

use std::path::{Path, PathBuf};

use egmla::Error;
use egmla::error::KernelError;
use egmla::low_level::kernels::{REGISTRY, shaders};
use egmla::low_level::{AdapterClass, Cooperative, Op, Plan, PlanContext, Sample, Sampled, Spec, Tuning, Variant};
use egmla::wgpu::{Features, Limits};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

pub const CLASSES: [AdapterClass; 4] = AdapterClass::ALL;

pub fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

pub fn read(relative: &str) -> String {
    std::fs::read_to_string(path(relative)).unwrap_or_else(|error| panic!("{relative}: {error}"))
}

pub fn webgpu_limits() -> Limits {
    Limits::default()
}

pub fn parse(spec: &Spec) -> (naga::Module, ModuleInfo) {
    let module = naga::front::wgsl::parse_str(spec.source)
        .unwrap_or_else(|error| panic!("{}: {}", spec.name, error.emit_to_string(spec.source)));
    let info = validate(spec.name, &module);
    (module, info)
}

/// With no capability beyond those of every WebGPU device (packing and unpacking halves is the one that we use) and those
/// of the features that the kernel asks for. `kernel` begins with its name.
pub fn validate(kernel: &str, module: &naga::Module) -> ModuleInfo {
    let spec = shaders().find(|spec| kernel.split(' ').next() == Some(spec.name)).unwrap();
    validator(spec.features).validate(module).unwrap_or_else(|error| panic!("{kernel}: {error:?}"))
}

pub fn validator(features: Features) -> Validator {
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    for (feature, capability) in [
        (Features::SUBGROUP, Capabilities::SUBGROUP),
        (Features::SHADER_F16, Capabilities::SHADER_FLOAT16),
        (Features::EXPERIMENTAL_COOPERATIVE_MATRIX, Capabilities::COOPERATIVE_MATRIX),
    ] {
        capabilities.set(capability, features.contains(feature));
    }
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    validator
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all());
    validator
}

/// A plan that a shader can choose.
pub struct Case<'a> {
    pub sample: &'a dyn Sample,
    pub index: usize,
    pub spec: &'static Spec,
    pub context: &'a PlanContext,
    pub tuning: Tuning,
    pub plan: Plan,
}

impl Case<'_> {
    /// What it is, for the message of an assertion.
    pub fn what(&self) -> String {
        let subgroups = [self.context.subgroup_min_size, self.context.subgroup_max_size];
        format!("{} {:?} {subgroups:?} {:?} {:?}", self.spec.name, self.context.class, self.tuning, self.sample)
    }
}

pub fn tunings(spec: &Spec) -> impl Iterator<Item = Tuning> + use<> {
    std::iter::once(Tuning::Auto).chain((0..spec.tunings).map(Tuning::Forced))
}

/// Smallest and largest subgroups of the devices that a kernel tells apart.
pub fn subgroups(spec: &Spec) -> &'static [(u32, u32)] {
    match spec {
        // Whole subgroups, and lanes that the smallest has: software, Intel's, NVIDIA's, AMD's, Apple's.
        _ if spec.cooperative != Cooperative::NONE => &[(4, 4), (8, 8), (16, 32), (32, 32), (32, 64), (4, 64)],
        _ if spec.features.contains(Features::SUBGROUP) => {
            &[(4, 64), (8, 64), (16, 64), (32, 64), (64, 64), (128, 128)]
        }
        _ => &[(4, 64)],
    }
}

/// The limits that a shader is made for: WebGPU's, but for kernels on matrices, which may need what devices with matrices offer.
pub fn limits_for(spec: &Spec) -> Limits {
    if spec.cooperative == Cooperative::NONE {
        return Limits::default();
    }
    Limits { max_compute_workgroup_storage_size: 48 << 10, ..large_limits() }
}

/// Every plan of every sample: each class of adapter, each size of its subgroups where they matter, each tuning, the limits that
/// the shader is made for. Where a device offers more, plans are the same: see `larger_limits_change_no_plan`. A shader may refuse samples that
/// another takes; it may not refuse all, and none for a limit.
pub fn each_case(mut visit: impl FnMut(Case<'_>)) {
    for operation in REGISTRY {
        let samples = operation.samples();
        for (index, spec) in operation.shaders().into_iter().enumerate() {
            let mut planned = 0;
            for (class, &(subgroup_min_size, subgroup_max_size)) in
                CLASSES.into_iter().flat_map(|class| subgroups(spec).iter().map(move |sizes| (class, sizes)))
            {
                let context =
                    &PlanContext { subgroup_min_size, subgroup_max_size, ..PlanContext::new(limits_for(spec), class) };
                for (sample, tuning) in
                    samples.iter().flat_map(|sample| tunings(spec).map(move |tuning| (sample, tuning)))
                {
                    match sample.plan(index, context, tuning) {
                        Ok(plan) => {
                            planned += 1;
                            visit(Case { sample: &**sample, index, spec, context, tuning, plan });
                        }
                        Err(Error::Kernel(KernelError::Problem { .. })) => {}
                        Err(error) => panic!("{} {class:?} {tuning:?} {sample:?}: {error}", spec.name),
                    }
                }
            }
            assert!(planned > 0, "{}: no sample", spec.name);
        }
    }
}

/// Limits of an adapter well above WebGPU's.
pub fn large_limits() -> Limits {
    Limits {
        max_compute_workgroup_storage_size: 1 << 16,
        max_compute_invocations_per_workgroup: 1024,
        max_compute_workgroup_size_x: 1024,
        max_compute_workgroup_size_y: 1024,
        max_storage_buffers_per_shader_stage: 64,
        max_storage_buffer_binding_size: 1 << 32,
        max_buffer_size: 1 << 32,
        ..Limits::default()
    }
}

/// The shader of a name.
pub fn shader<O: Op>(name: &str) -> &'static Variant<O> {
    O::VARIANTS.iter().find(|variant| variant.spec.name == name).unwrap_or_else(|| panic!("no shader {name}"))
}

/// The sample of an operation that `like` picks.
pub fn sample<O: Sampled>(like: impl Fn(&O) -> bool) -> O {
    O::samples().into_iter().find(like).expect("a sample")
}
