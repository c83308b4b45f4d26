//! One attention layer at the paper's 120M shape: wall time of a submission and its end, per prefill and per decode step.
//!
//! `cargo bench -- decode` selects. Compare rows of one run only: machines drift.

use criterion::Criterion;
use egmla::attention::{
    Attention, CacheOptions, DecodePath, LatentCache, Mode, StepInput, Workspace, WorkspaceOptions,
};
use egmla::check::random::{Random, attention_weights};
use egmla::check::readback;
use egmla::config::{AttentionConfig, GateConfig, GateSite, RopeConfig};
use egmla::kernel::{Kernels, Recording, Region};
use egmla::plan::Storage;
use egmla::wgpu;

type Failure = Box<dyn std::error::Error>;

/// 12 heads × 64, rope 64, and a gate of 256 over a vocabulary that is smaller than the paper's 50 304: no row of it is
/// read that the tokens do not name.
fn config(d_latent: u32, site: Option<GateSite>) -> AttentionConfig {
    let gate = site.map(|site| GateConfig {
        vocab_size: 4096,
        d_gate: 256,
        site,
        activation: Default::default(),
        norm: Default::default(),
        norm_eps: 1e-5,
    });
    AttentionConfig {
        hidden_size: 768,
        n_head: 12,
        d_latent,
        d_q_latent: None,
        d_nope: 64,
        d_rope: 64,
        d_value: 64,
        attention_bias: false,
        gate,
        rope: RopeConfig::default(),
    }
}

struct Bench {
    kernels: Kernels,
    queue: wgpu::Queue,
}

impl Bench {
    fn open() -> Result<Self, Failure> {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
        let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;
        println!("adapter: {:?}", adapter.get_info());
        Ok(Bench { kernels: Kernels::new(&device)?, queue })
    }

    /// Records, submits and waits.
    fn step(&self, rig: &Rig, input: StepInput<'_>, path: DecodePath) -> egmla::Result<()> {
        let step = rig.cache.plan_step(input)?;
        let mut recording = Recording::new(&self.kernels);
        let Rig { attention, cache, workspace, hidden, out } = rig;
        attention.forward(&mut recording, cache, 0, &step, workspace, path, hidden, out)?;
        readback::submit(&recording, &self.queue)?;
        let one = Region::new(&out.buffer, 0, 4);
        readback::wait(readback::read(&self.kernels, &self.queue, &[&one]))?;
        Ok(())
    }
}

struct Rig {
    attention: Attention,
    cache: LatentCache,
    workspace: Workspace,
    hidden: Region,
    out: Region,
}

impl Rig {
    fn new(bench: &Bench, config: &AttentionConfig, capacity: u32, tokens: u32) -> egmla::Result<Self> {
        let kernels = &bench.kernels;
        let attention = Attention::new(kernels, config, &attention_weights(config, true, 1)?, Storage::F16)?;
        let options = CacheOptions { n_layer: 1, batch: 1, capacity, storage: Storage::F16 };
        let cache = LatentCache::new(kernels, config, options)?;
        let workspace = Workspace::new(&cache, WorkspaceOptions::new(tokens))?;
        let values = Random::new(2).values((tokens * config.hidden_size) as usize, 1.0);
        let hidden = Region::from(&kernels.upload("hidden", bytemuck::cast_slice(&values))?);
        let out = Region::from(&kernels.allocate("out", 4 * values.len() as u64)?);
        Ok(Rig { attention, cache, workspace, hidden, out })
    }
}

fn run(criterion: &mut Criterion) -> Result<(), Failure> {
    let bench = Bench::open()?;
    let prefill_tokens = 256;
    let models = [
        ("mla_r256", config(256, None)),
        ("egmla_r64_latent", config(64, Some(GateSite::Latent))),
        ("egmla_r64_up_projected", config(64, Some(GateSite::UpProjected))),
    ];
    for (name, config) in models {
        let cached = 1024;
        let mut rig = Rig::new(&bench, &config, cached + 1, prefill_tokens)?;
        let ids = Random::new(3).ids(prefill_tokens as usize, 4096);
        let prefill = StepInput { mode: Mode::Prefill, counts: &[prefill_tokens], token_ids: Some(&ids) };
        bench.step(&rig, prefill, DecodePath::Auto)?;
        criterion.bench_function(&format!("prefill/{name}/{prefill_tokens}"), |bencher| {
            bencher.iter(|| bench.step(&rig, prefill, DecodePath::Auto));
        });
        while rig.cache.lengths()[0] < cached {
            bench.step(&rig, prefill, DecodePath::Auto)?;
            let step = rig.cache.plan_step(prefill)?;
            rig.cache.commit(&step)?;
        }
        let decode = StepInput { mode: Mode::Decode, counts: &[1], token_ids: Some(&ids[..1]) };
        for (label, path) in [("expanded", DecodePath::Expanded), ("absorbed", DecodePath::Absorbed)] {
            if rig.attention.decode_path(path).is_err() {
                continue;
            }
            bench.step(&rig, decode, path)?;
            criterion.bench_function(&format!("decode/{name}/{label}/{cached}"), |bencher| {
                bencher.iter(|| bench.step(&rig, decode, path));
            });
        }
    }
    Ok(())
}

fn main() {
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    if let Err(failure) = run(&mut criterion) {
        eprintln!("error: {failure}");
        std::process::exit(1);
    }
    criterion.final_summary();
}
