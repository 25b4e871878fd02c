//! The next token: plain text, a prompt with its completion, or a conversation (Radford et al., 2018).

use oxiformers_processors::chat_template::assistant_mask;
use oxiformers_processors::tokenizer::EncodeOptions;
use oxiformers_processors::{ChatTemplate, RenderOptions};
use serde_json::{Value, json};

use super::{
    Batch, Draw, IGNORED, Objective, Row, Targets, Texts, column, is_blank_line, kind, list, text, wide,
};
use crate::{Example, Preprocessor};

/// [`IGNORED`] as examples hold it.
const NOT_LEARNED: i32 = IGNORED as i32;

/// Learns to continue texts.
#[derive(Debug, Clone)]
pub struct CausalLM {
    /// Text to tokens.
    pub texts: Texts,
    /// What a record holds.
    pub source: Source,
    /// Whether a text ends with the token that says so.
    pub append_eos: bool,
    /// Whether a batch becomes one row, whose sequences do not see each other, instead of rows with padding.
    pub padding_free: bool,
}

/// What is learned of a record.
#[derive(Debug, Clone)]
pub enum Source {
    /// All of the text in this column.
    Text(String),
    /// The text of the second column after that of the first, which is not learned.
    Completion {
        /// What is given.
        prompt: String,
        /// What is learned.
        completion: String,
    },
    /// What the assistant says in the conversation of this column: a list of messages with `role` and `content`. Tools
    /// stand in the column `tools`.
    Chat {
        /// The column.
        messages: String,
        /// The template.
        template: ChatTemplate,
    },
}

impl Preprocessor for CausalLM {
    fn settings(&self) -> Value {
        let source = match &self.source {
            Source::Text(column) => json!({ "text": column }),
            Source::Completion { prompt, completion } => {
                json!({ "prompt": prompt, "completion": completion })
            }
            Source::Chat { messages, template } => {
                let template = template
                    .select(&RenderOptions::default())
                    .map(|(_, source)| source);
                json!({ "messages": messages, "template": template.unwrap_or_default() })
            }
        };
        let texts = self.texts.settings();
        json!({ "task": "causal-lm", "source": source, "append_eos": self.append_eos, "texts": texts })
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        let (mut ids, mut labels) = match &self.source {
            Source::Text(_) if is_blank_line(record) => return Ok(Vec::new()),
            Source::Text(column) => (self.tokens(text(record, column)?, true)?, None),
            Source::Completion { prompt, completion } => {
                let prompt = self.tokens(text(record, prompt)?, true)?;
                let completion = self.tokens(text(record, completion)?, false)?;
                let known = std::iter::repeat_n(NOT_LEARNED, prompt.len());
                let labels: Vec<i32> = known.chain(completion.iter().map(|id| *id as i32)).collect();
                ([prompt, completion].concat(), Some(labels))
            }
            Source::Chat { messages, template } => {
                let tools = match column(record, "tools") {
                    Ok(Value::Array(tools)) => Some(tools.clone()),
                    _ => None,
                };
                let (ids, learned) = self.chat(template, list(record, messages)?, tools)?;
                if !learned.contains(&true) {
                    return Err(format!("`{messages}` holds no word of the assistant"));
                }
                let label = |(id, learned): (&u32, bool)| if learned { *id as i32 } else { NOT_LEARNED };
                let labels = ids.iter().zip(learned).map(label).collect();
                (ids, Some(labels))
            }
        };
        if ids.is_empty() {
            return Err("is a text with no tokens".to_string());
        }
        let eos = self.texts.tokenizer.eos_token_id().filter(|_| self.append_eos);
        if let Some(eos) =
            eos.filter(|eos| ids.last() != Some(eos) && !matches!(self.source, Source::Chat { .. }))
        {
            ids.push(eos);
            labels.iter_mut().for_each(|labels| labels.push(eos as i32));
        }
        let most = self.texts.max_length.unwrap_or(usize::MAX);
        ids.truncate(most);
        let example = Example::default().with_ids("input_ids", &ids);
        Ok(vec![match labels {
            Some(mut labels) => {
                labels.truncate(most);
                if labels.iter().all(|label| *label == NOT_LEARNED) {
                    return Err(format!(
                        "what is to be learned lies behind the first {most} tokens (max_length)"
                    ));
                }
                example.with("labels", labels)
            }
            None => example,
        }])
    }
}

impl CausalLM {
    /// The tokens of a text; where it goes on after another one, nothing is put before it.
    fn tokens(&self, text: &str, begins: bool) -> Result<Vec<u32>, String> {
        let tokenizer = &self.texts.tokenizer;
        let mut ids = tokenizer
            .encode(text, begins)
            .map_err(|error| error.to_string())?;
        // What a tokenizer puts around a text is no text.
        if begins && ids.len() <= tokenizer.num_special_tokens_to_add(false) {
            return Err("is a text with no tokens".to_string());
        }
        // The text may go on; where it does not, its end is set by `append_eos`.
        if begins && ids.len() > 1 && ids.last().copied() == tokenizer.eos_token_id() {
            ids.pop();
        }
        Ok(ids)
    }

    /// The tokens of a conversation, and which of them the assistant says.
    fn chat(
        &self,
        template: &ChatTemplate,
        messages: &[Value],
        tools: Option<Vec<Value>>,
    ) -> Result<(Vec<u32>, Vec<bool>), String> {
        if let Some(other) = messages.iter().find(|message| !message.is_object()) {
            return Err(format!(
                "a message is {}, not an object with `role` and `content`",
                kind(other)
            ));
        }
        let options = RenderOptions {
            tools,
            ..RenderOptions::default()
        };
        let plain = |error: oxiformers_processors::Error| error.to_string();
        let mut rendered = template.render_tracked(messages, &options).map_err(plain)?;
        if rendered.generation.is_empty() {
            // The template does not say where the assistant speaks: what a message adds to the prompt that asks for it.
            for (at, message) in messages.iter().enumerate() {
                if message.get("role").and_then(Value::as_str) != Some("assistant") {
                    continue;
                }
                let asking = RenderOptions {
                    add_generation_prompt: true,
                    ..options.clone()
                };
                let before = match at {
                    0 => String::new(),
                    _ => template.render(&messages[..at], &asking).map_err(plain)?,
                };
                let after = template.render(&messages[..=at], &options).map_err(plain)?;
                if !after.starts_with(&before) || !rendered.text.starts_with(&after) {
                    return Err(
                        "the chat template has no {% generation %} block, and what the assistant says cannot be told \
                         from the rest; use a template that has one"
                            .to_string(),
                    );
                }
                rendered
                    .generation
                    .push(before.chars().count()..after.chars().count());
            }
        }
        let bare = EncodeOptions {
            add_special_tokens: false,
            ..EncodeOptions::default()
        };
        let encoding = self
            .texts
            .tokenizer
            .encode_with(&rendered.text, &bare)
            .map_err(plain)?;
        let offsets: Vec<_> = encoding.offsets.iter().map(|(start, end)| *start..*end).collect();
        let mask = assistant_mask(&rendered.generation, &offsets);
        Ok((encoding.ids, mask))
    }
}

impl Objective for CausalLM {
    fn collate(&self, rows: &[Row], _: Draw) -> Batch {
        let labels = |row: &Row| {
            let labels = row.example.ints("labels").or(row.example.ints("input_ids"));
            wide(labels.unwrap_or_default())
        };
        if self.padding_free {
            return flattened(rows, labels, &self.texts);
        }
        let mut labels: Vec<_> = rows.iter().map(labels).collect();
        self.texts.padding.fill(&mut labels, IGNORED);
        Batch::padded(rows, self.texts.padding).with_labels(Targets::Tokens(labels))
    }
}

/// All sequences in one row; the first token of each is not to be predicted from the sequence before.
fn flattened(rows: &[Row], labels: impl Fn(&Row) -> Vec<i64>, texts: &Texts) -> Batch {
    let (mut ids, mut segments, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    for (segment, row) in rows.iter().enumerate() {
        let mut labels = labels(row);
        if let Some(first) = labels.first_mut() {
            *first = IGNORED;
        }
        segments.extend(std::iter::repeat_n(segment as u32, labels.len()));
        targets.extend(labels);
        ids.extend(
            row.example
                .ints("input_ids")
                .unwrap_or_default()
                .iter()
                .map(|id| *id as u32),
        );
    }
    let mut batch = Batch::from_rows(vec![ids], Vec::new(), texts.padding);
    let [_, seq] = batch.dims();
    targets.resize(seq, IGNORED);
    segments.resize(seq, rows.len() as u32);
    batch.segments = vec![segments];
    batch.with_labels(Targets::Tokens(vec![targets]))
}
