//! Cases of `group_ids`: all groups of a step, those of a second pass, a list of many tiles.

use super::batch::compare_numbers;
use super::each_variant;
use super::grouped_batch::{GroupedBatch, Ids, Sources};
use crate::attention::groups::NO_ROW;
use crate::check::Case;
use crate::kernels::attention_grouped::Tiling;
use crate::kernels::{GroupIds, group_ids};
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    for (name, first_group, longest) in [("whole", 0, 30), ("second_pass", 16, 30), ("long", 0, 300)] {
        // Lists are made when they are needed.
        let op = GroupIds { tokens: 3, first_group, groups: 1, n_sequence: 3, table: 0, list_words: 1 };
        each_variant(cases, name, op, move |lab, launch| {
            let tiling = Tiling { groups: 4, span: 2 };
            let sequences = [(longest, Ids::Skewed), (1, Ids::Equal), (21, Ids::Distinct)];
            let Some(batch) = GroupedBatch::new(&sequences, (1, 1), tiling, Sources::Both) else {
                return Ok(Vec::new());
            };
            let groups = batch.groups - first_group;
            let (token_ids, token_rows) = ([7, 8, 9], [7, NO_ROW, 9]);
            let lists = lab.words(&batch.words)?;
            let (id_list, row_list) = (lab.words(&token_ids)?, lab.words(&token_rows)?);
            let ids = lab.output((groups + 3) as usize)?;
            let op = GroupIds { groups, table: batch.table, list_words: batch.words.len() as u32, ..op };
            let args = group_ids::Args {
                token_ids: &id_list.region,
                token_rows: &row_list.region,
                lists: &lists.region,
                ids: &ids.region,
            };
            launch.of(op).run(lab, args)?;
            let listed = batch.ids[first_group as usize..].iter().map(|id| id.map(|id| (id, id % 2 == 1)));
            let tokens = token_ids.iter().zip(token_rows).map(|(&id, row)| Some((id, row != NO_ROW)));
            let expected = reference::group_ids(&listed.chain(tokens).collect::<Vec<_>>());
            Ok(vec![compare_numbers(lab, &ids, &expected)?])
        });
    }
}
