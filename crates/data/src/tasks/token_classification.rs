//! What each word of a text is: names, parts of speech.

use oxiformers_processors::tokenizer::{EncodeOptions, Sequence, TextInput, Truncation};
use serde_json::{Value, json};

use super::{Batch, Draw, IGNORED, Objective, Row, Targets, Texts, class, list, wide};
use crate::{Example, Preprocessor};

/// [`IGNORED`] as examples hold it.
const NOT_LEARNED: i32 = IGNORED as i32;

/// Learns to classify words.
#[derive(Debug, Clone)]
pub struct TokenClassification {
    /// Text to tokens.
    pub texts: Texts,
    /// The column of the words, a list of texts.
    pub tokens_column: String,
    /// The column of their classes, a list as long.
    pub tags_column: String,
    /// The classes.
    pub labels: Vec<String>,
    /// Whether every token of a word has its class, and not its first one alone.
    pub label_all_tokens: bool,
}

impl Preprocessor for TokenClassification {
    fn settings(&self) -> Value {
        let columns = [&self.tokens_column, &self.tags_column];
        json!({
            "task": "token-classification", "columns": columns, "labels": self.labels,
            "label_all_tokens": self.label_all_tokens, "texts": self.texts.settings(),
        })
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        let words = list(record, &self.tokens_column)?;
        let words: Option<Vec<&str>> = words.iter().map(Value::as_str).collect();
        let words = words.ok_or_else(|| format!("`{}` is no list of texts", self.tokens_column))?;
        let tags = list(record, &self.tags_column)?;
        if tags.len() != words.len() {
            let (tokens, labels) = (&self.tokens_column, &self.tags_column);
            return Err(format!(
                "has {} `{labels}` for {} `{tokens}`",
                tags.len(),
                words.len()
            ));
        }
        let classes: Result<Vec<i32>, String> = tags.iter().map(|tag| class(tag, &self.labels)).collect();
        let classes = classes.map_err(|message| format!("`{}`: {message}", self.tags_column))?;
        let options = EncodeOptions {
            truncation: self.texts.max_length.map(|length| Truncation {
                max_length: Some(length),
                ..Truncation::default()
            }),
            ..EncodeOptions::default()
        };
        let input = TextInput::Single(Sequence::Words(&words));
        let encoding = self
            .texts
            .tokenizer
            .encode_with(input, &options)
            .map_err(|error| error.to_string())?;
        let mut before = None;
        let label = |word: &Option<u32>| {
            let first = *word != before;
            before = *word;
            let class = word.and_then(|word| classes.get(word as usize));
            class
                .filter(|_| first || self.label_all_tokens)
                .copied()
                .unwrap_or(NOT_LEARNED)
        };
        let labels: Vec<i32> = encoding.word_ids.iter().map(label).collect();
        if labels.iter().all(|label| *label == NOT_LEARNED) {
            return Err(format!("`{}` is a text with no tokens", self.tokens_column));
        }
        Ok(vec![self.texts.example(&encoding).with("labels", labels)])
    }
}

impl Objective for TokenClassification {
    fn collate(&self, rows: &[Row], _: Draw) -> Batch {
        let labels = |row: &Row| wide(row.example.ints("labels").unwrap_or_default());
        let mut labels: Vec<_> = rows.iter().map(labels).collect();
        self.texts.padding.fill(&mut labels, IGNORED);
        Batch::padded(rows, self.texts.padding).with_labels(Targets::Tokens(labels))
    }
}
