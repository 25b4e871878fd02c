//! Rows of equal length.

use oxiformers_processors::Tokenizer;

use super::Row;

/// The label of a token that nothing is learned of.
pub const IGNORED: i64 = -100;

/// How rows are filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Padding {
    /// Id of what they are filled with; 0 where the tokenizer has no such token, which does no harm, as nobody sees it.
    pub pad_token_id: u32,
    /// Type of such a token.
    pub pad_token_type_id: u32,
    /// Lengths are rounded up to a multiple of this.
    pub multiple_of: usize,
}

impl Padding {
    /// As a tokenizer fills rows.
    pub fn new(tokenizer: &Tokenizer, multiple_of: Option<usize>) -> Self {
        Self {
            pad_token_id: tokenizer.pad_token_id().unwrap_or(0),
            pad_token_type_id: tokenizer.config().pad_token_type_id,
            multiple_of: multiple_of.unwrap_or(1).max(1),
        }
    }

    /// The length of rows that hold all of `rows`.
    pub fn width<T>(&self, rows: &[Vec<T>]) -> usize {
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        longest.max(1).next_multiple_of(self.multiple_of)
    }

    /// Fills rows on the right.
    pub fn fill<T: Copy>(&self, rows: &mut [Vec<T>], with: T) {
        let width = self.width(rows);
        rows.iter_mut().for_each(|row| row.resize(width, with));
    }
}

/// What a model is to answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Targets {
    /// A token or class for each token, [`IGNORED`] for those that nothing is learned of: `[batch, seq]`.
    Tokens(Vec<Vec<i64>>),
    /// A class for each row, or for each question of several rows: `[batch]`.
    Classes(Vec<i64>),
    /// Numbers for each row: `[batch, num_labels]`. To be predicted as they are, or 0 and 1 for classes of which any
    /// number may apply.
    Numbers(Vec<Vec<f32>>),
    /// Where the answer begins and ends, in tokens: `[batch]`.
    Spans {
        /// First token.
        start: Vec<i64>,
        /// Last token.
        end: Vec<i64>,
    },
}

/// Rows of equal length, filled on the right.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Token ids `[batch, seq]`.
    pub input_ids: Vec<Vec<u32>>,
    /// How many of each row's tokens are real.
    pub lengths: Vec<usize>,
    /// Which text each token belongs to; empty where all are 0.
    pub token_type_ids: Vec<Vec<u32>>,
    /// Which sequence each token belongs to, where several stand in a row and do not see each other; empty where a row
    /// is one sequence. Positions begin anew with each.
    pub segments: Vec<Vec<u32>>,
    /// How many rows belong together as choices of one question; 0 where each stands alone.
    pub num_choices: usize,
    /// What the model is to answer.
    pub labels: Targets,
}

impl Batch {
    /// The `input_ids` and `token_type_ids` of rows, filled; `labels` are still to be set.
    pub fn padded(rows: &[Row], padding: Padding) -> Self {
        let ids = |name: &str| -> Vec<Vec<u32>> {
            let of = |row: &Row| {
                row.example
                    .ints(name)
                    .unwrap_or_default()
                    .iter()
                    .map(|id| *id as u32)
                    .collect()
            };
            rows.iter().map(of).collect()
        };
        Self::from_rows(ids("input_ids"), ids("token_type_ids"), padding)
    }

    /// The same for rows of ids and types; rows without types have 0.
    pub fn from_rows(mut input_ids: Vec<Vec<u32>>, mut types: Vec<Vec<u32>>, padding: Padding) -> Self {
        let lengths: Vec<usize> = input_ids.iter().map(Vec::len).collect();
        padding.fill(&mut input_ids, padding.pad_token_id);
        if types.iter().all(Vec::is_empty) {
            types.clear();
        } else {
            for (types, length) in types.iter_mut().zip(&lengths) {
                types.resize(*length, 0);
            }
            padding.fill(&mut types, padding.pad_token_type_id);
        }
        Self {
            input_ids,
            lengths,
            token_type_ids: types,
            segments: Vec::new(),
            num_choices: 0,
            labels: Targets::Classes(Vec::new()),
        }
    }

    /// Sets what is to be answered.
    #[must_use]
    pub fn with_labels(mut self, labels: Targets) -> Self {
        self.labels = labels;
        self
    }

    /// `[batch, seq]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.input_ids.len(), self.input_ids.first().map_or(0, Vec::len)]
    }

    /// 1 for tokens, 0 for padding, row by row.
    pub fn attention_mask(&self) -> Vec<Vec<u32>> {
        let [_, seq] = self.dims();
        let row = |length: &usize| (0..seq).map(|at| u32::from(at < *length)).collect();
        self.lengths.iter().map(row).collect()
    }

    /// Positions `[batch, seq]`, which begin anew with each sequence of a row; empty where a row is one sequence.
    pub fn position_ids(&self) -> Vec<Vec<u32>> {
        let row = |segments: &Vec<u32>| {
            let mut begin = 0;
            let at = |at: usize| {
                if at > 0 && segments[at] != segments[at - 1] {
                    begin = at;
                }
                (at - begin) as u32
            };
            (0..segments.len()).map(at).collect()
        };
        self.segments.iter().map(row).collect()
    }

    /// Number of real tokens.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }
}
