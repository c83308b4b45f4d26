//! Divides the tokens into steps.

use egmla::attention::Mode;

/// `--prefill`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefill {
    /// Every token.
    All,
    /// The first N of each sequence, or all of a shorter one.
    First(u32),
}

impl Prefill {
    pub fn parse(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("all", _) => Ok(Prefill::All),
            (_, Ok(tokens)) => Ok(Prefill::First(tokens)),
            _ => Err("neither `all` nor a whole number of tokens".to_owned()),
        }
    }
}

/// New tokens of every sequence in one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Which kernels.
    pub mode: Mode,
    /// New tokens of each sequence.
    pub counts: Vec<u32>,
    /// Their indices among all tokens, in the order of the step.
    pub rows: Vec<usize>,
}

/// All sequences in step: prefill, at most `chunk` tokens of each at a time, then one token of each at a time.
#[derive(Debug, Clone)]
pub struct Schedule {
    lengths: Vec<u32>,
    prefilled: Vec<u32>,
    chunk: u32,
    done: Vec<u32>,
}

impl Schedule {
    pub fn new(lengths: &[u32], prefill: Prefill, chunk: Option<u32>) -> Self {
        let first = match prefill {
            Prefill::All => u32::MAX,
            Prefill::First(tokens) => tokens,
        };
        Schedule {
            lengths: lengths.to_vec(),
            prefilled: lengths.iter().map(|&length| length.min(first)).collect(),
            chunk: chunk.unwrap_or(u32::MAX),
            done: vec![0; lengths.len()],
        }
    }

    /// The most tokens that a step will have.
    pub fn most_tokens(&self) -> u32 {
        let most = |tokens: &u32| (*tokens).min(self.chunk);
        let prefill: u32 = self.prefilled.iter().map(most).sum();
        let decode = self.lengths.iter().filter(|length| **length > 0).count() as u32;
        prefill.max(decode)
    }

    /// A short step of each kind that will come, to compile the kernels by: not of this schedule, whose tokens are all to come.
    pub fn warm_up(&self) -> Vec<Planned> {
        /// Tokens of a sequence.
        const SHORT: u32 = 32;
        let decodes = self.lengths.iter().zip(&self.prefilled).any(|(length, prefilled)| length > prefilled);
        let mut short = self.clone();
        short.chunk = self.chunk.min(SHORT);
        short.prefilled.iter_mut().for_each(|prefilled| *prefilled = (*prefilled).min(short.chunk));
        let mut steps: Vec<_> = short.next_if(Mode::Prefill).into_iter().collect();
        steps.extend(decodes.then(|| short.next_if(Mode::Decode)).flatten());
        steps
    }

    /// The next step, when it is of the given kind.
    pub fn next_if(&mut self, mode: Mode) -> Option<Planned> {
        let mut after = self.clone();
        let step = after.next()?;
        (step.mode == mode).then(|| {
            *self = after;
            step
        })
    }
}

impl Iterator for Schedule {
    type Item = Planned;

    fn next(&mut self) -> Option<Planned> {
        let left = |until: &[u32], most: u32| -> Vec<u32> {
            until.iter().zip(&self.done).map(|(until, done)| until.saturating_sub(*done).min(most)).collect()
        };
        let mut planned = (Mode::Prefill, left(&self.prefilled, self.chunk));
        if planned.1.iter().all(|&count| count == 0) {
            planned = (Mode::Decode, left(&self.lengths, 1));
        }
        let (mode, counts) = planned;
        if counts.iter().all(|&count| count == 0) {
            return None;
        }
        let mut rows = Vec::new();
        let mut first = 0;
        for ((length, done), &count) in self.lengths.iter().zip(&mut self.done).zip(&counts) {
            rows.extend(first + *done as usize..first + (*done + count) as usize);
            *done += count;
            first += *length as usize;
        }
        Some(Planned { mode, counts, rows })
    }
}

#[cfg(test)]
mod tests {
    use super::{Mode, Planned, Prefill, Schedule};

    #[test]
    fn a_warm_up_is_a_short_step_of_each_kind_that_comes() {
        let kinds = |lengths: &[u32], prefill, chunk| -> Vec<_> {
            let schedule = Schedule::new(lengths, prefill, chunk);
            let steps = schedule.warm_up();
            assert!(steps.iter().all(|step| step.rows.len() as u32 <= schedule.most_tokens()));
            steps.into_iter().map(|step| (step.mode, step.counts)).collect()
        };
        assert_eq!(kinds(&[50, 3], Prefill::All, None), [(Mode::Prefill, vec![32, 3])]);
        assert_eq!(kinds(&[50, 0], Prefill::First(0), None), [(Mode::Decode, vec![1, 0])]);
        let both = [(Mode::Prefill, vec![4, 3]), (Mode::Decode, vec![1, 0])];
        assert_eq!(kinds(&[50, 3], Prefill::First(10), Some(4)), both);
        assert_eq!(kinds(&[], Prefill::All, None), []);
    }

    fn steps(lengths: &[u32], prefill: Prefill, chunk: Option<u32>) -> Vec<Planned> {
        Schedule::new(lengths, prefill, chunk).collect()
    }

    fn planned(mode: Mode, counts: &[u32], rows: &[usize]) -> Planned {
        Planned { mode, counts: counts.to_vec(), rows: rows.to_vec() }
    }

    #[test]
    fn everything_is_prefilled_at_once() {
        let expected = [planned(Mode::Prefill, &[2, 0, 1], &[0, 1, 2])];
        assert_eq!(steps(&[2, 0, 1], Prefill::All, None), expected);
        assert_eq!(steps(&[2, 0, 1], Prefill::First(9), None), expected);
    }

    #[test]
    fn sequences_are_decoded_in_step() {
        let expected = [planned(Mode::Decode, &[1, 1], &[0, 2]), planned(Mode::Decode, &[1, 0], &[1])];
        assert_eq!(steps(&[2, 1], Prefill::First(0), None), expected);
    }

    #[test]
    fn chunks_come_before_decoding() {
        let expected = [
            planned(Mode::Prefill, &[2, 1], &[0, 1, 5]),
            planned(Mode::Prefill, &[1, 0], &[2]),
            planned(Mode::Decode, &[1, 0], &[3]),
            planned(Mode::Decode, &[1, 0], &[4]),
        ];
        assert_eq!(steps(&[5, 1], Prefill::First(3), Some(2)), expected);
    }

    #[test]
    fn every_token_is_in_exactly_one_step_and_no_step_is_larger_than_announced() {
        for prefill in [Prefill::All, Prefill::First(0), Prefill::First(1), Prefill::First(4)] {
            for chunk in [None, Some(1), Some(3)] {
                let schedule = Schedule::new(&[7, 0, 1, 4], prefill, chunk);
                let most = schedule.most_tokens();
                let mut rows = Vec::new();
                for step in schedule {
                    assert!(step.rows.len() <= most as usize, "{step:?}");
                    assert_eq!(step.rows.len(), step.counts.iter().sum::<u32>() as usize, "{step:?}");
                    rows.extend(step.rows);
                }
                rows.sort_unstable();
                assert_eq!(rows, (0..12).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn prefill_is_all_or_a_number() {
        assert_eq!(Prefill::parse("all"), Ok(Prefill::All));
        assert_eq!(Prefill::parse("0"), Ok(Prefill::First(0)));
        for wrong in ["", "some", "-1", "1.5", "4294967296"] {
            assert!(Prefill::parse(wrong).is_err(), "{wrong}");
        }
    }
}
