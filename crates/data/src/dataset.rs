//! What a training sees: all examples of a cache or some of them, or its tokens in blocks; and in which order.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cache::TokenCache;
use crate::example::{Example, Values};
use crate::shuffle::Permutation;
use crate::{Error, Result};

/// Batches whose examples are sorted by length together, as many as Transformers takes.
const MEGABATCH: u64 = 50;

/// In which order examples are seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SamplingStrategy {
    /// Another order in every epoch.
    #[default]
    Random,
    /// As they stand in the data.
    Sequential,
    /// Another order in every epoch, examples of similar length side by side, so that there is little padding.
    GroupByLength,
}

/// Examples by their number.
#[derive(Clone)]
pub struct Dataset {
    cache: Arc<TokenCache>,
    view: View,
    first: u64,
    len: u64,
    /// Numbers that were computed of the examples, with their name.
    computed: Option<(&'static str, Arc<Vec<Vec<f32>>>)>,
}

/// What an example is.
#[derive(Clone)]
enum View {
    /// Those of the cache.
    Examples,
    /// Those of the cache in another order, of which a part is taken.
    Permuted(Permutation),
    /// So many tokens, whatever texts they are from.
    Blocks { size: usize, segments: bool },
}

impl Dataset {
    /// The examples of a cache.
    pub fn new(cache: TokenCache) -> Self {
        Self {
            first: 0,
            len: cache.len(),
            cache: Arc::new(cache),
            view: View::Examples,
            computed: None,
        }
    }

    /// The tokens of a cache, one text after the other, in blocks of `size`; what is left in the end is no block. With
    /// `segments`, the texts within a block do not see each other.
    ///
    /// # Errors
    /// Where there are less tokens than a block has, or labels, which blocks have none of.
    pub fn blocks(cache: TokenCache, size: usize, segments: bool) -> Result<Self> {
        if cache.total("labels") > 0 {
            let message = "joins texts as a whole; conversations and completions are learned in part";
            return Err(Error::config("packing", message));
        }
        let tokens = cache.total("input_ids");
        let len = tokens / size.max(1) as u64;
        if len == 0 {
            return Err(Error::config(
                "block_size",
                format!("is {size}, and the data has {tokens} tokens"),
            ));
        }
        Ok(Self {
            first: 0,
            len,
            cache: Arc::new(cache),
            view: View::Blocks { size, segments },
            computed: None,
        })
    }

    /// Number of examples.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Only the first `most`.
    #[must_use]
    pub fn take(mut self, most: u64) -> Self {
        self.len = self.len.min(most);
        self
    }

    /// The same with a column of numbers that were computed of its examples, in their order.
    ///
    /// # Errors
    /// Where there are not as many as examples.
    pub fn with_computed(mut self, name: &'static str, numbers: Vec<Vec<f32>>) -> Result<Self> {
        if numbers.len() as u64 != self.len {
            let message = format!(
                "has numbers of {} examples, and there are {}",
                numbers.len(),
                self.len
            );
            return Err(Error::config(name, message));
        }
        self.computed = Some((name, Arc::new(numbers)));
        Ok(self)
    }

    /// Splits it in two, `share` of it in the second: examples by chance, which is the same for the same seed; of blocks
    /// those at the end, so that no text is in both parts but one.
    pub fn split(self, share: f64, seed: u64) -> (Self, Self) {
        let held = ((self.len as f64 * share).round() as u64).clamp(1, self.len.saturating_sub(1).max(1));
        let view = match &self.view {
            View::Examples => View::Permuted(Permutation::new(self.len, seed, "split", 0)),
            other => other.clone(),
        };
        let part = |first, len| Self {
            cache: self.cache.clone(),
            view: view.clone(),
            first: self.first + first,
            len,
            computed: None,
        };
        (part(0, self.len - held), part(self.len - held, held))
    }

    /// The example of that number.
    ///
    /// # Errors
    /// Where there is none, or a file is damaged.
    pub fn get(&self, index: u64) -> Result<Example> {
        if index >= self.len {
            return Err(Error::format(
                "the data",
                format!("there is no example {index} among {}", self.len),
            ));
        }
        let at = self.first + index;
        let example = match &self.view {
            View::Examples => self.cache.get(at)?,
            View::Permuted(order) => self.cache.get(order.at(at))?,
            View::Blocks { size, segments } => {
                let begin = at * *size as u64;
                let example =
                    Example::default().with("input_ids", self.cache.stream("input_ids", begin, *size)?);
                match segments {
                    true => example.with("segments", self.cache.segments("input_ids", begin, *size)?),
                    false => example,
                }
            }
        };
        Ok(match &self.computed {
            Some((name, numbers)) => {
                example.with_values(*name, Values::Floats(numbers[index as usize].clone()))
            }
            None => example,
        })
    }

    /// What tells this data from other: the same for the same files, tokenizer and settings.
    pub fn fingerprint(&self) -> String {
        let view = match &self.view {
            View::Examples => "examples".to_string(),
            View::Permuted(_) => "permuted".to_string(),
            View::Blocks { size, segments } => format!("blocks-{size}-{segments}"),
        };
        format!("{}/{view}/{}+{}", self.cache.key, self.first, self.len)
    }

    /// Where an example comes from, in words: file and line; of a block, those of its first and its last text.
    pub fn source(&self, index: u64, example: &Example) -> String {
        self.cache
            .source(example)
            .or_else(|| self.source_of_block(index))
            .unwrap_or_else(|| format!("block {index}"))
    }

    fn source_of_block(&self, index: u64) -> Option<String> {
        let View::Blocks { size, .. } = &self.view else {
            return None;
        };
        let size = *size as u64;
        let begin = (self.first + index) * size;
        let place = |token| {
            let example = self.cache.example_of("input_ids", token)?;
            self.cache.source(&self.cache.get(example).ok()?)
        };
        let (first, last) = (place(begin)?, place((begin + size).checked_sub(1)?)?);
        Some(match first == last {
            true => first,
            false => format!("{first} to {last}"),
        })
    }

    /// Number of tokens in it.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn tokens(&self, index: u64) -> Result<usize> {
        let at = self.first + index;
        match &self.view {
            View::Examples => self.cache.count("input_ids", at),
            View::Permuted(order) => self.cache.count("input_ids", order.at(at)),
            View::Blocks { size, .. } => Ok(*size),
        }
    }
}

/// Batches of an epoch, by their number: nothing has to be remembered of those before.
pub struct Sampler<'a> {
    data: &'a Dataset,
    batch: u64,
    batches: u64,
    strategy: SamplingStrategy,
    order: Permutation,
    /// The examples of the batches that are sorted together, and the number of the first of these.
    sorted: Option<(u64, Vec<u64>)>,
}

impl<'a> Sampler<'a> {
    /// The batches of an epoch.
    pub fn new(
        data: &'a Dataset,
        batch: usize,
        drop_last: bool,
        strategy: SamplingStrategy,
        seed: u64,
        epoch: u64,
    ) -> Self {
        Self {
            data,
            batch: batch as u64,
            batches: batches(data.len(), batch, drop_last),
            strategy,
            order: Permutation::new(data.len(), seed, "epoch", epoch),
            sorted: None,
        }
    }

    /// The examples of a batch.
    ///
    /// # Errors
    /// Where lengths are asked for, and a file is damaged.
    pub fn batch(&mut self, number: u64) -> Result<Vec<u64>> {
        if number >= self.batches {
            return Ok(Vec::new());
        }
        let range = number * self.batch..((number + 1) * self.batch).min(self.data.len());
        match self.strategy {
            SamplingStrategy::Sequential => Ok(range.collect()),
            SamplingStrategy::Random => Ok(range.map(|at| self.order.at(at)).collect()),
            SamplingStrategy::GroupByLength => {
                let first = number / MEGABATCH * MEGABATCH;
                if self.sorted.as_ref().is_none_or(|(known, _)| *known != first) {
                    let all = first * self.batch..((first + MEGABATCH) * self.batch).min(self.data.len());
                    let long = all.map(|at| {
                        let index = self.order.at(at);
                        Ok((self.data.tokens(index)?, index))
                    });
                    let mut long = long.collect::<Result<Vec<_>>>()?;
                    // The sort keeps the order of what is equally long.
                    long.sort_by_key(|(tokens, _)| std::cmp::Reverse(*tokens));
                    self.sorted = Some((first, long.into_iter().map(|(_, index)| index).collect()));
                }
                let sorted = self.sorted.as_ref().map_or(&[][..], |(_, sorted)| sorted);
                let begin = ((number - first) * self.batch) as usize;
                let end = (begin + self.batch as usize).min(sorted.len());
                Ok(sorted.get(begin..end).unwrap_or_default().to_vec())
            }
        }
    }
}

/// How many batches there are.
pub fn batches(examples: u64, batch: usize, drop_last: bool) -> u64 {
    match drop_last {
        true => examples / batch as u64,
        false => examples.div_ceil(batch as u64),
    }
}
