//! MPNet (Song et al., 2020): RoBERTa without token types, with a bias for relative positions that all layers share.

use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Embeddings, EmbeddingsConfig, Encoder, Error, Head, LayerNorm,
    Mlp, PositionCount, RelativeBias, Result, Weights,
};
use serde::{Deserialize, Serialize};

use crate::bert::{self, Layer, pooled_head};
use crate::roberta::{classification_head, lm_head};
use crate::{EncoderArchitecture, Task};

/// Positions are counted after this token, whatever the configuration says of padding.
const PADDING: u32 = 1;
/// Distances from here on share a bucket.
const MAX_DISTANCE: usize = 128;
/// Buckets of distances, whatever the size of their table.
const BUCKETS: usize = 32;

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub initializer_range: f64,
    pub layer_norm_eps: f64,
    pub relative_attention_num_buckets: usize,
    pub tie_word_embeddings: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 30_527,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            max_position_embeddings: 512,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            relative_attention_num_buckets: BUCKETS,
            tie_word_embeddings: true,
        }
    }
}

impl Config {
    fn layer(&self, w: &Weights) -> Result<Layer> {
        const NAMES: [&str; 4] = ["q", "k", "v", "o"];
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        let attention = AttentionConfig {
            qkv_bias: true,
            out_bias: true,
            ..AttentionConfig::new(hidden, heads, heads, hidden / heads.max(1))
        };
        let norm = |name| LayerNorm::load(&w.pp(name), hidden, self.layer_norm_eps, true);
        let (names, inner) = (["intermediate.dense", "output.dense"], self.intermediate_size);
        Ok(Layer {
            attention: Attention::load_named(&w.pp("attention.attn"), NAMES, attention)?,
            attention_norm: norm("attention.LayerNorm")?,
            mlp: Mlp::load(w, names, hidden, inner, self.hidden_act, true)?,
            output_norm: norm("output.LayerNorm")?,
        })
    }
}

impl EncoderArchitecture for Config {
    type Model = Encoder<Layer>;
    const BASE: &'static str = "mpnet";
    const IGNORED: &'static [&'static str] = bert::IGNORED;

    fn load(&self, w: &Weights) -> Result<Encoder<Layer>> {
        let w = w.pp("mpnet");
        if self.relative_attention_num_buckets != BUCKETS {
            let message = format!(
                "is {}; only {BUCKETS} is supported",
                self.relative_attention_num_buckets
            );
            return Err(Error::config("relative_attention_num_buckets", message));
        }
        let embeddings = EmbeddingsConfig {
            max_position_embeddings: Some(self.max_position_embeddings),
            position_count: PositionCount::AfterPadding {
                pad_token_id: PADDING,
            },
            ..EmbeddingsConfig::new(self.vocab_size, self.hidden_size, self.layer_norm_eps)
        };
        let embeddings = Embeddings::load(&w.pp("embeddings"), embeddings)?;
        let w = w.pp("encoder");
        let layers = (0..self.num_hidden_layers).map(|i| self.layer(&w.pp("layer").pp(i)));
        let mut encoder = Encoder::new(embeddings, layers.collect::<Result<_>>()?);
        let (at, heads) = (w.pp("relative_attention_bias"), self.num_attention_heads);
        encoder.relative_bias = Some(RelativeBias::load(&at, BUCKETS, MAX_DISTANCE, heads, true)?);
        Ok(encoder)
    }

    fn head(&self, task: Task, w: &Weights, model: &Encoder<Layer>, labels: usize) -> Result<Option<Head>> {
        let hidden = self.hidden_size;
        Ok(Some(match task {
            Task::MaskedLM => {
                let (table, tied) = (&model.embeddings.word_embeddings, self.tie_word_embeddings);
                lm_head(&w.pp("lm_head"), table, tied, hidden, self.layer_norm_eps)?
            }
            Task::SequenceClassification => {
                classification_head(&w.pp("classifier"), Activation::Tanh, hidden, labels)?
            }
            _ => return pooled_head(task, w, &w.pp("mpnet.pooler.dense"), hidden, labels),
        }))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings.saturating_sub(PADDING as usize + 1))
    }
}
