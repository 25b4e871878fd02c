//! DeepSeek-V3 (DeepSeek-AI, 2024): multi-head latent attention; after some dense layers, shared experts next to
//! routed ones, which a sigmoid router chooses within its best groups.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, activation};
use oxiformers_nn::latent::{LatentAttention, LatentAttentionConfig};
use oxiformers_nn::moe::{Experts, spread, top_k};
use oxiformers_nn::{
    Activation, Context, Decoder, DecoderConfig, DecoderLayer, Error, GatedMlp, Init, Linear, Result,
    RmsNorm, Role, Rope, RopeParameters, RopeSettings, Weights,
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
    pub moe_intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub n_shared_experts: usize,
    #[serde(alias = "num_local_experts")]
    pub n_routed_experts: usize,
    pub routed_scaling_factor: f64,
    pub kv_lora_rank: usize,
    /// Without a value, or null: no latent. Configurations always write it.
    pub q_lora_rank: Option<usize>,
    pub qk_rope_head_dim: usize,
    pub v_head_dim: usize,
    pub qk_nope_head_dim: usize,
    pub n_group: usize,
    pub topk_group: usize,
    pub num_experts_per_tok: usize,
    pub first_k_dense_replace: usize,
    pub norm_topk_prob: bool,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub rope_interleave: bool,
    pub attention_bias: bool,
    pub initializer_range: f64,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 129_280,
            hidden_size: 7168,
            intermediate_size: 18_432,
            moe_intermediate_size: 2048,
            num_hidden_layers: 61,
            num_attention_heads: 128,
            n_shared_experts: 1,
            n_routed_experts: 256,
            routed_scaling_factor: 2.5,
            kv_lora_rank: 512,
            q_lora_rank: None,
            qk_rope_head_dim: 64,
            v_head_dim: 128,
            qk_nope_head_dim: 128,
            n_group: 8,
            topk_group: 4,
            num_experts_per_tok: 8,
            first_k_dense_replace: 3,
            norm_topk_prob: true,
            hidden_act: Activation::Silu,
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            rope_interleave: true,
            attention_bias: false,
            initializer_range: 0.02,
            rope: RopeSettings::default(),
        }
    }
}

impl Config {
    /// `head_dim^-0.5`, times the square of yarn's scale where the frequencies are stretched.
    fn scale(&self, rope: &RopeParameters) -> f64 {
        let scale = ((self.qk_nope_head_dim + self.qk_rope_head_dim) as f64).powf(-0.5);
        match (rope.rope_type.as_str(), rope.factor, rope.mscale_all_dim) {
            ("default", ..) => scale,
            (_, Some(factor), Some(all)) if factor > 1.0 && all != 0.0 => {
                scale * (0.1 * all * factor.ln() + 1.0).powi(2)
            }
            _ => scale,
        }
    }

    fn check(&self) -> Result<()> {
        let (experts, groups) = (self.n_routed_experts, self.n_group);
        if groups == 0 || experts == 0 || experts % groups != 0 {
            let message = format!("{experts} experts cannot be cut into {groups} groups");
            return Err(Error::config("n_group", message));
        }
        if self.topk_group == 0 || self.topk_group > groups {
            let message = format!("there are {groups} groups to choose {} of", self.topk_group);
            return Err(Error::config("topk_group", message));
        }
        if self.num_experts_per_tok == 0 || self.num_experts_per_tok > self.topk_group * (experts / groups) {
            let message = format!(
                "the chosen groups hold {} experts",
                self.topk_group * (experts / groups)
            );
            return Err(Error::config("num_experts_per_tok", message));
        }
        Ok(())
    }
}

/// Chooses experts.
#[derive(Module, Debug)]
pub struct Router {
    gate: Linear,
    /// Added to the scores for the choice alone: `[n_routed_experts]`.
    e_score_correction_bias: Param<Tensor<1>>,
    groups: usize,
    topk_group: usize,
    top_k: usize,
    normalize: bool,
    scale: f64,
}

impl Router {
    /// Weights `[tokens, experts]` of the experts for `x` `[tokens, hidden_size]`, zero for those not chosen.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let scores = activation::sigmoid(self.gate.forward(x));
        let [tokens, experts] = scores.dims();
        let each = experts / self.groups;
        let choice = scores.clone() + self.e_score_correction_bias.val().unsqueeze();
        // A group is as good as its two best experts.
        let in_groups = choice.clone().reshape([tokens, self.groups, each]);
        let (best, _) = in_groups.topk_with_indices(each.min(2), 2);
        let (_, chosen) = top_k(best.sum_dim(2).reshape([tokens, self.groups]), self.topk_group);
        let ones = Tensor::ones([tokens, self.topk_group], (&choice.device(), choice.dtype()));
        let open = spread(chosen, ones, self.groups).reshape([tokens, self.groups, 1]);
        let closed = open
            .expand([tokens, self.groups, each])
            .reshape([tokens, experts])
            .equal_elem(0.0);
        let (_, indices) = top_k(choice.mask_fill(closed, f64::NEG_INFINITY), self.top_k);
        let mut weights = scores.gather(1, indices.clone());
        if self.normalize {
            weights = weights.clone() / (weights.sum_dim(1) + 1e-20);
        }
        spread(indices, weights * self.scale, experts)
    }
}

/// Routed experts and shared ones.
#[derive(Module, Debug)]
pub struct Mixture {
    router: Router,
    experts: Experts,
    shared_experts: Option<GatedMlp>,
}

impl Mixture {
    fn load(w: &Weights, c: &Config) -> Result<Self> {
        c.check()?;
        let (hidden, inner, count, act) = (
            c.hidden_size,
            c.moe_intermediate_size,
            c.n_routed_experts,
            c.hidden_act,
        );
        let names = ["gate_proj", "up_proj", "down_proj"];
        let router = Router {
            gate: Linear::load(&w.pp("gate").with_role(Role::Kept), hidden, count, false)?,
            e_score_correction_bias: w
                .pp("gate")
                .buffer("e_score_correction_bias", [count], Init::Zeros)?,
            groups: c.n_group,
            topk_group: c.topk_group,
            top_k: c.num_experts_per_tok,
            normalize: c.norm_topk_prob,
            scale: c.routed_scaling_factor,
        };
        let shared = match c.n_shared_experts {
            0 => None,
            n => Some(GatedMlp::load(
                &w.pp("shared_experts"),
                hidden,
                n * inner,
                act,
                false,
            )?),
        };
        Ok(Self {
            router,
            experts: Experts::load(&w.pp("experts"), count, names, hidden, inner, act)?,
            shared_experts: shared,
        })
    }

    /// `[batch, seq, hidden_size]` to the same shape.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let dims = x.dims();
        let flat = x.clone().reshape([dims[0] * dims[1], dims[2]]);
        let routed = self
            .experts
            .forward(flat.clone(), self.router.forward(flat))
            .reshape(dims);
        match &self.shared_experts {
            Some(shared) => routed + shared.forward(x),
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
    self_attn: LatentAttention,
    post_attention_layernorm: RmsNorm,
    mlp: FeedForward,
}

impl DecoderLayer for Layer {
    fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let attended = self
            .self_attn
            .forward(self.input_layernorm.forward(x.clone()), cx);
        let (normed, x) = self.post_attention_layernorm.forward_sum(attended, x);
        x + match &self.mlp {
            FeedForward::Dense(mlp) => mlp.forward(normed),
            FeedForward::Sparse(mixture) => mixture.forward(normed),
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let (hidden, eps, count) = (self.hidden_size, self.rms_norm_eps, self.num_hidden_layers);
        let rope = self.rope.resolve("full_attention", 10_000.0)?;
        let attention = LatentAttentionConfig {
            hidden_size: hidden,
            num_heads: self.num_attention_heads,
            q_lora_rank: self.q_lora_rank,
            kv_lora_rank: self.kv_lora_rank,
            qk_nope_head_dim: self.qk_nope_head_dim,
            qk_rope_head_dim: self.qk_rope_head_dim,
            v_head_dim: self.v_head_dim,
            bias: self.attention_bias,
            scale: self.scale(&rope),
            rope: Rope::new(
                &rope,
                self.qk_rope_head_dim,
                self.max_position_embeddings,
                self.rope_interleave,
            )?,
        };
        let layers = (0..count).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let mlp = if i < self.first_k_dense_replace {
                let inner = self.intermediate_size;
                FeedForward::Dense(GatedMlp::load(
                    &w.pp("mlp"),
                    hidden,
                    inner,
                    self.hidden_act,
                    false,
                )?)
            } else {
                FeedForward::Sparse(Mixture::load(&w.pp("mlp"), self)?)
            };
            Ok(Layer {
                input_layernorm: RmsNorm::load(&w.pp("input_layernorm"), hidden, eps)?,
                self_attn: LatentAttention::load(&w.pp("self_attn"), attention.clone())?,
                post_attention_layernorm: RmsNorm::load(&w.pp("post_attention_layernorm"), hidden, eps)?,
                mlp,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        // One more layer, which predicts a token further, follows in released checkpoints.
        w.ignore(|name| name.starts_with(&format!("model.layers.{count}.")));
        let norm = RmsNorm::load(&w.pp("model.norm"), hidden, eps)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            ..DecoderConfig::new(self.vocab_size, hidden, count)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
