//! Objectives: what is learned of a record, and how examples become a batch. One file each.

mod batch;
pub mod causal_lm;
pub mod denoising;
pub mod masked_lm;
pub mod multiple_choice;
pub mod preference;
pub mod prompted;
pub mod prompts;
pub mod question_answering;
pub mod seq2seq;
pub mod text_classification;
pub mod token_classification;

use oxiformers_processors::Tokenizer;
use oxiformers_processors::tokenizer::{EncodeOptions, Encoding, Truncation, TruncationStrategy};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub use batch::{Batch, IGNORED, Padding, Targets};

use crate::{Error, Result};
use crate::{Example, Preprocessor, shuffle};

/// An example of a batch and its place in the data.
#[derive(Debug, Clone)]
pub struct Row {
    /// Its place.
    pub index: u64,
    /// The example.
    pub example: Example,
}

/// Where the randomness of collating comes from: the same example is masked in the same way in the same epoch.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    /// Seed of the run.
    pub seed: u64,
    /// The epoch, counted from 0; for evaluation always the same.
    pub epoch: u64,
}

impl Draw {
    /// The generator for one example.
    pub fn rng(self, index: u64) -> ChaCha8Rng {
        shuffle::rng(self.seed, "collate", [self.epoch, index])
    }

    /// A seed for what is drawn of one example.
    pub fn seed(self, index: u64) -> u64 {
        self.rng(index).next_u64()
    }
}

/// What is to be learned.
pub trait Objective: Preprocessor + Send + Sync {
    /// Rows of equal length, with what the model is to answer.
    fn collate(&self, rows: &[Row], draw: Draw) -> Batch;
}

/// Text to token ids.
#[derive(Debug, Clone)]
pub struct Texts {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The longest sequence in tokens, special ones included; longer ones are cut.
    pub max_length: Option<usize>,
    /// How rows are filled.
    pub padding: Padding,
}

impl Texts {
    /// Texts of at most `max_length` tokens.
    ///
    /// # Errors
    /// Where the tokenizer has no padding token.
    pub fn new(tokenizer: Tokenizer, max_length: Option<usize>, multiple_of: Option<usize>) -> Result<Self> {
        if max_length == Some(0) {
            return Err(Error::config(
                "max_length",
                "is 0; a sequence has at least one token",
            ));
        }
        let padding = Padding::new(&tokenizer, multiple_of);
        Ok(Self {
            tokenizer,
            max_length,
            padding,
        })
    }

    /// What examples depend on.
    fn settings(&self) -> Value {
        let whole = self.tokenizer.to_json(false).unwrap_or_default();
        let digest = crate::hex(&Sha256::digest(whole));
        json!({ "tokenizer": digest, "max_length": self.max_length })
    }

    /// Encodes a text, or two of them as one sequence.
    fn encode(&self, text: &str, pair: Option<&str>) -> Result<Encoding, String> {
        let options = EncodeOptions {
            truncation: self.max_length.map(|length| Truncation {
                max_length: Some(length),
                strategy: TruncationStrategy::LongestFirst,
                ..Truncation::default()
            }),
            ..EncodeOptions::default()
        };
        let encoding = match pair {
            Some(pair) => self.tokenizer.encode_with((text, pair), &options),
            None => self.tokenizer.encode_with(text, &options),
        };
        encoding.map_err(|error| error.to_string())
    }

    /// The ids of an encoding, and the types of its tokens where these are not all 0.
    fn example(&self, encoding: &Encoding) -> Example {
        let example = Example::default().with_ids("input_ids", &encoding.ids);
        match encoding.token_type_ids.iter().any(|ty| *ty != 0) {
            true => example.with_ids("token_type_ids", &encoding.token_type_ids),
            false => example,
        }
    }
}

/// The column `name` of a record.
fn column<'a>(record: &'a Value, name: &str) -> Result<&'a Value, String> {
    match record {
        Value::Object(columns) => columns.get(name).filter(|value| !value.is_null()).ok_or_else(|| {
            let names: Vec<_> = columns.keys().take(12).map(|name| format!("`{name}`")).collect();
            format!("has no `{name}`; it has {}", names.join(", "))
        }),
        _ => Err(format!("is no object with `{name}`")),
    }
}

/// The text in the column `name`; a record that is nothing but a text is that text.
///
/// # Errors
/// Says what is there instead.
pub fn text<'a>(record: &'a Value, name: &str) -> Result<&'a str, String> {
    if let Value::String(text) = record {
        return Ok(text);
    }
    match column(record, name)? {
        Value::String(text) => Ok(text),
        other => Err(format!("`{name}` is {}, not a text", kind(other))),
    }
}

/// A list in the column `name`.
fn list<'a>(record: &'a Value, name: &str) -> Result<&'a [Value], String> {
    match column(record, name)? {
        Value::Array(list) => Ok(list),
        other => Err(format!("`{name}` is {}, not a list", kind(other))),
    }
}

/// A line that is empty is no text at all in a text file, and a mistake elsewhere.
fn is_blank_line(record: &Value) -> bool {
    record.as_str().is_some_and(|text| text.trim().is_empty())
}

/// Labels as models take them.
fn wide(labels: &[i32]) -> Vec<i64> {
    labels.iter().map(|label| i64::from(*label)).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A class: a number, also as text (as in CSV), or the name of a label.
fn class(value: &Value, labels: &[String]) -> Result<i32, String> {
    let known = || match labels.len() {
        0..=12 => labels.join(", "),
        more => format!("{}, … ({more})", labels[..12].join(", ")),
    };
    if let Value::String(name) = value
        && let Some(class) = labels.iter().position(|label| label == name)
    {
        return Ok(class as i32);
    }
    let number = match value {
        Value::Number(number) => number.as_i64(),
        Value::String(text) => text.trim().parse().ok(),
        Value::Bool(flag) => Some(i64::from(*flag)),
        _ => None,
    };
    match number {
        Some(class) if usize::try_from(class).is_ok_and(|class| class < labels.len()) => Ok(class as i32),
        Some(class) => Err(format!(
            "the label {class} is out of range: there are {} labels, from 0",
            labels.len()
        )),
        None => Err(format!("{value} is none of the labels {}", known())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_by_number_and_name() {
        let labels = ["no".to_string(), "yes".to_string()];
        assert_eq!(class(&json!(1), &labels), Ok(1));
        assert_eq!(class(&json!("0"), &labels), Ok(0));
        assert_eq!(class(&json!("yes"), &labels), Ok(1));
        assert!(
            class(&json!(2), &labels)
                .expect_err("range")
                .contains("out of range")
        );
        assert!(class(&json!(-1), &labels).is_err());
        assert!(
            class(&json!("so"), &labels)
                .expect_err("name")
                .contains("no, yes")
        );
    }
}
