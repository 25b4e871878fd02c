//! SmolLM3 (Bakouch et al., 2025): Llama, every fourth layer of which knows no positions.

use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Decoder, DecoderConfig, Error, GatedMlp, Result, RmsNorm, Rope,
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
    pub head_dim: Option<usize>,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub initializer_range: f64,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub use_sliding_window: bool,
    pub sliding_window: Option<usize>,
    /// 0 for each layer without a rotation.
    pub no_rope_layers: Option<Vec<u8>>,
    pub no_rope_layer_interval: usize,
    pub layer_types: Option<Vec<String>>,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 128_256,
            hidden_size: 2048,
            intermediate_size: 11_008,
            num_hidden_layers: 36,
            num_attention_heads: 16,
            num_key_value_heads: Some(4),
            head_dim: None,
            hidden_act: Activation::Silu,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: true,
            initializer_range: 0.02,
            attention_bias: false,
            mlp_bias: false,
            use_sliding_window: false,
            sliding_window: None,
            no_rope_layers: None,
            no_rope_layer_interval: 4,
            layer_types: None,
            rope: RopeSettings::default(),
        }
    }
}

impl Config {
    /// Whether layer `i` rotates its queries and keys.
    fn rotates(&self, i: usize) -> Result<bool> {
        match &self.no_rope_layers {
            Some(layers) => {
                let message = || format!("names {} layers of {}", layers.len(), self.num_hidden_layers);
                let rotates = layers
                    .get(i)
                    .ok_or_else(|| Error::config("no_rope_layers", message()))?;
                Ok(*rotates != 0)
            }
            None => Ok(!(i + 1).is_multiple_of(self.no_rope_layer_interval)),
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.rms_norm_eps);
        let head_dim = self.head_dim.unwrap_or(hidden / heads.max(1));
        let rope = self.rope.resolve("full_attention", 2_000_000.0)?;
        let rope = Rope::new(&rope, head_dim, self.max_position_embeddings, false)?;
        let attention = AttentionConfig {
            qkv_bias: self.attention_bias,
            out_bias: self.attention_bias,
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads.unwrap_or(heads), head_dim)
        };
        let window = self.sliding_window.filter(|_| self.use_sliding_window);
        let mut windows = Vec::new();
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let rotates = self.rotates(i)?;
            let window = layer_types::window(&self.layer_types, i, window, !rotates)?;
            windows.push(window);
            let attention = AttentionConfig {
                window,
                rope: rotates.then(|| rope.clone()),
                ..attention.clone()
            };
            let self_attn = Attention::load(&w.pp("self_attn"), attention)?;
            let mlp = GatedMlp::load(
                &w.pp("mlp"),
                hidden,
                self.intermediate_size,
                self.hidden_act,
                self.mlp_bias,
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
