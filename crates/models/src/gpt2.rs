//! GPT-2 (Radford et al., 2019): learned positions, layer norms before attention and before a feed-forward block.
//! Its layer serves all models with layer norms and a plain feed-forward block, one after the other or in parallel.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Decoder, DecoderConfig, DecoderLayer, Error, LayerNorm,
    Linear, Mlp, Projection, Result, Weights, training,
};
use serde::{Deserialize, Serialize};

use crate::Architecture;

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
    pub n_inner: Option<usize>,
    pub activation_function: Activation,
    pub layer_norm_epsilon: f64,
    pub initializer_range: f64,
    pub scale_attn_weights: bool,
    pub scale_attn_by_inverse_layer_idx: bool,
    pub tie_word_embeddings: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 50_257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            n_inner: None,
            activation_function: Activation::GeluTanh,
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            tie_word_embeddings: true,
        }
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    /// Before attention.
    pub ln_1: LayerNorm,
    /// Attention.
    pub attn: Attention,
    /// Before the feed-forward block; without it, a parallel block gets what attention gets.
    pub ln_2: Option<LayerNorm>,
    /// Feed-forward block.
    pub mlp: Mlp,
    /// Whether attention and the block see the same hidden states.
    pub parallel: bool,
}

impl DecoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let normed = self.ln_1.forward(x.clone());
        let attended = self.attn.forward(normed.clone(), cx);
        let seen = if self.parallel {
            x.clone()
        } else {
            x.clone() + attended.clone()
        };
        let fed = match &self.ln_2 {
            Some(norm) => self.mlp.forward(norm.forward(seen)),
            None => self.mlp.forward(normed),
        };
        match self.parallel {
            true => x + training::parallel(attended + fed),
            false => x + attended + fed,
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "transformer";
    const IGNORED: &'static [&'static str] = &["attn.bias", "attn.masked_bias"];

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.n_embd, self.n_head, self.layer_norm_epsilon);
        let inner = self.n_inner.unwrap_or(4 * hidden);
        if heads == 0 || hidden % heads != 0 {
            let message = format!("{hidden} hidden units cannot be shared by {heads} heads");
            return Err(Error::config("n_head", message));
        }
        let layers = (0..self.n_layer).map(|i| {
            let w = w.pp("transformer.h").pp(i);
            let mut attention = AttentionConfig::new(hidden, heads, heads, hidden / heads.max(1));
            let mut scale = if self.scale_attn_weights {
                (attention.head_dim.max(1) as f64).powf(-0.5)
            } else {
                1.0
            };
            if self.scale_attn_by_inverse_layer_idx {
                scale /= (i + 1) as f64;
            }
            attention.scale = Some(scale);
            attention.check()?;
            let qkv = Linear::load_conv1d(&w.pp("attn.c_attn"), hidden, 3 * hidden)?;
            // What is added to the hidden states starts smaller the more layers add to them.
            let std = self.initializer_range / (2.0 * self.n_layer as f64).sqrt();
            let out = Linear::load_conv1d(&w.pp("attn.c_proj").with_std(std), hidden, hidden)?;
            let fc = Linear::load_conv1d(&w.pp("mlp.c_fc"), hidden, inner)?;
            let proj = Linear::load_conv1d(&w.pp("mlp.c_proj").with_std(std), inner, hidden)?;
            Ok(Layer {
                ln_1: LayerNorm::load(&w.pp("ln_1"), hidden, eps, true)?,
                attn: Attention::new(Projection::Stacked(qkv), out, attention),
                ln_2: Some(LayerNorm::load(&w.pp("ln_2"), hidden, eps, true)?),
                mlp: Mlp::new(fc, proj, self.activation_function),
                parallel: false,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = LayerNorm::load(&w.pp("transformer.ln_f"), hidden, eps, true)?;
        let frame = DecoderConfig {
            embedding: "transformer.wte".to_string(),
            positions: Some(("transformer.wpe".to_string(), self.n_positions, 0)),
            tie_word_embeddings: self.tie_word_embeddings,
            ..DecoderConfig::new(self.vocab_size, hidden, self.n_layer)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.n_positions)
    }
}
