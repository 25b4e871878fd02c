//! Qwen3-MoE (Qwen Team, 2025): Qwen3 with a mixture of experts.

use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Decoder, DecoderConfig, GatedMlp, Result, RmsNorm, Rope,
    RopeSettings, Weights,
};
use serde::{Deserialize, Serialize};

use crate::Architecture;
use crate::qwen2_moe::{FeedForward, Layer, Mixture, Routing, is_sparse};

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
    pub num_key_value_heads: usize,
    pub head_dim: Option<usize>,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub initializer_range: f64,
    pub attention_bias: bool,
    pub use_sliding_window: bool,
    pub sliding_window: Option<usize>,
    pub decoder_sparse_step: usize,
    pub moe_intermediate_size: usize,
    pub num_experts_per_tok: usize,
    #[serde(alias = "num_local_experts")]
    pub num_experts: usize,
    pub norm_topk_prob: bool,
    pub mlp_only_layers: Vec<usize>,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 151_936,
            hidden_size: 2048,
            intermediate_size: 6144,
            num_hidden_layers: 24,
            num_attention_heads: 32,
            num_key_value_heads: 4,
            head_dim: None,
            hidden_act: Activation::Silu,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            attention_bias: false,
            use_sliding_window: false,
            sliding_window: Some(4096),
            decoder_sparse_step: 1,
            moe_intermediate_size: 768,
            num_experts_per_tok: 8,
            num_experts: 128,
            norm_topk_prob: false,
            mlp_only_layers: Vec::new(),
            rope: RopeSettings::default(),
        }
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        let window = self.sliding_window.filter(|_| self.use_sliding_window);
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.rms_norm_eps);
        let head_dim = self.head_dim.unwrap_or(hidden / heads.max(1));
        let rope = self.rope.resolve("full_attention", 10_000.0)?;
        let attention = AttentionConfig {
            qkv_bias: self.attention_bias,
            out_bias: self.attention_bias,
            window,
            rope: Some(Rope::new(&rope, head_dim, self.max_position_embeddings, false)?),
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads, head_dim)
        };
        let routing = Routing {
            num_experts: self.num_experts,
            top_k: self.num_experts_per_tok,
            normalize: self.norm_topk_prob,
        };
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let at = w.pp("self_attn");
            let self_attn = Attention::load(&at, attention.clone())?.with_head_rms_norm(&at, eps, false)?;
            let (at, act) = (w.pp("mlp"), self.hidden_act);
            let sparse = is_sparse(
                i,
                self.num_experts,
                self.decoder_sparse_step,
                &self.mlp_only_layers,
            );
            let mlp = if sparse {
                let (inner, names) = (self.moe_intermediate_size, ["gate_proj", "up_proj", "down_proj"]);
                FeedForward::Sparse(Mixture::load(&at, names, &routing, hidden, inner, act)?)
            } else {
                FeedForward::Dense(GatedMlp::load(&at, hidden, self.intermediate_size, act, false)?)
            };
            Layer::load(&w, self_attn, mlp, hidden, eps)
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load(&w.pp("model.norm"), hidden, eps)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            windows: vec![window; self.num_hidden_layers],
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
