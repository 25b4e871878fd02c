//! StarCoder2 (Lozhkov et al., 2024): layer norms and a plain feed-forward block, rotation, grouped heads, a sliding
//! window.

use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Decoder, DecoderConfig, LayerNorm, Mlp, Result, Rope,
    RopeSettings, Weights,
};
use serde::{Deserialize, Serialize};

use crate::Architecture;
use crate::gpt2::Layer;

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
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub initializer_range: f64,
    pub norm_epsilon: f64,
    pub sliding_window: Option<usize>,
    pub use_bias: bool,
    pub tie_word_embeddings: bool,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 49_152,
            hidden_size: 3072,
            intermediate_size: 12_288,
            num_hidden_layers: 30,
            num_attention_heads: 24,
            num_key_value_heads: 2,
            hidden_act: Activation::GeluTanh,
            max_position_embeddings: 4096,
            initializer_range: 0.018_042,
            norm_epsilon: 1e-5,
            sliding_window: None,
            use_bias: true,
            tie_word_embeddings: true,
            rope: RopeSettings::default(),
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.norm_epsilon);
        let head_dim = hidden / heads.max(1);
        let rope = self.rope.resolve("full_attention", 10_000.0)?;
        let attention = AttentionConfig {
            qkv_bias: self.use_bias,
            out_bias: self.use_bias,
            window: self.sliding_window,
            rope: Some(Rope::new(&rope, head_dim, self.max_position_embeddings, false)?),
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads, head_dim)
        };
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let norm = |name: &str| LayerNorm::load(&w.pp(name), hidden, eps, true);
            let (inner, act) = (self.intermediate_size, self.hidden_act);
            Ok(Layer {
                ln_1: norm("input_layernorm")?,
                attn: Attention::load(&w.pp("self_attn"), attention.clone())?,
                ln_2: Some(norm("post_attention_layernorm")?),
                mlp: Mlp::load(
                    &w.pp("mlp"),
                    ["c_fc", "c_proj"],
                    hidden,
                    inner,
                    act,
                    self.use_bias,
                )?,
                parallel: false,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = LayerNorm::load(&w.pp("model.norm"), hidden, eps, true)?;
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
