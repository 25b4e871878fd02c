//! ALBERT (Lan et al., 2020): BERT whose layers share their parameters, with embeddings narrower than the layers.

use oxiformers_nn::head::vocabulary_output;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Embeddings, EmbeddingsConfig, Encoder, Error, Head, LayerNorm,
    Linear, Mlp, Reads, Result, Weights,
};
use serde::{Deserialize, Serialize};

use crate::bert::{Layer, pooled_head};
use crate::{EncoderArchitecture, Task};

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: usize,
    pub embedding_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_hidden_groups: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub inner_group_num: usize,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub initializer_range: f64,
    pub layer_norm_eps: f64,
    pub tie_word_embeddings: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 30_000,
            embedding_size: 128,
            hidden_size: 4096,
            num_hidden_layers: 12,
            num_hidden_groups: 1,
            num_attention_heads: 64,
            intermediate_size: 16_384,
            inner_group_num: 1,
            hidden_act: Activation::GeluTanh,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            tie_word_embeddings: true,
        }
    }
}

impl Config {
    fn layer(&self, w: &Weights) -> Result<Layer> {
        const NAMES: [&str; 4] = ["query", "key", "value", "dense"];
        let (hidden, heads, eps) = (self.hidden_size, self.num_attention_heads, self.layer_norm_eps);
        let attention = AttentionConfig {
            qkv_bias: true,
            out_bias: true,
            ..AttentionConfig::new(hidden, heads, heads, hidden / heads.max(1))
        };
        let (names, inner) = (["ffn", "ffn_output"], self.intermediate_size);
        Ok(Layer {
            attention: Attention::load_named(&w.pp("attention"), NAMES, attention)?,
            attention_norm: LayerNorm::load(&w.pp("attention.LayerNorm"), hidden, eps, true)?,
            mlp: Mlp::load(w, names, hidden, inner, self.hidden_act, true)?,
            output_norm: LayerNorm::load(&w.pp("full_layer_layer_norm"), hidden, eps, true)?,
        })
    }

    /// Which of the stored layers runs in each place: groups of them, each for an equal share of the places.
    fn order(&self) -> Result<Vec<usize>> {
        let (places, groups, inner) = (
            self.num_hidden_layers,
            self.num_hidden_groups,
            self.inner_group_num,
        );
        // More passes than any model has would only take memory.
        if groups == 0 || groups > places.max(1) || inner == 0 || places.saturating_mul(inner) > 1 << 16 {
            let message = format!("{groups} groups of {inner} layers cannot make up {places} layers");
            return Err(Error::config("num_hidden_groups", message));
        }
        let group = |place| place * groups / places;
        Ok((0..places)
            .flat_map(|place| (0..inner).map(move |i| group(place) * inner + i))
            .collect())
    }
}

impl EncoderArchitecture for Config {
    type Model = Encoder<Layer>;
    const BASE: &'static str = "albert";
    const IGNORED: &'static [&'static str] = &["embeddings.position_ids", "pooler.weight", "pooler.bias"];

    fn load(&self, w: &Weights) -> Result<Encoder<Layer>> {
        let order = self.order()?;
        let w = w.pp("albert");
        let embeddings = EmbeddingsConfig {
            max_position_embeddings: Some(self.max_position_embeddings),
            type_vocab_size: self.type_vocab_size,
            ..EmbeddingsConfig::new(self.vocab_size, self.embedding_size, self.layer_norm_eps)
        };
        let embeddings = Embeddings::load(&w.pp("embeddings"), embeddings)?;
        let w = w.pp("encoder");
        let (width, hidden) = (self.embedding_size, self.hidden_size);
        let layers = (0..self.num_hidden_groups).flat_map(|group| {
            let w = w.pp("albert_layer_groups").pp(group).pp("albert_layers");
            (0..self.inner_group_num).map(move |i| self.layer(&w.pp(i)))
        });
        let mut encoder = Encoder::new(embeddings, layers.collect::<Result<_>>()?);
        encoder.project = Some(Linear::load(
            &w.pp("embedding_hidden_mapping_in"),
            width,
            hidden,
            true,
        )?);
        encoder.order = order;
        Ok(encoder)
    }

    fn head(&self, task: Task, w: &Weights, model: &Encoder<Layer>, labels: usize) -> Result<Option<Head>> {
        let (hidden, width) = (self.hidden_size, self.embedding_size);
        if task != Task::MaskedLM {
            return pooled_head(task, w, &w.pp("albert.pooler"), hidden, labels);
        }
        let w = w.pp("predictions");
        let dense = Linear::load(&w.pp("dense"), hidden, width, true)?;
        let norm = LayerNorm::load(&w.pp("LayerNorm"), width, self.layer_norm_eps, true)?;
        let table = &model.embeddings.word_embeddings;
        let output = vocabulary_output(&w, ["decoder", "bias"], table, self.tie_word_embeddings)?;
        let head = Head::new(Reads::All).dense(dense, self.hidden_act);
        Ok(Some(head.norm(norm).output(output)))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
