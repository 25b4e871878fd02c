//! Qwen1.5-MoE and Qwen2-MoE (Yang et al., 2024): Qwen2 with a mixture of experts, and beside it an expert that all
//! tokens share behind a gate of its own.

use burn::module::Module;
use burn::tensor::{Tensor, activation};
use oxiformers_nn::moe::{Experts, softmax_top_k};
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Context, Decoder, DecoderConfig, DecoderLayer, Error, GatedMlp,
    Linear, Result, RmsNorm, Role, Rope, RopeSettings, Weights,
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
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub initializer_range: f64,
    pub use_sliding_window: bool,
    pub sliding_window: Option<usize>,
    pub max_window_layers: usize,
    pub layer_types: Option<Vec<String>>,
    pub decoder_sparse_step: usize,
    pub moe_intermediate_size: usize,
    pub num_experts_per_tok: usize,
    pub num_experts: usize,
    pub norm_topk_prob: bool,
    pub mlp_only_layers: Vec<usize>,
    pub shared_expert_intermediate_size: usize,
    pub qkv_bias: bool,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 151_936,
            hidden_size: 2048,
            intermediate_size: 5632,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: Activation::Silu,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            use_sliding_window: false,
            sliding_window: Some(4096),
            max_window_layers: 28,
            layer_types: None,
            decoder_sparse_step: 1,
            moe_intermediate_size: 1408,
            num_experts_per_tok: 4,
            num_experts: 60,
            norm_topk_prob: false,
            mlp_only_layers: Vec::new(),
            shared_expert_intermediate_size: 5632,
            qkv_bias: true,
            rope: RopeSettings::default(),
        }
    }
}

/// How experts are chosen.
#[derive(Debug, Clone)]
pub struct Routing {
    /// How many there are.
    pub num_experts: usize,
    /// How many a token gets.
    pub top_k: usize,
    /// Whether their weights are scaled to sum to 1.
    pub normalize: bool,
}

/// A mixture of experts.
#[derive(Module, Debug)]
pub struct Mixture {
    gate: Linear,
    experts: Experts,
    /// An expert for all tokens, and the gate that weighs it.
    shared: Option<(GatedMlp, Linear)>,
    top_k: usize,
    normalize: bool,
}

impl Mixture {
    /// Loads `gate` and `experts`, whose layers have the names `[gate, up, down]`.
    pub fn load(
        w: &Weights,
        names: [&str; 3],
        routing: &Routing,
        hidden: usize,
        inner: usize,
        act: Activation,
    ) -> Result<Self> {
        let count = routing.num_experts;
        if routing.top_k == 0 || routing.top_k > count {
            let message = format!("there are {count} experts to choose {} of", routing.top_k);
            return Err(Error::config("num_experts_per_tok", message));
        }
        Ok(Self {
            gate: Linear::load(&w.pp("gate").with_role(Role::Kept), hidden, count, false)?,
            experts: Experts::load(&w.pp("experts"), count, names, hidden, inner, act)?,
            shared: None,
            top_k: routing.top_k,
            normalize: routing.normalize,
        })
    }

    /// Adds `shared_expert` and `shared_expert_gate`.
    fn with_shared_expert(
        mut self,
        w: &Weights,
        hidden: usize,
        inner: usize,
        act: Activation,
    ) -> Result<Self> {
        let expert = GatedMlp::load(&w.pp("shared_expert"), hidden, inner, act, false)?;
        self.shared = Some((
            expert,
            Linear::load(&w.pp("shared_expert_gate"), hidden, 1, false)?,
        ));
        Ok(self)
    }

    /// `[batch, seq, hidden_size]` to the same shape.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let dims = x.dims();
        let flat = x.clone().reshape([dims[0] * dims[1], dims[2]]);
        let weights = softmax_top_k(self.gate.forward(flat.clone()), self.top_k, self.normalize);
        let routed = self.experts.forward(flat, weights).reshape(dims);
        match &self.shared {
            Some((expert, gate)) => routed + activation::sigmoid(gate.forward(x.clone())) * expert.forward(x),
            None => routed,
        }
    }
}

/// The feed-forward part of a layer.
#[derive(Module, Debug)]
pub enum FeedForward {
    /// One block.
    Dense(GatedMlp),
    /// A mixture of experts.
    Sparse(Mixture),
}

/// One layer.
#[derive(Module, Debug)]
pub struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: FeedForward,
}

impl Layer {
    /// From its parts; other models put their own attention and experts into this layer.
    pub fn load(
        w: &Weights,
        self_attn: Attention,
        mlp: FeedForward,
        hidden: usize,
        eps: f64,
    ) -> Result<Self> {
        Ok(Self {
            input_layernorm: RmsNorm::load(&w.pp("input_layernorm"), hidden, eps)?,
            self_attn,
            post_attention_layernorm: RmsNorm::load(&w.pp("post_attention_layernorm"), hidden, eps)?,
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
        x + match &self.mlp {
            FeedForward::Dense(mlp) => mlp.forward(normed),
            FeedForward::Sparse(moe) => moe.forward(normed),
        }
    }
}

/// Whether layer `i` has experts.
pub(crate) fn is_sparse(i: usize, num_experts: usize, step: usize, mlp_only_layers: &[usize]) -> bool {
    num_experts > 0 && step > 0 && (i + 1).is_multiple_of(step) && !mlp_only_layers.contains(&i)
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.rms_norm_eps);
        let head_dim = self.head_dim.unwrap_or(hidden / heads.max(1));
        let rope = self.rope.resolve("full_attention", 10_000.0)?;
        let attention = AttentionConfig {
            qkv_bias: self.qkv_bias,
            rope: Some(Rope::new(&rope, head_dim, self.max_position_embeddings, false)?),
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads.unwrap_or(heads), head_dim)
        };
        let window = self.sliding_window.filter(|_| self.use_sliding_window);
        let routing = Routing {
            num_experts: self.num_experts,
            top_k: self.num_experts_per_tok,
            normalize: self.norm_topk_prob,
        };
        let mut windows = Vec::new();
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let window = {
                let slides = i.is_multiple_of(2) && i < self.max_window_layers;
                layer_types::window(&self.layer_types, i, window, slides)?
            };
            windows.push(window);
            let attention = AttentionConfig {
                window,
                ..attention.clone()
            };
            let self_attn = Attention::load(&w.pp("self_attn"), attention)?;
            let (at, act) = (w.pp("mlp"), self.hidden_act);
            let sparse = is_sparse(
                i,
                self.num_experts,
                self.decoder_sparse_step,
                &self.mlp_only_layers,
            );
            let mlp = if sparse {
                let (inner, names) = (self.moe_intermediate_size, ["gate_proj", "up_proj", "down_proj"]);
                let moe = Mixture::load(&at, names, &routing, hidden, inner, act)?;
                let inner = self.shared_expert_intermediate_size;
                FeedForward::Sparse(moe.with_shared_expert(&at, hidden, inner, act)?)
            } else {
                FeedForward::Dense(GatedMlp::load(&at, hidden, self.intermediate_size, act, false)?)
            };
            Layer::load(&w, self_attn, mlp, hidden, eps)
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
