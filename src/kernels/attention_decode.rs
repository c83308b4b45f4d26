//! Attention of up to 16 queries per sequence over rebuilt or cached keys and values, split over the cache. Groups of query heads
//! may share keys and values (GQA, MQA).

use bytemuck::{Pod, Zeroable};

use crate::adapter::{AdapterClass, PlanContext};
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero};
use crate::storage::{Storage, padded, product, words};

/// Sequences begin at multiples of this in a step's numbering of cache rows.
pub const SPLIT: u32 = 256;

/// Cache rows per workgroup, here and in `attention_absorbed`; each divides [`SPLIT`].
pub const SPLITS: [u32; 3] = [SPLIT, 128, 64];

/// (WORKGROUP, most HEADS, most COLUMNS): HEADS query heads of a group share a workgroup, COLUMNS invocations its values.
const TUNINGS: &[(u32, u32, u32)] = &[(64, 4, 8), (128, 4, 16), (64, 8, 16), (256, 1, 16)];

/// The setting of a class of adapter for groups of `group` query heads.
fn setting(class: AdapterClass, group: u32) -> usize {
    match class {
        AdapterClass::Software => 0,
        _ if group <= TUNINGS[1].1 => 1,
        _ => 2,
    }
}

/// Query heads per workgroup, at most `most`.
fn heads_of(group: u32, most: u32) -> u32 {
    group.clamp(1, most).next_power_of_two()
}

/// Workgroups per split of `attention_decode`, for [`split_length`]: every group of `n_head / n_kv_head` heads has one or more.
pub fn workgroups(context: &PlanContext, n_head: u32, n_kv_head: u32) -> u32 {
    let group = n_head / n_kv_head.max(1);
    let of_class = setting(context.class, group);
    // Planning refuses a measured setting that does not exist.
    let chosen = TUNINGS.get(context.auto(AttentionDecode::NAME, of_class)).unwrap_or(&TUNINGS[of_class]);
    n_kv_head.saturating_mul(group.div_ceil(heads_of(group, chosen.1)))
}

/// The split length of a step whose query tokens meet `met` cache rows in all, with `groups` workgroups per split
/// ([`workgroups`]; every four heads in `attention_absorbed`): the longest that fills the device, else the shortest. Long splits
/// make fewer partial results, short ones more workgroups. Without subgroups a workgroup has an invocation for every four rows of
/// a split: shorter ones would be less work for as many lanes of the device, so they stay long.
pub fn split_length(context: &PlanContext, met: u64, groups: u32) -> u32 {
    if !context.features.contains(wgpu::Features::SUBGROUP) {
        return SPLIT;
    }
    let all = |split: u32| met.div_ceil(split.into()).saturating_mul(groups.into());
    let fills = |split: &u32| all(*split) >= context.class.full().into();
    SPLITS.into_iter().find(fills).unwrap_or(SPLITS[SPLITS.len() - 1])
}

/// Most partial results of a step, where the sequences have `longest` and `shortest` splits of either length and `tokens` query
/// tokens: a step takes short splits only while twice as long ones leave the device half empty. `groups` as in [`split_length`].
pub fn most_partials(context: &PlanContext, groups: u32, tokens: u32, longest: u64, shortest: u64) -> u64 {
    let full = context.class.full();
    if full <= groups || !context.features.contains(wgpu::Features::SUBGROUP) {
        return longest;
    }
    longest.max(shortest.min(2 * (u64::from(full.div_ceil(groups.max(1))) + u64::from(tokens))))
}

/// One entry of the sequence table of a decode step: [`super::cache_read::SequenceRow`], and the place of its results.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct DecodeSequence {
    /// First row in the step's numbering, a multiple of [`SPLIT`].
    pub first_row: u32,
    /// Cache row of position 0.
    pub first_slot: u32,
    /// Tokens, those of this step included.
    pub length: u32,
    /// First query token of the sequence, in the step's numbering of new tokens.
    pub token: u32,
    /// Query tokens: each sees those before it.
    pub tokens: u32,
    /// First partial result: query token i's split s is partial result `partial + i · splits + s`.
    pub partial: u32,
    /// Splits of the sequence.
    pub splits: u32,
    /// Padding to 32 bytes.
    pub unused: u32,
}

crate::params! {
    /// Uniform parameters, as in the shaders.
    pub struct Params {
        n_head: u32, n_kv_head: u32, d_nope: u32, d_rope: u32, d_value: u32, kv_first: u32, kv_pitch: u32, n_sequence: u32,
        rope_pitch: u32, scale: f32, tiles_x: u32, tiles_y: u32, tiles_z: u32,
    }
}

crate::args! {
    /// Buffers of one dispatch. A tile writes the partial results of its own splits.
    pub struct Args {
        /// `[tokens, n_head, d_nope + d_rope]` f32, rotated.
        q: Read,
        /// `[kv_rows, n_kv_head, d_nope + d_value]` in `kv_storage`, rows `kv_pitch` elements apart.
        kv: Read,
        /// `[cache_rows, pitch of d_rope]` in `storage`; not bound without a rotary key.
        rope_cache: Read,
        /// `[n_sequence]` [`DecodeSequence`].
        sequences: Read,
        /// `[partials, n_head, d_value]` f32, written.
        partial_values: Write,
        /// `[partials, n_head, 2]` f32 (m, l), written.
        partial_softmax: Write,
    }
}

/// Attention over one tile of keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionDecode {
    /// Query tokens.
    pub tokens: u32,
    /// Most query tokens per sequence.
    pub most_tokens: u32,
    /// Partial results: splits times query tokens, summed over the sequences.
    pub partials: u32,
    /// Cache rows per workgroup, one of [`SPLITS`].
    pub split: u32,
    /// Entries of the sequence table.
    pub n_sequence: u32,
    /// Query heads.
    pub n_head: u32,
    /// Heads of keys and values; divides `n_head`. Query head h reads head `h / (n_head / n_kv_head)`.
    pub n_kv_head: u32,
    /// Width of the content part. It and `d_value` are whole 16-byte loads in `kv_storage`, `d_rope` in `storage`.
    pub d_nope: u32,
    /// Width of the rotary part.
    pub d_rope: u32,
    /// Value width.
    pub d_value: u32,
    /// First row of the key tile in the step's numbering; a multiple of [`SPLIT`].
    pub kv_first: u32,
    /// Rows of the key tile; a multiple of [`SPLIT`].
    pub kv_rows: u32,
    /// Elements from one of them to the next: whole 16-byte loads in `kv_storage`, at least [`kv_width`](Self::kv_width).
    pub kv_pitch: u32,
    /// Cache rows of the rope cache.
    pub cache_rows: u32,
    /// Factor on the scores, `AttentionConfig::scale`.
    pub scale: f32,
    /// Storage of the rope cache.
    pub storage: Storage,
    /// Storage of keys and values.
    pub kv_storage: Storage,
}

impl AttentionDecode {
    /// Elements of a row of keys and values: `n_kv_head · (d_nope + d_value)`, `u32::MAX` if they are more.
    pub fn kv_width(&self) -> u32 {
        self.n_kv_head.saturating_mul(self.d_nope.saturating_add(self.d_value))
    }
}

impl Op for AttentionDecode {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "attention_decode";
    const VARIANTS: &'static [Variant<Self>] = &[LANES];

    fn widths(&self) -> [(&'static str, u32); 4] {
        [("d_nope", self.d_nope), ("d_rope", self.d_rope), ("d_value", self.d_value), ("", 0)]
    }

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("n_head", self.n_head), ("d_value", self.d_value), ("n_sequence", self.n_sequence)])?;
        check_groups(self.n_head, self.n_kv_head)?;
        let kv = [("d_nope", self.d_nope), ("d_value", self.d_value), ("kv_pitch", self.kv_pitch)];
        check_multiples(self.kv_storage.of_load(), &kv)?;
        check_multiples(self.storage.of_load(), &[("d_rope", self.d_rope)])?;
        for (what, rows) in [("kv_first", self.kv_first), ("kv_rows", self.kv_rows)] {
            if !rows.is_multiple_of(SPLIT) {
                return Err(format!("{what} is {rows}, not a multiple of {SPLIT}"));
            }
        }
        if self.kv_pitch < self.kv_width() {
            return Err(format!("kv_pitch is {}, rows have {} elements", self.kv_pitch, self.kv_width()));
        }
        check_split(self.split)
    }

    fn params(&self, plan: &Plan) -> Params {
        let [tiles_x, tiles_y, tiles_z] = plan.tiles;
        Params {
            n_head: self.n_head,
            n_kv_head: self.n_kv_head,
            d_nope: self.d_nope,
            d_rope: self.d_rope,
            d_value: self.d_value,
            kv_first: self.kv_first,
            kv_pitch: self.kv_pitch,
            n_sequence: self.n_sequence,
            rope_pitch: self.storage.row_pitch(self.d_rope),
            scale: self.scale,
            tiles_x,
            tiles_y,
            tiles_z,
        }
    }

    fn bytes(&self) -> Args<u64> {
        let rope = product(&[self.cache_rows, self.storage.row_pitch(self.d_rope)]);
        let kv = product(&[self.kv_rows, self.kv_pitch]);
        Args {
            q: words(product(&[self.tokens, self.n_head, self.d_nope + self.d_rope])),
            kv: padded(self.kv_storage.sized(kv), 4),
            rope_cache: self.storage.sized(rope),
            sequences: words(product(&[self.n_sequence, 8])),
            partial_values: words(product(&[self.partials, self.n_head, self.d_value])),
            partial_softmax: words(product(&[self.partials, self.n_head, 2])),
        }
    }

    fn cost(&self) -> Cost {
        let AttentionDecode {
            tokens, n_head, n_kv_head, d_nope, d_rope, d_value, kv_rows, storage, kv_storage, ..
        } = *self;
        // A cache row belongs to one sequence: only that sequence's queries attend to it.
        let rows = kv_rows.min(self.cache_rows);
        let met = rows.saturating_mul(self.most_tokens);
        let splits = kv_rows.div_ceil(self.split.max(1)).saturating_mul(self.most_tokens);
        Cost::of(
            &[times(2, &[met, n_head, d_nope]), times(2, &[met, n_head, d_rope]), times(2, &[met, n_head, d_value])],
            &[
                times(4, &[tokens, n_head, d_nope]),
                times(4, &[tokens, n_head, d_rope]),
                times(kv_storage.bytes(), &[rows, n_kv_head, d_nope]),
                times(kv_storage.bytes(), &[rows, n_kv_head, d_value]),
                times(storage.bytes(), &[rows, d_rope]),
                times(32, &[self.n_sequence]),
                times(4, &[splits, n_head, d_value]),
                times(8, &[splits, n_head]),
            ],
        )
    }
}

/// In 16-byte loads, keys and values read once for the HEADS query heads of a workgroup.
pub(crate) const LANES: Variant<AttentionDecode> = Variant::<AttentionDecode>::new(
    ("attention_decode", include_str!("../../shaders/attention_decode.wgsl")),
    TUNINGS.len(),
    |op, _, setting| {
        let AttentionDecode { split, n_kv_head, d_value, storage, kv_storage, .. } = *op;
        let (workgroup, most_heads, most_columns) = TUNINGS[setting];
        let group = op.n_head / n_kv_head;
        let heads = heads_of(group, most_heads);
        let columns = most_columns.min((d_value / kv_storage.of_load()).next_power_of_two().max(4)).max(heads);
        let vectors = if kv_storage == Storage::F16 { 2 } else { 1 };
        let round = (heads * vectors).min(4);
        let size = [op.kv_rows, n_kv_head * group.div_ceil(heads), op.most_tokens];
        Ok(Draft::new(workgroup, Grid::Tiled { size, tile: [split, 1, 1] })
            .with([("STORAGE_F16", storage.constant()), ("KV_F16", kv_storage.constant())])
            .with([("HEADS", heads), ("WORKGROUP", workgroup), ("COLUMNS", columns), ("SPLIT", split)])
            .bytes(16 * (workgroup * round + split / 4 * heads) + 4 * (workgroup / columns * heads)))
    },
    |op, _, plan| {
        let [heads, workgroup, columns, split] =
            ["HEADS", "WORKGROUP", "COLUMNS", "SPLIT"].map(|name| plan.value(name));
        let whole = |share: u64| share.is_power_of_two() && workgroup.is_multiple_of(share);
        let parts = u64::from(op.n_head / op.n_kv_head.max(1)).div_ceil(heads);
        hold(&[
            ([1, 2, 4, 8].contains(&heads), "heads are 1, 2, 4 or 8"),
            (whole(columns) && columns >= heads, "columns are a power of two from heads up and divide a workgroup"),
            (whole(split / 4), "a workgroup is whole lanes for every four rows of a split"),
            (u64::from(plan.tiles[1]) == u64::from(op.n_kv_head) * parts, "every group of heads has its workgroups"),
        ])
    },
)
.auto(|op, context| setting(context.class, op.n_head / op.n_kv_head));

/// Refuses query heads that are no whole groups over the heads of keys and values.
pub(super) fn check_groups(n_head: u32, n_kv_head: u32) -> Result<(), String> {
    if n_kv_head != 0 && n_head.is_multiple_of(n_kv_head) {
        return Ok(());
    }
    Err(format!("n_head is {n_head}, must be a multiple of n_kv_head, which is {n_kv_head}"))
}

/// Refuses a split length that no shader has.
pub(super) fn check_split(split: u32) -> Result<(), String> {
    if SPLITS.contains(&split) { Ok(()) } else { Err(format!("split is {split}, must be one of {SPLITS:?}")) }
}

crate::vary!(AttentionDecode {
    tokens,
    most_tokens,
    partials,
    split,
    n_sequence,
    n_head,
    n_kv_head,
    d_nope,
    d_rope,
    d_value,
    kv_first,
    kv_rows,
    kv_pitch,
    cache_rows,
    scale,
    storage,
    kv_storage
});

#[cfg(feature = "check")]
impl crate::sample::Sampled for AttentionDecode {
    fn samples() -> Vec<Self> {
        let mut all = Vec::new();
        let widths = [(8, 8, 8), (8, 0, 8), (16, 8, 32), (64, 64, 72), (0, 128, 256)];
        for (n_head, splits) in
            crate::sample::HEADS.into_iter().flat_map(|n_head| [0, 1, 3].map(|splits| (n_head, splits)))
        {
            // One head of keys and values for every query head, for all of them, or for three.
            let n_kv_head = match splits {
                1 => 1,
                3 if n_head % 3 == 0 => n_head / 3,
                _ => n_head,
            };
            for (storage, kv_storage) in Storage::ALL.into_iter().flat_map(|s| Storage::ALL.map(|kv| (s, kv))) {
                let split = SPLITS[n_head as usize % SPLITS.len()];
                all.extend(widths.map(|(d_nope, d_rope, d_value)| AttentionDecode {
                    tokens: 1,
                    most_tokens: 1,
                    partials: splits * (SPLIT / split),
                    split,
                    n_sequence: 1,
                    n_head,
                    n_kv_head,
                    d_nope,
                    d_rope,
                    d_value,
                    kv_first: 0,
                    kv_rows: splits * SPLIT,
                    kv_pitch: n_kv_head * (d_nope + d_value) + 8 * splits,
                    cache_rows: splits * SPLIT,
                    scale: 1.0,
                    storage,
                    kv_storage,
                }));
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let of = |n_head, kv_storage| AttentionDecode {
            tokens: 1,
            most_tokens: 1,
            partials: 1,
            split: 256,
            n_sequence: 1,
            n_head,
            n_kv_head: 2,
            d_nope: 3,
            d_rope: 2,
            d_value: 5,
            kv_first: 256,
            kv_rows: 256,
            kv_pitch: 20,
            cache_rows: 1000,
            scale: 1.0,
            storage: Storage::F16,
            kv_storage,
        };
        let flops = 2 * 256 * 2 * 10;
        vec![
            // 256 rows · 2 heads · (3 + 2 + 5) multiply-adds.
            // In: q 2·5·4, kv 256·2·8·4, keys 256·2·2, table 32. Out: 1·2·(5·4 + 8).
            (of(2, Storage::F32), Cost { flops, bytes: 40 + 16384 + 1024 + 32 + 56 }),
            // Keys and values in f16 are half of that.
            (of(2, Storage::F16), Cost { flops, bytes: 40 + 8192 + 1024 + 32 + 56 }),
            // Three times the query heads over the same keys and values.
            (of(6, Storage::F16), Cost { flops: 3 * flops, bytes: 3 * 40 + 8192 + 1024 + 32 + 3 * 56 }),
        ]
    }
}
