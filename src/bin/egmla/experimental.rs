//! The one place that accepts wgpu's experiments: `tests/common` takes this file too.

use egmla::kernels::COOPERATIVE_FEATURES;
use egmla::plan::Cooperative;
use egmla::wgpu;

/// What to open an adapter's device with for the kernels that multiply cooperative matrices, and which it has: nothing where
/// it has none that they use.
pub fn cooperative(adapter: &wgpu::Adapter) -> (wgpu::Features, wgpu::ExperimentalFeatures, Cooperative) {
    let matrices = Cooperative::of(&adapter.cooperative_matrix_properties());
    let info = adapter.get_info();
    // Mesa's software adapter lists its matrices whatever the width of its vectors. With 4 lanes it then refuses the device,
    // which wgpu takes for a defect and panics; with 16 it crashes in compiling.
    let unfit = info.device_type == wgpu::DeviceType::Cpu && (info.subgroup_min_size, info.subgroup_max_size) != (8, 8);
    if matrices == Cooperative::NONE || unfit || !adapter.features().contains(COOPERATIVE_FEATURES) {
        return none();
    }
    // SAFETY: what wgpu leaves unchecked of this feature is checked here. Only shaders of this crate are compiled; they load
    // and store whole matrices inside of their workgroup arrays alone, at offsets that their plans bound, in control flow that
    // is the same in all of a subgroup; and `Cooperative::of` keeps to sizes and types that the adapter lists.
    #[expect(unsafe_code, reason = "wgpu hands out its experiments to those only who vouch for their use")]
    let accepted = unsafe { wgpu::ExperimentalFeatures::enabled() };
    (COOPERATIVE_FEATURES, accepted, matrices)
}

/// What opens a device without them.
pub fn none() -> (wgpu::Features, wgpu::ExperimentalFeatures, Cooperative) {
    (wgpu::Features::empty(), wgpu::ExperimentalFeatures::disabled(), Cooperative::NONE)
}
