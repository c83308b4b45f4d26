//! burn's side: the same problems by its tensor operations, and by its `attention` where it has one.

use burn::tensor::activation::softmax;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::wgpu::WgpuSetup;
use burn::tensor::{Bool, Device, Tensor, TensorData};

use crate::problem::{Matmul, MlaDecode, Prefill};
use crate::{Failure, Side};

/// Opens burn's default adapter. burn asks for features that its compiler needs, so it opens the device, and the setup
/// hands the same device to us.
pub fn open() -> Result<(Device, WgpuSetup), Failure> {
    Ok(Device::wgpu_options().init_with_setup()?)
}

struct Burn<const D: usize> {
    device: Device,
    compute: Box<dyn Fn() -> Tensor<D>>,
    /// Kept until the device is done: a result that nobody holds need not be computed.
    result: Option<Tensor<D>>,
}

impl<const D: usize> Side for Burn<D> {
    fn run(&mut self) -> Result<(), Failure> {
        self.result = Some((self.compute)());
        Ok(self.device.sync()?)
    }

    fn result(&self) -> Result<Vec<f32>, Failure> {
        let result = self.result.clone().ok_or("burn's result was read before it was computed")?;
        Ok(result.try_into_vec_as::<f32>()?)
    }
}

fn ready<const D: usize>(device: &Device, compute: impl Fn() -> Tensor<D> + 'static) -> Result<Box<dyn Side>, Failure> {
    device.sync()?;
    Ok(Box::new(Burn { device: device.clone(), compute: Box::new(compute), result: None }))
}

fn tensor<const D: usize>(device: &Device, values: &[f32], shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

/// The right operand lies as in burn's `Linear`, `[inner, cols]`.
pub fn matmul(device: &Device, inputs: &Matmul) -> Result<Box<dyn Side>, Failure> {
    let x = tensor(device, &inputs.x, [inputs.rows, inputs.inner]);
    let w: Vec<f32> =
        (0..inputs.inner).flat_map(|inner| inputs.w.chunks(inputs.inner).map(move |row| row[inner])).collect();
    let w = tensor(device, &w, [inputs.inner, inputs.cols]);
    ready(device, move || x.clone().matmul(w.clone()))
}

pub fn prefill_operations(device: &Device, inputs: &Prefill) -> Result<Box<dyn Side>, Failure> {
    let &Prefill { heads, tokens, width, .. } = inputs;
    let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|values| tensor(device, values, [heads, tokens, width]));
    let hidden = Tensor::<2, Bool>::tril_mask([tokens, tokens], 0, device).unsqueeze::<3>();
    let hidden = hidden.expand([heads, tokens, tokens]);
    let scale = inputs.scale();
    ready(device, move || {
        let scores = q.clone().matmul(k.clone().transpose()) * scale;
        softmax(scores.mask_fill(hidden.clone(), f32::NEG_INFINITY), 2).matmul(v.clone())
    })
}

pub fn prefill_attention(device: &Device, inputs: &Prefill) -> Result<Box<dyn Side>, Failure> {
    let shape = [1, inputs.heads, inputs.tokens, inputs.width];
    let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|values| tensor(device, values, shape));
    // Its default scale is 1/√width; an explicit one would rule its fused kernels out.
    let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
    ready(device, move || attention(q.clone(), k.clone(), v.clone(), None, None, options))
}

pub fn mla_decode(device: &Device, inputs: &MlaDecode) -> Result<Box<dyn Side>, Failure> {
    let q = tensor(device, &inputs.queries(), [inputs.heads, inputs.key_width()]);
    let keys = tensor(device, &inputs.keys(), [inputs.cached, inputs.key_width()]);
    let values = tensor(device, &inputs.latents, [inputs.cached, inputs.latent]);
    let scale = inputs.scale();
    ready(device, move || {
        let scores = q.clone().matmul(keys.clone().transpose()) * scale;
        softmax(scores, 1).matmul(values.clone())
    })
}
