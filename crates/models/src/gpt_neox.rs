//! GPT-NeoX (Black et al., 2022) and Pythia: attention and feed-forward block in parallel, each after a layer norm of
//! its own, and a rotation of some of each head's dimensions.

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
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub initializer_range: f64,
    pub layer_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub use_parallel_residual: bool,
    pub attention_bias: bool,
    /// Older form of `partial_rotary_factor`.
    pub rotary_pct: f64,
    /// Older form of `rope_theta`.
    pub rotary_emb_base: f64,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 50_432,
            hidden_size: 6144,
            num_hidden_layers: 44,
            num_attention_heads: 64,
            intermediate_size: 24_576,
            hidden_act: Activation::Gelu,
            max_position_embeddings: 2048,
            initializer_range: 0.02,
            layer_norm_eps: 1e-5,
            tie_word_embeddings: false,
            use_parallel_residual: true,
            attention_bias: true,
            rotary_pct: 0.25,
            rotary_emb_base: 10_000.0,
            rope: RopeSettings::default(),
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "gpt_neox";
    const IGNORED: &'static [&'static str] =
        &["attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"];

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.layer_norm_eps);
        let head_dim = hidden / heads.max(1);
        let mut rope = self.rope.resolve("full_attention", self.rotary_emb_base)?;
        rope.partial_rotary_factor.get_or_insert(self.rotary_pct);
        let attention = AttentionConfig {
            qkv_bias: self.attention_bias,
            out_bias: self.attention_bias,
            rope: Some(Rope::new(&rope, head_dim, self.max_position_embeddings, false)?),
            ..AttentionConfig::new(hidden, heads, heads, head_dim)
        };
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("gpt_neox.layers").pp(i);
            let norm = |name: &str| LayerNorm::load(&w.pp(name), hidden, eps, true);
            let (names, inner) = (["dense_h_to_4h", "dense_4h_to_h"], self.intermediate_size);
            Ok(Layer {
                ln_1: norm("input_layernorm")?,
                attn: Attention::load_grouped(
                    &w.pp("attention"),
                    ["query_key_value", "dense"],
                    attention.clone(),
                )?,
                ln_2: Some(norm("post_attention_layernorm")?),
                mlp: Mlp::load(&w.pp("mlp"), names, hidden, inner, self.hidden_act, true)?,
                parallel: self.use_parallel_residual,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = LayerNorm::load(&w.pp("gpt_neox.final_layer_norm"), hidden, eps, true)?;
        let frame = DecoderConfig {
            embedding: "gpt_neox.embed_in".to_string(),
            lm_head: "embed_out".to_string(),
            tie_word_embeddings: self.tie_word_embeddings,
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
