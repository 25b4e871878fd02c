//! Granite (IBM, 2024): Llama with factors of the embeddings, the scores, both parts of a layer and the logits.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Decoder, DecoderConfig, DecoderLayer, Error, GatedMlp,
    Result, RmsNorm, Rope, RopeSettings, Weights,
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
    pub embedding_multiplier: f64,
    pub logits_scaling: f64,
    pub residual_multiplier: f64,
    pub attention_multiplier: f64,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: Activation::Silu,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            attention_bias: false,
            mlp_bias: false,
            embedding_multiplier: 1.0,
            logits_scaling: 1.0,
            residual_multiplier: 1.0,
            attention_multiplier: 1.0,
            rope: RopeSettings::default(),
        }
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: GatedMlp,
    residual_multiplier: f64,
}

impl DecoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let attended = self
            .self_attn
            .forward(self.input_layernorm.forward(x.clone()), cx);
        let x = x + attended * self.residual_multiplier;
        let fed = self.mlp.forward(self.post_attention_layernorm.forward(x.clone()));
        x + fed * self.residual_multiplier
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        if self.logits_scaling == 0.0 {
            return Err(Error::config("logits_scaling", "logits cannot be divided by 0"));
        }
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.rms_norm_eps);
        let head_dim = self.head_dim.unwrap_or(hidden / heads.max(1));
        let rope = self.rope.resolve("full_attention", 10_000.0)?;
        let attention = AttentionConfig {
            qkv_bias: self.attention_bias,
            out_bias: self.attention_bias,
            scale: Some(self.attention_multiplier),
            rope: Some(Rope::new(&rope, head_dim, self.max_position_embeddings, false)?),
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads.unwrap_or(heads), head_dim)
        };
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let norm = |name: &str| RmsNorm::load(&w.pp(name), hidden, eps);
            let (inner, act) = (self.intermediate_size, self.hidden_act);
            Ok(Layer {
                input_layernorm: norm("input_layernorm")?,
                self_attn: Attention::load(&w.pp("self_attn"), attention.clone())?,
                post_attention_layernorm: norm("post_attention_layernorm")?,
                mlp: GatedMlp::load(&w.pp("mlp"), hidden, inner, act, self.mlp_bias)?,
                residual_multiplier: self.residual_multiplier,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load(&w.pp("model.norm"), hidden, eps)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            embedding_multiplier: self.embedding_multiplier,
            logit_scale: 1.0 / self.logits_scaling,
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
