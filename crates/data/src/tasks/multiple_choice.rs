//! Which of several texts goes on with another (Zellers et al., 2018).

use serde_json::{Value, json};

use super::text_classification::classes;
use super::{Batch, Draw, Objective, Row, Targets, Texts, class, list, text};
use crate::{Example, Preprocessor};

/// Learns to choose.
#[derive(Debug, Clone)]
pub struct MultipleChoice {
    /// Text to tokens.
    pub texts: Texts,
    /// The column of what goes before.
    pub question_column: String,
    /// The column of the choices, a list of texts; or their columns.
    pub choices: Vec<String>,
    /// The column of the number of the right one.
    pub label_column: String,
}

impl Preprocessor for MultipleChoice {
    fn settings(&self) -> Value {
        let columns = json!([self.question_column, self.choices, self.label_column]);
        json!({ "task": "multiple-choice", "columns": columns, "texts": self.texts.settings() })
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        let question = text(record, &self.question_column)?;
        let choices: Vec<&str> = match self.choices.as_slice() {
            [one] => {
                let all: Option<Vec<&str>> = list(record, one)?.iter().map(Value::as_str).collect();
                all.ok_or_else(|| format!("`{one}` is no list of texts"))?
            }
            several => several
                .iter()
                .map(|name| text(record, name))
                .collect::<Result<_, _>>()?,
        };
        if choices.len() < 2 {
            return Err("has less than two choices".to_string());
        }
        let names: Vec<String> = (0..choices.len()).map(|choice| choice.to_string()).collect();
        let label = class(super::column(record, &self.label_column)?, &names)
            .map_err(|message| format!("`{}`: {message}", self.label_column))?;
        let (mut ids, mut types, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for choice in choices {
            let encoding = self.texts.encode(question, Some(choice))?;
            lengths.push(encoding.len() as i32);
            ids.extend(encoding.ids);
            types.extend(encoding.token_type_ids);
        }
        let example = Example::default()
            .with_ids("input_ids", &ids)
            .with("lengths", lengths);
        let example = match types.iter().any(|ty| *ty != 0) {
            true => example.with_ids("token_type_ids", &types),
            false => example,
        };
        Ok(vec![example.with("labels", vec![label])])
    }
}

impl Objective for MultipleChoice {
    fn collate(&self, rows: &[Row], _: Draw) -> Batch {
        // Questions may have different numbers of choices; those that are missing are rows of one token.
        let choices = |row: &Row| row.example.ints("lengths").map_or(0, <[i32]>::len);
        let most = rows.iter().map(choices).max().unwrap_or(0);
        let cut = |row: &Row, name: &str| -> Vec<Vec<u32>> {
            let mut values = row
                .example
                .ints(name)
                .unwrap_or_default()
                .iter()
                .map(|value| *value as u32);
            let lengths = row.example.ints("lengths").unwrap_or_default();
            let parts = lengths
                .iter()
                .map(|length| values.by_ref().take(*length as usize).collect());
            let mut parts: Vec<Vec<u32>> = parts.collect();
            parts.resize(
                most,
                vec![if name == "input_ids" {
                    self.texts.padding.pad_token_id
                } else {
                    0
                }],
            );
            parts
        };
        let ids = rows.iter().flat_map(|row| cut(row, "input_ids")).collect();
        let types = match rows
            .iter()
            .any(|row| row.example.ints("token_type_ids").is_some_and(|t| !t.is_empty()))
        {
            true => rows.iter().flat_map(|row| cut(row, "token_type_ids")).collect(),
            false => Vec::new(),
        };
        let mut batch = Batch::from_rows(ids, types, self.texts.padding);
        batch.num_choices = most;
        batch.with_labels(Targets::Classes(classes(rows)))
    }
}
