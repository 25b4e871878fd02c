//! Phi-3 and Phi-4 (Abdin et al., 2024): Llama's layer with its projections fused, a sliding window over every
//! layer, and longrope for the long-context variants.

use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Decoder, DecoderConfig, GatedMlp, Result, RmsNorm, Rope,
    RopeSettings, Weights,
};
use serde::{Deserialize, Serialize};

use crate::Architecture;
use crate::llama::Layer;

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
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub sliding_window: Option<usize>,
    pub initializer_range: f64,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 32_064,
            hidden_size: 3072,
            intermediate_size: 8192,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: Activation::Silu,
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: false,
            sliding_window: None,
            initializer_range: 0.02,
            rope: RopeSettings::default(),
        }
    }
}

impl Config {
    fn rope(&self, head_dim: usize) -> Result<Rope> {
        let mut rope = self.rope.resolve("full_attention", 10_000.0)?;
        if rope.rope_type == "yarn" {
            // The first releases called longrope so.
            rope.rope_type = "longrope".to_string();
        }
        rope.original_max_position_embeddings.get_or_insert(4096);
        Rope::new(&rope, head_dim, self.max_position_embeddings, false)
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        let head_dim = self.head_dim.unwrap_or(hidden / heads.max(1));
        let attention = AttentionConfig {
            window: self.sliding_window,
            rope: Some(self.rope(head_dim)?),
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads.unwrap_or(heads), head_dim)
        };
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let self_attn =
                Attention::load_stacked(&w.pp("self_attn"), ["qkv_proj", "o_proj"], attention.clone())?;
            let mlp = GatedMlp::load_fused(
                &w.pp("mlp"),
                ["gate_up_proj", "down_proj"],
                hidden,
                self.intermediate_size,
                self.hidden_act,
                false,
            )?;
            Layer::load(&w, self_attn, mlp, hidden, self.rms_norm_eps)
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load(&w.pp("model.norm"), hidden, self.rms_norm_eps)?;
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
