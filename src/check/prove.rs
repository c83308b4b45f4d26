//! Proves kernels on the device at hand: what validators and other drivers accept may compute nonsense here, or lose the device.
//!
//! A kernel that needs an optional feature runs on one small case and is compared with the f64 reference. One that is wrong,
//! that the driver refuses or that panics wgpu's compilers is left out ([`Kernels::leaving_out`]); a kernel for WebGPU's core
//! takes its place. Nothing runs unasked: the program `egmla` proves the kernels in a process of its own when it first meets an
//! adapter, and an application calls [`prove`] where it likes, and keeps the [`Proofs`].
//!
//! ```no_run
//! # fn run(kernels: egmla::Kernels) -> egmla::Result<()> {
//! let mut proofs = egmla::check::Proofs::default();
//! egmla::check::prove(&kernels, &mut proofs)?;
//! let kernels = kernels.leaving_out(proofs.left_out.clone());
//! # Ok(()) }
//! ```

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::{Deserialize, Serialize};

use super::{Case, cases};
use crate::adapter::{Cooperative, LeftOut, WhyLeftOut};
use crate::device::Kernels;
use crate::error::Result;
use crate::kernels::shaders;

/// What is known of the kernels that need optional features, on one device. Keep it per adapter, backend and driver.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Proofs {
    /// Checksum of the shaders' texts and of the checks that they run with: with others [`prove`] begins anew.
    pub of: u32,
    /// Kernels that were right.
    pub right: BTreeSet<String>,
    /// Kernels that are not to run.
    pub left_out: LeftOut,
}

impl Proofs {
    /// Forgets everything if it was of other shaders.
    pub fn renew(&mut self, kernels: &Kernels) {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&[u8::from(kernels.shader_checks())]);
        for spec in shaders() {
            hasher.update(spec.name.as_bytes());
            hasher.update(spec.source.as_bytes());
        }
        let of = hasher.finalize();
        if self.of != of {
            *self = Proofs { of, ..Proofs::default() };
        }
    }

    /// Kernels that need optional features which the device has, and of which nothing is known yet.
    pub fn unknown(&self, kernels: &Kernels) -> Vec<&'static str> {
        let context = kernels.context();
        let optional = shaders().filter(|spec| !spec.features.is_empty() && spec.offered(context));
        let known = |name: &str| self.right.contains(name) || self.left_out.0.contains_key(name);
        optional.map(|spec| spec.name).filter(|name| !known(name)).collect()
    }

    /// Takes a verdict of [`prove_kernel`] in.
    pub fn add(&mut self, kernel: &str, verdict: Option<WhyLeftOut>) {
        match verdict {
            None => _ = self.right.insert(kernel.to_owned()),
            Some(why) => _ = self.left_out.0.insert(kernel.to_owned(), why),
        }
    }
}

/// Proves every kernel that `proofs` does not know, and waits for each.
///
/// # Errors
/// `DeviceError::Lost` when a kernel takes the device along. It is then left out: call this again with kernels of a new device
/// and the same proofs. Where losing the device is too much, prove in a process of its own, kernel by kernel
/// ([`Proofs::unknown`], [`prove_kernel`]).
pub fn prove(kernels: &Kernels, proofs: &mut Proofs) -> Result<()> {
    proofs.renew(kernels);
    for kernel in proofs.unknown(kernels) {
        match prove_kernel(kernels, kernel) {
            Ok(verdict) => proofs.add(kernel, verdict),
            Err(error) => {
                proofs.add(kernel, Some(WhyLeftOut::Fatal(error.to_string())));
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Runs the first of a kernel's cases that this device computes; `None` if all was right. At the setting that it takes by itself:
/// but kernels on matrices at every setting that the device holds, since their larger tiles are for problems that no small case is.
///
/// # Errors
/// A lost device.
pub fn prove_kernel(kernels: &Kernels, kernel: &str) -> Result<Option<WhyLeftOut>> {
    let kernels = kernels.leaving_out(LeftOut::default());
    let on_matrices = shaders().any(|spec| spec.name == kernel && spec.cooperative != Cooperative::NONE);
    for case in cases().iter().filter(|case| case.kernel() == kernel) {
        if let Some(verdict) = verdict(case, &kernels, on_matrices)? {
            return Ok(verdict.err().map(WhyLeftOut::Wrong));
        }
    }
    // Never right without a comparison.
    Ok(Some(WhyLeftOut::Wrong("none of its cases runs on this device".to_owned())))
}

/// Whether a case is right, at every setting or at that of the device alone, or what is wrong; `None` if the device does not
/// compute it.
///
/// # Errors
/// A lost device.
fn verdict(case: &Case, kernels: &Kernels, every_setting: bool) -> Result<Option<Result<(), String>>> {
    let run = || if every_setting { case.run(kernels) } else { case.run_once(kernels) };
    // wgpu's compilers panic on some shaders that its validation accepts.
    let Ok(outcomes) = catch_unwind(AssertUnwindSafe(run)) else {
        return Ok(Some(Err("it makes wgpu panic".to_owned())));
    };
    let outcomes = match outcomes {
        Ok(outcomes) => outcomes,
        Err(error) if error.is_loss() => return Err(error),
        Err(error) => return Ok(Some(Err(error.to_string()))),
    };
    let mut compared = outcomes.into_iter().filter(|outcome| !outcome.skipped).peekable();
    if compared.peek().is_none() {
        return Ok(None);
    }
    let wrong = compared.find_map(|outcome| outcome.verdict.err());
    Ok(Some(wrong.map_or(Ok(()), |problem| Err(format!("{}: {problem}", case.id())))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::super::compare::Tolerance;
    use super::super::{Case, name_of, outcome};
    use super::*;
    use crate::adapter::Tuning;
    use crate::cost::Cost;
    use crate::error::Error;
    use crate::op::{Op, Variant, anything};
    use crate::plan::{Draft, Plan};

    crate::params! {
        /// As in the shader.
        struct Params { elements: u32 }
    }

    crate::args! {
        /// One buffer.
        struct Args {
            /// Written.
            values: Write,
        }
    }

    /// Writes a constant: 1 by the first shader, 2 by the second, and the third is none.
    #[derive(Debug, Clone, Copy, PartialEq)]
    struct Ones(u32);

    macro_rules! writes {
        ($name:literal, $value:literal) => {
            Variant::<Ones>::new(
                (
                    $name,
                    concat!(
                        "override WORKGROUP: u32 = 64u;
                         struct Params { elements: u32 }
                         @group(0) @binding(0) var<uniform> params: Params;
                         @group(0) @binding(1) var<storage, read_write> values: array<f32>;
                         @compute @workgroup_size(WORKGROUP) fn main(@builtin(global_invocation_id) id: vec3<u32>) {
                             if (id.x < params.elements) { values[id.x] = ",
                        $value,
                        "; }
                         }"
                    ),
                ),
                1,
                |op, _, _| Ok(Draft::elements(64, op.0.into())),
                anything,
            )
        };
    }

    impl Op for Ones {
        type Args<T: Copy> = Args<T>;
        type Params = Params;
        const NAME: &'static str = "ones";
        const VARIANTS: &'static [Variant<Self>] =
            &[writes!("ones", "1.0"), writes!("ones_wrong", "2.0"), writes!("ones_refused", "nothing")];

        fn params(&self, _: &Plan) -> Params {
            Params { elements: self.0 }
        }

        fn bytes(&self) -> Args<u64> {
            Args { values: 4 * u64::from(self.0) }
        }

        fn cost(&self) -> Cost {
            Cost { flops: 0, bytes: 4 * u64::from(self.0) }
        }
    }

    fn case(variant: &'static Variant<Ones>) -> Case {
        Case::new(variant.spec.name, "5", move |lab| {
            let values = lab.output(5)?;
            let args = Args { values: &values.region };
            lab.launch(|recording| recording.add_variant(variant, &Ones(5), args, Tuning::Auto))?;
            let comparison = lab.compare(&values, &[1.0; 5], Tolerance::EXACT)?;
            Ok(vec![outcome(name_of(Tuning::Auto), vec![comparison])])
        })
    }

    fn kernels() -> Kernels {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
        let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default())).unwrap();
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default())).unwrap();
        Kernels::new(&device, &queue).unwrap()
    }

    /// Passes naga's validation; its HLSL writer, which wgpu runs on DX12, panics.
    const PANICS: &str = "enable f16;
        enable wgpu_cooperative_matrix;
        var<workgroup> sh: array<f32, 256>;
        @compute @workgroup_size(32) fn main() {
            coopStoreT(coopLoadT<coop_mat16x16<f32, C>>(&sh[0], 16u), &sh[0], 16u);
        }";

    fn panics() -> Case {
        Case::new("panics", "1", |_| {
            let module = naga::front::wgsl::parse_str(PANICS).unwrap();
            let all = (naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
            let info = naga::valid::Validator::new(all.0, all.1).validate(&module).unwrap();
            let (mut text, options) = (String::new(), naga::back::hlsl::Options::default());
            let pipeline = naga::back::hlsl::PipelineOptions::default();
            let written = naga::back::hlsl::Writer::new(&mut text, &options, &pipeline).write(&module, &info, None);
            Err(Error::problem("panics", format!("{:?}", written.is_ok())))
        })
    }

    #[test]
    fn planted_kernels_are_left_out_and_right_ones_are_not() {
        let kernels = kernels();
        let of = |case: Case| verdict(&case, &kernels, false).unwrap().unwrap();
        let [right, wrong, refused] = [0, 1, 2].map(|index| of(case(&Ones::VARIANTS[index])));
        assert_eq!(right, Ok(()));
        assert!(wrong.unwrap_err().starts_with("ones_wrong/5: relative error 1.00e0"));
        assert!(refused.unwrap_err().contains("nothing"));
        assert_eq!(of(panics()), Err("it makes wgpu panic".to_owned()));
        let larger = || {
            Case::new("larger", "1", |lab| {
                let right = |tuning| if tuning == Tuning::Auto { &[1.0; 5] } else { &[2.0; 5] };
                let tried = lab.settings(1).map(|tuning| {
                    let values = lab.output(5)?;
                    let args = Args { values: &values.region };
                    lab.launch(|recording| recording.add_variant(&Ones::VARIANTS[0], &Ones(5), args, Tuning::Auto))?;
                    let comparison = lab.compare(&values, right(tuning), Tolerance::EXACT)?;
                    Ok(outcome(name_of(tuning), vec![comparison]))
                });
                tried.collect()
            })
        };
        assert_eq!(of(larger()), Ok(()));
        assert!(verdict(&larger(), &kernels, true).unwrap().unwrap().unwrap_err().starts_with("larger/1: "));
        // The device is as it was.
        assert_eq!(of(case(&Ones::VARIANTS[0])), Ok(()));
    }

    #[test]
    fn proofs_of_other_shaders_are_forgotten_and_what_is_left_out_does_not_run() {
        let kernels = kernels();
        let mut proofs = Proofs::default();
        proofs.add("residual_add_vec4", Some(WhyLeftOut::Wrong("planted".to_owned())));
        let chosen = |kernels: &Kernels| {
            let op = crate::kernels::ResidualAdd { elements: 8, factor: 1.0 };
            crate::op::choose(&op, kernels.context()).unwrap().0.spec.name
        };
        assert_eq!(chosen(&kernels), "residual_add_vec4");
        let leaving_out = kernels.leaving_out(proofs.left_out.clone());
        assert_eq!(chosen(&leaving_out), "residual_add");
        proofs.renew(&kernels);
        assert_eq!(proofs.left_out, LeftOut::default());
        proofs.add("norm", None);
        let known = proofs.clone();
        proofs.renew(&kernels);
        assert_eq!(proofs, known);
        proofs.renew(&kernels.with_shader_checks(true));
        assert_eq!(proofs.right.len(), 0);
        // Nothing optional is on.
        assert_eq!(proofs.unknown(&kernels), Vec::<&str>::new());
    }
}
