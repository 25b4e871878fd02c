//! Multi-head latent attention (DeepSeek-AI, 2024): keys and values of all heads are projected from one narrow
//! latent per token, and only that and a shared rotated key are cached.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_kernels::{AttentionOptions, ScoreBias, attention};

use crate::attention::{MAX_HEAD_DIM, MAX_HEADS};
use crate::{Context, Error, Linear, Result, RmsNorm, Rope, Weights, training};

/// Numbers and switches of a latent attention layer.
#[derive(Debug, Clone)]
pub struct LatentAttentionConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Heads.
    pub num_heads: usize,
    /// Width of the queries' latent; `None` where they are projected directly.
    pub q_lora_rank: Option<usize>,
    /// Width of the latent that keys and values share.
    pub kv_lora_rank: usize,
    /// Dimensions of a query or key head that are not rotated.
    pub qk_nope_head_dim: usize,
    /// Dimensions of a query or key head that are rotated; all heads share this part of the key.
    pub qk_rope_head_dim: usize,
    /// Width of a value head.
    pub v_head_dim: usize,
    /// Whether the projections into the latents and out of the heads have a bias.
    pub bias: bool,
    /// Scale of the scores.
    pub scale: f64,
    /// Rotary embedding of `qk_rope_head_dim` dimensions.
    pub rope: Rope,
}

/// Multi-head latent attention over the cache.
#[derive(Module, Debug)]
pub struct LatentAttention {
    /// Into the queries' latent, if they have one.
    q_a_proj: Option<Linear>,
    q_a_norm: Option<RmsNorm>,
    q_proj: Linear,
    kv_a_proj: Linear,
    kv_a_norm: RmsNorm,
    kv_b_proj: Linear,
    o_proj: Linear,
    #[module(skip)]
    config: LatentAttentionConfig,
}

impl LatentAttention {
    /// Loads the layers by the names that DeepSeek gave them.
    pub fn load(w: &Weights, c: LatentAttentionConfig) -> Result<Self> {
        // The norms of the latents have an epsilon of their own, which no configuration names.
        const EPS: f64 = 1e-6;
        let dims = [c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim];
        if !(1..=MAX_HEADS).contains(&c.num_heads) || dims.iter().any(|dim| !(1..=MAX_HEAD_DIM).contains(dim))
        {
            let message = format!("there cannot be {} heads of widths {dims:?}", c.num_heads);
            return Err(Error::config("num_attention_heads", message));
        }
        if c.kv_lora_rank == 0 || c.q_lora_rank == Some(0) {
            return Err(Error::config("kv_lora_rank", "a latent of width 0 holds nothing"));
        }
        let (hidden, heads) = (c.hidden_size, c.num_heads);
        let q_width = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim);
        let (q_a_proj, q_a_norm, q_proj) = match c.q_lora_rank {
            None => (None, None, Linear::load(&w.pp("q_proj"), hidden, q_width, false)?),
            Some(rank) => (
                Some(Linear::load(&w.pp("q_a_proj"), hidden, rank, c.bias)?),
                Some(RmsNorm::load(&w.pp("q_a_layernorm"), rank, EPS)?),
                Linear::load(&w.pp("q_b_proj"), rank, q_width, false)?,
            ),
        };
        let latent = c.kv_lora_rank + c.qk_rope_head_dim;
        let kv_width = heads * (c.qk_nope_head_dim + c.v_head_dim);
        Ok(Self {
            q_a_proj,
            q_a_norm,
            q_proj,
            kv_a_proj: Linear::load(&w.pp("kv_a_proj_with_mqa"), hidden, latent, c.bias)?,
            kv_a_norm: RmsNorm::load(&w.pp("kv_a_layernorm"), c.kv_lora_rank, EPS)?,
            kv_b_proj: Linear::load(&w.pp("kv_b_proj"), c.kv_lora_rank, kv_width, false)?,
            o_proj: Linear::load(&w.pp("o_proj"), heads * c.v_head_dim, hidden, c.bias)?,
            config: c,
        })
    }

    /// `[batch, seq, hidden_size]` to the same shape.
    pub fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let [batch, seq, _] = x.dims();
        let c = &self.config;
        let (heads, nope, rotated) = (c.num_heads, c.qk_nope_head_dim, c.qk_rope_head_dim);
        let tables = cx.rope(&c.rope);
        let rotate = |x: Tensor<4>| c.rope.rotate(x, &tables);

        let q = match (&self.q_a_proj, &self.q_a_norm) {
            (Some(a), Some(norm)) => norm.forward(a.forward(x.clone())),
            _ => x.clone(),
        };
        let q = self.q_proj.forward(q);
        let q = q.reshape([batch, seq, heads, nope + rotated]).swap_dims(1, 2);
        let q_rotated = rotate(q.clone().narrow(3, nope, rotated));
        let q = Tensor::cat(vec![q.narrow(3, 0, nope), q_rotated], 3);

        let latent = self.kv_a_proj.forward(x);
        let k_rotated = latent.clone().narrow(2, c.kv_lora_rank, rotated);
        let latent = self.kv_a_norm.forward(latent.narrow(2, 0, c.kv_lora_rank));
        let mask = cx.mask(None);
        let dtype = q.dtype();
        let cached = cx.update(
            latent.reshape([batch, 1, seq, c.kv_lora_rank]),
            rotate(k_rotated.reshape([batch, 1, seq, rotated])),
        );
        // The latent is projected before anything attends to it, so codes become numbers first.
        let [latent, k_rotated] = cached.map(|rows| rows.dense(dtype));

        let keys = latent.dims()[2];
        let kv = (self.kv_b_proj.forward(latent))
            .reshape([batch, keys, heads, nope + c.v_head_dim])
            .swap_dims(1, 2);
        let k_rotated = k_rotated.expand([batch, heads, keys, rotated]);
        let k = Tensor::cat(vec![kv.clone().narrow(3, 0, nope), k_rotated], 3);
        let v = kv.narrow(3, nope, c.v_head_dim);
        let options = AttentionOptions {
            scale: Some(c.scale),
            softcap: None,
            dropout: training::attention(),
        };
        self.o_proj
            .forward(attention([q, k, v], &mask, ScoreBias::default(), options))
    }
}
