//! mBART (Liu et al., 2020): BART with layer norms before the parts of a layer, and one after the last.

use oxiformers_nn::seq2seq::{Half, LmHead, Reader, TiedTables};
use oxiformers_nn::{Head, Result, Stack, Weights};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bart::{self, Family, Layer};
use crate::fields::over_defaults;
use crate::{Seq2SeqArchitecture, Task};

/// The fields of `config.json`: BART's, with other defaults.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Value")]
pub struct Config(pub bart::Config);

impl Default for Config {
    fn default() -> Self {
        Self(bart::Config {
            decoder_start_token_id: None,
            ..bart::Config::default()
        })
    }
}

impl TryFrom<Value> for Config {
    type Error = serde_json::Error;

    fn try_from(json: Value) -> serde_json::Result<Self> {
        over_defaults(&Self::default().0, json).map(Self)
    }
}

const FAMILY: Family = Family {
    norm_before: true,
    final_norm: true,
    ..bart::FAMILY
};

impl Seq2SeqArchitecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn stack(&self, half: Half, w: &Weights, tables: &mut TiedTables) -> Result<Stack<Layer>> {
        self.0.stack_of(half, w, tables, &FAMILY)
    }

    fn lm_head(&self, w: &Weights, tables: &mut TiedTables) -> Result<LmHead> {
        self.0.lm_head_of(w, tables, &FAMILY)
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.0.max_position_embeddings)
    }

    fn reader(&self, _: Task, w: &Weights) -> Result<Reader<Layer>> {
        self.both_read(w, self.0.shift_around()?)
    }

    fn head(&self, task: Task, w: &Weights, labels: usize) -> Result<Option<Head>> {
        self.0.head_of(task, w, labels)
    }
}
