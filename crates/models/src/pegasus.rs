//! PEGASUS (Zhang et al., 2020): computed positions, layer norms before the parts of a layer, and one after the last.

use oxiformers_nn::seq2seq::{Half, LmHead, TiedTables};
use oxiformers_nn::{Result, Stack, Weights};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Seq2SeqArchitecture;
use crate::bart::{self, Family, Layer, PositionKind};
use crate::fields::over_defaults;

/// The fields of `config.json`: BART's, with other defaults.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Value")]
pub struct Config(pub bart::Config);

impl Default for Config {
    fn default() -> Self {
        Self(bart::Config {
            pad_token_id: Some(0),
            bos_token_id: None,
            eos_token_id: vec![1],
            decoder_start_token_id: Some(0),
            forced_eos_token_id: vec![1],
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
    embedding_norm: false,
    positions: PositionKind::Sinusoidal {
        offset: 0,
        inclusive: false,
    },
    target_vocab_size: None,
};

impl Seq2SeqArchitecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";
    const IGNORED: &'static [&'static str] = &["embed_positions.weight"];

    fn stack(&self, half: Half, w: &Weights, tables: &mut TiedTables) -> Result<Stack<Layer>> {
        self.0.stack_of(half, w, tables, &FAMILY)
    }

    fn lm_head(&self, w: &Weights, tables: &mut TiedTables) -> Result<LmHead> {
        self.0.lm_head_of(w, tables, &FAMILY)
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.0.max_position_embeddings)
    }
}
