//! Prompts and what follows them, as texts or as messages.

use oxiformers_processors::tokenizer::EncodeOptions;
use oxiformers_processors::{ChatTemplate, RenderOptions};
use serde_json::{Value, json};

use super::{IGNORED, Row, Texts, column, kind};

/// How prompts and what follows them become tokens.
#[derive(Debug, Clone)]
pub struct Prompted {
    /// Text to tokens.
    pub texts: Texts,
    /// What makes a text of messages.
    pub template: Option<ChatTemplate>,
    /// Whether a text ends with the token that says so; the template says it of messages.
    pub append_eos: bool,
}

/// A part of a conversation.
#[derive(Debug, Clone, Copy)]
enum Part<'a> {
    Text(&'a str),
    Messages(&'a [Value]),
}

impl<'a> Part<'a> {
    /// What stands in the column `name`, which is not empty.
    fn of(record: &'a Value, name: &str) -> Result<Self, String> {
        match column(record, name)? {
            Value::String(text) if text.is_empty() => Err(format!("`{name}` is an empty text")),
            Value::Array(messages) if messages.is_empty() => Err(format!("`{name}` holds no message")),
            Value::String(text) => Ok(Self::Text(text)),
            Value::Array(messages) => match messages.iter().find(|message| !message.is_object()) {
                None => Ok(Self::Messages(messages)),
                Some(other) => Err(format!(
                    "`{name}`: a message is {}, not an object with `role` and `content`",
                    kind(other)
                )),
            },
            other => Err(format!(
                "`{name}` is {}, neither a text nor a list of messages",
                kind(other)
            )),
        }
    }

    fn messages(self) -> Option<&'a [Value]> {
        match self {
            Self::Messages(messages) => Some(messages),
            Self::Text(_) => None,
        }
    }
}

/// Token ids of a prompt with each of its completions.
pub(super) struct Completed {
    /// The tokens that all have in common as their prompt.
    pub prompt_length: usize,
    /// The prompt and the completion, cut at the end where that is too long.
    pub ids: Vec<Vec<u32>>,
}

impl Prompted {
    /// What examples depend on.
    pub(super) fn settings(&self) -> Value {
        let template = self.template.as_ref().map(|template| {
            let source = template.select(&RenderOptions::default());
            source.map(|(_, source)| source.to_string()).unwrap_or_default()
        });
        json!({ "template": template, "append_eos": self.append_eos, "texts": self.texts.settings() })
    }

    /// The prompt of a record with each of the completions in these columns. Where the prompt is no list of messages and
    /// they are, it is the messages that all of them begin with.
    pub(super) fn completed(
        &self,
        record: &Value,
        prompt: &str,
        completions: &[&str],
    ) -> Result<Completed, String> {
        let (before, wholes) = self.wholes(record, Some(prompt), completions)?;
        let same = |ids: &Vec<u32>| ids.iter().zip(&before).take_while(|(a, b)| a == b).count();
        let prompt_length = wholes.iter().map(same).min().unwrap_or(0);
        let most = self.texts.max_length.unwrap_or(usize::MAX);
        let mut ids = wholes;
        for (ids, name) in ids.iter_mut().zip(completions) {
            if ids.len() <= prompt_length {
                return Err(format!("`{name}` adds no token to the prompt"));
            }
            if prompt_length >= most {
                return Err(format!(
                    "`{name}` lies behind the first {most} tokens (max_length)"
                ));
            }
            ids.truncate(most);
        }
        Ok(Completed { prompt_length, ids })
    }

    /// Token ids of the whole texts or conversations, which are not cut.
    pub(super) fn whole(&self, record: &Value, prompt: &str, ends: &[&str]) -> Result<Vec<Vec<u32>>, String> {
        let has_prompt = record.get(prompt).is_some_and(|prompt| !prompt.is_null());
        let (_, wholes) = self.wholes(record, has_prompt.then_some(prompt), ends)?;
        let most = self.texts.max_length.unwrap_or(usize::MAX);
        for (ids, name) in wholes.iter().zip(ends) {
            if ids.len() > most {
                return Err(format!(
                    "`{name}` has {} tokens, and max_length is {most}; what is cut off cannot be judged",
                    ids.len()
                ));
            }
        }
        Ok(wholes)
    }

    /// Token ids of the prompt alone, as a text or with the header of an answer.
    pub(super) fn prompt(&self, record: &Value, name: &str) -> Result<Vec<u32>, String> {
        match Part::of(record, name)? {
            Part::Text(text) => self.of_text(text, false),
            Part::Messages(messages) => self.of_messages(messages, tools(record), true),
        }
    }

    /// Token ids of the prompt, and of it with each completion.
    fn wholes(
        &self,
        record: &Value,
        prompt: Option<&str>,
        completions: &[&str],
    ) -> Result<(Vec<u32>, Vec<Vec<u32>>), String> {
        let parts = completions.iter().map(|name| Part::of(record, name));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        let conversations: Option<Vec<&[Value]>> = parts.iter().map(|part| part.messages()).collect();
        let Some(conversations) = conversations else {
            let before = prompt.map(|prompt| Part::of(record, prompt)).transpose()?;
            let before = match before {
                None => "",
                Some(Part::Text(text)) => text,
                Some(Part::Messages(_)) => {
                    return Err(format!(
                        "`{}` is a list of messages, and {} not",
                        prompt.unwrap_or_default(),
                        quoted(completions)
                    ));
                }
            };
            let whole = |(part, name): (&Part, &&str)| match part {
                Part::Text(text) => self.of_text(&format!("{before}{text}"), self.append_eos),
                Part::Messages(_) => Err(format!("`{name}` is a list of messages, and others are texts")),
            };
            let wholes = parts.iter().zip(completions).map(whole);
            let wholes = wholes.collect::<Result<Vec<_>, _>>()?;
            return Ok((self.of_text(before, false)?, wholes));
        };
        let given = match prompt {
            Some(prompt) if matches!(column(record, prompt), Ok(Value::Array(_))) => {
                Part::of(record, prompt)?.messages()
            }
            _ => None,
        };
        let (before, ends) = match given {
            Some(before) => (before, conversations),
            None => {
                let (first, others) = conversations.split_first().ok_or("has no messages")?;
                let longest = conversations.iter().map(|messages| messages.len() - 1).min();
                let common = (0..longest.unwrap_or(0))
                    .take_while(|at| others.iter().all(|messages| messages[*at] == first[*at]))
                    .count();
                if common == 0 && prompt.is_some() {
                    return Err(format!(
                        "`{}` is no list of messages, and {} begin with no message in common",
                        prompt.unwrap_or_default(),
                        quoted(completions)
                    ));
                }
                let ends = conversations.iter().map(|messages| &messages[common..]).collect();
                (&first[..common], ends)
            }
        };
        let asked = match prompt.is_none() || before.is_empty() {
            true => Vec::new(),
            false => self.of_messages(before, tools(record), true)?,
        };
        let whole = |end: &[Value]| self.of_messages(&[before, end].concat(), tools(record), false);
        let wholes = ends.into_iter().map(whole).collect::<Result<Vec<_>, _>>()?;
        Ok((asked, wholes))
    }

    fn of_text(&self, text: &str, ends: bool) -> Result<Vec<u32>, String> {
        let tokenizer = &self.texts.tokenizer;
        let mut ids = tokenizer.encode(text, true).map_err(|error| error.to_string())?;
        let eos = tokenizer.eos_token_id();
        // What the tokenizer puts behind a text that goes on.
        if !ends && ids.len() > 1 && ids.last().copied() == eos {
            ids.pop();
        }
        if let Some(eos) = eos.filter(|eos| ends && ids.last() != Some(eos)) {
            ids.push(eos);
        }
        Ok(ids)
    }

    fn of_messages(
        &self,
        messages: &[Value],
        tools: Option<Vec<Value>>,
        asks: bool,
    ) -> Result<Vec<u32>, String> {
        let template = self
            .template
            .as_ref()
            .ok_or("holds messages, and the model has no chat template")?;
        let options = RenderOptions {
            tools,
            add_generation_prompt: asks,
            ..RenderOptions::default()
        };
        let plain = |error: oxiformers_processors::Error| error.to_string();
        let text = template.render(messages, &options).map_err(plain)?;
        let bare = EncodeOptions {
            add_special_tokens: false,
            ..EncodeOptions::default()
        };
        let encoding = self.texts.tokenizer.encode_with(&text, &bare).map_err(plain)?;
        Ok(encoding.ids)
    }
}

/// The functions that the model may call.
fn tools(record: &Value) -> Option<Vec<Value>> {
    match record.get("tools") {
        Some(Value::Array(tools)) => Some(tools.clone()),
        _ => None,
    }
}

fn quoted(names: &[&str]) -> String {
    let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    names.join(" and ")
}

/// Token ids of a column.
pub(super) fn ids(row: &Row, name: &str) -> Vec<u32> {
    let ids = row.example.ints(name).unwrap_or_default();
    ids.iter().map(|id| *id as u32).collect()
}

/// How many tokens of a row are its prompt.
pub(super) fn prompt_length(row: &Row) -> usize {
    let length = row.example.ints("prompt_length").unwrap_or_default();
    length.first().map_or(0, |length| *length as usize)
}

/// What is learned of a sequence: all behind its prompt.
pub(super) fn behind(prompt: usize, ids: &[u32]) -> Vec<i64> {
    let label = |(at, id): (usize, &u32)| if at < prompt { IGNORED } else { i64::from(*id) };
    ids.iter().enumerate().map(label).collect()
}
