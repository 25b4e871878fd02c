//! ELECTRA (Clark et al., 2020): BERT trained to tell which tokens were put in place of others by a smaller BERT, the
//! generator; its embeddings may be narrower than its layers.

use oxiformers_nn::head::vocabulary_output;
use oxiformers_nn::{
    Activation, Encoder, Error, Head, LayerNorm, Linear, PositionCount, Reads, Result, Weights,
};
use serde::{Deserialize, Serialize};

use crate::bert::{self, Extended, Extends, Layer};
use crate::roberta::classification_head;
use crate::{EncoderArchitecture, Task};

/// The fields of `config.json`: BERT's with other defaults, and more.
pub type Config = Extended<Fields>;

/// The fields that BERT does not have.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Fields {
    pub embedding_size: usize,
    pub summary_type: String,
    pub summary_use_proj: bool,
    pub summary_activation: Activation,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            embedding_size: 128,
            summary_type: "first".to_string(),
            summary_use_proj: true,
            summary_activation: Activation::Gelu,
        }
    }
}

impl Extends for Fields {
    fn bert() -> bert::Config {
        bert::Config {
            hidden_size: 256,
            num_attention_heads: 4,
            intermediate_size: 1024,
            ..bert::Config::default()
        }
    }
}

impl Config {
    /// The head that chooses between continuations.
    fn summary(&self, w: &Weights) -> Result<Head> {
        let (hidden, own) = (self.bert.hidden_size, &self.own);
        if own.summary_type != "first" || !own.summary_use_proj {
            let message = format!(
                "is `{}`; only `first` with `summary_use_proj` is supported",
                own.summary_type
            );
            return Err(Error::config("summary_type", message));
        }
        let dense = Linear::load(&w.pp("sequence_summary.summary"), hidden, hidden, true)?;
        let output = Linear::load(&w.pp("classifier"), hidden, 1, true)?;
        let head = Head::new(Reads::First).dense(dense, own.summary_activation);
        Ok(head.output(output))
    }
}

impl EncoderArchitecture for Config {
    type Model = Encoder<Layer>;
    const BASE: &'static str = "electra";
    const IGNORED: &'static [&'static str] = &["embeddings.position_ids"];

    fn load(&self, w: &Weights) -> Result<Encoder<Layer>> {
        let (c, width, w) = (&self.bert, self.own.embedding_size, w.pp("electra"));
        c.check()?;
        let embeddings = c.embeddings(&w.pp("embeddings"), width, PositionCount::Plain)?;
        let layers = (0..c.num_hidden_layers).map(|i| c.layer(&w.pp("encoder.layer").pp(i)));
        let mut encoder = Encoder::new(embeddings, layers.collect::<Result<_>>()?);
        if width != c.hidden_size {
            let project = Linear::load(&w.pp("embeddings_project"), width, c.hidden_size, true)?;
            encoder.project = Some(project);
        }
        Ok(encoder)
    }

    fn head(&self, task: Task, w: &Weights, model: &Encoder<Layer>, labels: usize) -> Result<Option<Head>> {
        let (c, hidden, width) = (&self.bert, self.bert.hidden_size, self.own.embedding_size);
        let linear = |name, outputs| Linear::load(&w.pp(name), hidden, outputs, true);
        let of_tokens = || Head::new(Reads::All);
        Ok(Some(match task {
            Task::MaskedLM => {
                let at = w.pp("generator_predictions");
                let dense = Linear::load(&at.pp("dense"), hidden, width, true)?;
                let norm = LayerNorm::load(&at.pp("LayerNorm"), width, c.layer_norm_eps, true)?;
                let (table, names) = (
                    &model.embeddings.word_embeddings,
                    ["generator_lm_head", "generator_lm_head.bias"],
                );
                let output = vocabulary_output(w, names, table, c.tie_word_embeddings)?;
                of_tokens()
                    .dense(dense, Activation::Gelu)
                    .norm(norm)
                    .output(output)
            }
            Task::SequenceClassification => {
                classification_head(&w.pp("classifier"), Activation::Gelu, hidden, labels)?
            }
            Task::MultipleChoice => self.summary(w)?,
            Task::TokenClassification => of_tokens().output(linear("classifier", labels)?),
            Task::QuestionAnswering => of_tokens().output(linear("qa_outputs", 2)?),
            Task::PreTraining => {
                let dense = linear("discriminator_predictions.dense", hidden)?;
                let output = linear("discriminator_predictions.dense_prediction", 1)?;
                of_tokens().dense(dense, c.hidden_act).output(output)
            }
            _ => return Ok(None),
        }))
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        Some(self.bert.max_position_embeddings)
    }
}
