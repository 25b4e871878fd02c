//! What a text is, or how much of something: one class, any number of classes, or numbers.

use serde_json::{Value, json};

use super::{Batch, Draw, Objective, Row, Targets, Texts, class, column, kind, text};
use crate::{Example, Preprocessor, Values};

/// Learns to judge texts or pairs of texts.
#[derive(Debug, Clone)]
pub struct TextClassification {
    /// Text to tokens.
    pub texts: Texts,
    /// The column of the text.
    pub text_column: String,
    /// The column of a second text.
    pub pair_column: Option<String>,
    /// The column of what it is.
    pub label_column: String,
    /// What is learned of it.
    pub problem: Problem,
}

/// How labels are meant (`problem_type`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// One of these applies.
    SingleLabel(Vec<String>),
    /// Any number of these apply.
    MultiLabel(Vec<String>),
    /// As many numbers.
    Regression(usize),
}

impl Problem {
    /// The labels of a record, and 0 and 1 for each, or numbers.
    fn values(&self, value: &Value) -> Result<Values, String> {
        let several = |value: &Value| match value {
            Value::Array(list) => Ok(list.clone()),
            other => Err(format!("is {}, not a list of labels", kind(other))),
        };
        match self {
            Self::SingleLabel(labels) => Ok(Values::Ints(vec![class(value, labels)?])),
            Self::MultiLabel(labels) => {
                let mut applies = vec![0.0; labels.len()];
                for value in several(value)? {
                    applies[class(&value, labels)? as usize] = 1.0;
                }
                Ok(Values::Floats(applies))
            }
            Self::Regression(outputs) => {
                let list = match value {
                    Value::Array(list) => list.clone(),
                    one => vec![one.clone()],
                };
                let number = |value: &Value| match value {
                    Value::Number(number) => number.as_f64().map(|number| number as f32),
                    Value::String(text) => text.trim().parse().ok(),
                    _ => None,
                };
                let numbers: Option<Vec<f32>> = list.iter().map(number).collect();
                let numbers = numbers.filter(|numbers| numbers.iter().all(|number| number.is_finite()));
                let numbers = numbers.ok_or_else(|| format!("is {value}, not a number"))?;
                match numbers.len() == *outputs {
                    true => Ok(Values::Floats(numbers)),
                    false => Err(format!(
                        "is {} numbers, and the model gives {outputs}",
                        numbers.len()
                    )),
                }
            }
        }
    }
}

impl Preprocessor for TextClassification {
    fn settings(&self) -> Value {
        let columns = json!([self.text_column, self.pair_column, self.label_column]);
        let problem = format!("{:?}", self.problem);
        json!({ "task": "text-classification", "columns": columns, "problem": problem, "texts": self.texts.settings() })
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        let label = column(record, &self.label_column)?;
        let labels = self
            .problem
            .values(label)
            .map_err(|message| format!("`{}`: {message}", self.label_column))?;
        let pair = self
            .pair_column
            .as_deref()
            .map(|name| text(record, name))
            .transpose()?;
        let encoding = self.texts.encode(text(record, &self.text_column)?, pair)?;
        if encoding.special_tokens_mask.iter().all(|special| *special != 0) {
            return Err(format!("`{}` is a text with no tokens", self.text_column));
        }
        Ok(vec![self.texts.example(&encoding).with_values("labels", labels)])
    }
}

impl Objective for TextClassification {
    fn collate(&self, rows: &[Row], _: Draw) -> Batch {
        let labels = match &self.problem {
            Problem::SingleLabel(_) => Targets::Classes(classes(rows)),
            _ => {
                let numbers = |row: &Row| row.example.floats("labels").unwrap_or_default().to_vec();
                Targets::Numbers(rows.iter().map(numbers).collect())
            }
        };
        Batch::padded(rows, self.texts.padding).with_labels(labels)
    }
}

/// The one label of each row.
pub(super) fn classes(rows: &[Row]) -> Vec<i64> {
    let class = |row: &Row| {
        row.example
            .ints("labels")
            .and_then(|labels| labels.first().copied())
    };
    rows.iter()
        .map(|row| class(row).map_or(super::IGNORED, i64::from))
        .collect()
}
