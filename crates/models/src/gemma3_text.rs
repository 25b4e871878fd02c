//! Gemma 3's language model (Gemma Team, 2025): Gemma 2 with norms of each head's queries and keys in place of soft
//! caps, and with a rotation of its own in the layers with a sliding window, five of six.

use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Decoder, DecoderConfig, Error, GatedMlp, Result, RmsNorm, Rope,
    RopeSettings, Weights,
};
use serde::{Deserialize, Serialize};

use crate::Architecture;
use crate::gemma2::Layer;
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
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub hidden_activation: Activation,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub initializer_range: f64,
    pub attention_bias: bool,
    pub query_pre_attn_scalar: f64,
    pub sliding_window: Option<usize>,
    pub layer_types: Option<Vec<String>>,
    pub sliding_window_pattern: usize,
    pub rope_local_base_freq: f64,
    pub final_logit_softcapping: Option<f64>,
    pub attn_logit_softcapping: Option<f64>,
    pub use_bidirectional_attention: bool,
    #[serde(flatten)]
    pub rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 262_208,
            hidden_size: 2304,
            intermediate_size: 9216,
            num_hidden_layers: 26,
            num_attention_heads: 8,
            num_key_value_heads: 4,
            head_dim: 256,
            hidden_activation: Activation::GeluTanh,
            max_position_embeddings: 131_072,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: true,
            initializer_range: 0.02,
            attention_bias: false,
            query_pre_attn_scalar: 256.0,
            sliding_window: Some(4096),
            layer_types: None,
            sliding_window_pattern: 6,
            rope_local_base_freq: 10_000.0,
            final_logit_softcapping: None,
            attn_logit_softcapping: None,
            use_bidirectional_attention: false,
            rope: RopeSettings::default(),
        }
    }
}

impl Config {
    /// Rotations of layers that see everything, and of those with a window.
    fn ropes(&self) -> Result<[Rope; 2]> {
        let global = self.rope.resolve("full_attention", 1_000_000.0)?;
        let both = self.rope.rope_parameters.as_ref();
        let local = match both.filter(|both| both.get("sliding_attention").is_some()) {
            Some(_) => self
                .rope
                .resolve("sliding_attention", self.rope_local_base_freq)?,
            None => RopeSettings::default().resolve("sliding_attention", self.rope_local_base_freq)?,
        };
        let rope = |parameters| Rope::new(&parameters, self.head_dim, self.max_position_embeddings, false);
        Ok([rope(global)?, rope(local)?])
    }
}

impl Architecture for Config {
    type Layer = Layer;
    const BASE: &'static str = "model";

    fn load(&self, w: &Weights) -> Result<Decoder<Layer>> {
        if self.use_bidirectional_attention {
            let message = "this is an encoder; a causal language model has `false`";
            return Err(Error::config("use_bidirectional_attention", message));
        }
        let [global, local] = self.ropes()?;
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.rms_norm_eps);
        let head_dim = self.head_dim;
        let attention = AttentionConfig {
            qkv_bias: self.attention_bias,
            out_bias: self.attention_bias,
            scale: Some(self.query_pre_attn_scalar.powf(-0.5)),
            softcap: self.attn_logit_softcapping,
            ..AttentionConfig::new(hidden, heads, self.num_key_value_heads, head_dim)
        };
        let mut windows = Vec::new();
        let layers = (0..self.num_hidden_layers).map(|i| {
            let w = w.pp("model.layers").pp(i);
            let window = {
                let slides =
                    self.sliding_window_pattern > 0 && !(i + 1).is_multiple_of(self.sliding_window_pattern);
                layer_types::window(&self.layer_types, i, self.sliding_window, slides)?
            };
            windows.push(window);
            let attention = AttentionConfig {
                window,
                rope: Some(if window.is_some() { &local } else { &global }.clone()),
                ..attention.clone()
            };
            let at = w.pp("self_attn");
            let self_attn = Attention::load(&at, attention)?.with_head_rms_norm(&at, eps, true)?;
            let mlp = GatedMlp::load(
                &w.pp("mlp"),
                hidden,
                self.intermediate_size,
                self.hidden_activation,
                false,
            )?;
            Layer::load(&w, self_attn, mlp, hidden, eps)
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = RmsNorm::load_plus_one(&w.pp("model.norm"), hidden, eps)?;
        let frame = DecoderConfig {
            tie_word_embeddings: self.tie_word_embeddings,
            windows,
            embedding_scale: (hidden as f64).sqrt(),
            logit_softcap: self.final_logit_softcapping,
            ..DecoderConfig::new(self.vocab_size, hidden, self.num_hidden_layers)
        };
        Decoder::load(w, frame, layers, Some(norm.into()))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
