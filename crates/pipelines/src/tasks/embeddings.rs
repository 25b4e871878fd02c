//! `embeddings`: what a sentence means, as a vector.

use std::fmt;

use oxiformers_hub::ModelFiles;
use oxiformers_nn::LoadOptions;
use serde::{Deserialize, Serialize};

use crate::{Error, Pipeline, Result, SentenceEncoder, Task};

/// Makes vectors of sentences, as the model's `modules.json` says; without that file, the mean over its hidden states.
/// Sentences are cut to the length that the model's files give for it.
///
/// ```no_run
/// use oxiformers::{Embeddings, FromPretrained, Pipeline, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let embed = Embeddings::from_pretrained("sentence-transformers/all-MiniLM-L6-v2")?;
/// let sentences = ["A man is eating food.".to_string(), "Someone has dinner.".to_string()];
/// let vectors = block_on(embed.run(&sentences, &Default::default(), 32))?;
/// println!("{} numbers each", vectors[0].0.len());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Embeddings {
    /// The model with its tokenizer and modules.
    pub model: SentenceEncoder,
}

/// Options of [`Embeddings`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmbeddingsOptions {
    /// What is put before each sentence.
    pub prompt: Option<String>,
    /// Which of the model's own texts is put before each sentence, such as `query`.
    pub prompt_name: Option<String>,
    /// Whether vectors are made to have the length 1, if they do not anyway.
    pub normalize_embeddings: bool,
}

/// The vector of a sentence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Embedding(pub Vec<f32>);

impl Pipeline for Embeddings {
    const TASK: Task = Task::Embeddings;
    type Input = String;
    type Options = EmbeddingsOptions;
    type Output = Embedding;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Ok(Self {
            model: SentenceEncoder::from_files(files, options)?,
        })
    }

    async fn run(
        &self,
        inputs: &[String],
        options: &EmbeddingsOptions,
        batch_size: usize,
    ) -> Result<Vec<Embedding>> {
        let sentences: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let prompts = &self.model.model.prompts;
        let prompt = match (&options.prompt, &options.prompt_name) {
            (Some(prompt), _) => Some(prompt),
            (None, Some(name)) => Some(prompts.get(name).ok_or_else(|| {
                let names: Vec<&str> = prompts.keys().map(String::as_str).collect();
                Error::option(
                    "prompt_name",
                    format!("is `{name}`; the model has: {}", names.join(", ")),
                )
            })?),
            (None, None) => None,
        };
        let mut vectors = match prompt {
            Some(prompt) => {
                self.model
                    .encode_with_prompt(prompt, &sentences, batch_size)
                    .await?
            }
            None => self.model.encode(&sentences, batch_size).await?,
        };
        if options.normalize_embeddings {
            for vector in &mut vectors {
                let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
                vector.iter_mut().for_each(|x| *x /= length);
            }
        }
        Ok(vectors.into_iter().map(Embedding).collect())
    }
}

impl fmt::Display for Embedding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.0.iter().map(|x| format!("{x:.6}")).collect();
        f.write_str(&numbers.join(" "))
    }
}
