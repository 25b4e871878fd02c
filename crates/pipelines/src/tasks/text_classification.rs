//! `text-classification`, also called `sentiment-analysis`: what a text is.

use std::fmt;

use oxiformers_hub::ModelFiles;
use oxiformers_models::{AutoModelForSequenceClassification, ProblemType};
use oxiformers_nn::LoadOptions;
use oxiformers_processors::tokenizer::TruncationStrategy;
use serde::{Deserialize, Deserializer, Serialize};

use crate::texts::{TextOrPair, Texts, descending, rows_of, sigmoid, softmax};
use crate::{Error, OneOrMany, Pipeline, Result, Task};

/// Classifies texts, or pairs of texts.
///
/// ```no_run
/// use oxiformers::{FromPretrained, Pipeline, TextClassification, block_on};
/// use oxiformers::tasks::{TextClassificationOptions, TopK};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let classify = TextClassification::from_pretrained("distilbert/distilbert-base-uncased-finetuned-sst-2-english")?;
/// let options = TextClassificationOptions { top_k: TopK::All, ..Default::default() };
/// for label in block_on(classify.run(&["Not bad at all!".into()], &options, 1))?[0].as_slice() {
///     println!("{} {}", label.label, label.score);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TextClassification {
    /// The network.
    pub model: AutoModelForSequenceClassification,
    texts: Texts,
}

/// Options of [`TextClassification`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TextClassificationOptions {
    /// How many labels to give.
    pub top_k: TopK,
    /// What makes scores of logits; by default what the checkpoint is meant for.
    pub function_to_apply: Option<ClassificationFunction>,
    /// Whether texts that are too long for the model are cut.
    pub truncation: bool,
}

/// How many labels to give. As JSON a number, or null for all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TopK {
    /// The best one, not as a list.
    #[default]
    Best,
    /// A list of so many, the best first.
    Most(usize),
    /// All, the best first.
    All,
}

impl<'de> Deserialize<'de> for TopK {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Option::<usize>::deserialize(deserializer)?.map_or(Self::All, Self::Most))
    }
}

/// What makes scores of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClassificationFunction {
    /// Each label is likely or not, whatever the others are.
    Sigmoid,
    /// One label applies.
    Softmax,
    /// Scores are the logits.
    None,
}

impl ClassificationFunction {
    /// Scores of logits.
    pub fn apply(self, logits: &[f32]) -> Vec<f32> {
        match self {
            Self::Sigmoid => logits.iter().copied().map(sigmoid).collect(),
            Self::Softmax => softmax(logits),
            Self::None => logits.to_vec(),
        }
    }
}

/// A label and how well it fits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabelScore {
    /// Name of the label.
    pub label: String,
    /// Its score.
    pub score: f32,
}

impl TextClassification {
    /// What the checkpoint's logits are meant for. A single label is a probability unless the checkpoint says that it is
    /// a number.
    fn function(&self) -> ClassificationFunction {
        let labels = &self.model.labels;
        let says_number = self
            .model
            .config
            .json
            .get("problem_type")
            .is_some_and(|kind| kind == "regression");
        match labels.problem_type() {
            _ if says_number => ClassificationFunction::None,
            ProblemType::MultiLabelClassification => ClassificationFunction::Sigmoid,
            _ if labels.len() == 1 => ClassificationFunction::Sigmoid,
            _ => ClassificationFunction::Softmax,
        }
    }
}

impl Pipeline for TextClassification {
    const TASK: Task = Task::TextClassification;
    type Input = TextOrPair;
    type Options = TextClassificationOptions;
    type Output = OneOrMany<LabelScore>;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let model = AutoModelForSequenceClassification::from_files(files, options)?;
        Ok(Self {
            texts: Texts::from_files(files, &model.config)?,
            model,
        })
    }

    async fn run(
        &self,
        inputs: &[TextOrPair],
        options: &TextClassificationOptions,
        batch_size: usize,
    ) -> Result<Vec<OneOrMany<LabelScore>>> {
        if options.top_k == TopK::Most(0) {
            return Err(Error::option(
                "top_k",
                "is 0; leave it out for the best label, or give null for all",
            ));
        }
        let function = options.function_to_apply.unwrap_or(self.function());
        let cut = options.truncation.then_some(TruncationStrategy::LongestFirst);
        let rows = self.texts.rows(inputs, cut)?;
        let forward = async |inputs: &_, _: &_| rows_of(self.model.forward(inputs)?.logits).await;
        let logits = self.texts.in_batches(&rows, batch_size, forward).await?;
        let answer = |logits: Vec<f32>| {
            let scores = function.apply(&logits);
            let label = |id: usize| LabelScore {
                label: self.model.labels.label(id),
                score: scores[id],
            };
            let most = match options.top_k {
                TopK::Best => 1,
                TopK::Most(most) => most,
                TopK::All => scores.len(),
            };
            let labels: Vec<LabelScore> = descending(&scores, most).into_iter().map(label).collect();
            match options.top_k {
                TopK::Best => OneOrMany::of(labels),
                _ => OneOrMany::Many(labels),
            }
        };
        Ok(logits.into_iter().map(answer).collect())
    }
}

impl fmt::Display for LabelScore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\t{:.4}", self.label, self.score)
    }
}
