//! BitNet b1.58 2B4T (Ma et al., 2025): Llama's layer with a norm before each output projection, made for ternary weights
//! and activations of 8 bits, which its checkpoints ask for with their `quantization_config`.

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
    pub attention_bias: bool,
    pub tie_word_embeddings: bool,
    pub initializer_range: f64,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 128_256,
            hidden_size: 2560,
            intermediate_size: 6912,
            num_hidden_layers: 30,
            num_attention_heads: 20,
            num_key_value_heads: Some(5),
            head_dim: None,
            hidden_act: Activation::Relu2,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-5,
            attention_bias: false,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            rope: RopeSettings::default(),
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let head_dim = self.head_dim.unwrap_or(hidden / self.num_attention_heads.max(1));
        let rope = Rope::new(
            &self.rope.resolve("full_attention", 500_000.0)?,
            head_dim,
            self.max_position_embeddings,
            false,
        )?;
        let kv_heads = self.num_key_value_heads.unwrap_or(self.num_attention_heads);
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let attention = AttentionConfig {
                qkv_bias: self.attention_bias,
                out_bias: self.attention_bias,
                rope: Some(rope.clone()),
                ..AttentionConfig::new(hidden, self.num_attention_heads, kv_heads, head_dim)
            };
            let norm =
                |w: &Weights, name: &str, size: usize| RmsNorm::load(&w.pp(name), size, self.rms_norm_eps);
            let (attn, mlp) = (w.pp("self_attn"), w.pp("mlp"));
            let attention =
                Attention::load(&attn, attention)?.with_out_norm(norm(&attn, "attn_sub_norm", hidden)?);
            let feed_forward = GatedMlp::load(&mlp, hidden, inner, self.hidden_act, false)?
                .with_inner_norm(norm(&mlp, "ffn_sub_norm", inner)?);
            Layer::load(&w, attention, feed_forward, hidden, self.rms_norm_eps)
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load(&w.pp("model.norm"), hidden, self.rms_norm_eps)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
