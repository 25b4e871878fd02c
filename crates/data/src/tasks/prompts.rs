//! Prompts that a model answers by itself while it learns.

use serde_json::{Value, json};

use super::prompted::{Prompted, ids};
use super::{Batch, Draw, Objective, Row};
use crate::{Example, Preprocessor};

/// Prompts, with all that the records say besides, which answers are judged by.
#[derive(Debug, Clone)]
pub struct Prompts {
    /// Texts to tokens.
    pub prompted: Prompted,
    /// The column of the prompt.
    pub prompt_column: String,
    /// Columns that every record must have.
    pub needed: Vec<String>,
}

impl Preprocessor for Prompts {
    fn settings(&self) -> Value {
        let columns = (&self.prompt_column, &self.needed);
        json!({ "task": "prompts", "columns": columns, "prompted": self.prompted.settings() })
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        let ids = self.prompted.prompt(record, &self.prompt_column)?;
        if ids.is_empty() {
            return Err(format!("`{}` is a text with no tokens", self.prompt_column));
        }
        if let Some(most) = self.prompted.texts.max_length.filter(|most| ids.len() > *most) {
            return Err(format!(
                "`{}` has {} tokens, and max_length is {most}",
                self.prompt_column,
                ids.len()
            ));
        }
        for name in &self.needed {
            super::text(record, name)?;
        }
        let bytes = record.to_string().into_bytes();
        Ok(vec![
            Example::default()
                .with_ids("input_ids", &ids)
                .with("record", bytes.into_iter().map(i32::from).collect()),
        ])
    }
}

/// The record that a row was made of.
pub fn record(row: &Row) -> Value {
    let bytes = row.example.ints("record").unwrap_or_default();
    let bytes: Vec<u8> = bytes.iter().map(|byte| *byte as u8).collect();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// The tokens of a row's prompt.
pub fn prompt(row: &Row) -> Vec<u32> {
    ids(row, "input_ids")
}

impl Objective for Prompts {
    fn collate(&self, rows: &[Row], _: Draw) -> Batch {
        Batch::padded(rows, self.prompted.texts.padding)
    }
}
