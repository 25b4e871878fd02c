//! Text to [`Encoding`]: pieces, cut, with special tokens around them, padded.

use tokenizers::{InputSequence, PostProcessor, TruncationDirection};

use super::Tokenizer;
use super::config::Side;
use super::encoding::{
    BatchEncoding, EncodeOptions, Encoding, Padding, Sequence, TextInput, Truncation, TruncationStrategy,
};
use crate::{Error, Result};

impl Tokenizer {
    /// Encodes a text, a pair of texts, or words of a text, with everything that is known about each token.
    /// What truncation cuts off is in [`Encoding::overflowing`].
    ///
    /// ```no_run
    /// # use oxiformers_processors::tokenizer::{EncodeOptions, Tokenizer, Truncation, TruncationStrategy};
    /// # fn windows(tokenizer: &Tokenizer, question: &str, context: &str) -> oxiformers_processors::Result<()> {
    /// let options = EncodeOptions {
    ///     truncation: Some(Truncation {
    ///         max_length: Some(384),
    ///         strategy: TruncationStrategy::OnlySecond,
    ///         stride: 128,
    ///         side: None,
    ///     }),
    ///     ..EncodeOptions::default()
    /// };
    /// for window in tokenizer.encode_with((question, context), &options)?.into_windows() {
    ///     println!("{:?}", window.offsets);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; and when `truncation` leaves no room, or `padding` needs a token that the
    /// tokenizer does not have.
    pub fn encode_with<'a>(
        &self,
        input: impl Into<TextInput<'a>>,
        options: &EncodeOptions,
    ) -> Result<Encoding> {
        let mut encoding = self.encode_unpadded(input.into(), options)?;
        if let Some(padding) = &options.padding {
            self.pad(std::slice::from_mut(&mut encoding), padding)?;
        }
        Ok(encoding)
    }

    /// Encodes several inputs as rows. With truncation, the windows over what is cut off of an input are rows
    /// behind its first.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_with`].
    pub fn encode_batch<'a, I: Into<TextInput<'a>>>(
        &self,
        inputs: impl IntoIterator<Item = I>,
        options: &EncodeOptions,
    ) -> Result<BatchEncoding> {
        let mut batch = BatchEncoding::default();
        for (sample, input) in inputs.into_iter().enumerate() {
            let windows = self.encode_unpadded(input.into(), options)?.into_windows();
            batch
                .overflow_to_sample_mapping
                .extend(std::iter::repeat_n(sample, windows.len()));
            batch.encodings.extend(windows);
        }
        if let Some(padding) = &options.padding {
            self.pad(&mut batch.encodings, padding)?;
        }
        Ok(batch)
    }

    /// Fills rows with the padding token.
    ///
    /// # Errors
    /// [`Error::NoToken`] when a row has to be filled and there is no padding token.
    pub fn pad(&self, rows: &mut [Encoding], padding: &Padding) -> Result<()> {
        let longest = rows.iter().map(Encoding::len).max().unwrap_or(0);
        let length = padding.length.unwrap_or(longest);
        let length = match padding.multiple_of {
            Some(multiple @ 1..) => length.next_multiple_of(multiple),
            _ => length,
        };
        if rows.iter().all(|row| row.len() >= length) {
            return Ok(());
        }
        let pad = self.pad_token_id().ok_or(Error::NoToken { role: "pad_token" })?;
        let side = padding.side.unwrap_or(self.config().padding_side);
        for row in rows {
            row.pad(length, side, pad, self.config().pad_token_type_id);
        }
        Ok(())
    }

    /// How many special tokens are put around a text, or a pair of texts.
    pub fn num_special_tokens_to_add(&self, pair: bool) -> usize {
        self.around
            .as_ref()
            .as_ref()
            .map_or(0, |processor| processor.added_tokens(pair))
    }

    fn encode_unpadded(&self, input: TextInput<'_>, options: &EncodeOptions) -> Result<Encoding> {
        let pieces = |sequence| {
            let sequence = match sequence {
                Sequence::Text(text) => InputSequence::from(text),
                Sequence::Words(words) => InputSequence::from(words),
            };
            self.backend()
                .encode_char_offsets(sequence, false)
                .map_err(Error::tokenize)
        };
        let (mut first, mut second) = match input {
            TextInput::Single(text) => (pieces(text)?, None),
            TextInput::Pair(first, second) => (pieces(first)?, Some(pieces(second)?)),
        };
        if let Some(truncation) = &options.truncation
            && let Some(length) = truncation.max_length.or(self.config().model_max_length)
        {
            let special = match options.add_special_tokens {
                true => self.num_special_tokens_to_add(second.is_some()),
                false => 0,
            };
            let room = length.checked_sub(special).ok_or_else(|| {
                Error::Tokenize(format!(
                    "max_length {length} leaves no room beside {special} special tokens"
                ))
            })?;
            let side = truncation.side.unwrap_or(self.config().truncation_side);
            truncate(&mut first, second.as_mut(), room, truncation, side)?;
        }
        Ok((&self.surround(first, second, options.add_special_tokens)?).into())
    }

    /// Puts what belongs around pieces around them.
    pub(super) fn surround(
        &self,
        first: tokenizers::Encoding,
        mut second: Option<tokenizers::Encoding>,
        add_special_tokens: bool,
    ) -> Result<tokenizers::Encoding> {
        if let Some(second) = &mut second {
            // Some processors leave the types as they are.
            second.set_type_ids(vec![1; second.len()]);
            for window in second.get_overflowing_mut() {
                window.set_type_ids(vec![1; window.len()]);
            }
        }
        if let Some(processor) = self.around.as_ref() {
            return processor
                .process(first, second, add_special_tokens)
                .map_err(Error::tokenize);
        }
        let mut encodings: Vec<_> = std::iter::once(first).chain(second).collect();
        for (sequence, encoding) in encodings.iter_mut().enumerate() {
            encoding.set_sequence_id(sequence);
            for window in encoding.get_overflowing_mut() {
                window.set_sequence_id(sequence);
            }
        }
        Ok(tokenizers::Encoding::merge(encodings, false))
    }
}

/// Cuts texts so that both together have at most `room` tokens.
fn truncate(
    first: &mut tokenizers::Encoding,
    second: Option<&mut tokenizers::Encoding>,
    room: usize,
    truncation: &Truncation,
    side: Side,
) -> Result<()> {
    let (one, two) = (first.len(), second.as_ref().map(|second| second.len()));
    let excess = (one + two.unwrap_or(0)).saturating_sub(room);
    if excess == 0 {
        return Ok(());
    }
    let less = |length: usize, which: &str| {
        length
            .checked_sub(excess)
            .filter(|left| *left > 0)
            .ok_or_else(|| {
                Error::Tokenize(format!(
                    "the {which} text has only {length} tokens, and {excess} have to go to leave {room}"
                ))
            })
    };
    let (one, two) = match (truncation.strategy, two) {
        (_, two) if room == 0 => (0, two.map(|_| 0)),
        (TruncationStrategy::OnlyFirst, two) => (less(one, "first")?, two),
        (TruncationStrategy::OnlySecond, Some(two)) => (one, Some(less(two, "second")?)),
        (TruncationStrategy::OnlySecond, None) => {
            return Err(Error::Tokenize(
                "the second text is to be cut, but there is only one".to_owned(),
            ));
        }
        (TruncationStrategy::LongestFirst, None) => (room, None),
        (TruncationStrategy::LongestFirst, Some(two)) => {
            let shorter = one.min(two).min(room / 2);
            match one <= two {
                true => (shorter, Some(room - shorter)),
                false => (room - shorter, Some(shorter)),
            }
        }
    };
    cut(first, one, truncation.stride, side)?;
    if let (Some(second), Some(two)) = (second, two) {
        cut(second, two, truncation.stride, side)?;
    }
    Ok(())
}

fn cut(encoding: &mut tokenizers::Encoding, length: usize, stride: usize, side: Side) -> Result<()> {
    if length > 0 && length < encoding.len() && stride >= length {
        return Err(Error::Tokenize(format!(
            "a stride of {stride} tokens does not fit into windows of {length}"
        )));
    }
    let direction = match side {
        Side::Left => TruncationDirection::Left,
        Side::Right => TruncationDirection::Right,
    };
    encoding.truncate(length, stride, direction);
    Ok(())
}
