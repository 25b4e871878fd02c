//! Multi-head attention with all that models vary in it.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use oxiformers_kernels::{AttentionOptions, ScoreBias, cached_attention, split};

use crate::parameters::{Kind, Slot};
use crate::{Context, Error, Init, LayerNorm, Linear, Norm, Result, RmsNorm, Rope, Weights, training};

/// More heads, or wider ones, than any model has.
pub(crate) const MAX_HEADS: usize = 1 << 14;
pub(crate) const MAX_HEAD_DIM: usize = 1 << 14;

/// Numbers and switches of an attention layer.
#[derive(Debug, Clone)]
pub struct AttentionConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; each serves `num_heads / num_kv_heads` query heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether the query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
    /// Scale of the scores; `head_dim^-0.5` where `None`.
    pub scale: Option<f64>,
    /// Soft cap of the scores: `cap · tanh(score / cap)`.
    pub softcap: Option<f64>,
    /// How many tokens a query sees, itself included; in an encoder, half of them on either side.
    pub window: Option<usize>,
    /// Rotary embedding.
    pub rope: Option<Rope>,
    /// Clamp of the projected queries, keys and values to `[-x, x]`.
    pub clip_qkv: Option<f64>,
}

impl AttentionConfig {
    /// Plain attention: no bias, every token seen, no rotary embedding.
    pub fn new(hidden_size: usize, num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Self {
        Self {
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            qkv_bias: false,
            out_bias: false,
            scale: None,
            softcap: None,
            window: None,
            rope: None,
            clip_qkv: None,
        }
    }

    /// Checks that there are heads, and that each key/value head serves a whole number of them.
    ///
    /// # Errors
    /// Names the field of the configuration that does not fit.
    pub fn check(&self) -> Result<()> {
        let (heads, kv_heads) = (self.num_heads, self.num_kv_heads);
        if !(1..=MAX_HEADS).contains(&heads) || !(1..=MAX_HEAD_DIM).contains(&self.head_dim) {
            let message = format!("there cannot be {heads} heads of width {}", self.head_dim);
            return Err(Error::config("num_attention_heads", message));
        }
        if kv_heads == 0 || heads % kv_heads != 0 {
            let message = format!("{kv_heads} key/value heads cannot be shared by {heads} heads");
            return Err(Error::config("num_key_value_heads", message));
        }
        Ok(())
    }
}

/// How queries, keys and values are projected.
#[derive(Module, Debug)]
pub enum Projection {
    /// One layer each.
    Split([Linear; 3]),
    /// One layer: all query heads, then all key heads, then all value heads.
    Stacked(Linear),
    /// One layer, grouped by key/value head: its query heads, its key head, its value head.
    Grouped(Linear),
}

/// Norms of queries and keys.
#[derive(Module, Debug)]
pub enum QkNorm {
    /// Over each head, after the heads are cut apart.
    PerHead([Norm; 2]),
    /// Over the whole projection, before the heads are cut apart.
    Whole([Norm; 2]),
    /// Over each head after the rotation, with weights `[heads, head_dim]` of their own.
    HeadWeights([PerHeadNorm; 2]),
}

/// A layer norm or RMS norm whose heads have a weight each.
#[derive(Module, Debug)]
pub struct PerHeadNorm {
    /// `[heads, head_dim]`, or `[1, head_dim]` for each head.
    weights: Vec<Param<Tensor<2>>>,
    #[module(skip)]
    norm: Norm,
}

impl PerHeadNorm {
    /// Layer norm without bias over each head, with `weight` `[heads, head_dim]`, or `norms.0.weight` and so on
    /// `[head_dim]` where each head's is stored `apart`.
    pub fn load_layer_norm(
        w: &Weights,
        heads: usize,
        head_dim: usize,
        eps: f64,
        apart: bool,
    ) -> Result<Self> {
        let w = w.with_kind(Kind::LayerNorm);
        let weights = if w.is_stored("norms.0.weight") || (apart && !w.is_stored("weight")) {
            let one = |head| {
                let name = format!("norms.{head}.weight");
                let slot = Slot {
                    tensor: name.clone(),
                    shape: vec![head_dim],
                    offset: 0,
                    strides: vec![head_dim, 1],
                };
                w.param_of(&name, slot, [1, head_dim], Init::Ones)
            };
            (0..heads).map(one).collect::<Result<_>>()?
        } else {
            vec![w.param("weight", [heads, head_dim], Init::Ones)?]
        };
        Ok(Self {
            weights,
            norm: LayerNorm::unweighted(eps).into(),
        })
    }

    /// `[batch, heads, seq, head_dim]` to the same shape.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let weights = self.weights.iter().map(Param::val).collect();
        let weights = Tensor::cat(weights, 0);
        let [heads, head_dim] = weights.dims();
        self.norm.forward(x) * weights.reshape([1, heads, 1, head_dim])
    }
}

/// Multi-head attention over the cache, or of an encoder's tokens over each other.
#[derive(Module, Debug)]
pub struct Attention {
    qkv: Projection,
    o_proj: Linear,
    qk_norm: Option<QkNorm>,
    /// A learned score per head that takes part in the softmax and leads nowhere: `[heads]`.
    sinks: Option<Param<Tensor<1>>>,
    /// ALiBi slopes: `[heads]`.
    alibi: Option<Tensor<1>>,
    /// The norm of what the output projection takes.
    out_norm: Option<RmsNorm>,
    #[module(skip)]
    config: AttentionConfig,
}

impl Attention {
    /// Loads `q_proj`, `k_proj`, `v_proj` and `o_proj`.
    pub fn load(w: &Weights, config: AttentionConfig) -> Result<Self> {
        Self::load_named(w, ["q_proj", "k_proj", "v_proj", "o_proj"], config)
    }

    /// Loads four layers by the names `[query, key, value, output]`.
    pub fn load_named(w: &Weights, [q, k, v, o]: [&str; 4], config: AttentionConfig) -> Result<Self> {
        config.check()?;
        let linear = |name: &str, heads: usize| {
            Linear::load(
                &w.pp(name),
                config.hidden_size,
                heads * config.head_dim,
                config.qkv_bias,
            )
        };
        let qkv = [
            linear(q, config.num_heads)?,
            linear(k, config.num_kv_heads)?,
            linear(v, config.num_kv_heads)?,
        ];
        Self::with_projection(w, Projection::Split(qkv), o, config)
    }

    /// Loads one layer `qkv` whose output rows are stacked: queries, keys, values.
    pub fn load_stacked(w: &Weights, [qkv, o]: [&str; 2], config: AttentionConfig) -> Result<Self> {
        let linear = Self::fused(&w.pp(qkv), &config)?;
        Self::with_projection(w, Projection::Stacked(linear), o, config)
    }

    /// Loads one layer `qkv` whose output rows are grouped by key/value head.
    pub fn load_grouped(w: &Weights, [qkv, o]: [&str; 2], config: AttentionConfig) -> Result<Self> {
        let linear = Self::fused(&w.pp(qkv), &config)?;
        Self::with_projection(w, Projection::Grouped(linear), o, config)
    }

    fn fused(w: &Weights, config: &AttentionConfig) -> Result<Linear> {
        config.check()?;
        let rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
        Linear::load(w, config.hidden_size, rows, config.qkv_bias)
    }

    fn with_projection(w: &Weights, qkv: Projection, o: &str, config: AttentionConfig) -> Result<Self> {
        let width = config.num_heads * config.head_dim;
        let o_proj = Linear::load(&w.pp(o), width, config.hidden_size, config.out_bias)?;
        Ok(Self::new(qkv, o_proj, config))
    }

    /// From layers that are loaded already.
    pub fn new(qkv: Projection, o_proj: Linear, config: AttentionConfig) -> Self {
        Self {
            qkv,
            o_proj,
            qk_norm: None,
            sinks: None,
            alibi: None,
            out_norm: None,
            config,
        }
    }

    /// Adds norms of queries and keys.
    pub fn with_qk_norm(mut self, norm: QkNorm) -> Self {
        self.qk_norm = Some(norm);
        self
    }

    /// Adds RMS norms over each head's queries and keys, stored as `q_norm` and `k_norm`.
    pub fn with_head_rms_norm(self, w: &Weights, eps: f64, plus_one: bool) -> Result<Self> {
        let load = if plus_one {
            RmsNorm::load_plus_one
        } else {
            RmsNorm::load
        };
        let norm = |name| load(&w.pp(name), self.config.head_dim, eps).map(Norm::Rms);
        let norms = [norm("q_norm")?, norm("k_norm")?];
        Ok(self.with_qk_norm(QkNorm::PerHead(norms)))
    }

    /// Adds attention sinks.
    pub fn with_sinks(mut self, sinks: Param<Tensor<1>>) -> Self {
        self.sinks = Some(sinks);
        self
    }

    /// Adds a norm of what the output projection takes.
    pub fn with_out_norm(mut self, norm: RmsNorm) -> Self {
        self.out_norm = Some(norm);
        self
    }

    /// Adds ALiBi with the given slopes.
    pub fn with_alibi(mut self, slopes: Tensor<1>) -> Self {
        self.alibi = Some(slopes);
        self
    }

    /// `[batch, seq, hidden_size]` to the same shape.
    pub fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let c = &self.config;
        let [q, k, v] = self.project(x);
        let (mut q, mut k) = match &self.qk_norm {
            Some(QkNorm::PerHead([q_norm, k_norm])) => (q_norm.forward(q), k_norm.forward(k)),
            Some(QkNorm::HeadWeights([q_norm, k_norm])) => (q_norm.forward(q), k_norm.forward(k)),
            _ => (q, k),
        };
        if let Some(rope) = &c.rope {
            let tables = cx.rope(rope);
            (q, k) = (rope.rotate(q, &tables), rope.rotate(k, &tables));
        }
        let mask = cx.mask(c.window);
        let kv = cx.update(k, v);
        let bias = ScoreBias {
            bias: cx.bias(),
            alibi: self.alibi.clone(),
            sinks: self.sinks.as_ref().map(Param::val),
        };
        let options = AttentionOptions {
            scale: c.scale,
            softcap: c.softcap,
            dropout: training::attention(),
        };
        self.output(cached_attention(q, kv, &mask, bias, options))
    }

    /// What follows the attention: `[batch, seq, num_heads * head_dim]` to `[batch, seq, hidden_size]`. For architectures
    /// with an attention of their own.
    pub fn output(&self, x: Tensor<3>) -> Tensor<3> {
        let x = match &self.out_norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        training::attention_output(self.o_proj.forward(x))
    }

    /// Queries `[batch, num_heads, seq, head_dim]`, keys and values `[batch, num_kv_heads, seq, head_dim]`, before norms
    /// of heads and the rotation.
    pub fn project(&self, x: Tensor<3>) -> [Tensor<4>; 3] {
        let [batch, seq, _] = x.dims();
        let c = &self.config;
        let (heads, kv_heads, dim) = (c.num_heads, c.num_kv_heads, c.head_dim);
        let clip = |x: Tensor<3>| match c.clip_qkv {
            Some(limit) => x.clamp(-limit, limit),
            None => x,
        };
        let (q, k, v) = match &self.qkv {
            Projection::Split([q, k, v]) => {
                let [q, k, v] = Linear::forward_all([q, k, v], x);
                (clip(q), clip(k), clip(v))
            }
            Projection::Stacked(qkv) => {
                let qkv = clip(qkv.forward(x));
                let (q_width, kv_width) = (heads * dim, kv_heads * dim);
                let [q, k, v] = split(qkv, [q_width, kv_width, kv_width]);
                (q, k, v)
            }
            Projection::Grouped(qkv) => {
                let group = heads / kv_heads;
                let qkv = clip(qkv.forward(x)).reshape([batch, seq, kv_heads, group + 2, dim]);
                let part = |start, len: usize| {
                    qkv.clone()
                        .narrow(3, start, len)
                        .reshape([batch, seq, kv_heads * len * dim])
                };
                (part(0, group), part(group, 1), part(group + 1, 1))
            }
        };
        let (q, k) = match &self.qk_norm {
            Some(QkNorm::Whole([q_norm, k_norm])) => (q_norm.forward(q), k_norm.forward(k)),
            _ => (q, k),
        };
        [
            split_heads(q, heads),
            split_heads(k, kv_heads),
            split_heads(v, kv_heads),
        ]
    }
}

/// `[batch, seq, heads * dim]` to `[batch, heads, seq, dim]`.
pub fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, seq, width] = x.dims();
    x.reshape([batch, seq, heads, width / heads.max(1)])
        .swap_dims(1, 2)
}

/// ALiBi slopes `2^(-8 i / heads)`, with the interpolation that BLOOM and MPT use where the number of heads
/// is no power of two.
pub fn alibi_slopes(heads: usize, bias_max: f64) -> Vec<f32> {
    let closest = if heads.is_power_of_two() {
        heads
    } else {
        heads.next_power_of_two() / 2
    };
    let slope = |i: usize, n: usize| 2f64.powf(-bias_max * i as f64 / n as f64) as f32;
    let mut slopes: Vec<f32> = (1..=closest).map(|i| slope(i, closest)).collect();
    slopes.extend((0..heads - closest).map(|i| slope(2 * i + 1, 2 * closest)));
    slopes
}
