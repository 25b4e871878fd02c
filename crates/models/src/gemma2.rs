//! Gemma 2 (Gemma Team, 2024): Gemma with norms before and after both parts of a layer, soft caps of scores and
//! logits, and a sliding window in every other layer.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Decoder, DecoderConfig, DecoderLayer, GatedMlp, Result,
    RmsNorm, Rope, RopeSettings, Weights,
};
use serde::{Deserialize, Serialize};

use crate::Architecture;
use crate::layer_types;

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
    pub head_dim: usize,
    pub hidden_activation: Activation,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub initializer_range: f64,
    pub attention_bias: bool,
    pub query_pre_attn_scalar: f64,
    pub sliding_window: Option<usize>,
    pub layer_types: Option<Vec<String>>,
    /// Null and absent both mean none; configurations always write it.
    pub final_logit_softcapping: Option<f64>,
    /// Null and absent both mean none; configurations always write it.
    pub attn_logit_softcapping: Option<f64>,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 256_000,
            hidden_size: 2304,
            intermediate_size: 9216,
            num_hidden_layers: 26,
            num_attention_heads: 8,
            num_key_value_heads: 4,
            head_dim: 256,
            hidden_activation: Activation::GeluTanh,
            max_position_embeddings: 8192,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: true,
            initializer_range: 0.02,
            attention_bias: false,
            query_pre_attn_scalar: 256.0,
            sliding_window: Some(4096),
            layer_types: None,
            final_logit_softcapping: None,
            attn_logit_softcapping: None,
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
    pre_feedforward_layernorm: RmsNorm,
    mlp: GatedMlp,
    post_feedforward_layernorm: RmsNorm,
}

impl Layer {
    /// From its parts; Gemma 3 puts its own attention into this layer.
    pub fn load(w: &Weights, self_attn: Attention, mlp: GatedMlp, hidden: usize, eps: f64) -> Result<Self> {
        let norm = |name: &str| RmsNorm::load_plus_one(&w.pp(name), hidden, eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            pre_feedforward_layernorm: norm("pre_feedforward_layernorm")?,
            mlp,
            post_feedforward_layernorm: norm("post_feedforward_layernorm")?,
        })
    }
}

impl DecoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let attended = self
            .self_attn
            .forward(self.input_layernorm.forward(x.clone()), cx);
        let x = x + self.post_attention_layernorm.forward(attended);
        let fed = self
            .mlp
            .forward(self.pre_feedforward_layernorm.forward(x.clone()));
        x + self.post_feedforward_layernorm.forward(fed)
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
            scale: Some(self.query_pre_attn_scalar.powf(-0.5)),
            softcap: self.attn_logit_softcapping,
            rope: Some(Rope::new(&rope, head_dim, self.max_position_embeddings, false)?),
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads, head_dim)
        };
        let mut windows = Vec::new();
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let window = layer_types::window(&self.layer_types, i, self.sliding_window, i.is_multiple_of(2))?;
            windows.push(window);
            let attention = AttentionConfig {
                window,
                ..attention.clone()
            };
            let self_attn = Attention::load(&w.pp("self_attn"), attention)?;
            let mlp = GatedMlp::load(
                &w.pp("mlp"),
                hidden,
                self.intermediate_size,
                self.hidden_activation,
                false,
            )?;
            Layer::load(&w, self_attn, mlp, hidden, eps)
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load_plus_one(&w.pp("model.norm"), hidden, eps)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            windows,
            embedding_scale: (hidden as f64).sqrt(),
            logit_softcap: self.final_logit_softcapping,
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
