//! OPT (Zhang et al., 2022): learned positions that start at 2, layer norms before or after both parts of a layer, and
//! in one size an embedding narrower than the layers.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Decoder, DecoderConfig, DecoderLayer, LayerNorm, Linear,
    Mlp, Result, Weights,
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
    pub num_hidden_layers: usize,
    pub ffn_dim: usize,
    pub max_position_embeddings: usize,
    pub do_layer_norm_before: bool,
    #[serde(rename = "_remove_final_layer_norm")]
    pub remove_final_layer_norm: bool,
    pub word_embed_proj_dim: Option<usize>,
    pub num_attention_heads: usize,
    pub activation_function: Activation,
    pub init_std: f64,
    pub enable_bias: bool,
    pub layer_norm_elementwise_affine: bool,
    pub tie_word_embeddings: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 50_272,
            hidden_size: 768,
            num_hidden_layers: 12,
            ffn_dim: 3072,
            max_position_embeddings: 2048,
            do_layer_norm_before: true,
            remove_final_layer_norm: false,
            word_embed_proj_dim: None,
            num_attention_heads: 12,
            activation_function: Activation::Relu,
            init_std: 0.02,
            enable_bias: true,
            layer_norm_elementwise_affine: true,
            tie_word_embeddings: true,
        }
    }
}

impl Config {
    fn norm(&self, w: &Weights) -> Result<LayerNorm> {
        const EPS: f64 = 1e-5;
        if self.layer_norm_elementwise_affine {
            LayerNorm::load(w, self.hidden_size, EPS, true)
        } else {
            Ok(LayerNorm::unweighted(EPS))
        }
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    self_attn: Attention,
    self_attn_layer_norm: LayerNorm,
    mlp: Mlp,
    final_layer_norm: LayerNorm,
    norm_before: bool,
}

impl DecoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        if self.norm_before {
            let x = x.clone() + self.self_attn.forward(self.self_attn_layer_norm.forward(x), cx);
            x.clone() + self.mlp.forward(self.final_layer_norm.forward(x))
        } else {
            let attended = self.self_attn.forward(x.clone(), cx);
            let x = self.self_attn_layer_norm.forward_sum(attended, x);
            self.final_layer_norm.forward_sum(self.mlp.forward(x.clone()), x)
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        let attention = AttentionConfig {
            qkv_bias: self.enable_bias,
            out_bias: self.enable_bias,
            ..AttentionConfig::new(hidden, heads, heads, hidden / heads.max(1))
        };
        let decoder = w.pp("model.decoder");
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = decoder.pp("layers").pp(i);
            let names = ["q_proj", "k_proj", "v_proj", "out_proj"];
            let act = self.activation_function;
            Ok(Layer {
                self_attn: Attention::load_named(&w.pp("self_attn"), names, attention.clone())?,
                self_attn_layer_norm: self.norm(&w.pp("self_attn_layer_norm"))?,
                mlp: Mlp::load(&w, ["fc1", "fc2"], hidden, self.ffn_dim, act, self.enable_bias)?,
                final_layer_norm: self.norm(&w.pp("final_layer_norm"))?,
                norm_before: self.do_layer_norm_before,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = if self.do_layer_norm_before && !self.remove_final_layer_norm {
            Some(self.norm(&decoder.pp("final_layer_norm"))?.into())
        } else {
            None
        };
        let frame = DecoderConfig {
            embedding: "model.decoder.embed_tokens".to_string(),
            positions: Some((
                "model.decoder.embed_positions".to_string(),
                self.max_position_embeddings,
                2,
            )),
            tie_word_embeddings: self.tie_word_embeddings,
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        let width = self.word_embed_proj_dim.unwrap_or(hidden);
        let model = Decoder::load_with_width(w, width, frame, layers, norm)?;
        if width == hidden {
            return Ok(model);
        }
        let project_in = Linear::load(&decoder.pp("project_in"), width, hidden, false)?;
        Ok(model.with_projections(
            project_in,
            Linear::load(&decoder.pp("project_out"), hidden, width, false)?,
        ))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
