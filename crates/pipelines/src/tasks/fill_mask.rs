//! `fill-mask`: what stands behind a mask.

use std::fmt;

use burn::tensor::{Int, Tensor, TensorData};
use oxiformers_hub::ModelFiles;
use oxiformers_models::AutoModelForMaskedLM;
use oxiformers_nn::{Backbone, EncoderInputs, LoadOptions};
use oxiformers_processors::tokenizer::{Encoding, TruncationStrategy};
use serde::{Deserialize, Serialize};

use crate::pipeline::lines;
use crate::texts::{Texts, descending, rows_of, softmax};
use crate::{Error, Pipeline, Result, Task};

/// Fills in the masked tokens of texts.
///
/// ```no_run
/// use oxiformers::{FillMask, FromPretrained, Pipeline, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let fill = FillMask::from_pretrained("google-bert/bert-base-uncased")?;
/// println!("{}", block_on(fill.run(&["This is a simple [MASK].".into()], &Default::default(), 1))?[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct FillMask {
    /// The network.
    pub model: AutoModelForMaskedLM,
    texts: Texts,
}

/// Options of [`FillMask`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FillMaskOptions {
    /// How many tokens to give for each mask.
    pub top_k: usize,
    /// The only tokens to choose from. Of a word that is none, its first token.
    pub targets: Option<Targets>,
    /// Whether texts that are too long for the model are cut.
    pub truncation: bool,
}

impl Default for FillMaskOptions {
    fn default() -> Self {
        Self {
            top_k: 5,
            targets: None,
            truncation: false,
        }
    }
}

/// Tokens to choose from: as JSON a string or a list of strings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// A token in place of a mask.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Filled {
    /// How likely it is.
    pub score: f32,
    /// Its id.
    pub token: u32,
    /// Its text.
    pub token_str: String,
    /// The text with it. Where there are more masks, these are still in it.
    pub sequence: String,
}

/// What can stand behind the masks of a text, the likeliest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum FilledMasks {
    /// Of the only mask.
    One(Vec<Filled>),
    /// Of each mask, whatever stands behind the others.
    Many(Vec<Vec<Filled>>),
}

impl Pipeline for FillMask {
    const TASK: Task = Task::FillMask;
    type Input = String;
    type Options = FillMaskOptions;
    type Output = FilledMasks;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let model = AutoModelForMaskedLM::from_files(files, options)?;
        let texts = Texts::from_files(files, &model.config)?;
        if texts.tokenizer.mask_token_id().is_none() {
            return Err(Error::Unsuited {
                model: texts.name,
                message: "its tokenizer has no mask_token, so nothing can be filled in".to_string(),
            });
        }
        Ok(Self { model, texts })
    }

    async fn run(
        &self,
        inputs: &[String],
        options: &FillMaskOptions,
        batch_size: usize,
    ) -> Result<Vec<FilledMasks>> {
        let targets = self.targets(options.targets.as_ref())?;
        let cut = options.truncation.then_some(TruncationStrategy::LongestFirst);
        let rows = self.texts.rows(inputs, cut)?;
        let masks = rows
            .iter()
            .enumerate()
            .map(|(index, row)| self.masks(index, row))
            .collect::<Result<Vec<_>>>()?;
        let forward = async |inputs: &EncoderInputs, batch: &[usize]| {
            let output = self.model.encoder.forward(inputs, self.model.device());
            let x = output.map_err(oxiformers_models::Error::from)?.last_hidden_state;
            let [_, seq, hidden] = x.dims();
            // The vocabulary is large: logits are made for the masked tokens only.
            let places =
                |(at, row): (usize, &usize)| masks[*row].iter().map(move |mask| (at * seq + mask) as i32);
            let places: Vec<i32> = batch.iter().enumerate().flat_map(places).collect();
            let count = places.len();
            let places = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &x.device());
            let x = x.flatten::<2>(0, 1).select(0, places).reshape([1, count, hidden]);
            let places = EncoderInputs::padded(&[vec![0; count]], 0);
            let logits = self.model.head.forward(x, &places).squeeze_dim::<2>(0);
            let mut logits = rows_of(logits).await?.into_iter();
            Ok(batch
                .iter()
                .map(|row| logits.by_ref().take(masks[*row].len()).collect())
                .collect())
        };
        let logits: Vec<Vec<Vec<f32>>> = self.texts.in_batches(&rows, batch_size, forward).await?;
        let answer = |((row, masks), logits): ((&Encoding, &Vec<usize>), &Vec<Vec<f32>>)| {
            let fill = |(mask, logits): (&usize, &Vec<f32>)| {
                self.fill(
                    row,
                    *mask,
                    masks.len() == 1,
                    logits,
                    targets.as_deref(),
                    options.top_k,
                )
            };
            let mut filled = masks.iter().zip(logits).map(fill).collect::<Result<Vec<_>>>()?;
            Ok(match filled.len() {
                1 => FilledMasks::One(filled.swap_remove(0)),
                _ => FilledMasks::Many(filled),
            })
        };
        rows.iter().zip(&masks).zip(&logits).map(answer).collect()
    }
}

impl FillMask {
    /// Where the masks of a row are.
    fn masks(&self, index: usize, row: &Encoding) -> Result<Vec<usize>> {
        let mask = self.texts.tokenizer.mask_token_id();
        let masks: Vec<usize> = (0..row.len())
            .filter(|at| row.ids.get(*at).copied() == mask)
            .collect();
        if masks.is_empty() {
            let token = self.texts.tokenizer.mask_token().unwrap_or_default();
            return Err(Error::input(
                index,
                format!("has no {token}, which stands for what is to be filled in"),
            ));
        }
        Ok(masks)
    }

    /// The ids of the only tokens to choose from.
    fn targets(&self, targets: Option<&Targets>) -> Result<Option<Vec<u32>>> {
        let targets = match targets {
            None => return Ok(None),
            Some(Targets::One(target)) => std::slice::from_ref(target),
            Some(Targets::Many(targets)) => targets,
        };
        let tokenizer = &self.texts.tokenizer;
        let mut ids: Vec<u32> = Vec::new();
        for target in targets {
            let id = match tokenizer.token_to_id(target) {
                Some(id) => id,
                None => match tokenizer.encode(target, false)?.first() {
                    Some(id) => {
                        let token = tokenizer.id_to_token(*id).unwrap_or_default();
                        tracing::warn!("the target {target:?} is no token; `{token}` is taken instead");
                        *id
                    }
                    None => {
                        tracing::warn!("the target {target:?} has no tokens and is left out");
                        continue;
                    }
                },
            };
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        if ids.is_empty() {
            return Err(Error::option(
                "targets",
                "has no token; name one, or leave the option out",
            ));
        }
        Ok(Some(ids))
    }

    fn fill(
        &self,
        row: &Encoding,
        mask: usize,
        only: bool,
        logits: &[f32],
        targets: Option<&[u32]>,
        top_k: usize,
    ) -> Result<Vec<Filled>> {
        let tokenizer = &self.texts.tokenizer;
        let probabilities = softmax(logits);
        let (scores, ids): (Vec<f32>, Vec<u32>) = match targets {
            Some(targets) => (targets.iter())
                .filter_map(|id| Some((*probabilities.get(*id as usize)?, *id)))
                .unzip(),
            None => probabilities
                .iter()
                .zip(0..)
                .map(|(score, id)| (*score, id))
                .unzip(),
        };
        let pad = tokenizer.pad_token_id();
        let filled = |index: usize| {
            let mut sequence = row.ids.clone();
            sequence[mask] = ids[index];
            sequence.retain(|id| Some(*id) != pad);
            Ok(Filled {
                score: scores[index],
                token: ids[index],
                token_str: tokenizer.decode(&[ids[index]], false)?,
                // The other masks would be left out with the special tokens.
                sequence: tokenizer.decode(&sequence, only)?,
            })
        };
        descending(&scores, top_k).into_iter().map(filled).collect()
    }
}

impl fmt::Display for FilledMasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(filled) => lines(f, filled),
            Self::Many(masks) => lines(f, &masks.iter().flatten().collect::<Vec<_>>()),
        }
    }
}

impl fmt::Display for Filled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\t{:.4}\t{}", self.token_str, self.score, self.sequence)
    }
}
