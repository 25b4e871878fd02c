//! A text from another: translation, summarization (Sutskever et al., 2014).

use oxiformers_processors::Tokenizer;
use serde_json::{Value, json};

use super::{Batch, Draw, IGNORED, Objective, Row, Targets, Texts, text, wide};
use crate::{Example, Preprocessor};

/// Learns to write a text that belongs to another.
#[derive(Debug, Clone)]
pub struct Seq2Seq {
    /// Text to tokens.
    pub texts: Texts,
    /// The tokenizer of what is written, as [`Tokenizer::for_target`] gives it.
    pub target: Tokenizer,
    /// The column that is read.
    pub source_column: String,
    /// The column that is to be written.
    pub target_column: String,
    /// What is put before each text, such as `summarize: `.
    pub prefix: String,
    /// The longest text to be written, in tokens; longer ones are cut.
    pub max_target_length: Option<usize>,
}

impl Preprocessor for Seq2Seq {
    fn settings(&self) -> Value {
        let columns = [&self.source_column, &self.target_column, &self.prefix];
        let target = Texts {
            tokenizer: self.target.clone(),
            max_length: self.max_target_length,
            padding: self.texts.padding,
        };
        json!({ "task": "seq2seq-lm", "columns": columns, "target": target.settings(), "texts": self.texts.settings() })
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        // As data sets of translations are written: {"translation": {"en": …, "de": …}}.
        let record = record
            .get("translation")
            .filter(|inner| inner.is_object())
            .unwrap_or(record);
        if record.is_string() {
            return Err(format!(
                "is a text, and no object with `{}` and `{}`",
                self.source_column, self.target_column
            ));
        }
        let source = format!("{}{}", self.prefix, text(record, &self.source_column)?);
        let encoding = self.texts.encode(&source, None)?;
        let written = text(record, &self.target_column)?;
        let labels = self
            .target
            .encode(written, true)
            .map_err(|error| error.to_string())?;
        for (name, ids, tokenizer) in [
            (&self.source_column, &encoding.ids, &self.texts.tokenizer),
            (&self.target_column, &labels, &self.target),
        ] {
            if ids.len() <= tokenizer.num_special_tokens_to_add(false) {
                return Err(format!("`{name}` is a text with no tokens"));
            }
        }
        let mut labels = labels;
        if let Some(most) = self.max_target_length.filter(|most| labels.len() > *most) {
            // What ends the text stays.
            let end = labels.last().copied().filter(|id| self.target.is_special(*id));
            labels.truncate(most - usize::from(end.is_some()));
            labels.extend(end);
        }
        Ok(vec![self.texts.example(&encoding).with_ids("labels", &labels)])
    }
}

impl Objective for Seq2Seq {
    fn collate(&self, rows: &[Row], _: Draw) -> Batch {
        let labels = |row: &Row| wide(row.example.ints("labels").unwrap_or_default());
        let mut labels: Vec<_> = rows.iter().map(labels).collect();
        self.texts.padding.fill(&mut labels, IGNORED);
        Batch::padded(rows, self.texts.padding).with_labels(Targets::Tokens(labels))
    }
}
