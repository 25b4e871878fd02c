//! Chat templates: a conversation to the exact text that the model was trained on.
//!
//! The template is the model's own (`chat_template.jinja`, `tokenizer_config.json` or GGUF metadata) and is
//! rendered as Transformers 5.23 does in `apply_chat_template`: Jinja2's immutable sandbox with `trim_blocks`,
//! `lstrip_blocks`, loop controls, `{% generation %}` blocks and Python's ways of printing values.
//!
//! ```
//! use oxiformers_processors::{ChatTemplate, Message, RenderOptions};
//!
//! let template = ChatTemplate::new("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")?;
//! let text = template.render(&[Message::user("Hi")], &RenderOptions::default())?;
//! assert_eq!(text, "<user>Hi");
//! # Ok::<(), oxiformers_processors::Error>(())
//! ```

mod bounds;
mod encode;
mod environment;
mod files;
mod generation;
mod json;
mod message;
mod methods;
mod rewrite;
mod sanitize;
mod strftime;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use indexmap::IndexMap;
use minijinja::Environment;
use serde::Serialize;
use serde_json::{Map, Value};

pub use chrono::NaiveDateTime;
pub use encode::{EncodedChat, encode_prompt};
pub use generation::assistant_mask;
pub use message::{Content, Message};
pub use sanitize::{ControlTokens, Piece};

use crate::{Error, Result};

/// Names under which a message's reasoning is passed; the first is the one templates are meant to read.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Appended to the final message to find its end in the rendered text.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Context names that only the renderer sets.
const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];
/// Nesting of messages and arguments, that of `serde_json`'s own parser.
const MAX_DEPTH: usize = 128;

/// The chat templates of a model, compiled.
#[derive(Clone)]
pub struct ChatTemplate {
    env: Arc<Environment<'static>>,
    sources: IndexMap<String, String>,
    special_tokens: Map<String, Value>,
}

/// What [`ChatTemplate::render`] is asked for beside the messages.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// JSON schemas of the functions that the model may call.
    pub tools: Option<Vec<Value>>,
    /// Documents to ground the answer in, objects with `title` and `text`.
    pub documents: Option<Vec<Value>>,
    /// End with the header of a new assistant message.
    pub add_generation_prompt: bool,
    /// Leave the final message open so that the model goes on with it: the field to continue, `content` as a
    /// rule, or `reasoning_content`. Not together with `add_generation_prompt`.
    pub continue_final_message: Option<String>,
    /// Name of the template to use (`default`, `tool_use`, `rag`, …); as Transformers does, `tool_use` is
    /// taken when there are tools and `default` otherwise.
    pub template: Option<String>,
    /// Further variables of the template (`enable_thinking`, `reasoning_effort`, `date_string`, …); they win
    /// over special tokens of the same name.
    pub kwargs: Map<String, Value>,
    /// What `strftime_now` takes for now; the local time when `None`.
    pub now: Option<NaiveDateTime>,
}

impl RenderOptions {
    /// Options that end the text with the header of the assistant's next message.
    pub fn generation() -> Self {
        Self {
            add_generation_prompt: true,
            ..Self::default()
        }
    }

    /// Options that leave the `content` of the final message open.
    pub fn continuing() -> Self {
        Self {
            continue_final_message: Some("content".into()),
            ..Self::default()
        }
    }

    /// Sets a variable of the template.
    pub fn with(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.kwargs.insert(name.into(), value.into());
        self
    }

    /// Sets the tools.
    pub fn with_tools(mut self, tools: Vec<Value>) -> Self {
        self.tools = Some(tools);
        self
    }
}

/// A rendered conversation and where the assistant speaks in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text, with the special tokens that the template writes (a tokenizer must not add its own again).
    pub text: String,
    /// Character (not byte) ranges of the `{% generation %}` blocks, in order.
    pub generation: Vec<Range<usize>>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("sources", &self.sources)
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles the one template of a model.
    pub fn new(source: impl Into<String>) -> Result<Self> {
        Self::named([("default".to_string(), source.into())])
    }

    /// Compiles the named templates of a model.
    pub fn named(templates: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let mut env = environment::new();
        let mut sources = IndexMap::new();
        for (name, source) in templates {
            let syntax = |message| Error::TemplateSyntax {
                name: name.clone(),
                message,
            };
            let rewritten = rewrite::rewrite(&source).map_err(syntax)?;
            env.add_template_owned(name.clone(), rewritten)
                .map_err(|error| syntax(environment::describe(&error)))?;
            sources.insert(name, source);
        }
        if sources.is_empty() {
            return Err(Error::NoTemplate(
                "the model has no chat template: pass one as Jinja text".into(),
            ));
        }
        Ok(Self {
            env: Arc::new(env),
            sources,
            special_tokens: Map::new(),
        })
    }

    /// The special tokens that templates see (`bos_token`, `eos_token`, …).
    pub fn with_special_tokens<K: Into<String>, V: Into<Value>>(
        mut self,
        tokens: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        self.special_tokens.extend(
            tokens
                .into_iter()
                .map(|(name, token)| (name.into(), token.into())),
        );
        self
    }

    /// Names of the templates.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sources.keys().map(String::as_str)
    }

    /// The special tokens that templates see.
    pub fn special_tokens(&self) -> &Map<String, Value> {
        &self.special_tokens
    }

    /// Name and Jinja source of the template that these options pick.
    pub fn select(&self, options: &RenderOptions) -> Result<(&str, &str)> {
        let name = match &options.template {
            Some(name) => name.as_str(),
            None if options.tools.is_some() && self.sources.contains_key("tool_use") => "tool_use",
            None => "default",
        };
        match self.sources.get_key_value(name) {
            Some((name, source)) => Ok((name, source)),
            None => {
                let names: Vec<_> = self.names().collect();
                Err(Error::NoTemplate(format!(
                    "the model has no chat template named {name:?}; name one of {names:?}"
                )))
            }
        }
    }

    /// Renders a conversation: `messages` are [`Message`]s or JSON objects with `role` and `content`.
    pub fn render<M: Serialize>(&self, messages: &[M], options: &RenderOptions) -> Result<String> {
        Ok(self.render_tracked(messages, options)?.text)
    }

    /// Renders a conversation and reports its `{% generation %}` blocks, for [`assistant_mask`].
    pub fn render_tracked<M: Serialize>(&self, messages: &[M], options: &RenderOptions) -> Result<Rendered> {
        let (name, source) = self.select(options)?;
        let mut messages = prepare_messages(messages)?;
        let open = match &options.continue_final_message {
            Some(_) if options.add_generation_prompt => {
                return Err(Error::chat(
                    "continue_final_message",
                    "not together with add_generation_prompt: one goes on with the final message, the other \
                     starts a new one",
                ));
            }
            Some(field) => Some(open_final_message(&mut messages, field, source)?),
            None => None,
        };
        for (field, list) in [("tools", &options.tools), ("documents", &options.documents)] {
            for value in list.iter().flatten() {
                check(field, value)?;
            }
        }
        if let Some(name) = options
            .kwargs
            .keys()
            .find(|name| RESERVED.contains(&name.as_str()))
        {
            return Err(Error::chat(
                "kwargs",
                format!("{name:?} has an argument of its own"),
            ));
        }

        let mut context = self.special_tokens.clone();
        for (name, value) in &options.kwargs {
            check_depth("kwargs", value, 0)?;
            context.insert(name.clone(), value.clone());
        }
        context.insert("messages".into(), messages.into());
        context.insert("tools".into(), options.tools.clone().into());
        context.insert("documents".into(), options.documents.clone().into());
        context.insert(
            "add_generation_prompt".into(),
            options.add_generation_prompt.into(),
        );

        let progress = Arc::new(Mutex::new(generation::Progress::default()));
        let text = environment::render(&self.env, name, context, options.now, &progress)?;
        let mut generation = progress
            .lock()
            .map(|mut progress| std::mem::take(&mut progress.spans))
            .unwrap_or_default();
        let text = match open {
            Some(final_text) => {
                let text = cut_at_tag(text, &final_text)?;
                let length = text.chars().count();
                generation.retain(|span| span.start < length);
                generation
                    .iter_mut()
                    .for_each(|span| span.end = span.end.min(length));
                text
            }
            None => text,
        };
        Ok(Rendered { text, generation })
    }
}

/// Plain JSON of the messages: keys with a null value go, reasoning is passed under all its names.
fn prepare_messages<M: Serialize>(messages: &[M]) -> Result<Vec<Value>> {
    if messages.is_empty() {
        return Err(Error::chat(
            "messages",
            "the conversation is empty: give at least one message",
        ));
    }
    let mut prepared = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        let value = serde_json::to_value(message)
            .map_err(|error| Error::chat("messages", format!("message {index}: {error}")))?;
        check("messages", &value)?;
        let Value::Object(mut message) = value else {
            continue;
        };
        message.retain(|_, value| !value.is_null());
        let reasoning = REASONING_FIELDS
            .iter()
            .find_map(|field| message.get(*field))
            .cloned();
        if let Some(reasoning) = reasoning {
            let mut aliased = Map::from_iter([("thinking".to_string(), reasoning.clone())]);
            aliased.extend(message);
            aliased.insert("reasoning_content".into(), reasoning);
            message = aliased;
        }
        prepared.push(Value::Object(message));
    }
    Ok(prepared)
}

/// Each message, tool and document is an object of bounded depth.
fn check(field: &'static str, value: &Value) -> Result<()> {
    if !value.is_object() {
        let kind = match value {
            Value::Array(_) => "a list",
            Value::String(_) => "a string",
            _ => "a scalar",
        };
        return Err(Error::chat(
            field,
            format!("expected a list of objects, but one item is {kind}"),
        ));
    }
    check_depth(field, value, 0)
}

fn check_depth(field: &'static str, value: &Value, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::chat(
            field,
            format!("nested deeper than {MAX_DEPTH} levels"),
        ));
    }
    match value {
        Value::Array(items) => items
            .iter()
            .try_for_each(|item| check_depth(field, item, depth + 1)),
        Value::Object(items) => items
            .values()
            .try_for_each(|item| check_depth(field, item, depth + 1)),
        _ => Ok(()),
    }
}

/// Tags the end of the final message's `field` and returns the text that it had.
fn open_final_message(messages: &mut [Value], field: &str, source: &str) -> Result<String> {
    let refuse = |message: String| Error::chat("continue_final_message", message);
    let last = messages.last_mut().and_then(Value::as_object_mut);
    let last = last.ok_or_else(|| refuse("the conversation is empty".into()))?;
    let value = last
        .get(field)
        .cloned()
        .ok_or_else(|| refuse(format!("the final message has no {field:?} to continue")))?;

    // Reasoning stands under several names: tag every copy, whichever the template reads.
    let fields: Vec<&str> = if REASONING_FIELDS.contains(&field) {
        REASONING_FIELDS
            .into_iter()
            .filter(|name| last.get(*name) == Some(&value))
            .collect()
    } else {
        vec![field]
    };
    if !fields.iter().any(|field| source.contains(field)) {
        return Err(refuse(format!(
            "the chat template does not read the field {field:?}"
        )));
    }
    match value {
        Value::Array(_) => {
            let block = last
                .get_mut(field)
                .and_then(Value::as_array_mut)
                .and_then(|blocks| {
                    blocks
                        .iter_mut()
                        .rev()
                        .find_map(|block| block.as_object_mut()?.get_mut("text"))
                });
            let text = match block {
                Some(Value::String(text)) => text,
                Some(_) => return Err(refuse("the \"text\" of the final message is not a string".into())),
                None => return Err(refuse("the final message has no text to continue".into())),
            };
            let before = text.clone();
            text.push_str(CONTINUE_TAG);
            Ok(before)
        }
        Value::String(text) => {
            for field in fields {
                last.insert(field.into(), format!("{text}{CONTINUE_TAG}").into());
            }
            Ok(text)
        }
        _ => Err(refuse(format!("the {field:?} of the final message is not text"))),
    }
}

/// Cuts the rendered text where the final message ends.
fn cut_at_tag(mut text: String, final_text: &str) -> Result<String> {
    let tag = CONTINUE_TAG.trim_end();
    let found = text.rfind(tag).filter(|_| text.contains(py_strip(final_text)));
    let Some(at) = found else {
        return Err(Error::chat(
            "continue_final_message",
            format!(
                "the final message does not appear in the rendered text; this template drops part of it. \
                 Message: {:?}",
                py_strip(final_text)
            ),
        ));
    };
    let spacing_kept = text[at..].starts_with(CONTINUE_TAG);
    text.truncate(at);
    if !spacing_kept {
        // The template trimmed the message, so what stood before the tag would have been trimmed too.
        text.truncate(text.trim_end_matches(is_py_space).len());
    }
    Ok(text)
}

/// Whitespace in Python's sense, which has four separators more than Unicode's `White_Space`.
fn is_py_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn py_strip(text: &str) -> &str {
    text.trim_matches(is_py_space)
}
