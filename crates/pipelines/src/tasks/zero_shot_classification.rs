//! `zero-shot-classification`: which of some labels fits a text, for labels that the model was not trained on. The model
//! judges whether the text entails a sentence about the label (Yin et al., 2019).

use std::fmt;

use oxiformers_hub::ModelFiles;
use oxiformers_models::AutoModelForSequenceClassification;
use oxiformers_nn::LoadOptions;
use oxiformers_processors::tokenizer::TruncationStrategy;
use serde::{Deserialize, Serialize};

use crate::texts::{Texts, descending, rows_of, softmax};
use crate::{Error, Pipeline, Result, Task};

/// Classifies texts by labels of the moment, with a model of natural language inference.
///
/// ```no_run
/// use oxiformers::tasks::ZeroShotClassificationOptions;
/// use oxiformers::{FromPretrained, Pipeline, ZeroShotClassification, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let classify = ZeroShotClassification::from_pretrained("facebook/bart-large-mnli")?;
/// let options = ZeroShotClassificationOptions::labels(["urgent", "not urgent", "phone"]);
/// let texts = ["I have a problem with my phone that needs to be resolved!".into()];
/// println!("{}", block_on(classify.run(&texts, &options, 8))?[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ZeroShotClassification {
    /// The network.
    pub model: AutoModelForSequenceClassification,
    texts: Texts,
}

/// Options of [`ZeroShotClassification`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ZeroShotClassificationOptions {
    /// The labels; as JSON a list, or a text with commas between them.
    pub candidate_labels: CandidateLabels,
    /// The sentence about a label, which stands in it for `{}`.
    pub hypothesis_template: String,
    /// Whether several labels may fit: each has a probability of its own.
    pub multi_label: bool,
    /// Whether texts that are too long for the model are cut; the sentences about labels are not.
    pub truncation: bool,
}

impl Default for ZeroShotClassificationOptions {
    fn default() -> Self {
        Self {
            candidate_labels: CandidateLabels::Many(Vec::new()),
            hypothesis_template: "This example is {}.".to_string(),
            multi_label: false,
            truncation: false,
        }
    }
}

impl ZeroShotClassificationOptions {
    /// These labels.
    pub fn labels<T: Into<String>>(labels: impl IntoIterator<Item = T>) -> Self {
        Self {
            candidate_labels: CandidateLabels::Many(labels.into_iter().map(Into::into).collect()),
            ..Self::default()
        }
    }
}

/// Labels to choose from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum CandidateLabels {
    /// With commas between them.
    Text(String),
    /// As a list.
    Many(Vec<String>),
}

impl CandidateLabels {
    fn list(&self) -> Vec<&str> {
        match self {
            Self::Text(text) => text
                .split(',')
                .map(str::trim)
                .filter(|label| !label.is_empty())
                .collect(),
            Self::Many(labels) => labels.iter().map(String::as_str).collect(),
        }
    }
}

/// How well labels fit a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ZeroShotLabels {
    /// The text.
    pub sequence: String,
    /// The labels, the best first.
    pub labels: Vec<String>,
    /// How likely each is.
    pub scores: Vec<f32>,
}

impl Pipeline for ZeroShotClassification {
    const TASK: Task = Task::ZeroShotClassification;
    type Input = String;
    type Options = ZeroShotClassificationOptions;
    type Output = ZeroShotLabels;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let model = AutoModelForSequenceClassification::from_files(files, options)?;
        Ok(Self {
            texts: Texts::from_files(files, &model.config)?,
            model,
        })
    }

    async fn run(
        &self,
        inputs: &[String],
        options: &ZeroShotClassificationOptions,
        batch_size: usize,
    ) -> Result<Vec<ZeroShotLabels>> {
        let labels = options.candidate_labels.list();
        if labels.is_empty() {
            return Err(Error::option(
                "candidate_labels",
                "is missing; name the labels to choose from",
            ));
        }
        if !options.hypothesis_template.contains("{}") {
            let message = format!(
                "{:?} has no {{}}, which stands for the label",
                options.hypothesis_template
            );
            return Err(Error::option("hypothesis_template", message));
        }
        let hypotheses: Vec<String> = labels
            .iter()
            .map(|label| options.hypothesis_template.replace("{}", label))
            .collect();
        let cut = options.truncation.then_some(TruncationStrategy::OnlyFirst);
        let pairs = inputs
            .iter()
            .flat_map(|text| hypotheses.iter().map(move |hypothesis| (text, hypothesis)));
        let rows = self.texts.rows(pairs, cut).map_err(|error| match error {
            // Rows are counted, and an input has as many as there are labels.
            Error::Input { index, message } => Error::input(index / labels.len(), message),
            error => error,
        })?;
        let forward = async |inputs: &_, _: &_| rows_of(self.model.forward(inputs)?.logits).await;
        let logits = self.texts.in_batches(&rows, batch_size, forward).await?;
        let (entails, contradicts) = self.classes()?;
        let answer = |(text, logits): (&String, &[Vec<f32>])| {
            let scores: Vec<f32> = match options.multi_label || labels.len() == 1 {
                true => logits
                    .iter()
                    .map(|logits| softmax(&[logits[contradicts], logits[entails]])[1])
                    .collect(),
                false => softmax(&logits.iter().map(|logits| logits[entails]).collect::<Vec<_>>()),
            };
            let order = descending(&scores, scores.len());
            ZeroShotLabels {
                sequence: text.clone(),
                labels: order.iter().map(|index| labels[*index].to_string()).collect(),
                scores: order.iter().map(|index| scores[*index]).collect(),
            }
        };
        Ok(inputs
            .iter()
            .zip(logits.chunks(labels.len()))
            .map(answer)
            .collect())
    }
}

impl ZeroShotClassification {
    /// The classes of texts that entail the other, and that contradict it.
    fn classes(&self) -> Result<(usize, usize)> {
        let labels = &self.model.labels;
        let last = labels
            .len()
            .checked_sub(1)
            .filter(|last| *last > 0)
            .ok_or_else(|| Error::Unsuited {
                model: self.texts.name.clone(),
                message: "has one label; it takes a model of natural language inference".to_string(),
            })?;
        let entails = (0..=last).find(|id| labels.label(*id).to_lowercase().starts_with("entail"));
        if entails.is_none() {
            tracing::warn!(
                "no label of {} is called `entailment`; the last one is taken for it",
                self.texts.name
            );
        }
        Ok(match entails.unwrap_or(last) {
            0 => (0, last),
            entails => (entails, 0),
        })
    }
}

impl fmt::Display for ZeroShotLabels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (label, score)) in self.labels.iter().zip(&self.scores).enumerate() {
            let begin = if index > 0 { "\n" } else { "" };
            write!(f, "{begin}{label}\t{score:.4}")?;
        }
        Ok(())
    }
}
