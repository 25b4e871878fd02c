//! BLOOM (BigScience Workshop, 2022): ALiBi in place of positions, and a layer norm of the embeddings.

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use oxiformers_nn::attention::alibi_slopes;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Decoder, DecoderConfig, DecoderLayer, LayerNorm, Mlp,
    Result, Weights,
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
    #[serde(alias = "num_hidden_layers")]
    pub n_layer: usize,
    pub n_head: usize,
    /// Older name of `hidden_size`; it counts over it.
    pub n_embed: Option<usize>,
    /// Older name of `n_head`; it counts over it.
    pub num_attention_heads: Option<usize>,
    pub layer_norm_epsilon: f64,
    pub initializer_range: f64,
    pub apply_residual_connection_post_layernorm: bool,
    pub tie_word_embeddings: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 250_880,
            hidden_size: 64,
            n_layer: 2,
            n_head: 8,
            n_embed: None,
            num_attention_heads: None,
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
            apply_residual_connection_post_layernorm: false,
            tie_word_embeddings: true,
        }
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    input_layernorm: LayerNorm,
    self_attention: Attention,
    post_attention_layernorm: LayerNorm,
    mlp: Mlp,
    /// Whether the residuals are taken after the norms.
    residual_after_norm: bool,
}

impl DecoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let residual = |x: Tensor<3>, normed: &Tensor<3>| {
            if self.residual_after_norm {
                normed.clone()
            } else {
                x
            }
        };
        let normed = self.input_layernorm.forward(x.clone());
        let x = residual(x, &normed) + self.self_attention.forward(normed, cx);
        let normed = self.post_attention_layernorm.forward(x.clone());
        residual(x, &normed) + self.mlp.forward(normed)
    }
}

/// ALiBi's slopes of `heads` heads, times `factor`; Falcon and MPT have them, too.
pub(crate) fn alibi(w: &Weights, heads: usize, bias_max: f64, factor: f64) -> Tensor<1> {
    let slopes: Vec<f32> = alibi_slopes(heads, bias_max)
        .iter()
        .map(|slope| slope * factor as f32)
        .collect();
    Tensor::from_data(TensorData::new(slopes, [heads]), w.device())
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "transformer";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, eps) = (self.n_embed.unwrap_or(self.hidden_size), self.layer_norm_epsilon);
        let heads = self.num_attention_heads.unwrap_or(self.n_head);
        let attention = AttentionConfig {
            qkv_bias: true,
            out_bias: true,
            ..AttentionConfig::new(hidden, heads, heads, hidden / heads.max(1))
        };
        attention.check()?;
        let layers = (0..self.n_layer).map(|i| {
            let w = w.pp("transformer.h").pp(i);
            let norm = |name: &str| LayerNorm::load(&w.pp(name), hidden, eps, true);
            let at = w.pp("self_attention");
            let self_attention =
                Attention::load_grouped(&at, ["query_key_value", "dense"], attention.clone())?;
            let (names, act) = (["dense_h_to_4h", "dense_4h_to_h"], Activation::GeluTanh);
            Ok(Layer {
                input_layernorm: norm("input_layernorm")?,
                self_attention: self_attention.with_alibi(alibi(&w, heads, 8.0, 1.0)),
                post_attention_layernorm: norm("post_attention_layernorm")?,
                mlp: Mlp::load(&w.pp("mlp"), names, hidden, 4 * hidden, act, true)?,
                residual_after_norm: self.apply_residual_connection_post_layernorm,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = LayerNorm::load(&w.pp("transformer.ln_f"), hidden, eps, true)?;
        let frame = DecoderConfig {
            embedding: "transformer.word_embeddings".to_string(),
            tie_word_embeddings: self.tie_word_embeddings,
            ..DecoderConfig::new(self.vocab_size, hidden, self.n_layer)
        };
        let embedding_norm =
            LayerNorm::load(&w.pp("transformer.word_embeddings_layernorm"), hidden, eps, true)?;
        Ok(Decoder::load(w, frame, layers, Some(norm.into()))?.with_embedding_norm(embedding_norm))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        None
    }
}
