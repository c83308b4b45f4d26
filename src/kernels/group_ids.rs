//! Lists the token ids without a resident gate row, whose gate rows a pass projects: ids of groups, then of new tokens.

use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan, check_nonzero};
use crate::storage::words;

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { tokens: u32, first_group: u32, groups: u32, n_sequence: u32, table: u32 }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[tokens]` u32.
        token_ids: Read,
        /// `[tokens]` u32 resident gate rows, `u32::MAX` for none.
        token_rows: Read,
        /// Group lists and sequence table.
        lists: Read,
        /// `[groups + tokens]` u32, written.
        ids: Write,
    }
}

/// Ids to list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupIds {
    /// New tokens.
    pub tokens: u32,
    /// First group, in the step's numbering.
    pub first_group: u32,
    /// Groups.
    pub groups: u32,
    /// Entries of the sequence table.
    pub n_sequence: u32,
    /// Word of the sequence table in `lists`.
    pub table: u32,
    /// Words of `lists`.
    pub list_words: u32,
}

impl GroupIds {
    fn ids(&self) -> u64 {
        u64::from(self.groups) + u64::from(self.tokens)
    }
}

impl Op for GroupIds {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "group_ids";
    const VARIANTS: &'static [Variant<Self>] = &[ELEMENTS];

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("n_sequence", self.n_sequence)])
    }

    fn params(&self, _: &Plan) -> Params {
        let GroupIds { tokens, first_group, groups, n_sequence, table, .. } = *self;
        Params { tokens, first_group, groups, n_sequence, table }
    }

    fn bytes(&self) -> Args<u64> {
        let tokens = words(self.tokens.into());
        Args { token_ids: tokens, token_rows: tokens, lists: words(self.list_words.into()), ids: words(self.ids()) }
    }

    fn cost(&self) -> Cost {
        let GroupIds { tokens, groups, n_sequence, .. } = *self;
        // Two words of a header and the id written; id and row of a token and the id written.
        Cost::of(&[], &[times(12, &[groups]), times(12, &[tokens]), times(64, &[n_sequence])])
    }
}

pub(crate) const ELEMENTS: Variant<GroupIds> = Variant::<GroupIds>::new(
    ("group_ids", include_str!("../../shaders/group_ids.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, _, setting| Ok(Draft::elements(LINEAR_WORKGROUPS[setting], op.ids())),
    anything,
);

crate::vary!(GroupIds { tokens, first_group, groups, n_sequence, table, list_words });

#[cfg(feature = "check")]
impl crate::sample::Sampled for GroupIds {
    fn samples() -> Vec<Self> {
        let of = |groups| GroupIds { tokens: 2, first_group: 5, groups, n_sequence: 1, table: 0, list_words: 16 };
        crate::sample::ELEMENTS.map(of).to_vec()
    }

    fn counted() -> Vec<(Self, Cost)> {
        // 3 groups and 3 tokens of 12 bytes, a line of the table.
        let op = GroupIds { tokens: 3, first_group: 0, groups: 3, n_sequence: 1, table: 0, list_words: 99 };
        vec![(op, Cost { flops: 0, bytes: 36 + 36 + 64 })]
    }
}
