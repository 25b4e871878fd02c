//! GPT-J (Wang and Komatsuzaki, 2021): attention and feed-forward block in parallel after one layer norm, rotation of
//! neighbouring dimensions.

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
    pub n_positions: usize,
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
    pub rotary_dim: usize,
    pub n_inner: Option<usize>,
    pub activation_function: Activation,
    pub layer_norm_epsilon: f64,
    pub initializer_range: f64,
    pub tie_word_embeddings: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 50_400,
            n_positions: 2048,
            n_embd: 4096,
            n_layer: 28,
            n_head: 16,
            rotary_dim: 64,
            n_inner: None,
            activation_function: Activation::GeluTanh,
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
            tie_word_embeddings: false,
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "transformer";
    const IGNORED: &'static [&'static str] = &["attn.bias", "attn.masked_bias"];

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.n_embd, self.n_head, self.layer_norm_epsilon);
        let rope = RopeSettings::default().resolve("full_attention", 10_000.0)?;
        let attention = AttentionConfig {
            rope: Some(Rope::with_rotary_dim(
                &rope,
                self.rotary_dim,
                self.n_positions,
                true,
            )?),
            ..AttentionConfig::new(hidden, heads, heads, hidden / heads.max(1))
        };
        let inner = self.n_inner.unwrap_or(4 * hidden);
        let layers = (0..self.n_layer).map(|i| {
            let w = w.pp("transformer.h").pp(i);
            let names = ["q_proj", "k_proj", "v_proj", "out_proj"];
            Ok(Layer {
                ln_1: LayerNorm::load(&w.pp("ln_1"), hidden, eps, true)?,
                attn: Attention::load_named(&w.pp("attn"), names, attention.clone())?,
                ln_2: None,
                mlp: Mlp::load(
                    &w.pp("mlp"),
                    ["fc_in", "fc_out"],
                    hidden,
                    inner,
                    self.activation_function,
                    true,
                )?,
                parallel: true,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = LayerNorm::load(&w.pp("transformer.ln_f"), hidden, eps, true)?;
        let frame = DecoderConfig {
            embedding: "transformer.wte".to_string(),
            tie_word_embeddings: self.tie_word_embeddings,
            lm_head_bias: true,
            ..DecoderConfig::new(self.vocab_size, hidden, self.n_layer)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.n_positions)
    }
}
