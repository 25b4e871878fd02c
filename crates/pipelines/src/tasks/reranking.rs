//! `reranking`, also called `text-ranking`: which documents fit a query best, judged by a model that reads both together.

use std::fmt;

use oxiformers_hub::ModelFiles;
use oxiformers_models::AutoModelForSequenceClassification;
use oxiformers_nn::LoadOptions;
use oxiformers_processors::tokenizer::TruncationStrategy;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ClassificationFunction;
use crate::pipeline::lines;
use crate::texts::{Texts, descending, rows_of};
use crate::{Error, Pipeline, Result, Task};

/// Puts documents in order by a cross-encoder.
///
/// ```no_run
/// use oxiformers::tasks::{Documents, RerankingOptions};
/// use oxiformers::{FromPretrained, Pipeline, Reranking, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let rank = Reranking::from_pretrained("cross-encoder/ms-marco-MiniLM-L6-v2")?;
/// let documents = Documents {
///     query: "How many people live in Berlin?".into(),
///     documents: vec!["Berlin is well known for its museums.".into(), "3.5 million people live in Berlin.".into()],
/// };
/// let options = RerankingOptions { top_k: Some(1), ..Default::default() };
/// println!("{}", block_on(rank.run(&[documents], &options, 32))?[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Reranking {
    /// The network.
    pub model: AutoModelForSequenceClassification,
    texts: Texts,
    function: ClassificationFunction,
}

/// Options of [`Reranking`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RerankingOptions {
    /// How many documents to give; by default all.
    pub top_k: Option<usize>,
    /// Whether the documents' texts are given as well.
    pub return_documents: bool,
    /// What makes scores of logits; by default what the checkpoint says, else a probability.
    pub function_to_apply: Option<ClassificationFunction>,
    /// Whether what is too long for the model is cut.
    pub truncation: bool,
}

/// A query and documents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Documents {
    /// What is looked for.
    pub query: String,
    /// Where it is looked for.
    pub documents: Vec<String>,
}

/// A document's place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ranked {
    /// Which document it is, counted from 0.
    pub corpus_id: usize,
    /// How well it fits.
    pub score: f32,
    /// Its text, where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// Documents, the best first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ranking(pub Vec<Ranked>);

impl Pipeline for Reranking {
    const TASK: Task = Task::Reranking;
    type Input = Documents;
    type Options = RerankingOptions;
    type Output = Ranking;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let model = AutoModelForSequenceClassification::from_files(files, options)?;
        let texts = Texts::from_files(files, &model.config)?;
        let unsuited = |message| Error::Unsuited {
            model: files.describe("config.json"),
            message,
        };
        if model.labels.len() != 1 {
            let message = format!("has {} labels; a model that ranks has one", model.labels.len());
            return Err(unsuited(message));
        }
        let json = &model.config.json;
        let named = (json.pointer("/sentence_transformers/activation_fn"))
            .or(json.get("sbert_ce_default_activation_function"))
            .and_then(Value::as_str);
        let function = match named.map(|name| name.rsplit('.').next().unwrap_or(name)) {
            None | Some("Sigmoid") => ClassificationFunction::Sigmoid,
            Some("Identity") => ClassificationFunction::None,
            Some(other) => return Err(unsuited(format!("`activation_fn`: `{other}` is not supported"))),
        };
        Ok(Self {
            model,
            texts,
            function,
        })
    }

    async fn run(
        &self,
        inputs: &[Documents],
        options: &RerankingOptions,
        batch_size: usize,
    ) -> Result<Vec<Ranking>> {
        let function = options.function_to_apply.unwrap_or(self.function);
        let cut = options.truncation.then_some(TruncationStrategy::LongestFirst);
        let of = |input: usize, error| match error {
            Error::Input { index, message } => Error::input(input, format!("document {index} {message}")),
            error => error,
        };
        let mut rows = Vec::new();
        for (index, input) in inputs.iter().enumerate() {
            let pairs = input.documents.iter().map(|document| (&input.query, document));
            rows.extend(self.texts.rows(pairs, cut).map_err(|error| of(index, error))?);
        }
        let forward = async |inputs: &_, _: &_| rows_of(self.model.forward(inputs)?.logits).await;
        let mut logits = self
            .texts
            .in_batches(&rows, batch_size, forward)
            .await?
            .into_iter();
        let rank = |input: &Documents| {
            let logits: Vec<f32> = logits.by_ref().take(input.documents.len()).flatten().collect();
            let scores = function.apply(&logits);
            let most = options.top_k.unwrap_or(scores.len());
            let ranked = |corpus_id: usize| Ranked {
                corpus_id,
                score: scores[corpus_id],
                text: options
                    .return_documents
                    .then(|| input.documents[corpus_id].clone()),
            };
            Ranking(descending(&scores, most).into_iter().map(ranked).collect())
        };
        Ok(inputs.iter().map(rank).collect())
    }
}

impl fmt::Display for Ranking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        lines(f, &self.0)
    }
}

impl fmt::Display for Ranked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.4}\t{}", self.score, self.corpus_id)?;
        match &self.text {
            Some(text) => write!(f, "\t{text}"),
            None => Ok(()),
        }
    }
}
