//! MPT (MosaicML, 2023): ALiBi in place of positions, no biases anywhere.

use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Decoder, DecoderConfig, Error, LayerNorm, Mlp, Result, Weights,
};
use serde::{Deserialize, Serialize};

use crate::Architecture;
use crate::bloom::alibi;
use crate::gpt2::Layer;

/// The field `attn_config`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct AttnConfig {
    pub clip_qkv: Option<f64>,
    pub softmax_scale: Option<f64>,
    pub alibi: bool,
    /// Transformers 5.23 takes 8 whatever is written here; the models were trained with this.
    pub alibi_bias_max: f64,
}

impl Default for AttnConfig {
    fn default() -> Self {
        Self {
            clip_qkv: None,
            softmax_scale: None,
            alibi: true,
            alibi_bias_max: 8.0,
        }
    }
}

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub d_model: usize,
    pub n_heads: usize,
    pub n_layers: usize,
    pub max_seq_len: usize,
    pub vocab_size: usize,
    pub layer_norm_epsilon: f64,
    pub attn_config: AttnConfig,
    pub initializer_range: f64,
    pub tie_word_embeddings: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            d_model: 2048,
            n_heads: 16,
            n_layers: 24,
            max_seq_len: 2048,
            vocab_size: 50_368,
            layer_norm_epsilon: 1e-5,
            attn_config: AttnConfig::default(),
            initializer_range: 0.02,
            tie_word_embeddings: true,
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "transformer";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        if !self.attn_config.alibi {
            return Err(Error::config(
                "attn_config.alibi",
                "learned positions are not supported",
            ));
        }
        let (hidden, heads, eps) = (self.d_model, self.n_heads, self.layer_norm_epsilon);
        let attention = AttentionConfig {
            scale: self.attn_config.softmax_scale,
            // No limit is written as 0, too.
            clip_qkv: self.attn_config.clip_qkv.filter(|limit| *limit > 0.0),
            ..AttentionConfig::new(hidden, heads, heads, hidden / heads.max(1))
        };
        attention.check()?;
        let slopes = alibi(w, heads, self.attn_config.alibi_bias_max, 1.0);
        let layers = (0..self.n_layers).map(|i| {
            let w = w.pp("transformer.blocks").pp(i);
            let norm = |name: &str| LayerNorm::load(&w.pp(name), hidden, eps, false);
            let (names, act) = (["up_proj", "down_proj"], Activation::Gelu);
            let attn = Attention::load_stacked(&w.pp("attn"), ["Wqkv", "out_proj"], attention.clone())?;
            Ok(Layer {
                ln_1: norm("norm_1")?,
                attn: attn.with_alibi(slopes.clone()),
                ln_2: Some(norm("norm_2")?),
                mlp: Mlp::load(&w.pp("ffn"), names, hidden, 4 * hidden, act, false)?,
                parallel: false,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = LayerNorm::load(&w.pp("transformer.norm_f"), hidden, eps, false)?;
        let frame = DecoderConfig {
            embedding: "transformer.wte".to_string(),
            tie_word_embeddings: self.tie_word_embeddings,
            ..DecoderConfig::new(self.vocab_size, hidden, self.n_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_seq_len)
    }
}
