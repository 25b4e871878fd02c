//! StableLM (Bellagente et al., 2024): Llama with layer norms, a rotation of a part of each head's dimensions, and in
//! some sizes both parts of a layer in parallel and norms of each head's queries and keys.

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
    pub intermediate_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub initializer_range: f64,
    pub layer_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub use_qkv_bias: bool,
    pub qk_layernorm: bool,
    pub use_parallel_residual: bool,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 50_304,
            intermediate_size: 6912,
            hidden_size: 2560,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            hidden_act: Activation::Silu,
            max_position_embeddings: 4096,
            initializer_range: 0.02,
            layer_norm_eps: 1e-5,
            tie_word_embeddings: false,
            use_qkv_bias: false,
            qk_layernorm: false,
            use_parallel_residual: false,
            rope: RopeSettings::default(),
        }
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    input_layernorm: LayerNorm,
    self_attn: Attention,
    /// None where the feed-forward block is parallel to attention.
    post_attention_layernorm: Option<LayerNorm>,
    mlp: GatedMlp,
}

impl DecoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(normed.clone(), cx);
        let normed = match &self.post_attention_layernorm {
            Some(norm) => norm.forward(x.clone()),
            None => normed,
        };
        x + self.mlp.forward(normed)
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.layer_norm_eps);
        let (kv_heads, head_dim) = (self.num_key_value_heads, hidden / heads.max(1));
        let mut rope = self.rope.resolve("full_attention", 10_000.0)?;
        rope.partial_rotary_factor.get_or_insert(0.25);
        let attention = AttentionConfig {
            qkv_bias: self.use_qkv_bias,
            rope: Some(Rope::new(&rope, head_dim, self.max_position_embeddings, false)?),
            ..AttentionConfig::new(hidden, heads, kv_heads, head_dim)
        };
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let at = w.pp("self_attn");
            let mut self_attn = Attention::load(&at, attention.clone())?;
            if self.qk_layernorm {
                let norm =
                    |name, heads| PerHeadNorm::load_layer_norm(&at.pp(name), heads, head_dim, eps, true);
                let norms = [norm("q_layernorm", heads)?, norm("k_layernorm", kv_heads)?];
                self_attn = self_attn.with_qk_norm(QkNorm::HeadWeights(norms));
            }
            let norm = |name: &str| LayerNorm::load(&w.pp(name), hidden, eps, true);
            Ok(Layer {
                input_layernorm: norm("input_layernorm")?,
                self_attn,
                post_attention_layernorm: match self.use_parallel_residual {
                    true => None,
                    false => Some(norm("post_attention_layernorm")?),
                },
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
        let norm = LayerNorm::load(&w.pp("model.norm"), hidden, eps, true)?;
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
