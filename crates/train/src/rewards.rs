//! How good an answer is.

use oxiformers_models::AutoModelFor;
use oxiformers_models::nn::EncoderInputs;
use oxiformers_models::tasks::SequenceClassification;
use oxiformers_processors::tokenizer::EncodeOptions;
use oxiformers_processors::{ChatTemplate, RenderOptions, Tokenizer};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Error, Result};

/// What answers are judged by, as a recipe says it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardSection {
    /// How it is computed.
    #[serde(rename = "type")]
    pub kind: RewardType,
    /// What it is called in logs; its type where `None`.
    #[serde(default)]
    pub name: Option<String>,
    /// What it counts.
    #[serde(default = "one")]
    pub weight: f64,
    /// The pattern that an answer has (`regex`).
    #[serde(default)]
    pub pattern: Option<String>,
    /// The column of the record that holds the right answer (`exact`, `contains`).
    #[serde(default)]
    pub column: Option<String>,
    /// Tokens that an answer should have (`length`).
    #[serde(default)]
    pub target: Option<usize>,
    /// The reward model (`model`).
    #[serde(default)]
    pub model: Option<String>,
}

fn one() -> f64 {
    1.0
}

/// How a reward is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardType {
    /// 1 where the answer has a part that matches `pattern`, else 0.
    Regex,
    /// 1 where the answer is what stands in `column`, but for white space around it, else 0.
    Exact,
    /// 1 where the answer has a part that is what stands in `column`, else 0.
    Contains,
    /// 1 for `target` tokens, less the share by which it misses them, 0 at least.
    Length,
    /// What the reward model `model` says of the prompt with the answer.
    Model,
}

/// An answer, and the record with its prompt.
#[derive(Debug)]
pub struct Answer<'a> {
    /// The record.
    pub record: &'a Value,
    /// The answer without special tokens.
    pub text: String,
    /// How many tokens it has.
    pub tokens: usize,
}

/// A reward model with its tokenizer.
#[derive(Debug)]
pub struct RewardModel {
    /// The model, without autodiff.
    pub model: AutoModelFor<SequenceClassification>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// What makes a text of messages.
    pub template: Option<ChatTemplate>,
    /// The column of the prompt.
    pub prompt_column: String,
}

/// How answers are judged.
#[derive(Debug)]
pub struct Reward {
    name: String,
    rule: Rule,
}

#[derive(Debug)]
enum Rule {
    Regex(Regex),
    Exact(String),
    Contains(String),
    Length(usize),
    Model(Box<RewardModel>),
}

impl Reward {
    /// The reward that a recipe describes; `load` finds its model.
    ///
    /// # Errors
    /// Names what is missing.
    pub fn new(section: &RewardSection, load: impl FnOnce(&str) -> Result<RewardModel>) -> Result<Self> {
        let missing = |field: &str| {
            Error::config(
                "objective.rewards",
                format!("need `{field}` for {:?}", section.kind),
            )
        };
        let column = || section.column.clone().ok_or_else(|| missing("column"));
        let rule = match section.kind {
            RewardType::Regex => {
                let pattern = section.pattern.as_deref().ok_or_else(|| missing("pattern"))?;
                let pattern = Regex::new(pattern);
                Rule::Regex(pattern.map_err(|error| Error::config("objective.rewards", error))?)
            }
            RewardType::Exact => Rule::Exact(column()?),
            RewardType::Contains => Rule::Contains(column()?),
            RewardType::Length => match section.target {
                Some(target @ 1..) => Rule::Length(target),
                _ => return Err(missing("target")),
            },
            RewardType::Model => Rule::Model(Box::new(load(
                section.model.as_deref().ok_or_else(|| missing("model"))?,
            )?)),
        };
        let kind = serde_json::to_value(section.kind).unwrap_or_default();
        let kind = kind.as_str().unwrap_or_default();
        Ok(Self {
            name: section.name.clone().unwrap_or_else(|| kind.to_string()),
            rule,
        })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How good each answer is.
    ///
    /// # Errors
    /// Where a model cannot judge it.
    pub async fn of(&self, answers: &[Answer<'_>]) -> Result<Vec<f64>> {
        let each = |rule: &dyn Fn(&Answer) -> f64| Ok(answers.iter().map(rule).collect());
        let is = |yes: bool| f64::from(u8::from(yes));
        let right = |answer: &Answer, column: &str| {
            let value = answer.record.get(column).and_then(Value::as_str);
            value.unwrap_or_default().trim().to_string()
        };
        match &self.rule {
            Rule::Regex(pattern) => each(&|answer| is(pattern.is_match(&answer.text))),
            Rule::Exact(column) => each(&|answer| is(answer.text.trim() == right(answer, column))),
            Rule::Contains(column) => each(&|answer| is(answer.text.contains(&right(answer, column)))),
            Rule::Length(target) => each(&|answer| {
                let missed = answer.tokens.abs_diff(*target) as f64 / *target as f64;
                1.0 - missed.min(1.0)
            }),
            Rule::Model(model) => model.of(answers).await,
        }
    }
}

impl RewardModel {
    /// What the model says of each prompt with its answer.
    async fn of(&self, answers: &[Answer<'_>]) -> Result<Vec<f64>> {
        let rows = answers
            .iter()
            .map(|answer| self.ids(answer))
            .collect::<Result<Vec<_>>>()?;
        let inputs = EncoderInputs::padded(&rows, self.tokenizer.pad_token_id().unwrap_or(0));
        let logits = self.model.forward(&inputs)?.logits;
        let [_, outputs] = logits.dims();
        let values = logits.into_data_async().await;
        let values = values.map_err(|error| Error::Device(format!("{error:?}")))?;
        Ok(values.iter::<f64>().step_by(outputs.max(1)).collect())
    }

    fn ids(&self, answer: &Answer) -> Result<Vec<u32>> {
        let text = match answer.record.get(&self.prompt_column) {
            Some(Value::Array(messages)) => {
                let said = json!({ "role": "assistant", "content": answer.text });
                let template = self.template.as_ref().ok_or_else(|| {
                    Error::config(
                        "objective.rewards",
                        "have a model without a chat template, and prompts are messages",
                    )
                })?;
                let messages: Vec<Value> = messages.iter().cloned().chain([said]).collect();
                template.render(&messages, &RenderOptions::default())
            }
            prompt => Ok(format!(
                "{}{}",
                prompt.and_then(Value::as_str).unwrap_or_default(),
                answer.text
            )),
        };
        let bare = EncodeOptions {
            add_special_tokens: false,
            ..EncodeOptions::default()
        };
        let ids = text.and_then(|text| self.tokenizer.encode_with(&text, &bare));
        Ok(ids.map_err(oxiformers_data::Error::from)?.ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        let record = json!({ "answer": " 42 " });
        let answers = ["42", "It is 42.", "<answer>7</answer>"].map(|text| Answer {
            record: &record,
            text: text.to_string(),
            tokens: text.len(),
        });
        let of = |section: Value| {
            let section: RewardSection = serde_json::from_value(section).expect("section");
            let reward = Reward::new(&section, |_| unreachable!("no model"));
            reward.map(|reward| futures::executor::block_on(reward.of(&answers)).expect("rewards"))
        };
        let is = |section: Value, expected: [f64; 3]| assert_eq!(of(section).expect("reward"), expected);
        is(
            json!({ "type": "regex", "pattern": "(?s)<answer>.*</answer>" }),
            [0.0, 0.0, 1.0],
        );
        is(json!({ "type": "exact", "column": "answer" }), [1.0, 0.0, 0.0]);
        is(json!({ "type": "contains", "column": "answer" }), [1.0, 1.0, 0.0]);
        is(json!({ "type": "length", "target": 4 }), [0.5, 0.0, 0.0]);
        for (section, message) in [
            (json!({ "type": "regex" }), "`pattern`"),
            (json!({ "type": "regex", "pattern": "(" }), "unclosed group"),
            (json!({ "type": "exact" }), "`column`"),
            (json!({ "type": "length", "target": 0 }), "`target`"),
            (json!({ "type": "model" }), "`model`"),
        ] {
            let error = of(section).expect_err(message).to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
