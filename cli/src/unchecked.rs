//! All `unsafe` of the program: wgpu's unchecked functions, each behind a safe function that upholds its conditions. The library
//! forbids `unsafe`, and a test looks for it everywhere else. `tests/common` and `tests/bench` include this file.

use egmla::low_level::{COOPERATIVE_FEATURES, Cooperative};
use egmla::wgpu;

/// The features to open a device with for cooperative matrices, and the adapter's sizes; nothing if the kernels use none of
/// them.
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

/// The same without cooperative matrices.
pub fn none() -> (wgpu::Features, wgpu::ExperimentalFeatures, Cooperative) {
    (wgpu::Features::empty(), wgpu::ExperimentalFeatures::disabled(), Cooperative::NONE)
}

/// Bytes of a driver's cache of pipelines that some driver did write: they come from [`Pipelines::of`] in this run or, sealed,
/// in an earlier one.
#[derive(Debug, PartialEq, Eq)]
pub struct Pipelines(Vec<u8>);

impl Pipelines {
    /// The present content of a cache.
    pub fn of(cache: &wgpu::PipelineCache) -> Option<Self> {
        cache.get_data().map(Pipelines)
    }

    /// A checksum before the bytes: a file that was cut or changed never reaches the driver.
    pub fn seal(&self) -> Vec<u8> {
        let mut sealed = checksum(&self.0).to_le_bytes().to_vec();
        sealed.extend_from_slice(&self.0);
        sealed
    }

    /// The bytes behind the checksum, where they are those that were sealed.
    pub fn unseal(sealed: &[u8]) -> Option<Self> {
        let (sum, content) = sealed.split_first_chunk::<8>()?;
        (u64::from_le_bytes(*sum) == checksum(content)).then(|| Pipelines(content.to_vec()))
    }
}

/// FNV-1a: for accidents, not for attacks; who can write the user's cache folder can replace the program.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// A driver's cache of compiled pipelines, with what an earlier run kept. The device must have
/// `wgpu::Features::PIPELINE_CACHE`; what wgpu says against it goes to the caller's error scope.
pub fn pipeline_cache(device: &wgpu::Device, kept: Option<&Pipelines>) -> wgpu::PipelineCache {
    let data = kept.map(|kept| kept.0.as_slice());
    let descriptor = wgpu::PipelineCacheDescriptor { label: Some("egmla"), data, fallback: true };
    // SAFETY: bytes that are handed over must be those that `get_data` returned. A `Pipelines` is made of nothing else: its
    // bytes came from there in this run, or passed the checksum that an earlier run put before them. wgpu itself refuses those
    // of another adapter or driver.
    #[expect(unsafe_code, reason = "wgpu cannot prove where a driver's bytes come from")]
    unsafe {
        device.create_pipeline_cache(&descriptor)
    }
}

#[cfg(test)]
mod tests {
    use super::Pipelines;

    #[test]
    fn a_damaged_file_is_not_used() {
        let sealed = Pipelines(b"pipelines".to_vec()).seal();
        assert_eq!(Pipelines::unseal(&sealed), Some(Pipelines(b"pipelines".to_vec())));
        assert_eq!(Pipelines::unseal(&sealed[..sealed.len() - 1]), None);
        assert_eq!(Pipelines::unseal(b"short"), None);
        let mut changed = sealed;
        changed[10] ^= 1;
        assert_eq!(Pipelines::unseal(&changed), None);
    }
}
