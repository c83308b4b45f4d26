// Token ids whose gate rows a pass projects: those of its groups, in the step's numbering, then those of the new tokens.
//
//   ids[r] = id of group first_group + r    where its header names no resident gate row
//   ids[groups + t] = token_ids[t]          where token_rows[t] is no resident gate row
//   u32 max everywhere else: padding, and groups with a resident gate row
//
// Floor: a few words per group; the dispatch.
// grid: one invocation per element of ids, folded into x and y.
// Static (RDNA3, Mesa 25), at most: 12 registers, no workgroup memory, nothing spilled.
// On an H200 at commit 10d32d5: 1 593 ids, some 3 µs. Not measured since.

override WORKGROUP: u32 = 64u;

const NO_ROW: u32 = 0xffffffffu;
// Words of `lists`: a group's header.
const HEADER_WORDS: u32 = 8u;
const HEADER_ID: u32 = 0u;
const HEADER_GATE_ROW: u32 = 2u;
// A line of the sequence table.
const SEQUENCE_WORDS: u32 = 16u;
const SEQUENCE_GROUPS: u32 = 2u;
const SEQUENCE_BASE: u32 = 3u;
const SEQUENCE_FIRST_GROUP: u32 = 10u;

struct Params {
    tokens: u32,
    first_group: u32,   // in the step's numbering
    groups: u32,
    n_sequence: u32,
    table: u32,         // first word of the sequence table in `lists`
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> token_ids: array<u32>;    // [tokens]
@group(0) @binding(2) var<storage, read> token_rows: array<u32>;   // [tokens]
@group(0) @binding(3) var<storage, read> lists: array<u32>;        // group lists and sequence table
@group(0) @binding(4) var<storage, read_write> ids: array<u32>;    // [groups + tokens]

// First word of the last line of the sequence table whose word `field` is at most `value`.
fn line_of(field: u32, value: u32) -> u32 {
    var low = 0u;
    var high = params.n_sequence;
    while (high - low > 1u) {
        let middle = (low + high) / 2u;
        if (lists[params.table + middle * SEQUENCE_WORDS + field] <= value) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return params.table + low * SEQUENCE_WORDS;
}

// Id of a group without a resident gate row; u32 max for any other, and for the padding behind the groups of a sequence.
fn id_of_group(number: u32) -> u32 {
    let line = line_of(SEQUENCE_FIRST_GROUP, number);
    let group = number - lists[line + SEQUENCE_FIRST_GROUP];
    if (group >= lists[line + SEQUENCE_GROUPS]) {
        return NO_ROW;
    }
    let header = lists[line + SEQUENCE_BASE] + group * HEADER_WORDS;
    return select(NO_ROW, lists[header + HEADER_ID], lists[header + HEADER_GATE_ROW] == NO_ROW);
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP + lane;
    if (i < params.groups) {
        ids[i] = id_of_group(params.first_group + i);
    } else if (i < params.groups + params.tokens) {
        let token = i - params.groups;
        ids[i] = select(NO_ROW, token_ids[token], token_rows[token] == NO_ROW);
    }
}
