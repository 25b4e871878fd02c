//! Command R (Cohere, 2024): attention and feed-forward block in parallel after one layer norm without bias,
//! rotation of neighbouring dimensions, tied and scaled logits.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::attention::PerHeadNorm;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Decoder, DecoderConfig, DecoderLayer, GatedMlp,
    LayerNorm, QkNorm, Result, Rope, RopeSettings, Weights,
};
use serde::{Deserialize, Serialize};

use crate::Architecture;

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub logit_scale: f64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub layer_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub use_qk_norm: bool,
    pub initializer_range: f64,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 256_000,
            hidden_size: 8192,
            intermediate_size: 22_528,
            logit_scale: 0.0625,
            num_hidden_layers: 40,
            num_attention_heads: 64,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: Activation::Silu,
            max_position_embeddings: 8192,
            layer_norm_eps: 1e-5,
            tie_word_embeddings: true,
            attention_bias: false,
            use_qk_norm: false,
            initializer_range: 0.02,
            rope: RopeSettings::default(),
        }
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    input_layernorm: LayerNorm,
    self_attn: Attention,
    mlp: GatedMlp,
}

impl DecoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let normed = self.input_layernorm.forward(x.clone());
        x + self.self_attn.forward(normed.clone(), cx) + self.mlp.forward(normed)
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.layer_norm_eps);
        let kv_heads = self.num_key_value_heads.unwrap_or(heads);
        let head_dim = self.head_dim.unwrap_or(hidden / heads.max(1));
        let rope = self.rope.resolve("full_attention", 500_000.0)?;
        let attention = AttentionConfig {
            qkv_bias: self.attention_bias,
            out_bias: self.attention_bias,
            rope: Some(Rope::new(&rope, head_dim, self.max_position_embeddings, true)?),
            ..AttentionConfig::new(hidden, heads, kv_heads, head_dim)
        };
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let at = w.pp("self_attn");
            let mut self_attn = Attention::load(&at, attention.clone())?;
            if self.use_qk_norm {
                let norm =
                    |name, heads| PerHeadNorm::load_layer_norm(&at.pp(name), heads, head_dim, eps, false);
                let norms = [norm("q_norm", heads)?, norm("k_norm", kv_heads)?];
                self_attn = self_attn.with_qk_norm(QkNorm::HeadWeights(norms));
            }
            Ok(Layer {
                input_layernorm: LayerNorm::load(&w.pp("input_layernorm"), hidden, eps, false)?,
                self_attn,
                mlp: GatedMlp::load(
                    &w.pp("mlp"),
                    hidden,
                    self.intermediate_size,
                    self.hidden_act,
                    false,
                )?,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = LayerNorm::load(&w.pp("model.norm"), hidden, eps, false)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            logit_scale: self.logit_scale,
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
