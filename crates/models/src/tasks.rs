//! What encoders are asked for: tasks, the labels of a checkpoint, and the form of the answers.

use std::collections::BTreeMap;
use std::fmt::Debug;

use burn::tensor::Tensor;
use oxiformers_nn::{EncoderInputs, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a head is for. The names are those of Transformers' `AutoModelFor…` classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Task {
    /// The encoder itself; its head is the pooler, where there is one.
    Base,
    MaskedLM,
    SequenceClassification,
    TokenClassification,
    QuestionAnswering,
    DocumentQuestionAnswering,
    MultipleChoice,
    NextSentencePrediction,
    /// What an architecture was trained on, if that is none of the others.
    PreTraining,
    /// Which cells of a table answer a question; see
    /// [`AutoModelForTableQuestionAnswering`](crate::AutoModelForTableQuestionAnswering).
    TableQuestionAnswering,
}

impl Task {
    /// The task that models of a class, such as `BertForMaskedLM`, are for.
    pub fn of_class(class: &str) -> Self {
        const TASKS: [(&str, Task); 9] = [
            ("ForMaskedLM", Task::MaskedLM),
            ("ForSequenceClassification", Task::SequenceClassification),
            ("ForTokenClassification", Task::TokenClassification),
            ("ForTableQuestionAnswering", Task::TableQuestionAnswering),
            ("ForDocumentQuestionAnswering", Task::DocumentQuestionAnswering),
            ("ForQuestionAnswering", Task::QuestionAnswering),
            ("ForMultipleChoice", Task::MultipleChoice),
            ("ForNextSentencePrediction", Task::NextSentencePrediction),
            ("ForPreTraining", Task::PreTraining),
        ];
        let known = TASKS.iter().find(|(ending, _)| class.ends_with(ending));
        // TAPAS answers questions about tables only.
        match known {
            Some((_, Task::QuestionAnswering)) if class.starts_with("Tapas") => Task::TableQuestionAnswering,
            Some((_, task)) => *task,
            None => Task::Base,
        }
    }
}

/// A task as a type, which says what form the answer has.
pub trait TaskType: Debug + Clone + Copy + Default + Send + Sync + 'static {
    /// The task.
    const TASK: Task;
    /// Form of the logits.
    type Logits: Debug;

    /// From what the head gives: `[batch, seq or 1, outputs]`.
    ///
    /// # Errors
    /// Where the rows cannot be put together as the inputs say.
    fn logits(outputs: Tensor<3>, inputs: &EncoderInputs) -> Result<Self::Logits>;
}

macro_rules! tasks {
    ($($(#[$doc:meta])* $task:ident -> $logits:ty: |$outputs:ident, $inputs:pat_param| $body:expr;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default)]
        pub struct $task;

        impl TaskType for $task {
            const TASK: Task = Task::$task;
            type Logits = $logits;

            fn logits($outputs: Tensor<3>, $inputs: &EncoderInputs) -> Result<$logits> {
                $body
            }
        }
    )+};
}

tasks! {
    /// Which token stands where: `[batch, seq, vocab_size]`.
    MaskedLM -> Tensor<3>: |x, _| Ok(x);
    /// What a text is: `[batch, num_labels]`.
    SequenceClassification -> Tensor<2>: |x, _| Ok(x.squeeze_dim(1));
    /// What each token is: `[batch, seq, num_labels]`.
    TokenClassification -> Tensor<3>: |x, _| Ok(x);
    /// Where in a text the answer to a question begins and ends.
    QuestionAnswering -> SpanLogits: |x, _| Ok(SpanLogits::new(x));
    /// The same in a document, of whose tokens it is known where they stand.
    DocumentQuestionAnswering -> SpanLogits: |x, _| Ok(SpanLogits::new(x));
    /// Which of several continuations is the right one: `[questions, choices]`.
    MultipleChoice -> Tensor<2>: |x, inputs| {
        let rows = x.dims()[0];
        let choices = if inputs.num_choices == 0 { rows } else { inputs.num_choices };
        if choices == 0 || !rows.is_multiple_of(choices) {
            let message = format!("{rows} rows are no whole number of questions with {choices} choices");
            return Err(Error::input("num_choices", message));
        }
        Ok(x.reshape([rows / choices, choices]))
    };
    /// Whether the second text follows the first: `[batch, 2]`, where 0 means that it does.
    NextSentencePrediction -> Tensor<2>: |x, _| Ok(x.squeeze_dim(1));
    /// Which tokens were put in place of others, in ELECTRA: `[batch, seq]`.
    PreTraining -> Tensor<2>: |x, _| Ok(x.squeeze_dim(2));
}

/// Where an answer begins and ends.
#[derive(Debug, Clone)]
pub struct SpanLogits {
    /// `[batch, seq]`.
    pub start_logits: Tensor<2>,
    /// `[batch, seq]`.
    pub end_logits: Tensor<2>,
}

impl SpanLogits {
    /// From `[batch, seq, 2]`.
    fn new(x: Tensor<3>) -> Self {
        let of = |index| x.clone().narrow(2, index, 1).squeeze_dim(2);
        Self {
            start_logits: of(0),
            end_logits: of(1),
        }
    }
}

/// How the logits of a text's classes are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemType {
    /// As numbers.
    Regression,
    /// One class applies: softmax.
    SingleLabelClassification,
    /// Any number of them apply: sigmoid.
    MultiLabelClassification,
}

/// The labels of a checkpoint: `id2label`, `num_labels` and `problem_type` of `config.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    num_labels: usize,
    id2label: BTreeMap<usize, String>,
    problem_type: Option<ProblemType>,
}

impl Labels {
    /// Reads them from a `config.json`.
    ///
    /// # Errors
    /// Names the field that does not fit.
    pub fn from_json(config: &Value) -> Result<Self> {
        fn field<T: serde::de::DeserializeOwned>(config: &Value, name: &str) -> Result<Option<T>> {
            match config.get(name) {
                None | Some(Value::Null) => Ok(None),
                Some(value) => T::deserialize(value)
                    .map(Some)
                    .map_err(|error| Error::config(name, error.to_string())),
            }
        }
        let id2label: Option<BTreeMap<usize, String>> = field(config, "id2label")?;
        let num_labels: Option<usize> = field(config, "num_labels")?;
        let id2label = id2label.unwrap_or_default();
        let num_labels = match id2label.len() {
            0 => num_labels.unwrap_or(2),
            len => len,
        };
        Ok(Self {
            num_labels,
            id2label,
            problem_type: field(config, "problem_type")?,
        })
    }

    /// The same, for another number of labels.
    #[must_use]
    pub fn resized(mut self, num_labels: usize) -> Self {
        self.num_labels = num_labels;
        self
    }

    /// Number of labels.
    pub fn len(&self) -> usize {
        self.num_labels
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.num_labels == 0
    }

    /// The name of a label; `LABEL_3` where the checkpoint does not name it.
    pub fn label(&self, id: usize) -> String {
        self.id2label
            .get(&id)
            .cloned()
            .unwrap_or_else(|| format!("LABEL_{id}"))
    }

    /// The label of a name.
    pub fn id(&self, label: &str) -> Option<usize> {
        let unnamed = || label.strip_prefix("LABEL_")?.parse().ok();
        let named = self.id2label.iter().find(|(_, name)| *name == label);
        named
            .map(|(id, _)| *id)
            .or_else(unnamed)
            .filter(|id| *id < self.num_labels)
    }

    /// How logits are meant: as the checkpoint says, else a single label is a number, and several exclude each other.
    pub fn problem_type(&self) -> ProblemType {
        self.problem_type.unwrap_or(match self.num_labels {
            1 => ProblemType::Regression,
            _ => ProblemType::SingleLabelClassification,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn labels() {
        let labels =
            Labels::from_json(&json!({"id2label": {"0": "no", "1": "yes", "2": "so so"}})).expect("labels");
        assert_eq!(
            (labels.len(), labels.label(2).as_str(), labels.id("yes")),
            (3, "so so", Some(1))
        );
        assert_eq!(labels.problem_type(), ProblemType::SingleLabelClassification);
        let labels = Labels::from_json(&json!({"num_labels": 1, "id2label": null})).expect("labels");
        assert_eq!(
            (
                labels.label(0).as_str(),
                labels.id("LABEL_0"),
                labels.id("LABEL_1")
            ),
            ("LABEL_0", Some(0), None)
        );
        assert_eq!(labels.problem_type(), ProblemType::Regression);
        let labels =
            Labels::from_json(&json!({"problem_type": "multi_label_classification"})).expect("labels");
        assert_eq!(
            (labels.len(), labels.problem_type()),
            (2, ProblemType::MultiLabelClassification)
        );
        let error = Labels::from_json(&json!({"id2label": {"one": "x"}})).expect_err("no number");
        assert!(error.to_string().contains("id2label"), "{error}");
    }
}
