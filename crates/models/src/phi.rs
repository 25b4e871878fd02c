//! Phi-1 and Phi-2 (Gunasekar et al., 2023): attention and feed-forward block in parallel after one layer norm, and a
//! rotation of half of each head's dimensions.

use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Decoder, DecoderConfig, LayerNorm, Mlp, QkNorm, Result, Rope,
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
    pub num_key_value_heads: Option<usize>,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub initializer_range: f64,
    pub layer_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub qk_layernorm: bool,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 51_200,
            hidden_size: 2048,
            intermediate_size: 8192,
            num_hidden_layers: 24,
            num_attention_heads: 32,
            num_key_value_heads: None,
            hidden_act: Activation::GeluTanh,
            max_position_embeddings: 2048,
            initializer_range: 0.02,
            layer_norm_eps: 1e-5,
            tie_word_embeddings: false,
            qk_layernorm: false,
            rope: RopeSettings::default(),
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.layer_norm_eps);
        let head_dim = hidden / heads.max(1);
        let mut rope = self.rope.resolve("full_attention", 10_000.0)?;
        rope.partial_rotary_factor.get_or_insert(0.5);
        let attention = AttentionConfig {
            qkv_bias: true,
            out_bias: true,
            rope: Some(Rope::new(&rope, head_dim, self.max_position_embeddings, false)?),
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads.unwrap_or(heads), head_dim)
        };
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let at = w.pp("self_attn");
            let mut attn =
                Attention::load_named(&at, ["q_proj", "k_proj", "v_proj", "dense"], attention.clone())?;
            if self.qk_layernorm {
                let norm = |name| LayerNorm::load(&at.pp(name), head_dim, eps, true);
                attn = attn.with_qk_norm(QkNorm::PerHead([
                    norm("q_layernorm")?.into(),
                    norm("k_layernorm")?.into(),
                ]));
            }
            let (inner, act) = (self.intermediate_size, self.hidden_act);
            Ok(Layer {
                ln_1: LayerNorm::load(&w.pp("input_layernorm"), hidden, eps, true)?,
                attn,
                ln_2: None,
                mlp: Mlp::load(&w.pp("mlp"), ["fc1", "fc2"], hidden, inner, act, true)?,
                parallel: true,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = LayerNorm::load(&w.pp("model.final_layernorm"), hidden, eps, true)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            lm_head_bias: true,
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
