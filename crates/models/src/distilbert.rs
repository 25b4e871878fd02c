//! DistilBERT (Sanh et al., 2019): BERT with half of the layers, without token types and pooler.

use oxiformers_nn::head::vocabulary_output;
use oxiformers_nn::{
    Activation, Attention, AttentionConfig, Embeddings, EmbeddingsConfig, Encoder, Head, LayerNorm, Linear,
    Mlp, Reads, Result, Weights,
};
use serde::{Deserialize, Serialize};

use crate::bert::Layer;
use crate::{EncoderArchitecture, Task};

const EPS: f64 = 1e-12;

/// The fields of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Config {
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    pub dim: usize,
    pub hidden_dim: usize,
    pub activation: Activation,
    pub initializer_range: f64,
    pub tie_word_embeddings: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 30_522,
            max_position_embeddings: 512,
            n_layers: 6,
            n_heads: 12,
            dim: 768,
            hidden_dim: 3072,
            activation: Activation::Gelu,
            initializer_range: 0.02,
            tie_word_embeddings: true,
        }
    }
}

impl Config {
    fn layer(&self, w: &Weights) -> Result<Layer> {
        const NAMES: [&str; 4] = ["q_lin", "k_lin", "v_lin", "out_lin"];
        let (dim, heads, inner) = (self.dim, self.n_heads, self.hidden_dim);
        let attention = AttentionConfig {
            qkv_bias: true,
            out_bias: true,
            ..AttentionConfig::new(dim, heads, heads, dim / heads.max(1))
        };
        Ok(Layer {
            attention: Attention::load_named(&w.pp("attention"), NAMES, attention)?,
            attention_norm: LayerNorm::load(&w.pp("sa_layer_norm"), dim, EPS, true)?,
            mlp: Mlp::load(&w.pp("ffn"), ["lin1", "lin2"], dim, inner, self.activation, true)?,
            output_norm: LayerNorm::load(&w.pp("output_layer_norm"), dim, EPS, true)?,
        })
    }
}

impl EncoderArchitecture for Config {
    type Model = Encoder<Layer>;
    const BASE: &'static str = "distilbert";
    const IGNORED: &'static [&'static str] = &["embeddings.position_ids"];

    fn load(&self, w: &Weights) -> Result<Encoder<Layer>> {
        let w = w.pp("distilbert");
        let embeddings = EmbeddingsConfig {
            max_position_embeddings: Some(self.max_position_embeddings),
            ..EmbeddingsConfig::new(self.vocab_size, self.dim, EPS)
        };
        let embeddings = Embeddings::load(&w.pp("embeddings"), embeddings)?;
        let layers = (0..self.n_layers).map(|i| self.layer(&w.pp("transformer.layer").pp(i)));
        Ok(Encoder::new(embeddings, layers.collect::<Result<_>>()?))
    }

    fn head(&self, task: Task, w: &Weights, model: &Encoder<Layer>, labels: usize) -> Result<Option<Head>> {
        let dim = self.dim;
        let linear = |name, outputs| Linear::load(&w.pp(name), dim, outputs, true);
        let classifier = |outputs| -> Result<Head> {
            let head = Head::new(Reads::First).dense(linear("pre_classifier", dim)?, Activation::Relu);
            Ok(head.output(linear("classifier", outputs)?))
        };
        Ok(Some(match task {
            Task::MaskedLM => {
                let norm = LayerNorm::load(&w.pp("vocab_layer_norm"), dim, EPS, true)?;
                let (table, names) = (
                    &model.embeddings.word_embeddings,
                    ["vocab_projector", "vocab_projector.bias"],
                );
                let output = vocabulary_output(w, names, table, self.tie_word_embeddings)?;
                let head = Head::new(Reads::All).dense(linear("vocab_transform", dim)?, self.activation);
                head.norm(norm).output(output)
            }
            Task::SequenceClassification => classifier(labels)?,
            Task::MultipleChoice => classifier(1)?,
            Task::TokenClassification => Head::new(Reads::All).output(linear("classifier", labels)?),
            Task::QuestionAnswering => Head::new(Reads::All).output(linear("qa_outputs", 2)?),
            _ => return Ok(None),
        }))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.max_position_embeddings)
    }
}
