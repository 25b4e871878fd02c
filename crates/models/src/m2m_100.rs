//! M2M100 (Fan et al., 2021) and NLLB (Costa-jussà et al., 2022): computed positions that are counted from after the
//! padding token's id, layer norms before the parts of a layer, and one after the last.

use oxiformers_nn::seq2seq::{Half, LmHead, TiedTables};
use oxiformers_nn::{Activation, Result, Stack, Weights};
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
            vocab_size: 128_112,
            activation_function: Activation::Relu,
            scale_embedding: true,
            forced_eos_token_id: Vec::new(),
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

impl Config {
    fn family(&self) -> Family {
        Family {
            norm_before: true,
            final_norm: true,
            embedding_norm: false,
            positions: PositionKind::Sinusoidal {
                offset: self.0.pad_token_id.map_or(0, |id| id as usize + 1),
                inclusive: true,
            },
            target_vocab_size: None,
        }
    }
}

impl Seq2SeqArchitecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";
    const IGNORED: &'static [&'static str] = &["embed_positions.weights"];

    fn stack(&self, half: Half, w: &Weights, tables: &mut TiedTables) -> Result<Stack<Layer>> {
        self.0.stack_of(half, w, tables, &self.family())
    }

    fn lm_head(&self, w: &Weights, tables: &mut TiedTables) -> Result<LmHead> {
        self.0.lm_head_of(w, tables, &self.family())
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.0.max_position_embeddings)
    }
}
