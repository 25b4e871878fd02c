//! Two answers of which one is preferred.

use serde_json::{Value, json};

use super::prompted::{Prompted, behind, ids, prompt_length};
use super::{Batch, Draw, IGNORED, Objective, Row, Targets, column, kind};
use crate::{Example, Preprocessor, Values};

/// The columns of a record.
#[derive(Debug, Clone)]
pub struct PairColumns {
    /// What is asked.
    pub prompt: String,
    /// The better answer.
    pub chosen: String,
    /// The other one.
    pub rejected: String,
}

impl PairColumns {
    /// What tells a preprocessing of these columns from other ones.
    fn settings(&self, task: &str, prompted: &Prompted) -> Value {
        let columns = [&self.prompt, &self.chosen, &self.rejected];
        json!({ "task": task, "columns": columns, "prompted": prompted.settings() })
    }
}

/// Learns which of two answers to a prompt is the better one (Rafailov et al., 2023). A batch has the rows of all chosen
/// answers, then those of all others; the prompts are not learned.
#[derive(Debug, Clone)]
pub struct Preference {
    /// Texts to tokens.
    pub prompted: Prompted,
    /// Where they stand.
    pub columns: PairColumns,
}

impl Preprocessor for Preference {
    fn settings(&self) -> Value {
        self.columns.settings("preference", &self.prompted)
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        let columns = [self.columns.chosen.as_str(), self.columns.rejected.as_str()];
        let completed = self.prompted.completed(record, &self.columns.prompt, &columns)?;
        Ok(vec![
            Example::default()
                .with_ids("input_ids", &completed.ids[0])
                .with_ids("rejected_input_ids", &completed.ids[1])
                .with("prompt_length", vec![completed.prompt_length as i32]),
        ])
    }
}

/// The rows of all chosen answers, then those of all others.
fn pairs(rows: &[Row]) -> Vec<Vec<u32>> {
    let all = |name: &'static str| rows.iter().map(move |row| ids(row, name));
    all("input_ids").chain(all("rejected_input_ids")).collect()
}

impl Objective for Preference {
    fn collate(&self, rows: &[Row], _: Draw) -> Batch {
        let ids = pairs(rows);
        let prompts = rows.iter().chain(rows).map(prompt_length);
        let mut labels: Vec<_> = ids
            .iter()
            .zip(prompts)
            .map(|(ids, prompt)| behind(prompt, ids))
            .collect();
        let padding = self.prompted.texts.padding;
        padding.fill(&mut labels, IGNORED);
        Batch::from_rows(ids, Vec::new(), padding).with_labels(Targets::Tokens(labels))
    }
}

/// Learns to give the better of two texts or conversations the larger number (Ouyang et al., 2022). A batch has the rows of
/// all chosen ones, then those of all others; its labels are the margins between them, none where there are none.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Texts to tokens.
    pub prompted: Prompted,
    /// Where they stand; the prompt may be missing. How much better the chosen one is may stand in `margin`.
    pub columns: PairColumns,
}

/// The column of how much better a text is than the other.
const MARGIN: &str = "margin";

impl Preprocessor for Comparison {
    fn settings(&self) -> Value {
        self.columns.settings("comparison", &self.prompted)
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        let ends = [self.columns.chosen.as_str(), self.columns.rejected.as_str()];
        let ids = self.prompted.whole(record, &self.columns.prompt, &ends)?;
        let example = Example::default()
            .with_ids("input_ids", &ids[0])
            .with_ids("rejected_input_ids", &ids[1]);
        let margin = match column(record, MARGIN) {
            Err(_) => return Ok(vec![example]),
            Ok(Value::Number(number)) => number.as_f64(),
            Ok(Value::String(text)) => text.trim().parse().ok(),
            Ok(other) => return Err(format!("`{MARGIN}` is {}, not a number", kind(other))),
        };
        let margin = margin
            .filter(|margin| margin.is_finite())
            .ok_or_else(|| format!("`{MARGIN}` is no number"))?;
        Ok(vec![
            example.with_values(MARGIN, Values::Floats(vec![margin as f32])),
        ])
    }
}

impl Objective for Comparison {
    fn collate(&self, rows: &[Row], _: Draw) -> Batch {
        let margin = |row: &Row| row.example.floats(MARGIN).unwrap_or_default().to_vec();
        let margins: Vec<_> = rows.iter().map(margin).collect();
        Batch::from_rows(pairs(rows), Vec::new(), self.prompted.texts.padding)
            .with_labels(Targets::Numbers(margins))
    }
}

/// Learns of single answers, each good or bad (Ethayarajh et al., 2024). A batch has their rows, and then each prompt again
/// with the answer of the row before it: what it is not an answer to.
#[derive(Debug, Clone)]
pub struct UnpairedPreference {
    /// Texts to tokens.
    pub prompted: Prompted,
    /// The column of what is asked.
    pub prompt_column: String,
    /// The column of the answer.
    pub completion_column: String,
    /// The column that says whether the answer is good.
    pub label_column: String,
}

impl Preprocessor for UnpairedPreference {
    fn settings(&self) -> Value {
        let columns = [&self.prompt_column, &self.completion_column, &self.label_column];
        json!({ "task": "unpaired-preference", "columns": columns, "prompted": self.prompted.settings() })
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        let name = &self.label_column;
        let label = match column(record, name)? {
            Value::Bool(label) => *label,
            // As it stands in CSV.
            Value::String(text) if text.eq_ignore_ascii_case("true") => true,
            Value::String(text) if text.eq_ignore_ascii_case("false") => false,
            other => return Err(format!("`{name}` is {}, not true or false", kind(other))),
        };
        let completed =
            self.prompted
                .completed(record, &self.prompt_column, &[self.completion_column.as_str()])?;
        Ok(vec![
            Example::default()
                .with_ids("input_ids", &completed.ids[0])
                .with("prompt_length", vec![completed.prompt_length as i32])
                .with("label", vec![i32::from(label)]),
        ])
    }
}

impl Objective for UnpairedPreference {
    fn collate(&self, rows: &[Row], _: Draw) -> Batch {
        let most = self.prompted.texts.max_length.unwrap_or(usize::MAX);
        let before = rows.iter().cycle().skip(rows.len().saturating_sub(1));
        let mismatched = rows.iter().zip(before).map(|(row, other)| {
            let (own, others) = (ids(row, "input_ids"), ids(other, "input_ids"));
            let (prompt, answer) = (&own[..prompt_length(row)], &others[prompt_length(other)..]);
            let mut ids = [prompt, answer].concat();
            ids.truncate(most);
            ids
        });
        let matched = rows.iter().map(|row| ids(row, "input_ids"));
        let ids: Vec<_> = matched.chain(mismatched).collect();
        let prompts = rows.iter().chain(rows).map(prompt_length);
        let mut labels: Vec<_> = ids
            .iter()
            .zip(prompts)
            .map(|(ids, prompt)| behind(prompt, ids))
            .collect();
        let padding = self.prompted.texts.padding;
        padding.fill(&mut labels, IGNORED);
        Batch::from_rows(ids, Vec::new(), padding).with_labels(Targets::Tokens(labels))
    }
}
