//! Falcon (Almazrouei et al., 2023): attention and feed-forward block in parallel after one norm or two, with one
//! key/value head or some; the oldest sizes have them one after the other, with ALiBi.

use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Decoder, DecoderConfig, LayerNorm, Mlp, Result, Rope,
    RopeSettings, Weights,
};
use serde::{Deserialize, Serialize};

use crate::Architecture;
use crate::bloom::alibi;
use crate::gpt2::Layer;

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_ln_in_parallel_attn: Option<usize>,
    pub layer_norm_epsilon: f64,
    pub initializer_range: f64,
    pub num_kv_heads: Option<usize>,
    pub alibi: bool,
    pub new_decoder_architecture: bool,
    pub multi_query: bool,
    pub parallel_attn: bool,
    pub bias: bool,
    pub max_position_embeddings: usize,
    pub ffn_hidden_size: Option<usize>,
    pub activation: Activation,
    pub tie_word_embeddings: bool,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 65_024,
            hidden_size: 4544,
            num_hidden_layers: 32,
            num_attention_heads: 71,
            num_ln_in_parallel_attn: None,
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
            num_kv_heads: None,
            alibi: false,
            new_decoder_architecture: false,
            multi_query: true,
            parallel_attn: true,
            bias: false,
            max_position_embeddings: 2048,
            ffn_hidden_size: None,
            activation: Activation::Gelu,
            tie_word_embeddings: true,
            rope: RopeSettings::default(),
        }
    }
}

impl Config {
    fn attention(&self, w: &Weights, config: &AttentionConfig) -> Result<Attention> {
        let names = ["query_key_value", "dense"];
        let attention = if self.new_decoder_architecture || !self.multi_query {
            Attention::load_grouped(w, names, config.clone())?
        } else {
            Attention::load_stacked(w, names, config.clone())?
        };
        if !self.alibi {
            return Ok(attention);
        }
        // The bias is scaled like the scores.
        let factor = (config.head_dim as f64).powf(-0.5);
        Ok(attention.with_alibi(alibi(w, config.num_heads, 8.0, factor)))
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "transformer";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (
            self.hidden_size,
            self.num_attention_heads,
            self.layer_norm_epsilon,
        );
        let head_dim = hidden / heads.max(1);
        let kv_heads = if self.new_decoder_architecture || !self.multi_query {
            self.num_kv_heads.unwrap_or(heads)
        } else {
            1
        };
        let rope = self.rope.resolve("full_attention", 10_000.0)?;
        let attention = AttentionConfig {
            qkv_bias: self.bias,
            out_bias: self.bias,
            rope: match self.alibi {
                true => None,
                false => Some(Rope::new(&rope, head_dim, self.max_position_embeddings, false)?),
            },
            ..AttentionConfig::new(hidden, heads, kv_heads, head_dim)
        };
        attention.check()?;
        let parallel = self.new_decoder_architecture || self.parallel_attn;
        let norms = match (self.new_decoder_architecture, self.num_ln_in_parallel_attn) {
            (true, None | Some(2)) => ["ln_attn", "ln_mlp"],
            _ => ["input_layernorm", "post_attention_layernorm"],
        };
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("transformer.h").pp(i);
            let norm = |name: &str| LayerNorm::load(&w.pp(name), hidden, eps, true);
            let names = ["dense_h_to_4h", "dense_4h_to_h"];
            let inner = self.ffn_hidden_size.unwrap_or(4 * hidden);
            Ok(Layer {
                ln_1: norm(norms[0])?,
                attn: self.attention(&w.pp("self_attention"), &attention)?,
                ln_2: match parallel && norms[0] == "input_layernorm" {
                    true => None,
                    false => Some(norm(norms[1])?),
                },
                mlp: Mlp::load(&w.pp("mlp"), names, hidden, inner, self.activation, self.bias)?,
                parallel,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = LayerNorm::load(&w.pp("transformer.ln_f"), hidden, eps, true)?;
        let frame = DecoderConfig {
            embedding: "transformer.word_embeddings".to_string(),
            tie_word_embeddings: self.tie_word_embeddings,
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
