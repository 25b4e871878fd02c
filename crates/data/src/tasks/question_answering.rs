//! Where in a text the answer to a question stands (Rajpurkar et al., 2016).

use oxiformers_processors::tokenizer::{EncodeOptions, Encoding, Truncation, TruncationStrategy};
use serde_json::{Value, json};

use super::{Batch, Draw, Objective, Row, Targets, Texts, column, kind, text};
use crate::{Example, Preprocessor};

/// Learns to find answers.
#[derive(Debug, Clone)]
pub struct QuestionAnswering {
    /// Text to tokens. A context that does not fit is read in windows.
    pub texts: Texts,
    /// How many tokens windows share.
    pub doc_stride: usize,
    /// The column of the question.
    pub question_column: String,
    /// The column of the text that answers it.
    pub context_column: String,
    /// The column of the answers, as SQuAD has them: `{"text": […], "answer_start": […]}`, where the answer begins in
    /// characters. The first one counts; none means that there is no answer.
    pub answers_column: String,
}

impl Preprocessor for QuestionAnswering {
    fn settings(&self) -> Value {
        let columns = [&self.question_column, &self.context_column, &self.answers_column];
        json!({
            "task": "question-answering", "columns": columns, "doc_stride": self.doc_stride,
            "texts": self.texts.settings(),
        })
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        // Some questions begin with many spaces, which would take the place of the context.
        let question = text(record, &self.question_column)?.trim_start();
        let context = text(record, &self.context_column)?;
        let answer = self.answer(column(record, &self.answers_column)?, context)?;
        let options = EncodeOptions {
            truncation: self.texts.max_length.map(|length| Truncation {
                max_length: Some(length),
                strategy: TruncationStrategy::OnlySecond,
                stride: self.doc_stride,
                side: None,
            }),
            ..EncodeOptions::default()
        };
        let encoding = self.texts.tokenizer.encode_with((question, context), &options);
        let windows = encoding.map_err(|error| error.to_string())?.into_windows();
        let example = |window: &Encoding| {
            let (start, end) = answer.and_then(|answer| span(window, answer)).unwrap_or_else(|| {
                // No answer here: both are where the class token stands.
                let cls = self.texts.tokenizer.cls_token_id();
                let at = window.ids.iter().position(|id| Some(*id) == cls).unwrap_or(0);
                (at, at)
            });
            let example = self
                .texts
                .example(window)
                .with("start_positions", vec![start as i32]);
            example.with("end_positions", vec![end as i32])
        };
        Ok(windows.iter().map(example).collect())
    }
}

impl QuestionAnswering {
    /// The characters of the answer.
    fn answer(&self, answers: &Value, context: &str) -> Result<Option<(usize, usize)>, String> {
        let name = &self.answers_column;
        let wrong = |what: &str| format!("`{name}` has no list `{what}`; it is {}", kind(answers));
        let texts = answers
            .get("text")
            .and_then(Value::as_array)
            .ok_or_else(|| wrong("text"))?;
        let starts = answers.get("answer_start").and_then(Value::as_array);
        let starts = starts.ok_or_else(|| wrong("answer_start"))?;
        let (Some(text), Some(start)) = (texts.first(), starts.first()) else {
            return Ok(None);
        };
        let (Some(text), Some(start)) = (
            text.as_str(),
            start.as_u64().and_then(|start| usize::try_from(start).ok()),
        ) else {
            return Err(format!(
                "`{name}` must hold texts and the places where they begin"
            ));
        };
        let found: String = context.chars().skip(start).take(text.chars().count()).collect();
        match found == text {
            true => Ok(Some((start, start + text.chars().count()))),
            false => Err(format!(
                "`{name}`: {text:?} does not stand at character {start}, where {found:?} does"
            )),
        }
    }
}

/// The tokens of an answer, if the window holds all of it.
fn span(window: &Encoding, (start, end): (usize, usize)) -> Option<(usize, usize)> {
    let context = |at: &usize| window.sequence_ids[*at] == Some(1);
    let first = (0..window.len()).find(context)?;
    let last = (0..window.len()).rev().find(context)?;
    if window.offsets[first].0 > start || window.offsets[last].1 < end {
        return None;
    }
    let begin = (first..=last).rev().find(|at| window.offsets[*at].0 <= start)?;
    let finish = (first..=last).find(|at| window.offsets[*at].1 >= end)?;
    Some((begin, finish))
}

impl Objective for QuestionAnswering {
    fn collate(&self, rows: &[Row], _: Draw) -> Batch {
        let of = |name| {
            let one = |row: &Row| {
                row.example
                    .ints(name)
                    .and_then(|values| values.first())
                    .map_or(0, |at| i64::from(*at))
            };
            rows.iter().map(one).collect()
        };
        Batch::padded(rows, self.texts.padding).with_labels(Targets::Spans {
            start: of("start_positions"),
            end: of("end_positions"),
        })
    }
}
