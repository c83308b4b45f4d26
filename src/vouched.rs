//! The one `unsafe` of the library: its own shaders run without wgpu's run-time checks.
//!
//! wgpu gives every loop a counter and every index a bound. Compilers of GPUs then neither unroll nor keep arrays in registers:
//! kernels of this library took 3 to 10 times as long on the first GPU that they met. Its shaders are fixed texts that need no
//! such checks when the library itself chooses what they run on.

use std::any::TypeId;
use std::sync::LazyLock;

use crate::kernels::REGISTRY;
use crate::op::{Op, Variant};

/// Who adds a dispatch to a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caller {
    /// The library's layer, cache, decoder, checks and benches: they write every table that a shader takes indices from.
    Library,
    /// An application, whose tables may hold anything.
    Application,
}

/// Operations whose shaders take no index from a buffer: sizes alone bound what they touch.
const WITHOUT_TABLES: [&str; 8] =
    ["matmul", "norm", "residual_add", "rope", "roofline_cooperative", "roofline_copy", "roofline_fma", "swiglu"];

/// Whether the library vouches for the shaders that an operation lists.
pub(crate) fn vouches<O: Op>(caller: Caller) -> bool {
    static OWN: LazyLock<Vec<TypeId>> = LazyLock::new(|| REGISTRY.iter().map(|op| op.id()).collect());
    OWN.contains(&TypeId::of::<O>()) && (caller == Caller::Library || WITHOUT_TABLES.contains(&O::NAME))
}

/// The listed shader of this name and text, to be planned in its place: an application may pass a copy with another draft.
pub(crate) fn listed<O: Op>(variant: &Variant<O>) -> Option<&'static Variant<O>> {
    let is_same = |own: &&Variant<O>| (own.spec.name, own.spec.source) == (variant.spec.name, variant.spec.source);
    O::VARIANTS.iter().find(is_same)
}

/// Compiles the text of a shader that [`vouches`] answers for, without checks of loops and indices.
pub(crate) fn shader_module(device: &wgpu::Device, label: &str, source: &'static str) -> wgpu::ShaderModule {
    let descriptor =
        wgpu::ShaderModuleDescriptor { label: Some(label), source: wgpu::ShaderSource::Wgsl(source.into()) };
    let checks = wgpu::ShaderRuntimeChecks {
        bounds_checks: false,
        force_loop_bounding: false,
        ..wgpu::ShaderRuntimeChecks::checked()
    };
    // SAFETY: without these checks a shader must end its loops and keep its indices within its arrays by itself. `vouches`
    // answers only for texts that operations of this crate list, planned by their own drafts.
    // Loops: each counts up to an override, a parameter or the length of a table's entry; `Draft::walks` and `check_widths`
    // refuse extents over `MAX_ITERATIONS`, and no loop changes its own counter otherwise. Those that look for a line of a table
    // halve what is left of it.
    // Indices into private and workgroup arrays: bounded by overrides; `Variant::assumes` states what each shader relies on, and
    // tests hold it against every plan. Indices into buffers: `Op::bytes` says what each must hold, `Region::check` refuses
    // less. Indices that come from a buffer come from tables that the library itself fills from checked lengths and ids; an
    // operation with such tables is vouched for only when the library adds it. Divisions stay checked.
    #[expect(unsafe_code, reason = "wgpu leaves out its checks for those only who vouch for the shader")]
    unsafe {
        device.create_shader_module_trusted(descriptor, checks)
    }
}
