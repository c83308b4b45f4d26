//! The three problems: sizes, inputs, and how many operations they take.

use clap::ValueEnum;

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Case {
    Matmul,
    Prefill,
    MlaDecode,
}

/// `y [rows, cols] = x [rows, inner] · wᵀ`
pub struct Matmul {
    pub rows: usize,
    pub inner: usize,
    pub cols: usize,
    /// `[rows, inner]`
    pub x: Vec<f32>,
    /// `[cols, inner]`, as in checkpoints.
    pub w: Vec<f32>,
}

/// Causal attention of every token over itself and all before it; scale `1/√width`.
pub struct Prefill {
    pub heads: usize,
    pub tokens: usize,
    pub width: usize,
    /// Each `[heads, tokens, width]`.
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// One query over a cache of latents, absorbed: a key is (latent, rope), a value is the latent; scale `1/√(key width)`.
pub struct MlaDecode {
    pub heads: usize,
    pub latent: usize,
    pub rope: usize,
    pub cached: usize,
    /// `[heads, latent]`
    pub q_latent: Vec<f32>,
    /// `[heads, rope]`
    pub q_rope: Vec<f32>,
    /// `[cached, latent]`
    pub latents: Vec<f32>,
    /// `[cached, rope]`
    pub ropes: Vec<f32>,
}

impl Matmul {
    pub fn new() -> Self {
        let (rows, inner, cols) = (1024, 1024, 1024);
        let mut random = Random::new();
        Matmul { rows, inner, cols, x: random.values(rows * inner), w: random.values(cols * inner) }
    }

    pub fn operations(&self) -> usize {
        2 * self.rows * self.inner * self.cols
    }

    pub fn describe(&self) -> String {
        format!("{} x {} x {} f32", self.rows, self.inner, self.cols)
    }
}

impl Prefill {
    pub fn new() -> Self {
        let (heads, tokens, width) = (16, 512, 128);
        let mut random = Random::new();
        let mut values = || random.values(heads * tokens * width);
        Prefill { heads, tokens, width, q: values(), k: values(), v: values() }
    }

    pub fn scale(&self) -> f32 {
        (self.width as f32).sqrt().recip()
    }

    /// Of the visible pairs only, although operations on whole tensors compute the masked half as well.
    pub fn operations(&self) -> usize {
        let visible = self.tokens * (self.tokens + 1) / 2;
        4 * self.heads * visible * self.width
    }

    pub fn describe(&self) -> String {
        let Prefill { heads, tokens, width, .. } = self;
        format!("{tokens} queries x {tokens} keys, {heads} heads x {width}, f32, causal on every side")
    }
}

impl MlaDecode {
    pub fn new() -> Self {
        let (heads, latent, rope, cached) = (16, 512, 64, 4096);
        let mut random = Random::new();
        MlaDecode {
            heads,
            latent,
            rope,
            cached,
            q_latent: random.values(heads * latent),
            q_rope: random.values(heads * rope),
            latents: random.values(cached * latent),
            ropes: random.values(cached * rope),
        }
    }

    pub fn key_width(&self) -> usize {
        self.latent + self.rope
    }

    pub fn scale(&self) -> f32 {
        (self.key_width() as f32).sqrt().recip()
    }

    /// `[heads, latent + rope]`
    pub fn queries(&self) -> Vec<f32> {
        side_by_side(&self.q_latent, self.latent, &self.q_rope, self.rope)
    }

    /// `[cached, latent + rope]`
    pub fn keys(&self) -> Vec<f32> {
        side_by_side(&self.latents, self.latent, &self.ropes, self.rope)
    }

    pub fn operations(&self) -> usize {
        2 * self.heads * self.cached * (self.key_width() + self.latent)
    }

    pub fn describe(&self) -> String {
        let MlaDecode { heads, latent, rope, cached, .. } = self;
        format!("one query, {heads} heads, latent {latent} + rope {rope}, {cached} cached tokens, f32, absorbed")
    }
}

/// Rows of `a`, each followed by the row of `b`.
pub fn side_by_side(a: &[f32], a_width: usize, b: &[f32], b_width: usize) -> Vec<f32> {
    a.chunks(a_width).zip(b.chunks(b_width)).flat_map(|(a, b)| [a, b].concat()).collect()
}

/// `[outer, inner, width]` as `[inner, outer, width]`.
pub fn swap_axes(values: &[f32], inner: usize, width: usize) -> Vec<f32> {
    (0..inner)
        .flat_map(|column| values.chunks(inner * width).map(move |row| &row[column * width..][..width]))
        .flatten()
        .copied()
        .collect()
}

struct Random(fastrand::Rng);

impl Random {
    fn new() -> Self {
        Random(fastrand::Rng::with_seed(20))
    }

    /// Uniform, of mean 0 and deviation 1.
    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| 3f32.sqrt() * (2.0 * self.0.f32() - 1.0)).collect()
    }
}
