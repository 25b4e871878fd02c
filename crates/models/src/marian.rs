//! Marian (Junczys-Dowmunt et al., 2018): BART with computed positions, without a norm of the embeddings, and in some
//! checkpoints with a vocabulary of the target language's own.

use oxiformers_nn::seq2seq::{Half, LmHead, TiedTables};
use oxiformers_nn::{Result, Stack, Weights};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Seq2SeqArchitecture;
use crate::bart::{self, Family, Layer, PositionKind};
use crate::fields::over_defaults;

/// The fields of `config.json`: BART's, with other defaults, and two more.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Value")]
#[allow(missing_docs)]
pub struct Config {
    #[serde(flatten)]
    pub bart: bart::Config,
    #[serde(flatten)]
    pub target: Target,
}

/// The vocabulary that translations are written with.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Target {
    pub decoder_vocab_size: Option<usize>,
    pub share_encoder_decoder_embeddings: bool,
}

impl Default for Target {
    fn default() -> Self {
        Self {
            decoder_vocab_size: None,
            share_encoder_decoder_embeddings: true,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        let bart = bart::Config {
            vocab_size: 58_101,
            pad_token_id: Some(58_100),
            bos_token_id: None,
            eos_token_id: vec![0],
            decoder_start_token_id: Some(58_100),
            forced_eos_token_id: vec![0],
            ..bart::Config::default()
        };
        Self {
            bart,
            target: Target::default(),
        }
    }
}

impl TryFrom<Value> for Config {
    type Error = serde_json::Error;

    fn try_from(json: Value) -> serde_json::Result<Self> {
        let target = serde_json::from_value(json.clone())?;
        let bart = over_defaults(&Self::default().bart, json)?;
        Ok(Self { bart, target })
    }
}

impl Config {
    fn family(&self) -> Family {
        let own = !self.target.share_encoder_decoder_embeddings;
        let vocab_size = self.target.decoder_vocab_size.unwrap_or(self.bart.vocab_size);
        Family {
            norm_before: false,
            final_norm: false,
            embedding_norm: false,
            positions: PositionKind::Sinusoidal {
                offset: 0,
                inclusive: false,
            },
            target_vocab_size: own.then_some(vocab_size),
        }
    }
}

impl Seq2SeqArchitecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";
    const IGNORED: &'static [&'static str] = &["embed_positions.weight"];

    fn stack(&self, half: Half, w: &Weights, tables: &mut TiedTables) -> Result<Stack<Layer>> {
        self.bart.stack_of(half, w, tables, &self.family())
    }

    fn lm_head(&self, w: &Weights, tables: &mut TiedTables) -> Result<LmHead> {
        self.bart.lm_head_of(w, tables, &self.family())
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.bart.max_position_embeddings)
    }
}
