//! gpt-oss (OpenAI, 2025): attention sinks, a sliding window in every other layer, yarn, and experts whose gated
//! activation is clamped. Released checkpoints store the experts in MXFP4, and they stay so in memory.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, activation};
use bytes::{Bytes, BytesMut};
use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_nn::linear::Matrix;
use oxiformers_nn::moe::{mix_experts, spread, top_k};
use oxiformers_nn::quant::mxfp4::{Mxfp4Stack, Slice};
use oxiformers_nn::{
    Attention, AttentionConfig, Context, Decoder, DecoderConfig, DecoderLayer, Error, Init, Linear, Result,
    RmsNorm, Role, Rope, RopeSettings, Slot, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::Architecture;
use crate::layer_types;

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub num_hidden_layers: usize,
    #[serde(alias = "num_experts")]
    pub num_local_experts: usize,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub head_dim: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub sliding_window: usize,
    pub tie_word_embeddings: bool,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub num_experts_per_tok: usize,
    pub swiglu_alpha: f64,
    pub swiglu_limit: f64,
    pub layer_types: Option<Vec<String>>,
    pub attention_bias: bool,
    pub initializer_range: f64,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            num_hidden_layers: 36,
            num_local_experts: 128,
            vocab_size: 201_088,
            hidden_size: 2880,
            intermediate_size: 2880,
            head_dim: 64,
            num_attention_heads: 64,
            num_key_value_heads: 8,
            sliding_window: 128,
            tie_word_embeddings: false,
            max_position_embeddings: 131_072,
            rms_norm_eps: 1e-5,
            num_experts_per_tok: 4,
            swiglu_alpha: 1.702,
            swiglu_limit: 7.0,
            layer_types: None,
            attention_bias: true,
            initializer_range: 0.02,
            rope: RopeSettings::default(),
        }
    }
}

impl Config {
    fn rope(&self) -> Result<Rope> {
        let mut settings = self.rope.clone();
        if settings.rope_parameters.is_none() && settings.rope_scaling.is_none() {
            settings.rope_parameters = Some(json!({
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
                "original_max_position_embeddings": 4096,
            }));
        }
        let rope = settings.resolve("full_attention", 150_000.0)?;
        Rope::new(&rope, self.head_dim, self.max_position_embeddings, false)
    }
}

/// The experts: `down((up(x) + 1) · gate(x) · σ(alpha · gate(x)))`, all with biases.
#[derive(Module, Debug)]
pub struct Experts {
    gate: Vec<Matrix>,
    up: Vec<Matrix>,
    down: Vec<Matrix>,
    /// `[experts, inner]`.
    gate_bias: Param<Tensor<2>>,
    /// `[experts, inner]`.
    up_bias: Param<Tensor<2>>,
    /// `[experts, hidden_size]`.
    down_bias: Param<Tensor<2>>,
    alpha: f64,
    limit: f64,
}

impl Experts {
    /// Loads the experts in one of three forms: a tensor each for gates, ups and downs, as in GGUF; gates and ups
    /// taking turns in the columns of `gate_up_proj` `[experts, hidden, 2 * inner]`; the same transposed and
    /// in MXFP4.
    fn load(w: &Weights, c: &Config) -> Result<Self> {
        let (count, hidden, inner) = (c.num_local_experts, c.hidden_size, c.intermediate_size);
        if c.swiglu_limit.is_nan() || c.swiglu_limit < 0.0 {
            let message = format!("is {}; it must not be below 0", c.swiglu_limit);
            return Err(Error::config("swiglu_limit", message));
        }
        let ([gate, up, down], gate_bias, up_bias, down_bias) = if w.is_stored("gate_proj.weight") {
            let bias = |name: &str, width| w.param(name, [count, width], Init::Zeros);
            (
                [
                    w.matrices("gate_proj.weight", [count, inner, hidden])?,
                    w.matrices("up_proj.weight", [count, inner, hidden])?,
                    w.matrices("down_proj.weight", [count, hidden, inner])?,
                ],
                bias("gate_proj.bias", inner)?,
                bias("up_proj.bias", inner)?,
                bias("down_proj.bias", hidden)?,
            )
        } else {
            let gate_up = Stored::load(w, "gate_up_proj", [count, 2 * inner, hidden])?;
            let down = Stored::load(w, "down_proj", [count, hidden, inner])?;
            let half = |i| {
                let slot = Slot {
                    offset: i,
                    strides: vec![2 * inner, 2],
                    ..Slot::whole("gate_up_proj_bias", &[count, 2 * inner])
                };
                w.param_of(
                    &format!("gate_up_proj_bias.{i}"),
                    slot,
                    [count, inner],
                    Init::Zeros,
                )
            };
            (
                [
                    gate_up.matrices(w, 0, 2)?,
                    gate_up.matrices(w, 1, 2)?,
                    down.matrices(w, 0, 1)?,
                ],
                half(0)?,
                half(1)?,
                w.param("down_proj_bias", [count, hidden], Init::Zeros)?,
            )
        };
        Ok(Self {
            gate,
            up,
            down,
            gate_bias,
            up_bias,
            down_bias,
            alpha: c.swiglu_alpha,
            limit: c.swiglu_limit,
        })
    }

    /// The experts' answers to `x` `[tokens, hidden]`, mixed by `weights` `[tokens, experts]`.
    pub fn forward(&self, x: Tensor<2>, weights: Tensor<2>) -> Tensor<2> {
        let linear = |x: Tensor<2>, weight: &Matrix, bias: &Param<Tensor<2>>, e: usize| {
            weight.linear(x, Some(bias.val().narrow(0, e, 1).squeeze_dim(0)))
        };
        mix_experts(x, weights, |e, x| {
            let gate = linear(x.clone(), &self.gate[e], &self.gate_bias, e).clamp_max(self.limit);
            let up = linear(x, &self.up[e], &self.up_bias, e).clamp(-self.limit, self.limit);
            let glu = gate.clone() * activation::sigmoid(gate * self.alpha);
            linear((up + 1.0) * glu, &self.down[e], &self.down_bias, e)
        })
    }
}

/// Stacked matrices `[experts, rows, columns]` as checkpoints hold them.
struct Stored {
    name: &'static str,
    shape: [usize; 3],
    data: Form,
}

enum Form {
    /// `[experts, columns, rows]`.
    Transposed(TensorView),
    Mxfp4(Mxfp4Stack),
    Fresh,
}

impl Stored {
    fn load(w: &Weights, name: &'static str, shape: [usize; 3]) -> Result<Self> {
        let [count, rows, columns] = shape;
        let blocks = format!("{name}_blocks");
        let data = if w.is_stored(&blocks) {
            let runs = columns.div_ceil(32);
            let blocks = w.view(&blocks, &[count, rows, runs, 16])?;
            let scales = w.view(&format!("{name}_scales"), &[count, rows, runs])?;
            let stack = Mxfp4Stack::new(shape, &blocks, &scales);
            let wrong = |reason| Error::config("quantization_config", format!("`{name}` {reason}"));
            Form::Mxfp4(stack.map_err(wrong)?)
        } else if !w.is_stored(name) && w.contains(name) {
            Form::Fresh
        } else {
            let view = w.view(name, &[count, columns, rows])?;
            if !matches!(view.dtype, DType::F32 | DType::F16 | DType::BF16) {
                let message = format!(
                    "`{name}` is stored as {:?}; possible are F32, F16, BF16 and MXFP4",
                    view.dtype
                );
                return Err(Error::config("quantization_config", message));
            }
            Form::Transposed(view)
        };
        Ok(Self { name, shape, data })
    }

    /// Each expert's rows `first`, `first + step`, …
    fn matrices(&self, w: &Weights, first: usize, step: usize) -> Result<Vec<Matrix>> {
        let [count, rows, columns] = self.shape;
        let each = |index| {
            let name = format!("{}.{index}.{first}", self.name);
            let slot = Slot {
                offset: index * rows * columns + first,
                strides: vec![step, rows],
                ..Slot::whole(self.name, &[count, columns, rows])
            };
            let view = match &self.data {
                Form::Transposed(view) => TensorView {
                    dtype: view.dtype,
                    shape: vec![rows / step, columns],
                    data: self.transposed(view, index, first, step),
                },
                Form::Mxfp4(stack) => stack.rows(Slice { index, first, step }),
                Form::Fresh => return w.fresh_matrix_of(&name, slot, [rows / step, columns]),
            };
            w.matrix_of(&name, slot, view)
        };
        (0..count).map(each).collect()
    }

    fn transposed(&self, view: &TensorView, expert: usize, first: usize, step: usize) -> Bytes {
        let [count, rows, columns] = self.shape;
        let size = view.data.len() / (count * rows * columns).max(1);
        let mut data = BytesMut::with_capacity(view.data.len() / (count * step).max(1));
        for row in (first..rows).step_by(step) {
            let stored = view.data.chunks_exact((rows * size).max(1));
            for values in stored.skip(expert * columns).take(columns) {
                data.extend_from_slice(&values[row * size..(row + 1) * size]);
            }
        }
        data.freeze()
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    router: Linear,
    experts: Experts,
    top_k: usize,
}

impl DecoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let attended = self
            .self_attn
            .forward(self.input_layernorm.forward(x.clone()), cx);
        let (normed, x) = self.post_attention_layernorm.forward_sum(attended, x);
        let [batch, seq, hidden] = x.dims();
        let normed = normed.reshape([batch * seq, hidden]);
        let logits = self.router.forward(normed.clone());
        let experts = logits.dims()[1];
        let (best, indices) = top_k(logits, self.top_k);
        let weights = spread(indices, activation::softmax(best, 1), experts);
        x + self
            .experts
            .forward(normed, weights)
            .reshape([batch, seq, hidden])
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.rms_norm_eps);
        if self.num_experts_per_tok == 0 || self.num_experts_per_tok > self.num_local_experts {
            let message = format!("there are {} experts to choose from", self.num_local_experts);
            return Err(Error::config("num_experts_per_tok", message));
        }
        let mut windows = Vec::new();
        let attention = AttentionConfig {
            qkv_bias: self.attention_bias,
            out_bias: self.attention_bias,
            rope: Some(self.rope()?),
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads, self.head_dim)
        };
        let layers = (0..self.num_hidden_layers).map(|i| {
            let sliding = Some(self.sliding_window);
            let window = layer_types::window(&self.layer_types, i, sliding, i.is_multiple_of(2))?;
            windows.push(window);
            let w = w.pp("model.layers").pp(i);
            let at = w.pp("self_attn");
            let attention = AttentionConfig {
                window,
                ..attention.clone()
            };
            let sinks = at.param("sinks", [heads], Init::Normal)?;
            Ok(Layer {
                input_layernorm: RmsNorm::load(&w.pp("input_layernorm"), hidden, eps)?,
                self_attn: Attention::load(&at, attention)?.with_sinks(sinks),
                post_attention_layernorm: RmsNorm::load(&w.pp("post_attention_layernorm"), hidden, eps)?,
                router: Linear::load(
                    &w.pp("mlp.router").with_role(Role::Kept),
                    hidden,
                    self.num_local_experts,
                    true,
                )?,
                experts: Experts::load(&w.pp("mlp.experts").with_role(Role::Expert), self)?,
                top_k: self.num_experts_per_tok,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load(&w.pp("model.norm"), hidden, eps)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            windows,
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
