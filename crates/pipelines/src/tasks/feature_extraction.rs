//! `feature-extraction`: what a model makes of each token.

use std::fmt;

use oxiformers_hub::ModelFiles;
use oxiformers_models::AutoModel;
use oxiformers_nn::LoadOptions;
use oxiformers_processors::tokenizer::TruncationStrategy;
use serde::{Deserialize, Serialize};

use crate::texts::{Texts, tokens_of};
use crate::{Pipeline, Result, Task};

/// Gives the last hidden states of texts.
///
/// ```no_run
/// use oxiformers::{FeatureExtraction, FromPretrained, Pipeline, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let extract = FeatureExtraction::from_pretrained("google-bert/bert-base-uncased")?;
/// let features = block_on(extract.run(&["A simple test.".into()], &Default::default(), 1))?;
/// println!("{} tokens", features[0].0[0].len());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct FeatureExtraction {
    /// The network.
    pub model: AutoModel,
    texts: Texts,
}

/// Options of [`FeatureExtraction`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FeatureExtractionOptions {
    /// Whether texts that are too long for the model are cut.
    pub truncation: bool,
}

/// Hidden states `[1, tokens, hidden_size]` of a text, special tokens included.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Features(pub [Vec<Vec<f32>>; 1]);

impl Pipeline for FeatureExtraction {
    const TASK: Task = Task::FeatureExtraction;
    type Input = String;
    type Options = FeatureExtractionOptions;
    type Output = Features;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let model = AutoModel::from_files(files, options)?;
        Ok(Self {
            texts: Texts::from_files(files, &model.config)?,
            model,
        })
    }

    async fn run(
        &self,
        inputs: &[String],
        options: &FeatureExtractionOptions,
        batch_size: usize,
    ) -> Result<Vec<Features>> {
        let cut = options.truncation.then_some(TruncationStrategy::LongestFirst);
        let rows = self.texts.rows(inputs, cut)?;
        let forward = async |inputs: &_, _: &_| {
            let output = self.model.forward(inputs)?;
            tokens_of(output.last_hidden_state, inputs).await
        };
        let rows = self.texts.in_batches(&rows, batch_size, forward).await?;
        Ok(rows.into_iter().map(|tokens| Features([tokens])).collect())
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, token) in self.0.iter().flatten().enumerate() {
            let numbers: Vec<String> = token.iter().map(|x| format!("{x:.6}")).collect();
            let begin = if index > 0 { "\n" } else { "" };
            write!(f, "{begin}{}", numbers.join(" "))?;
        }
        Ok(())
    }
}
