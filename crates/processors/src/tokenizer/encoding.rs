//! What encoding takes and what it gives: options, one encoded text, a batch of them.

use super::config::Side;

/// What is encoded: one text, or two of them as one sequence (question and context, premise and hypothesis).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextInput<'a> {
    /// One text.
    Single(Sequence<'a>),
    /// Two texts, joined as the model expects.
    Pair(Sequence<'a>, Sequence<'a>),
}

/// A text, whole or as words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sequence<'a> {
    /// A text as it is.
    Text(&'a str),
    /// A text that was cut into words before; `word_ids` count these, and offsets are within a word.
    Words(&'a [&'a str]),
}

impl<'a> From<&'a str> for Sequence<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl<'a> From<&'a String> for Sequence<'a> {
    fn from(text: &'a String) -> Self {
        Self::Text(text)
    }
}

impl<'a> From<&'a [&'a str]> for Sequence<'a> {
    fn from(words: &'a [&'a str]) -> Self {
        Self::Words(words)
    }
}

impl<'a, T: Into<Sequence<'a>>> From<T> for TextInput<'a> {
    fn from(text: T) -> Self {
        Self::Single(text.into())
    }
}

impl<'a, A: Into<Sequence<'a>>, B: Into<Sequence<'a>>> From<(A, B)> for TextInput<'a> {
    fn from((first, second): (A, B)) -> Self {
        Self::Pair(first.into(), second.into())
    }
}

/// How texts are encoded. The default puts special tokens around them, and neither cuts nor pads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Puts around a text what the model expects (`[CLS]`, `</s>`, …).
    pub add_special_tokens: bool,
    /// Cuts what is too long; without it nothing is cut, whatever the model can take.
    pub truncation: Option<Truncation>,
    /// Fills rows; without it rows keep their lengths.
    pub padding: Option<Padding>,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self {
            add_special_tokens: true,
            truncation: None,
            padding: None,
        }
    }
}

/// How long sequences are cut. What was cut off is in [`Encoding::overflowing`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Truncation {
    /// The longest sequence in tokens, special ones included; by default the model's `model_max_length` (and
    /// nothing is cut if it has none).
    pub max_length: Option<usize>,
    /// Which text of a pair is cut.
    pub strategy: TruncationStrategy,
    /// How many tokens a window shares with the one before it.
    pub stride: usize,
    /// Which end is cut off, by default the tokenizer's `truncation_side`.
    pub side: Option<Side>,
}

/// Which text of a pair is cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TruncationStrategy {
    /// The longer one, until both are equally long; then both.
    #[default]
    LongestFirst,
    /// The first one only.
    OnlyFirst,
    /// The second one only: windows over a context, with the question in each.
    OnlySecond,
}

/// How rows are filled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Padding {
    /// The length of a row, by default that of the longest. Longer rows stay as they are.
    pub length: Option<usize>,
    /// Rounds the length up to a multiple of this.
    pub multiple_of: Option<usize>,
    /// Which end is filled, by default the tokenizer's `padding_side`.
    pub side: Option<Side>,
}

/// A text as token ids, with where each token came from. All lists are of one length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids: the model's `input_ids`.
    pub ids: Vec<u32>,
    /// 0 for the first text, 1 for the second of a pair, or what else the model expects.
    pub token_type_ids: Vec<u32>,
    /// 1 for tokens, 0 for padding.
    pub attention_mask: Vec<u32>,
    /// 1 for tokens that were put around the text (`[CLS]`, padding, …), else 0.
    pub special_tokens_mask: Vec<u32>,
    /// For each token, the characters of its text that it stands for, `start..end` (see [`Characters`]);
    /// `(0, 0)` for what was put around.
    pub offsets: Vec<(usize, usize)>,
    /// For each token, the number of its word within its text.
    pub word_ids: Vec<Option<u32>>,
    /// For each token, which text it is from: 0 or 1.
    pub sequence_ids: Vec<Option<usize>>,
    /// The windows over what truncation cut off, in order; empty if nothing was.
    pub overflowing: Vec<Encoding>,
}

impl Encoding {
    /// Number of tokens, padding included.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// True if there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// True if something was cut off.
    pub fn is_truncated(&self) -> bool {
        !self.overflowing.is_empty()
    }

    /// This window and those over what was cut off, in order.
    pub fn into_windows(mut self) -> Vec<Self> {
        let rest = std::mem::take(&mut self.overflowing);
        std::iter::once(self).chain(rest).collect()
    }

    /// The token that holds a character of a text (`sequence` 0, or 1 for the second of a pair).
    pub fn char_to_token(&self, char: usize, sequence: usize) -> Option<usize> {
        (0..self.len()).find(|at| {
            self.sequence_ids.get(*at) == Some(&Some(sequence))
                && self
                    .offsets
                    .get(*at)
                    .is_some_and(|(start, end)| (*start..*end).contains(&char))
        })
    }

    /// The characters of a word of a text (`sequence` 0, or 1 for the second of a pair), as far as they are in this window.
    pub fn word_to_chars(&self, word: u32, sequence: usize) -> Option<(usize, usize)> {
        let of_word = |at: &usize| {
            self.word_ids.get(*at) == Some(&Some(word)) && self.sequence_ids.get(*at) == Some(&Some(sequence))
        };
        let first = (0..self.len()).find(of_word)?;
        let last = (0..self.len()).rev().find(of_word)?;
        Some((self.offsets.get(first)?.0, self.offsets.get(last)?.1))
    }

    /// Fills up to `length` tokens. Windows that were cut off are filled too.
    pub(super) fn pad(&mut self, length: usize, side: Side, id: u32, type_id: u32) {
        for window in &mut self.overflowing {
            window.pad(length, side, id, type_id);
        }
        let missing = length.saturating_sub(self.len());
        fn fill<T: Clone>(list: &mut Vec<T>, side: Side, missing: usize, with: T) {
            let at = match side {
                Side::Left => 0,
                Side::Right => list.len(),
            };
            list.splice(at..at, std::iter::repeat_n(with, missing));
        }
        fill(&mut self.ids, side, missing, id);
        fill(&mut self.token_type_ids, side, missing, type_id);
        fill(&mut self.attention_mask, side, missing, 0);
        fill(&mut self.special_tokens_mask, side, missing, 1);
        fill(&mut self.offsets, side, missing, (0, 0));
        fill(&mut self.word_ids, side, missing, None);
        fill(&mut self.sequence_ids, side, missing, None);
    }
}

impl From<&tokenizers::Encoding> for Encoding {
    fn from(encoding: &tokenizers::Encoding) -> Self {
        Self {
            ids: encoding.get_ids().to_vec(),
            token_type_ids: encoding.get_type_ids().to_vec(),
            attention_mask: encoding.get_attention_mask().to_vec(),
            special_tokens_mask: encoding.get_special_tokens_mask().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
            word_ids: encoding.get_word_ids().to_vec(),
            sequence_ids: encoding.get_sequence_ids(),
            overflowing: encoding.get_overflowing().iter().map(Self::from).collect(),
        }
    }
}

/// Several encoded texts. With padding, all rows are of one length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BatchEncoding {
    /// One per text; with truncation, followed by the windows over what was cut off of it.
    pub encodings: Vec<Encoding>,
    /// For each row, the text that it is from.
    pub overflow_to_sample_mapping: Vec<usize>,
}

impl BatchEncoding {
    /// Token ids, row by row.
    pub fn input_ids(&self) -> Vec<Vec<u32>> {
        self.rows(|row| &row.ids)
    }

    /// 1 for tokens, 0 for padding, row by row.
    pub fn attention_mask(&self) -> Vec<Vec<u32>> {
        self.rows(|row| &row.attention_mask)
    }

    /// Types of tokens, row by row.
    pub fn token_type_ids(&self) -> Vec<Vec<u32>> {
        self.rows(|row| &row.token_type_ids)
    }

    /// Number of rows, and length of the longest.
    pub fn shape(&self) -> [usize; 2] {
        let width = self.encodings.iter().map(Encoding::len).max().unwrap_or(0);
        [self.encodings.len(), width]
    }

    fn rows(&self, field: impl Fn(&Encoding) -> &Vec<u32>) -> Vec<Vec<u32>> {
        self.encodings.iter().map(|row| field(row).clone()).collect()
    }
}

/// A text whose parts are asked for by characters, as [offsets](Encoding::offsets) count.
#[derive(Debug, Clone)]
pub struct Characters<'a> {
    text: &'a str,
    /// Where each character begins, in bytes; none where each is one byte.
    begins: Option<Vec<usize>>,
}

impl<'a> Characters<'a> {
    /// The characters of a text.
    pub fn new(text: &'a str) -> Self {
        let begins = || text.char_indices().map(|(at, _)| at).collect();
        Self {
            text,
            begins: (!text.is_ascii()).then(begins),
        }
    }

    /// The characters `start..end`; what lies behind the end of the text counts as its end.
    pub fn part(&self, (start, end): (usize, usize)) -> &'a str {
        let byte = |character: usize| match &self.begins {
            Some(begins) => begins.get(character).copied(),
            None => Some(character).filter(|at| *at < self.text.len()),
        };
        let [start, end] = [start, end.max(start)].map(|at| byte(at).unwrap_or(self.text.len()));
        self.text.get(start..end).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_not_bytes() {
        let text = "aé你😀z";
        let characters = Characters::new(text);
        let part = |start, end| characters.part((start, end));
        assert_eq!(part(0, 5), text);
        assert_eq!(part(1, 3), "é你");
        assert_eq!(part(3, 4), "😀");
        assert_eq!(part(4, 9), "z");
        assert_eq!(part(5, 5), "");
        assert_eq!(part(3, 1), "");
        assert_eq!(part(9, 12), "");
    }
}
