//! The crate inside of an application: the caller's device, encoder and submission, between the caller's own render passes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::{Arc, Mutex};

use egmla::attention::{
    Attention, AttentionOptions, CacheOptions, DecodePath, LatentCache, Mode, Step, StepTokens, Tokens,
};
use egmla::config::{Activation, AttentionConfig, GateConfig, GateNorm, GateSite};
use egmla::error::{ArgumentError, BufferError};
use egmla::low_level::kernels::{CacheCopy, cache_copy};
use egmla::random::{Random, attention_weights};
use egmla::readback::{read, read_f32, wait};
use egmla::reference::{History, Layer};
use egmla::{Error, Kernels, Recording, Region, wgpu};

/// Width and height of the picture: 64 pixels of 4 bytes are one row of a copy, 256 bytes.
const SIDE: u32 = 64;
const SEED: u64 = 7;

/// What an application has before it hears of this crate.
struct App {
    device: wgpu::Device,
    queue: wgpu::Queue,
    errors: Arc<Mutex<Vec<String>>>,
}

impl App {
    /// WebGPU's default limits and no feature.
    fn new() -> Self {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
        let backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::all());
        let mut adapters = pollster::block_on(instance.enumerate_adapters(backends));
        adapters.sort_by_key(|adapter| adapter.get_info().backend == wgpu::Backend::Gl);
        let adapter = adapters.first().expect(
            "no GPU adapter: run `sh scripts/setup.sh`, which installs a software Vulkan driver (Mesa lavapipe)",
        );
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("the application"),
            required_limits: wgpu::Limits::default(),
            ..Default::default()
        }))
        .expect("a device with WebGPU's default limits");
        let errors = Arc::new(Mutex::new(Vec::new()));
        let log = errors.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| log.lock().unwrap().push(error.to_string())));
        App { device, queue, errors }
    }

    fn assert_no_errors(&self) {
        let errors = self.errors.lock().unwrap();
        assert_eq!(errors.len(), 0, "wgpu reported: {}", errors.join("; "));
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("frame") })
    }
}

/// The application's picture: its left half and its last quarter are drawn in passes of their own.
struct Picture {
    texture: wgpu::Texture,
    view: wgpu::TextureView,
    pipeline: wgpu::RenderPipeline,
    pixels: wgpu::Buffer,
}

/// A triangle over the whole target; the viewport cuts it.
const TRIANGLE: &str = "
    @vertex fn corner(@builtin(vertex_index) i: u32) -> @builtin(position) vec4<f32> {
        return vec4<f32>(f32(i & 1u) * 4.0 - 1.0, f32(i >> 1u) * 4.0 - 1.0, 0.0, 1.0);
    }
    @fragment fn colour() -> @location(0) vec4<f32> {
        return vec4<f32>(0.0, 1.0, 0.0, 1.0);
    }
";

impl Picture {
    fn new(app: &App) -> Self {
        let format = wgpu::TextureFormat::Rgba8Unorm;
        let texture = app.device.create_texture(&wgpu::TextureDescriptor {
            label: Some("picture"),
            size: wgpu::Extent3d { width: SIDE, height: SIDE, depth_or_array_layers: 1 },
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format,
            usage: wgpu::TextureUsages::RENDER_ATTACHMENT | wgpu::TextureUsages::COPY_SRC,
            view_formats: &[],
        });
        let module = app.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some("triangle"),
            source: wgpu::ShaderSource::Wgsl(TRIANGLE.into()),
        });
        let pipeline = app.device.create_render_pipeline(&wgpu::RenderPipelineDescriptor {
            label: Some("triangle"),
            layout: None,
            vertex: wgpu::VertexState {
                module: &module,
                entry_point: Some("corner"),
                compilation_options: Default::default(),
                buffers: &[],
            },
            primitive: wgpu::PrimitiveState::default(),
            depth_stencil: None,
            multisample: wgpu::MultisampleState::default(),
            fragment: Some(wgpu::FragmentState {
                module: &module,
                entry_point: Some("colour"),
                compilation_options: Default::default(),
                targets: &[Some(format.into())],
            }),
            multiview_mask: None,
            cache: None,
        });
        let pixels = app.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("pixels"),
            size: u64::from(4 * SIDE * SIDE),
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        let view = texture.create_view(&wgpu::TextureViewDescriptor::default());
        Picture { texture, view, pipeline, pixels }
    }

    /// Draws over `columns` from `left` on.
    fn draw(&self, encoder: &mut wgpu::CommandEncoder, load: wgpu::LoadOp<wgpu::Color>, left: u32, columns: u32) {
        let mut pass = encoder.begin_render_pass(&wgpu::RenderPassDescriptor {
            label: Some("triangle"),
            color_attachments: &[Some(wgpu::RenderPassColorAttachment {
                view: &self.view,
                depth_slice: None,
                resolve_target: None,
                ops: wgpu::Operations { load, store: wgpu::StoreOp::Store },
            })],
            ..Default::default()
        });
        pass.set_pipeline(&self.pipeline);
        pass.set_viewport(left as f32, 0.0, columns as f32, SIDE as f32, 0.0, 1.0);
        pass.draw(0..3, 0..1);
    }

    fn copy_out(&self, encoder: &mut wgpu::CommandEncoder) {
        encoder.copy_texture_to_buffer(
            self.texture.as_image_copy(),
            wgpu::TexelCopyBufferInfo {
                buffer: &self.pixels,
                layout: wgpu::TexelCopyBufferLayout { offset: 0, bytes_per_row: Some(4 * SIDE), rows_per_image: None },
            },
            self.texture.size(),
        );
    }
}

fn config(site: Option<GateSite>) -> AttentionConfig {
    AttentionConfig {
        hidden_size: 24,
        n_head: 3,
        d_latent: 10,
        d_q_latent: Some(14),
        d_nope: 6,
        d_rope: 4,
        d_value: 5,
        attention_bias: true,
        gate: site.map(|site| GateConfig {
            vocab_size: 11,
            d_gate: 7,
            tied: false,
            site,
            activation: Activation::Silu,
            norm: GateNorm::LayerNorm,
            norm_eps: 1e-5,
        }),
        ..AttentionConfig::default()
    }
}

/// A layer with its cache of two sequences, on the application's device.
struct Model {
    kernels: Kernels,
    config: AttentionConfig,
    attention: Attention,
    cache: LatentCache,
    /// The same layer in f64.
    reference: Layer,
}

impl Model {
    fn new(app: &App, config: AttentionConfig) -> Self {
        let kernels = Kernels::new(&app.device, &app.queue).unwrap();
        let weights = attention_weights(&config, true, SEED).unwrap();
        let attention = Attention::new(&kernels, &config, &weights, AttentionOptions::default()).unwrap();
        let options = CacheOptions { batch: 2, capacity: 16, max_tokens: 20, ..CacheOptions::default() };
        let cache = LatentCache::new(&attention, options).unwrap();
        let reference = Layer::new(config.clone(), &weights).unwrap();
        Model { kernels, config, attention, cache, reference }
    }

    /// Bytes of `tokens` rows of activations.
    fn bytes(&self, tokens: u32) -> u64 {
        4 * u64::from(tokens * self.config.hidden_size)
    }

    fn upload(&self, hidden: &[f32]) -> Region {
        Region::from(&self.kernels.upload("hidden", bytemuck::cast_slice(hidden)).unwrap())
    }

    /// A region of NaN.
    fn out(&self, tokens: u32) -> Region {
        self.upload(&vec![f32::NAN; (tokens * self.config.hidden_size) as usize])
    }

    fn hidden(&self, tokens: u32, seed: u64) -> Vec<f32> {
        Random::new(seed).values((tokens * self.config.hidden_size) as usize, 1.0)
    }

    fn ids(&self, tokens: u32, seed: u64) -> Vec<u32> {
        Random::new(seed).ids(tokens as usize, self.config.gate.as_ref().map_or(1, |gate| gate.vocab_size))
    }

    fn prepare(&mut self, mode: Mode, counts: &[u32], ids: &[u32]) -> Step {
        self.cache.prepare(mode, StepTokens { counts, ids: Some(ids) }).unwrap()
    }

    fn f32(&self, regions: &[&Region]) -> Vec<Vec<f32>> {
        wait(read_f32(&self.kernels, regions)).unwrap()
    }
}

/// Relative 2-norm error; NaN anywhere is no agreement.
fn assert_close(got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    assert!(got.iter().all(|value| value.is_finite()), "{got:?}");
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let error = square(&mut got.iter().zip(expected).map(|(&got, expected)| f64::from(got) - expected));
    let error = (error / square(&mut expected.iter().copied())).sqrt();
    assert!(error <= 2e-5, "relative error {error}");
}

#[test]
fn a_prefill_between_two_render_passes_in_one_submission() {
    let app = App::new();
    let picture = Picture::new(&app);
    for site in [None, Some(GateSite::UpProjected), Some(GateSite::Latent)] {
        let mut model = Model::new(&app, config(site));
        let (hidden, ids) = (model.hidden(12, 1), model.ids(12, 2));
        let (input, output) = (model.upload(&hidden), model.out(12));

        let mut encoder = app.encoder();
        picture.draw(&mut encoder, wgpu::LoadOp::Clear(wgpu::Color::RED), 0, SIDE / 2);
        let mut recording = Recording::new(&model.kernels);
        let tokens = Tokens { counts: &[7, 5], ids: Some(&ids), hidden: input, out: output.clone() };
        model.attention.prefill(&mut recording, &mut model.cache, tokens).unwrap();
        {
            let descriptor = wgpu::ComputePassDescriptor { label: Some("the application's"), timestamp_writes: None };
            let mut pass = encoder.begin_compute_pass(&descriptor);
            recording.record(&mut pass).unwrap();
        }
        // The left half must survive, the last quarter must be drawn.
        picture.draw(&mut encoder, wgpu::LoadOp::Load, 3 * SIDE / 4, SIDE / 4);
        picture.copy_out(&mut encoder);
        app.queue.submit([encoder.finish()]);

        let pixels = wait(read(&model.kernels, &[&Region::from(&picture.pixels)])).unwrap().remove(0);
        for (index, pixel) in (0..).zip(pixels.chunks_exact(4)) {
            let column = index % SIDE;
            let drawn = !(SIDE / 2..3 * SIDE / 4).contains(&column);
            let expected = if drawn { [0, 255, 0, 255] } else { [255, 0, 0, 255] };
            assert_eq!(pixel, expected, "column {column}, row {}", index / SIDE);
        }

        // Two sequences of their own: each begins at position 0 without a past.
        let hidden: Vec<f64> = hidden.iter().copied().map(f64::from).collect();
        let (first, second) = hidden.split_at(7 * model.config.hidden_size as usize);
        let mut expected = model.reference.forward(first, &ids[..7], &mut History::default());
        expected.extend(model.reference.forward(second, &ids[7..], &mut History::default()));
        assert_close(&model.f32(&[&output])[0], &expected);
        assert_eq!(model.cache.lengths(), [7, 5]);
    }
    app.assert_no_errors();
}

#[test]
fn two_steps_in_one_submission_equal_two_submissions() {
    let app = App::new();
    for (site, path) in [
        (None, DecodePath::Absorbed),
        (None, DecodePath::Expanded),
        (Some(GateSite::UpProjected), DecodePath::Auto),
        (Some(GateSite::Latent), DecodePath::Auto),
    ] {
        let run = |together: bool| {
            let mut model = Model::new(&app, config(site));
            model.cache.set_decode_path(path);
            let ids = model.ids(8, 3);
            let hidden = model.hidden(8, 4);
            let (past, new) = hidden.split_at(6 * model.config.hidden_size as usize);
            let (past, new) = (model.upload(past), model.upload(new));
            let (past_out, new_out) = (model.out(6), model.out(2));
            let mut recording = Recording::new(&model.kernels);
            let tokens = Tokens { counts: &[4, 2], ids: Some(&ids[..6]), hidden: past, out: past_out.clone() };
            model.attention.prefill(&mut recording, &mut model.cache, tokens).unwrap();
            let mut encoder = app.encoder();
            recording.encode(&mut encoder).unwrap();
            if !together {
                app.queue.submit([encoder.finish()]);
                encoder = app.encoder();
            }
            // The same recording, while the commands before have not run yet.
            recording.clear();
            let tokens = Tokens { counts: &[1, 1], ids: Some(&ids[6..]), hidden: new, out: new_out.clone() };
            model.attention.decode(&mut recording, &mut model.cache, tokens).unwrap();
            recording.encode(&mut encoder).unwrap();
            app.queue.submit([encoder.finish()]);
            assert_eq!(model.cache.lengths(), [5, 3]);
            model.f32(&[&past_out, &new_out])
        };
        let (together, apart) = (run(true), run(false));
        assert!(together.iter().flatten().all(|value| value.is_finite()));
        assert_eq!(together, apart, "{site:?} {path:?}");
    }
    app.assert_no_errors();
}

#[test]
fn one_recording_holds_several_steps() {
    let app = App::new();
    let mut model = Model::new(&app, config(Some(GateSite::UpProjected)));
    let (hidden, ids) = (model.hidden(5, 5), model.ids(5, 6));
    let width = model.config.hidden_size as usize;
    let rows: Vec<_> = hidden.chunks(width).map(|row| (model.upload(row), model.out(1))).collect();
    let mut recording = Recording::new(&model.kernels);
    // Sequence 1 alone, a token at a time.
    for ((input, output), id) in rows.iter().zip(&ids) {
        let (hidden, out) = (input.clone(), output.clone());
        let tokens = Tokens { counts: &[0, 1], ids: Some(std::slice::from_ref(id)), hidden, out };
        model.attention.decode(&mut recording, &mut model.cache, tokens).unwrap();
    }
    let mut encoder = app.encoder();
    recording.encode(&mut encoder).unwrap();
    app.queue.submit([encoder.finish()]);
    let outputs: Vec<_> = rows.iter().map(|(_, output)| output).collect();
    let hidden: Vec<f64> = hidden.iter().copied().map(f64::from).collect();
    let expected = model.reference.forward(&hidden, &ids, &mut History::default());
    assert_close(&model.f32(&outputs).concat(), &expected);
    assert_eq!(model.cache.lengths(), [0, 5]);
    app.assert_no_errors();
}

#[test]
fn errors_are_values_and_leave_everything_as_it_was() {
    let app = App::new();
    let mut model = Model::new(&app, config(Some(GateSite::UpProjected)));
    let tokens = 12;
    let (input, output) = (model.upload(&model.hidden(tokens, 1)), model.out(tokens));
    let ids = model.ids(tokens, 2);
    let mut recording = Recording::new(&model.kernels);
    // Something that was recorded before, so that "unchanged" is not "empty".
    let first = Tokens { counts: &[2, 0], ids: Some(&ids[..2]), hidden: input.clone(), out: output.clone() };
    model.attention.prefill(&mut recording, &mut model.cache, first).unwrap();
    let before = recording.dispatches();
    assert!(before > 0);

    let bytes = model.bytes(tokens);
    let mut refused = |counts: &[u32; 2], ids: &[u32], hidden: &Region, out: &Region| {
        let Model { attention, cache, .. } = &mut model;
        let tokens = Tokens { counts, ids: Some(ids), hidden: hidden.clone(), out: out.clone() };
        let error = attention.prefill(&mut recording, cache, tokens).unwrap_err();
        assert_eq!(recording.dispatches(), before, "{error}");
        assert_eq!(cache.lengths(), [2, 0], "{error}");
        assert!(!error.to_string().contains('\n'), "{error}");
        error
    };

    // No single dispatch binds both: the layer itself has to look.
    let error = refused(&[7, 5], &ids, &input, &input);
    assert!(matches!(error, Error::Buffer(BufferError::Aliased { .. })), "{error}");
    let both = Region::from(&app.device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("hidden and out"),
        size: 2 * bytes.next_multiple_of(256),
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    }));
    let first = Region::new(&both.buffer, 0, bytes);
    let second = Region::new(&both.buffer, bytes.next_multiple_of(256), bytes);
    let error = refused(&[7, 5], &ids, &first, &second);
    assert!(matches!(error, Error::Buffer(BufferError::Aliased { .. })), "{error}");

    let short = Region::new(&input.buffer, 0, bytes - 4);
    let error = refused(&[7, 5], &ids, &short, &output);
    let expected = (bytes, bytes - 4);
    assert!(
        matches!(error, Error::Buffer(BufferError::Size { needed, found, .. }) if (needed, found) == expected),
        "{error}"
    );
    assert_eq!(error.to_string(), format!("attention: buffer `hidden` has {} bytes, needs {bytes}", bytes - 4));
    let short = Region::new(&output.buffer, 0, bytes - 4);
    let error = refused(&[7, 5], &ids, &input, &short);
    assert!(
        matches!(error, Error::Buffer(BufferError::Size { needed, found, .. }) if (needed, found) == expected),
        "{error}"
    );
    // A region that claims more than its buffer has.
    let false_claim = Region::new(&model_buffer(&app, 16), 0, bytes);
    let error = refused(&[7, 5], &ids, &false_claim, &output);
    assert!(matches!(error, Error::Buffer(BufferError::Size { found: 16, .. })), "{error}");

    let large = Region::new(&model_buffer(&app, bytes + 256), 4, bytes);
    let error = refused(&[7, 5], &ids, &large, &output);
    assert!(matches!(error, Error::Buffer(BufferError::Offset { offset: 4, alignment: 256, .. })), "{error}");

    // A buffer that no shader can be given.
    let usage = wgpu::BufferUsages::COPY_DST;
    let copied = wgpu::BufferDescriptor { label: None, size: bytes, usage, mapped_at_creation: false };
    let error = refused(&[7, 5], &ids, &input, &Region::from(&app.device.create_buffer(&copied)));
    assert_eq!(error.to_string(), "attention: buffer `out` was made without BufferUsages::STORAGE");

    // 2 tokens are there, 16 fit.
    let many = model_ids(16);
    let error = refused(&[15, 0], &many[..15], &input, &output);
    assert!(matches!(error, Error::CacheFull { sequence: 0, length: 2, added: 15, capacity: 16 }), "{error}");
    let error = refused(&[0, u32::MAX], &ids, &input, &output);
    assert!(matches!(error, Error::CacheFull { sequence: 1, length: 0, .. }), "{error}");

    let error = refused(&[1, 1], &[10, 11], &input, &output);
    assert!(matches!(error, Error::Argument(ArgumentError::TokenId { index: 1, id: 11, vocab_size: 11 })), "{error}");
    let error = refused(&[1, 1], &[1], &input, &output);
    assert!(matches!(error, Error::Argument(ArgumentError::Count { expected: 2, found: 1, .. })), "{error}");
    let error = refused(&[0, 0], &[], &input, &output);
    assert!(matches!(error, Error::Argument(ArgumentError::Empty { .. })), "{error}");
    app.assert_no_errors();
}

fn model_buffer(app: &App, size: u64) -> wgpu::Buffer {
    let usage = wgpu::BufferUsages::STORAGE;
    app.device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
}

fn model_ids(tokens: u32) -> Vec<u32> {
    Random::new(9).ids(tokens as usize, 11)
}

#[test]
fn a_stale_step_is_refused() {
    let app = App::new();
    let mut model = Model::new(&app, config(None));
    let other = Model::new(&app, config(None));
    let (input, output) = (model.upload(&model.hidden(2, 1)), model.out(2));
    let mut recording = Recording::new(&model.kernels);
    let forward = |model: &Model, recording: &mut Recording, step: &Step| {
        model.attention.forward(recording, &model.cache, step, 0, &input, &output)
    };

    // Of two steps of one state the first is stale.
    let first = model.prepare(Mode::Prefill, &[1, 1], &[0, 0]);
    let step = model.prepare(Mode::Prefill, &[1, 1], &[0, 0]);
    assert!(matches!(forward(&model, &mut recording, &first), Err(Error::StaleStep)));
    assert!(matches!(model.cache.commit(first), Err(Error::StaleStep)));
    // Another cache of the same sizes.
    assert!(matches!(forward(&other, &mut recording, &step), Err(Error::StaleStep)));
    assert_eq!(recording.dispatches(), 0);
    forward(&model, &mut recording, &step).unwrap();
    let recorded = recording.dispatches();
    model.cache.commit(step).unwrap();
    assert_eq!(model.cache.lengths(), [1, 1]);

    for change in [|cache: &mut LatentCache| cache.truncate(0, 0).unwrap(), |cache: &mut LatentCache| cache.reset()] {
        let step = model.prepare(Mode::Decode, &[1, 0], &[0]);
        change(&mut model.cache);
        assert!(matches!(forward(&model, &mut recording, &step), Err(Error::StaleStep)));
        assert!(matches!(model.cache.commit(step), Err(Error::StaleStep)));
        assert_eq!(recording.dispatches(), recorded);
    }
    app.assert_no_errors();
}

/// Lengths change when the caller says so, not when something is recorded.
#[test]
fn nothing_is_submitted_for_the_caller() {
    let app = App::new();
    let mut model = Model::new(&app, config(None));
    let (input, output) = (model.upload(&model.hidden(3, 1)), model.out(3));
    let step = model.prepare(Mode::Prefill, &[3, 0], &[0; 3]);
    let mut recording = Recording::new(&model.kernels);
    model.attention.forward(&mut recording, &model.cache, &step, 0, &input, &output).unwrap();
    assert_eq!(model.cache.lengths(), [0, 0]);
    let mut encoder = app.encoder();
    recording.encode(&mut encoder).unwrap();
    // Recorded and dropped: the output is what it was.
    drop(encoder);
    assert!(model.f32(&[&output])[0].iter().all(|value| value.is_nan()));
    // The same recording serves another encoder.
    let mut encoder = app.encoder();
    recording.encode(&mut encoder).unwrap();
    app.queue.submit([encoder.finish()]);
    assert!(model.f32(&[&output])[0].iter().all(|value| value.is_finite()));
    model.cache.commit(step).unwrap();
    assert_eq!(model.cache.lengths(), [3, 0]);
    app.assert_no_errors();
}

/// Commands that have not run yet keep their parameters, whatever becomes of the recording that wrote them.
#[test]
fn what_commands_hold_does_not_change_with_the_recording() {
    let app = App::new();
    let kernels = Kernels::new(&app.device, &app.queue).unwrap();
    let words: Vec<u32> = (0..64).collect();
    let cache = Region::from(&kernels.upload("words", bytemuck::cast_slice(&words)).unwrap());
    let mut recording = Recording::new(&kernels);
    let mut encoder = app.encoder();
    let mut expected = words.clone();
    let mut copy = |recording: &mut Recording, from: u32, to: u32| {
        recording
            .add(&CacheCopy { words: 1, from_word: from, to_word: to }, cache_copy::Args { cache: &cache })
            .unwrap();
        expected[to as usize] = from;
    };
    let begin = recording.mark();
    copy(&mut recording, 0, 32);
    recording.encode(&mut encoder).unwrap();
    // Instead of that one, and the whole again.
    recording.rewind(begin);
    copy(&mut recording, 1, 33);
    recording.encode(&mut encoder).unwrap();
    recording.encode(&mut encoder).unwrap();
    // Behind it, more than the buffer of the parameters has room for.
    (2..12).for_each(|word| copy(&mut recording, word, 32 + word));
    recording.encode(&mut encoder).unwrap();
    // Anew, twice.
    for word in [12, 13] {
        recording.clear();
        copy(&mut recording, word, 32 + word);
        recording.encode(&mut encoder).unwrap();
    }
    // Of an encoder that is given up nothing runs.
    recording.clear();
    recording.add(&CacheCopy { words: 1, from_word: 0, to_word: 63 }, cache_copy::Args { cache: &cache }).unwrap();
    recording.encode(&mut app.encoder()).unwrap();
    recording.clear();
    copy(&mut recording, 14, 46);
    recording.encode(&mut encoder).unwrap();
    app.queue.submit([encoder.finish()]);
    let got: Vec<u32> = bytemuck::pod_collect_to_vec(&wait(read(&kernels, &[&cache])).unwrap()[0]);
    assert_eq!(got, expected);
    app.assert_no_errors();
}

/// An application may keep any of these in another thread.
#[test]
fn everything_can_be_sent_and_shared() {
    fn shared<T: Send + Sync>() {}
    shared::<Kernels>();
    shared::<Attention>();
    shared::<LatentCache>();
    shared::<Recording>();
    shared::<Step>();
    shared::<Region>();
    shared::<Error>();
}
