//! Attention of a decoder to what an encoder has read.

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_kernels::{AttentionOptions, ScoreBias, attention};

use crate::attention::split_heads;
use crate::{AttentionConfig, Context, Linear, Result, Weights, training};

/// Multi-head attention whose keys and values come from an encoder's output. They are computed
/// [once](Self::keys_and_values) and kept in the cache.
#[derive(Module, Debug)]
pub struct CrossAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    #[module(skip)]
    config: AttentionConfig,
}

impl CrossAttention {
    /// Loads four layers by the names `[query, key, value, output]`; keys and values are projected from
    /// `source_width` dimensions.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or numbers of heads that do not fit.
    pub fn load_named(
        w: &Weights,
        [q, k, v, o]: [&str; 4],
        source_width: usize,
        config: AttentionConfig,
    ) -> Result<Self> {
        config.check()?;
        let (width, kv_width) = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        );
        Ok(Self {
            q_proj: Linear::load(&w.pp(q), config.hidden_size, width, config.qkv_bias)?,
            k_proj: Linear::load(&w.pp(k), source_width, kv_width, config.qkv_bias)?,
            v_proj: Linear::load(&w.pp(v), source_width, kv_width, config.qkv_bias)?,
            o_proj: Linear::load(&w.pp(o), width, config.hidden_size, config.out_bias)?,
            config,
        })
    }

    /// Keys and values `[batch, num_kv_heads, source, head_dim]` of an encoder's output
    /// `[batch, source, source_width]`.
    pub fn keys_and_values(&self, source: Tensor<3>) -> (Tensor<4>, Tensor<4>) {
        let [k, v] = Linear::forward_all([&self.k_proj, &self.v_proj], source);
        (
            split_heads(k, self.config.num_kv_heads),
            split_heads(v, self.config.num_kv_heads),
        )
    }

    /// `[batch, seq, hidden_size]` to the same shape; zeros where nothing has been read.
    pub fn forward(&self, x: Tensor<3>, cx: &mut Context) -> Tensor<3> {
        let Some((k, v, mask)) = cx.source() else {
            return x.zeros_like();
        };
        let q = split_heads(self.q_proj.forward(x), self.config.num_heads);
        let options = AttentionOptions {
            scale: self.config.scale,
            softcap: self.config.softcap,
            dropout: training::attention(),
        };
        let x = attention([q, k, v], &mask, ScoreBias::default(), options);
        training::attention_output(self.o_proj.forward(x))
    }
}
