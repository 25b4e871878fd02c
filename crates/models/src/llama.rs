//! Llama (Touvron et al., 2023) and the models that share its layer: RMS norm before attention and before a
//! gated feed-forward block, rotary positions, grouped key/value heads.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Decoder, DecoderConfig, DecoderLayer, GatedMlp, Result,
    RmsNorm, Rope, RopeSettings, Weights,
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
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub tie_word_embeddings: bool,
    pub initializer_range: f64,
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
            attention_bias: false,
            mlp_bias: false,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            rope: RopeSettings::default(),
        }
    }
}

impl Config {
    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
            .unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Key and value heads.
    pub fn num_key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: GatedMlp,
}

impl Layer {
    /// From its parts, whatever form its norms have.
    pub fn new(
        input_layernorm: RmsNorm,
        self_attn: Attention,
        post_attention_layernorm: RmsNorm,
        mlp: GatedMlp,
    ) -> Self {
        Self {
            input_layernorm,
            self_attn,
            post_attention_layernorm,
            mlp,
        }
    }

    /// From its parts; other models put their own attention into this layer.
    pub fn load(
        w: &Weights,
        self_attn: Attention,
        mlp: GatedMlp,
        hidden_size: usize,
        eps: f64,
    ) -> Result<Self> {
        Ok(Self {
            input_layernorm: RmsNorm::load(&w.pp("input_layernorm"), hidden_size, eps)?,
            self_attn,
            post_attention_layernorm: RmsNorm::load(&w.pp("post_attention_layernorm"), hidden_size, eps)?,
            mlp,
        })
    }
}

impl DecoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let attended = self
            .self_attn
            .forward(self.input_layernorm.forward(x.clone()), cx);
        let (normed, x) = self.post_attention_layernorm.forward_sum(attended, x);
        x + self.mlp.forward(normed)
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let rope = Rope::new(
            &self.rope.resolve("full_attention", 10_000.0)?,
            self.head_dim(),
            self.max_position_embeddings,
            false,
        )?;
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let attention = AttentionConfig {
                qkv_bias: self.attention_bias,
                out_bias: self.attention_bias,
                rope: Some(rope.clone()),
                ..AttentionConfig::new(
                    self.hidden_size,
                    self.num_attention_heads,
                    self.num_key_value_heads(),
                    self.head_dim(),
                )
            };
            let self_attn = Attention::load(&w.pp("self_attn"), attention)?;
            let (hidden, inner) = (self.hidden_size, self.intermediate_size);
            let mlp = GatedMlp::load(&w.pp("mlp"), hidden, inner, self.hidden_act, self.mlp_bias)?;
            Layer::load(&w, self_attn, mlp, hidden, self.rms_norm_eps)
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load(&w.pp("model.norm"), self.hidden_size, self.rms_norm_eps)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            ..DecoderConfig::new(self.vocab_size, self.hidden_size, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
