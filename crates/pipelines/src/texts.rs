//! Texts into an encoder, batch by batch, and its values out of it.

use std::cmp::Reverse;
use std::fmt::Display;

use burn::tensor::{FloatDType, Tensor};
use oxiformers_hub::ModelFiles;
use oxiformers_models::AutoConfig;
use oxiformers_models::registry::AnyConfig;
use oxiformers_nn::EncoderInputs;
use oxiformers_processors::Tokenizer;
use oxiformers_processors::tokenizer::{EncodeOptions, Encoding, TextInput, Truncation, TruncationStrategy};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One text, or a pair of texts that a model reads together. As JSON a string, or an object with `text` and `text_pair`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TextOrPair {
    /// A text.
    Text(String),
    /// A text with, perhaps, another one.
    Pair {
        /// The first.
        text: String,
        /// The second.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        text_pair: Option<String>,
    },
}

impl<T: Into<String>> From<T> for TextOrPair {
    fn from(text: T) -> Self {
        Self::Text(text.into())
    }
}

impl<'a> From<&'a TextOrPair> for TextInput<'a> {
    fn from(input: &'a TextOrPair) -> Self {
        match input {
            // As in Python, nothing is no second text.
            TextOrPair::Pair {
                text,
                text_pair: Some(pair),
            } if !pair.is_empty() => (text, pair).into(),
            TextOrPair::Text(text) | TextOrPair::Pair { text, .. } => text.into(),
        }
    }
}

/// A tokenizer, and what a model takes.
#[derive(Debug)]
pub(crate) struct Texts {
    /// What to call the model in messages.
    pub name: String,
    pub tokenizer: Tokenizer,
    /// The longest row that the model takes, in tokens, if there is a limit.
    limit: Option<usize>,
    /// The longest row that the tokenizer or the model is made for: what is cut has this length, and windows have.
    pub window: Option<usize>,
    /// The encoder that reads the rows, which says which of them share a batch.
    architecture: Option<AnyConfig>,
}

impl Texts {
    /// `limit` is the longest row that the model takes.
    pub fn new(name: &str, tokenizer: Tokenizer, limit: Option<usize>) -> Self {
        Self {
            name: name.to_string(),
            window: tokenizer.config().model_max_length.into_iter().chain(limit).min(),
            tokenizer,
            limit,
            architecture: None,
        }
    }

    pub fn from_files(files: &ModelFiles, config: &AutoConfig) -> Result<Self> {
        let limit = config.architecture.max_position_embeddings();
        Ok(Self {
            architecture: Some(config.architecture.clone()),
            ..Self::new(files.name(), Tokenizer::from_files(files)?, limit)
        })
    }

    /// The tokens of each input. One that is too long for the model is an error, unless it is to be cut, which is said.
    pub fn rows<'a, I: Into<TextInput<'a>>>(
        &self,
        inputs: impl IntoIterator<Item = I>,
        cut: Option<TruncationStrategy>,
    ) -> Result<Vec<Encoding>> {
        let encode = |(index, input)| self.encode(index, input, cut);
        let mut rows = inputs
            .into_iter()
            .enumerate()
            .map(encode)
            .collect::<Result<Vec<_>>>()?;
        let mut shortened = 0;
        for row in &mut rows {
            shortened += usize::from(row.is_truncated());
            row.overflowing.clear();
        }
        self.say_cut(shortened, rows.len());
        Ok(rows)
    }

    /// The tokens of an input, which is the `index`-th; what was cut off lies in its windows.
    pub fn encode<'a>(
        &self,
        index: usize,
        input: impl Into<TextInput<'a>>,
        cut: Option<TruncationStrategy>,
    ) -> Result<Encoding> {
        let options = EncodeOptions {
            truncation: cut.zip(self.window).map(|(strategy, length)| Truncation {
                max_length: Some(length),
                strategy,
                ..Truncation::default()
            }),
            ..EncodeOptions::default()
        };
        let row = self.tokenizer.encode_with(input, &options);
        let row = row.map_err(|error| Error::input(index, error.to_string()))?;
        self.check_length(
            index,
            row.len(),
            "shorten it, or have it cut with the option `truncation`",
        )?;
        Ok(row)
    }

    /// Says that inputs were cut.
    pub fn say_cut(&self, shortened: usize, of: usize) {
        if shortened > 0 {
            let length = self.window.unwrap_or_default();
            tracing::warn!("{shortened} of {of} inputs were cut to {length} tokens");
        }
    }

    /// An error that says what to do where an input has more tokens than the model takes.
    pub fn check_length(&self, index: usize, length: usize, what_to_do: impl Display) -> Result<()> {
        match self.limit.filter(|limit| length > *limit) {
            _ if length == 0 => Err(Error::input(index, "has no tokens")),
            Some(limit) => {
                let message = format!(
                    "has {length} tokens, and {} takes {limit}; {what_to_do}",
                    self.name
                );
                Err(Error::input(index, message))
            }
            None => Ok(()),
        }
    }

    /// Runs rows, `batch_size` of similar length at a time. `forward` gives one answer for each row of a batch; it is told
    /// which rows they are. The answers are in the order of the rows.
    pub async fn in_batches<A>(
        &self,
        rows: &[Encoding],
        batch_size: usize,
        forward: impl AsyncFn(&EncoderInputs, &[usize]) -> Result<Vec<A>>,
    ) -> Result<Vec<A>> {
        let forward = async |batch: &[usize]| forward(&self.inputs(rows, batch), batch).await;
        let shape = |row: &Encoding| self.shape(row.len());
        in_batches(rows, batch_size, TOKENS_AT_ONCE, shape, forward).await
    }

    /// Where a row of this length belongs.
    pub fn shape(&self, length: usize) -> Shape {
        let group = |architecture: &AnyConfig| architecture.batch_group(length);
        Shape {
            group: self.architecture.as_ref().map_or(0, group),
            length,
        }
    }

    fn inputs(&self, rows: &[Encoding], batch: &[usize]) -> EncoderInputs {
        let ids: Vec<Vec<u32>> = batch.iter().map(|row| rows[*row].ids.clone()).collect();
        let mut inputs = EncoderInputs::padded(&ids, self.tokenizer.pad_token_id().unwrap_or(0));
        let config = self.tokenizer.config();
        if config
            .model_input_names
            .iter()
            .any(|name| name == "token_type_ids")
        {
            let width = inputs.dims()[1];
            let types = |row: &usize| {
                let mut types = rows[*row].token_type_ids.clone();
                types.resize(width, config.pad_token_type_id);
                types
            };
            inputs.token_type_ids = batch.iter().map(types).collect();
        }
        inputs
    }
}

/// Which batch something belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Shape {
    /// Batches are made of one group.
    pub group: usize,
    /// Tokens.
    pub length: usize,
}

/// Tokens, padding included, that an encoder reads at once: more would take more memory and no less time.
pub(crate) const TOKENS_AT_ONCE: usize = 4096;

/// Answers items of one group and of similar length at a time: `batch_size` of them, fewer where that would be more than
/// `most_tokens`. `forward` is told which items a batch has, and gives one answer for each. The answers are in the order of
/// the items.
pub(crate) async fn in_batches<T, A>(
    items: &[T],
    batch_size: usize,
    most_tokens: usize,
    shape: impl Fn(&T) -> Shape,
    forward: impl AsyncFn(&[usize]) -> Result<Vec<A>>,
) -> Result<Vec<A>> {
    let shapes: Vec<Shape> = items.iter().map(shape).collect();
    // The longest first: little of a batch is padding, and where memory does not suffice, it shows at once.
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|item| Reverse(shapes[*item]));
    let mut answers = Vec::with_capacity(items.len());
    let mut rest = order.as_slice();
    while let [longest, ..] = rest {
        let Shape { group, length } = shapes[*longest];
        let most = batch_size.min(most_tokens / length.max(1)).max(1);
        let same = |item: &&usize| shapes[**item].group == group;
        let (batch, after) = rest.split_at(rest.iter().take(most).take_while(same).count());
        answers.extend(batch.iter().copied().zip(forward(batch).await?));
        rest = after;
    }
    answers.sort_by_key(|(item, _)| *item);
    Ok(answers.into_iter().map(|(_, answer)| answer).collect())
}

/// The values of a tensor, wherever it is.
pub(crate) async fn values<const D: usize>(x: Tensor<D>) -> Result<Vec<f32>> {
    let data = x
        .cast(FloatDType::F32)
        .into_data_async()
        .await
        .map_err(Error::read_back)?;
    data.try_into_vec().map_err(Error::read_back)
}

/// The values `[batch, n]`, row by row.
pub(crate) async fn rows_of(x: Tensor<2>) -> Result<Vec<Vec<f32>>> {
    let width = x.dims()[1].max(1);
    Ok(values(x).await?.chunks(width).map(<[f32]>::to_vec).collect())
}

/// The values `[batch, seq, n]`, row by row and token by token; without those of padding tokens.
pub(crate) async fn tokens_of(x: Tensor<3>, inputs: &EncoderInputs) -> Result<Vec<Vec<Vec<f32>>>> {
    let [_, seq, width] = x.dims();
    let (seq, width) = (seq.max(1), width.max(1));
    let values = values(x).await?;
    let row = |(row, tokens): (&[f32], &std::ops::Range<usize>)| {
        let real = row.chunks(width).take(tokens.end).skip(tokens.start);
        real.map(<[f32]>::to_vec).collect()
    };
    Ok(values.chunks(seq * width).zip(&inputs.tokens).map(row).collect())
}

/// Index and value of the largest; the first of those that are equal.
pub(crate) fn largest(x: &[f32]) -> Option<(usize, f32)> {
    x.iter()
        .copied()
        .enumerate()
        .reduce(|best, other| if other.1 > best.1 { other } else { best })
}

/// Indices of the `most` largest values, from the largest on; equal ones keep their order.
pub(crate) fn descending(x: &[f32], most: usize) -> Vec<usize> {
    let by_value = |a: &usize, b: &usize| x[*b].total_cmp(&x[*a]).then(a.cmp(b));
    let mut order: Vec<usize> = (0..x.len()).collect();
    if most < order.len() {
        order.select_nth_unstable_by(most, by_value);
        order.truncate(most);
    }
    order.sort_unstable_by(by_value);
    order
}

/// Numbers as probabilities of things that exclude each other.
pub(crate) fn softmax(x: &[f32]) -> Vec<f32> {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f32 = exp.iter().sum();
    exp.iter().map(|x| x / sum).collect()
}

/// A number as a probability.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
