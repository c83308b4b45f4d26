//! For which shaders the library switches wgpu's checks off, and that applications cannot make it do so for theirs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use egmla::check::guarded::Guarded;
use egmla::low_level::kernels::{Gather, ResidualAdd, WordScatter, gather, residual_add, word_scatter};
use egmla::low_level::{Cost, Draft, Op, Plan, Tuning, Variant, anything};
use egmla::{Kernels, Recording, Storage, readback};

fn floats(kernels: &Kernels, values: &[f32]) -> Guarded {
    Guarded::filled(kernels, "floats", bytemuck::cast_slice(values)).unwrap()
}

/// The first shader of an operation, with another draft: one that covers nothing.
fn forged() -> &'static Variant<ResidualAdd> {
    let draft: fn(&ResidualAdd, &_, usize) -> _ = |_, _, _| Ok(Draft::elements(64, 0));
    Box::leak(Box::new(Variant { draft, ..ResidualAdd::VARIANTS[0] }))
}

#[test]
fn a_copy_of_a_shader_is_planned_as_the_library_plans_it() {
    let gpu = common::gpu();
    let (delta, stream) = (floats(&gpu.kernels, &[1.0; 8]), floats(&gpu.kernels, &[2.0; 8]));
    let args = residual_add::Args { delta: &delta.region, stream: &stream.region };
    let mut recording = Recording::new(&gpu.kernels);
    let op = ResidualAdd { elements: 8, factor: 1.0 };
    recording.add_variant(forged(), &op, args, Tuning::Auto).unwrap();
    assert_eq!((recording.dispatches(), recording.checked_kernels().count()), (1, 0));
    readback::submit(&mut recording).unwrap();
    assert_eq!(stream.read_f32(&gpu.kernels).unwrap(), [3.0; 8]);
    gpu.assert_no_errors();
}

egmla::params! {
    /// As in the shader.
    struct Params { elements: u32 }
}

egmla::args! {
    /// The buffers of `residual_add`.
    struct Args {
        /// Added.
        delta: Read,
        /// Halved.
        stream: Write,
    }
}

/// An application's own operation under a name that the library uses.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Halve(u32);

impl Op for Halve {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "residual_add";
    const VARIANTS: &'static [Variant<Self>] = &[Variant::<Self>::new(
        (
            "residual_add",
            "struct Params { elements: u32 }
             override WORKGROUP: u32 = 64u;
             @group(0) @binding(0) var<uniform> params: Params;
             @group(0) @binding(1) var<storage, read> delta: array<f32>;
             @group(0) @binding(2) var<storage, read_write> stream: array<f32>;
             @compute @workgroup_size(WORKGROUP) fn main(@builtin(global_invocation_id) id: vec3<u32>) {
                 if (id.x < params.elements) { stream[id.x] = stream[id.x] / 2.0 + 0.0 * delta[id.x]; }
             }",
        ),
        1,
        |op, _, _| Ok(Draft::elements(64, op.0.into())),
        anything,
    )];

    fn params(&self, _: &Plan) -> Params {
        Params { elements: self.0 }
    }

    fn bytes(&self) -> Args<u64> {
        Args { delta: 4 * u64::from(self.0), stream: 4 * u64::from(self.0) }
    }

    fn cost(&self) -> Cost {
        Cost { flops: u64::from(self.0), bytes: 8 * u64::from(self.0) }
    }
}

/// Its shader keeps wgpu's checks, and neither takes the other's pipeline.
#[test]
fn an_own_shader_under_a_name_of_the_library_is_another_and_checked() {
    let gpu = common::gpu();
    let (delta, stream) = (floats(&gpu.kernels, &[1.0; 8]), floats(&gpu.kernels, &[2.0; 8]));
    let mut recording = Recording::new(&gpu.kernels);
    let own = Args { delta: &delta.region, stream: &stream.region };
    recording.add(&Halve(8), own).unwrap();
    let args = residual_add::Args { delta: &delta.region, stream: &stream.region };
    recording.add(&ResidualAdd { elements: 8, factor: 1.0 }, args).unwrap();
    recording.add(&Halve(8), own).unwrap();
    assert_eq!(recording.checked_kernels().collect::<Vec<_>>(), ["residual_add"; 2]);
    readback::submit(&mut recording).unwrap();
    assert_eq!(stream.read_f32(&gpu.kernels).unwrap(), [1.0; 8]);
    gpu.assert_no_errors();
}

/// Indices that an application writes into a table may be anything: these operations keep wgpu's checks, and write nowhere else.
#[test]
fn hostile_tables_of_an_application_reach_no_other_memory() {
    let gpu = common::gpu();
    let kernels = &gpu.kernels;
    let hostile = [0, 7, 8, 1 << 16, 1 << 29, 1 << 31, u32::MAX - 1];
    let table = floats(kernels, &[5.0; 32]);
    let (ids, rows) = (Guarded::filled(kernels, "ids", &hostile).unwrap(), hostile.len() as u32);
    let y = Guarded::poisoned(kernels, "y", 4 * hostile.len()).unwrap();
    let patches: Vec<u32> = hostile.iter().flat_map(|&word| [word, 1]).collect();
    let patches = Guarded::filled(kernels, "patches", &patches).unwrap();
    let words = Guarded::filled(kernels, "words", &[0; 8]).unwrap();
    let mut recording = Recording::new(kernels);
    let op = Gather { rows, width: 4, table_row: 4, first_id: 0, vocab_size: 8, storage: Storage::F32 };
    recording.add(&op, gather::Args { table: &table.region, ids: &ids.region, y: &y.region }).unwrap();
    let args = word_scatter::Args { patches: &patches.region, words: &words.region };
    recording.add(&WordScatter { count: rows, words: 8 }, args).unwrap();
    assert_eq!(recording.checked_kernels().collect::<Vec<_>>(), ["gather", "word_scatter"]);
    readback::submit(&mut recording).unwrap();
    let got = y.read_f32(kernels).unwrap();
    assert_eq!(got[..8], [5.0; 8]);
    let words = words.read(kernels).unwrap();
    assert_eq!((words[0], words[7], &words[1..7]), (1, 1, &[0; 6][..]));
    // Reading checks the guard words around each.
    for region in [&table, &ids, &patches] {
        region.read(kernels).unwrap();
    }
    gpu.assert_no_errors();
}

/// The default, and with every check: the same results, bit for bit.
#[test]
fn checks_change_no_result() {
    let gpu = common::gpu();
    let results = [false, true].map(|on| {
        let kernels = gpu.kernels.with_shader_checks(on);
        let values: Vec<f32> = (0..999).map(|i| i as f32 / 7.0).collect();
        let (delta, stream) = (floats(&kernels, &values), floats(&kernels, &values));
        let mut recording = Recording::new(&kernels);
        let args = residual_add::Args { delta: &delta.region, stream: &stream.region };
        recording.add(&ResidualAdd { elements: 999, factor: 1.0 }, args).unwrap();
        readback::submit(&mut recording).unwrap();
        stream.read(&kernels).unwrap()
    });
    assert_eq!(results[0], results[1]);
    gpu.assert_no_errors();
}
