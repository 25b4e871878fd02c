//! Qwen3 (Qwen Team, 2025): Qwen2 without biases and with RMS norms over each head's queries and keys.

use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Decoder, DecoderConfig, GatedMlp, Result, RmsNorm, Rope,
    RopeSettings, Weights,
};
use serde::{Deserialize, Serialize};

use crate::Architecture;
use crate::layer_types;
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
    pub head_dim: usize,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub initializer_range: f64,
    pub attention_bias: bool,
    pub use_sliding_window: bool,
    pub sliding_window: Option<usize>,
    pub max_window_layers: usize,
    pub layer_types: Option<Vec<String>>,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 151_936,
            hidden_size: 4096,
            intermediate_size: 22_016,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: 128,
            hidden_act: Activation::Silu,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            attention_bias: false,
            use_sliding_window: false,
            sliding_window: Some(4096),
            max_window_layers: 28,
            layer_types: None,
            rope: RopeSettings::default(),
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.rms_norm_eps);
        let head_dim = self.head_dim;
        let rope = self.rope.resolve("full_attention", 10_000.0)?;
        let attention = AttentionConfig {
            qkv_bias: self.attention_bias,
            out_bias: self.attention_bias,
            rope: Some(Rope::new(&rope, head_dim, self.max_position_embeddings, false)?),
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads.unwrap_or(heads), head_dim)
        };
        let window = self.sliding_window.filter(|_| self.use_sliding_window);
        let mut windows = Vec::new();
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let window = layer_types::window(&self.layer_types, i, window, i >= self.max_window_layers)?;
            windows.push(window);
            let attention = AttentionConfig {
                window,
                ..attention.clone()
            };
            let at = w.pp("self_attn");
            let self_attn = Attention::load(&at, attention)?.with_head_rms_norm(&at, eps, false)?;
            let mlp = GatedMlp::load(
                &w.pp("mlp"),
                hidden,
                self.intermediate_size,
                self.hidden_act,
                false,
            )?;
            Layer::load(&w, self_attn, mlp, hidden, eps)
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load(&w.pp("model.norm"), hidden, eps)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            windows,
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
