//! RoBERTa (Liu et al., 2019), and with it XLM-RoBERTa (Conneau et al., 2020) and CamemBERT (Martin et al., 2020): BERT
//! with positions that are counted after the padding token, and other heads.

use oxiformers_nn::head::vocabulary_output;
use oxiformers_nn::{
    Activation, Embedding, Encoder, Head, LayerNorm, Linear, PositionCount, Reads, Result, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bert::{self, Layer, pooled_head};
use crate::fields::over_defaults;
use crate::{EncoderArchitecture, Task};

/// The fields of `config.json`: BERT's, with other defaults.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Value")]
pub struct Config(pub bert::Config);

impl Default for Config {
    fn default() -> Self {
        Self(bert::Config {
            vocab_size: 50_265,
            pad_token_id: 1,
            ..bert::Config::default()
        })
    }
}

impl TryFrom<Value> for Config {
    type Error = serde_json::Error;

    fn try_from(json: Value) -> serde_json::Result<Self> {
        over_defaults(&Self::default().0, json).map(Self)
    }
}

/// The head for masked tokens at `w`; `table` is shared by its output layer where the two are `tied`.
///
/// # Errors
/// A tensor that is missing or misshapen.
pub fn lm_head(w: &Weights, table: &Embedding, tied: bool, hidden: usize, eps: f64) -> Result<Head> {
    let dense = Linear::load(&w.pp("dense"), hidden, hidden, true)?;
    let norm = LayerNorm::load(&w.pp("layer_norm"), hidden, eps, true)?;
    let output = vocabulary_output(w, ["decoder", "bias"], table, tied)?;
    let head = Head::new(Reads::All).dense(dense, Activation::Gelu);
    Ok(head.norm(norm).output(output))
}

/// The head that classifies by the first token, at `w`.
///
/// # Errors
/// A tensor that is missing or misshapen.
pub fn classification_head(w: &Weights, act: Activation, hidden: usize, labels: usize) -> Result<Head> {
    let dense = Linear::load(&w.pp("dense"), hidden, hidden, true)?;
    let output = Linear::load(&w.pp("out_proj"), hidden, labels, true)?;
    Ok(Head::new(Reads::First).dense(dense, act).output(output))
}

impl EncoderArchitecture for Config {
    type Model = Encoder<Layer>;
    const BASE: &'static str = "roberta";
    const IGNORED: &'static [&'static str] = bert::IGNORED;

    fn load(&self, w: &Weights) -> Result<Encoder<Layer>> {
        let pad_token_id = self.0.pad_token_id;
        self.0
            .encoder(&w.pp("roberta"), PositionCount::AfterPadding { pad_token_id })
    }

    fn head(&self, task: Task, w: &Weights, model: &Encoder<Layer>, labels: usize) -> Result<Option<Head>> {
        let (c, hidden) = (&self.0, self.0.hidden_size);
        Ok(Some(match task {
            Task::MaskedLM => {
                let table = &model.embeddings.word_embeddings;
                lm_head(
                    &w.pp("lm_head"),
                    table,
                    c.tie_word_embeddings,
                    hidden,
                    c.layer_norm_eps,
                )?
            }
            Task::SequenceClassification => {
                classification_head(&w.pp("classifier"), Activation::Tanh, hidden, labels)?
            }
            _ => return pooled_head(task, w, &w.pp("roberta.pooler.dense"), hidden, labels),
        }))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        // The first rows of the table are the padding token's and those before it.
        Some((self.0.max_position_embeddings).saturating_sub(self.0.pad_token_id as usize + 1))
    }
}
