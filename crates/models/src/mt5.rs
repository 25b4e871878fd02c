//! mT5 (Xue et al., 2021): T5 1.1 for many languages; its output is never scaled.

use oxiformers_nn::seq2seq::{Half, LmHead, Reader, TiedTables};
use oxiformers_nn::{Head, Result, Stack, Weights};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::fields::over_defaults;
use crate::t5::{self, IGNORED, Layer};
use crate::{Seq2SeqArchitecture, Task};

/// The fields of `config.json`: T5's, with other defaults.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Value")]
pub struct Config(pub t5::Config);

impl Default for Config {
    fn default() -> Self {
        Self(t5::Config {
            vocab_size: 250_112,
            d_ff: 1024,
            num_layers: 8,
            num_heads: 6,
            feed_forward_proj: "gated-gelu".to_string(),
            decoder_start_token_id: Some(0),
            ..t5::Config::default()
        })
    }
}

impl TryFrom<Value> for Config {
    type Error = serde_json::Error;

    fn try_from(json: Value) -> serde_json::Result<Self> {
        over_defaults(&Self::default().0, json).map(Self)
    }
}

impl Seq2SeqArchitecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "";
    const IGNORED: &'static [&'static str] = IGNORED;

    fn stack(&self, half: Half, w: &Weights, tables: &mut TiedTables) -> Result<Stack<Layer>> {
        self.0.stack_of(half, w, tables, false)
    }

    fn lm_head(&self, _: &Weights, tables: &mut TiedTables) -> Result<LmHead> {
        self.0.lm_head_of(tables, false)
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        None
    }

    fn reader(&self, task: Task, w: &Weights) -> Result<Reader<Layer>> {
        self.0.reader_of(task, w, self)
    }

    fn head(&self, task: Task, w: &Weights, labels: usize) -> Result<Option<Head>> {
        self.0.head_of(task, w, labels)
    }
}
