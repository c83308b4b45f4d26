//! candle's side, on the CPU: the same problems by its tensor operations.

use candle_core::{Device, Result, Shape, Tensor};
use candle_nn::ops::softmax_last_dim;

use crate::problem::{Matmul, MlaDecode, Prefill};
use crate::{Failure, Side};

struct Candle {
    compute: Box<dyn Fn() -> Result<Tensor>>,
    result: Option<Tensor>,
}

impl Side for Candle {
    fn run(&mut self) -> std::result::Result<(), Failure> {
        self.result = Some((self.compute)()?);
        Ok(())
    }

    fn result(&self) -> std::result::Result<Vec<f32>, Failure> {
        let result = self.result.as_ref().ok_or("candle's result was read before it was computed")?;
        Ok(result.flatten_all()?.to_vec1()?)
    }
}

fn ready(compute: impl Fn() -> Result<Tensor> + 'static) -> Box<dyn Side> {
    Box::new(Candle { compute: Box::new(compute), result: None })
}

fn tensor(values: &[f32], shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values.to_vec(), shape.into(), &Device::Cpu)
}

/// The right operand lies as in candle's `Linear`, `[cols, inner]`.
pub fn matmul(inputs: &Matmul) -> Result<Box<dyn Side>> {
    let x = tensor(&inputs.x, (inputs.rows, inputs.inner))?;
    let w = tensor(&inputs.w, (inputs.cols, inputs.inner))?;
    Ok(ready(move || x.matmul(&w.t()?)))
}

pub fn prefill(inputs: &Prefill) -> Result<Box<dyn Side>> {
    let &Prefill { heads, tokens, width, .. } = inputs;
    let load = |values: &[f32]| tensor(values, (heads, tokens, width));
    let (q, k, v) = (load(&inputs.q)?, load(&inputs.k)?, load(&inputs.v)?);
    let hidden = |query: usize, key: usize| if key > query { f32::NEG_INFINITY } else { 0.0 };
    let mask: Vec<f32> = (0..tokens).flat_map(|query| (0..tokens).map(move |key| hidden(query, key))).collect();
    let mask = tensor(&mask, (1, tokens, tokens))?;
    let scale = f64::from(inputs.scale());
    Ok(ready(move || softmax_last_dim(&(q.matmul(&k.t()?)? * scale)?.broadcast_add(&mask)?)?.matmul(&v)))
}

pub fn mla_decode(inputs: &MlaDecode) -> Result<Box<dyn Side>> {
    let q = tensor(&inputs.queries(), (inputs.heads, inputs.key_width()))?;
    let keys = tensor(&inputs.keys(), (inputs.cached, inputs.key_width()))?;
    let values = tensor(&inputs.latents, (inputs.cached, inputs.latent))?;
    let scale = f64::from(inputs.scale());
    Ok(ready(move || softmax_last_dim(&(q.matmul(&keys.t()?)? * scale)?)?.matmul(&values)))
}
