//! Mixtral (Jiang et al., 2024): Mistral with a mixture of experts in every layer.

use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Decoder, DecoderConfig, Result, RmsNorm, Rope, RopeSettings,
    Weights,
};
use serde::{Deserialize, Serialize};

use crate::Architecture;
use crate::qwen2_moe::{FeedForward, Layer, Mixture, Routing};

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: Option<usize>,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub initializer_range: f64,
    pub sliding_window: Option<usize>,
    pub num_experts_per_tok: usize,
    #[serde(alias = "num_experts")]
    pub num_local_experts: usize,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 14_336,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            head_dim: None,
            hidden_act: Activation::Silu,
            max_position_embeddings: 131_072,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            sliding_window: None,
            num_experts_per_tok: 2,
            num_local_experts: 8,
            rope: RopeSettings::default(),
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.rms_norm_eps);
        let head_dim = self.head_dim.unwrap_or(hidden / heads.max(1));
        let rope = self.rope.resolve("full_attention", 1_000_000.0)?;
        let attention = AttentionConfig {
            window: self.sliding_window,
            rope: Some(Rope::new(&rope, head_dim, self.max_position_embeddings, false)?),
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads, head_dim)
        };
        let routing = Routing {
            num_experts: self.num_local_experts,
            top_k: self.num_experts_per_tok,
            normalize: true,
        };
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let self_attn = Attention::load(&w.pp("self_attn"), attention.clone())?;
            let (inner, names) = (self.intermediate_size, ["w1", "w3", "w2"]);
            let moe = Mixture::load(
                &w.pp("block_sparse_moe"),
                names,
                &routing,
                hidden,
                inner,
                self.hidden_act,
            )?;
            Layer::load(&w, self_attn, FeedForward::Sparse(moe), hidden, eps)
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load(&w.pp("model.norm"), hidden, eps)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            windows: vec![self.sliding_window; self.num_hidden_layers],
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
