//! `sentence-similarity`: how much sentences mean the same as another one.

use std::fmt;

use oxiformers_hub::ModelFiles;
use oxiformers_nn::LoadOptions;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Pipeline, Result, SentenceEncoder, Task};

/// Compares sentences by their vectors.
///
/// ```no_run
/// use oxiformers::tasks::Sentences;
/// use oxiformers::{FromPretrained, Pipeline, SentenceSimilarity, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let compare = SentenceSimilarity::from_pretrained("sentence-transformers/all-MiniLM-L6-v2")?;
/// let sentences = Sentences {
///     source_sentence: "A man is eating food.".into(),
///     sentences: vec!["Someone has dinner.".into(), "The sky is blue.".into()],
/// };
/// println!("{}", block_on(compare.run(&[sentences], &Default::default(), 32))?[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SentenceSimilarity {
    /// The model with its tokenizer and modules.
    pub model: SentenceEncoder,
    similarity: SimilarityFunction,
}

/// Options of [`SentenceSimilarity`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SentenceSimilarityOptions {
    /// How vectors are compared; by default as the model's files say.
    pub similarity_fn_name: Option<SimilarityFunction>,
}

/// How vectors are compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SimilarityFunction {
    /// The cosine of the angle between them.
    #[default]
    Cosine,
    /// Their product.
    Dot,
    /// Their distance, negative.
    Euclidean,
    /// The sum of their differences, negative.
    Manhattan,
}

impl SimilarityFunction {
    fn of(self, a: &[f32], b: &[f32]) -> f32 {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        match self {
            Self::Cosine => dot(a, b) / (dot(a, a).sqrt().max(1e-12) * dot(b, b).sqrt().max(1e-12)),
            Self::Dot => dot(a, b),
            Self::Euclidean => -a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt(),
            Self::Manhattan => -a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f32>(),
        }
    }
}

/// A sentence and those that it is compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sentences {
    /// The sentence.
    pub source_sentence: String,
    /// The others.
    pub sentences: Vec<String>,
}

/// How similar each of the sentences is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Similarities(pub Vec<f32>);

impl Pipeline for SentenceSimilarity {
    const TASK: Task = Task::SentenceSimilarity;
    type Input = Sentences;
    type Options = SentenceSimilarityOptions;
    type Output = Similarities;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let file = "config_sentence_transformers.json";
        let settings: Map<String, Value> = files.json(file)?.unwrap_or_default();
        let similarity = match settings.get("similarity_fn_name") {
            None | Some(Value::Null) => SimilarityFunction::default(),
            Some(name) => SimilarityFunction::deserialize(name).map_err(|error| Error::Unsuited {
                model: files.describe(file),
                message: format!("`similarity_fn_name`: {error}"),
            })?,
        };
        Ok(Self {
            model: SentenceEncoder::from_files(files, options)?,
            similarity,
        })
    }

    async fn run(
        &self,
        inputs: &[Sentences],
        options: &SentenceSimilarityOptions,
        batch_size: usize,
    ) -> Result<Vec<Similarities>> {
        let similarity = options.similarity_fn_name.unwrap_or(self.similarity);
        let mut all: Vec<&str> = Vec::new();
        for input in inputs {
            all.push(&input.source_sentence);
            all.extend(input.sentences.iter().map(String::as_str));
        }
        let mut vectors = self.model.encode(&all, batch_size).await?.into_iter();
        let compare = |input: &Sentences| {
            let source = vectors.next().unwrap_or_default();
            let others = vectors.by_ref().take(input.sentences.len());
            Similarities(others.map(|other| similarity.of(&source, &other)).collect())
        };
        Ok(inputs.iter().map(compare).collect())
    }
}

impl fmt::Display for Similarities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scores: Vec<String> = self.0.iter().map(|score| format!("{score:.4}")).collect();
        f.write_str(&scores.join("\n"))
    }
}
