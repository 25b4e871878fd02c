//! The template environment of Transformers: Jinja2's immutable sandbox, on minijinja.
//!
//! Where it still differs from Python:
//!
//! - there is no `%` on strings (the `format` filter is there) and no `truncate` and `urlencode` filter;
//! - `d.items` without a call is the key `items` of `d`, not the method;
//! - text added to a `safe` text is not escaped, and lazy results of filters count as lists in `tojson`;
//! - values of different types are ordered instead of refused;
//! - floats beyond 1e16 are written out in full inside containers and by `~`.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use chrono::NaiveDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Object, Value, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State};
use serde_json::Map;

use super::generation::{self, Progress};
use super::{bounds, json, methods, strftime};
use crate::Error as CrateError;

/// Instructions, and 64 bytes of produced data each, that one rendering may cost beside its input.
const FUEL: u64 = 2_000_000;
/// Longest text that a template may write beyond 16 times its input.
const MAX_OUTPUT: usize = 32 << 20;
/// Name of the filter around the values of a loop.
pub(super) const ITERABLE: &str = "__iterable__";
/// Nesting of macro calls and loops.
const RECURSION: usize = 100;

/// The exception a template raises itself.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// An environment with Transformers' filters and globals.
pub(super) fn new() -> Environment<'static> {
    let mut env = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
    {
        env.set_syntax(syntax);
    }
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_recursion_limit(RECURSION);
    env.set_formatter(print);
    env.set_unknown_method_callback(methods::call);
    env.add_filter("tojson", json::tojson);
    env.add_filter(ITERABLE, iterable);
    env.add_filter("wordcount", minijinja_contrib::filters::wordcount);
    env.add_test("iterable", |value: &Value| {
        value.is_undefined() || (!value.is_none() && value.try_iter().is_ok())
    });
    env.add_test("callable", |value: &Value| {
        value.is_undefined() || (value.kind() == ValueKind::Plain && value.as_object().is_some())
    });
    env.add_test("sequence", |value: &Value| {
        let kind = value.kind();
        matches!(
            kind,
            ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map
        )
    });
    env.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
        let message = message.to_string();
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    bounds::add_to(&mut env);
    env.add_global("dict", Value::from_object(Dict));
    env
}

/// Renders a template within its bounds.
pub(super) fn render(
    env: &Environment<'static>,
    name: &str,
    context: Map<String, serde_json::Value>,
    now: Option<NaiveDateTime>,
    progress: &Arc<Mutex<Progress>>,
) -> Result<String, CrateError> {
    let failed = |error: &Error| {
        let mut source = Some(error as &dyn std::error::Error);
        while let Some(error) = source {
            if let Some(Raised(message)) = error.downcast_ref() {
                return CrateError::TemplateRaised {
                    message: message.clone(),
                };
            }
            source = error.source();
        }
        CrateError::TemplateRender {
            name: name.into(),
            message: describe(error),
        }
    };

    let mut values: BTreeMap<String, Value> = BTreeMap::new();
    values.insert(
        "strftime_now".into(),
        Value::from_function(move |format: &str| -> Result<String, Error> {
            let now = now.unwrap_or_else(|| chrono::Local::now().naive_local());
            strftime::strftime(now, format).ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidOperation,
                    "strftime_now: the format is too long",
                )
            })
        }),
    );
    let mut input = 0usize;
    for (key, value) in context {
        input = input.saturating_add(size(&value));
        values.insert(key, to_value(value));
    }
    values.insert(
        generation::FUNCTION.into(),
        generation::function(progress.clone()),
    );

    let mut env = env.clone();
    env.set_fuel(Some(FUEL.saturating_add(2 * input as u64)));
    let mut writer = Bounded {
        text: Vec::new(),
        limit: MAX_OUTPUT.saturating_add(input.saturating_mul(16)),
        progress: progress.clone(),
    };
    let template = env.get_template(name).map_err(|error| failed(&error))?;
    template
        .render_captured_to(Value::from(values), &mut writer)
        .map_err(|error| failed(&error))?;
    String::from_utf8(writer.text).map_err(|error| CrateError::TemplateRender {
        name: name.into(),
        message: error.to_string(),
    })
}

/// What an error and its causes say, with the line of the innermost template error.
pub(super) fn describe(error: &Error) -> String {
    let mut text = String::new();
    let mut line = None;
    let mut cause = Some(error as &dyn std::error::Error);
    while let Some(error) = cause {
        if !text.is_empty() {
            text.push_str(": ");
        }
        match error.downcast_ref::<Error>() {
            Some(error) => {
                text.push_str(&error.kind().to_string());
                if let Some(detail) = error.detail() {
                    text.push_str(": ");
                    text.push_str(detail);
                }
                line = error.line().or(line);
            }
            None => text.push_str(&error.to_string()),
        }
        cause = error.source();
    }
    match line {
        Some(line) => format!("{text} (line {line})"),
        None => text,
    }
}

/// A template value of plain JSON, keys in their order.
fn to_value(json: serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (_, Some(value)) => Value::from(value),
            _ => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text),
        Json::Array(items) => Value::from(items.into_iter().map(to_value).collect::<Vec<_>>()),
        Json::Object(items) => Value::from_pairs(items.into_iter().map(|(key, item)| (key, to_value(item)))),
    }
}

/// Rough size of the input, to scale the bounds with.
fn size(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::String(text) => 8 + text.len(),
        serde_json::Value::Array(items) => 8 + items.iter().map(size).sum::<usize>(),
        serde_json::Value::Object(items) => {
            8 + items
                .iter()
                .map(|(key, item)| key.len() + size(item))
                .sum::<usize>()
        }
        _ => 8,
    }
}

/// Collects the output, counts its characters, and ends the rendering when it grows too long.
struct Bounded {
    text: Vec<u8>,
    limit: usize,
    progress: Arc<Mutex<Progress>>,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len().saturating_add(bytes.len()) > self.limit {
            return Err(io::Error::other("the rendered text is too long"));
        }
        if let Ok(mut progress) = self.progress.lock() {
            // Every byte but UTF-8's continuations starts a character.
            progress.written += bytes.iter().filter(|byte| (**byte & 0xc0) != 0x80).count();
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Prints a value as Python's `str` does.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match f64::try_from(value.clone()) {
        Ok(float) if value.kind() == ValueKind::Number && !value.is_integer() => {
            out.write_str(&json::float_repr(float))?;
            Ok(())
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// What a loop goes over: anything that Python can iterate.
fn iterable(value: Value) -> Result<Value, Error> {
    if value.is_none() {
        return Err(Error::new(ErrorKind::InvalidOperation, "none is not iterable"));
    }
    // A list of characters has a length, and so has the loop.
    let characters = |text: &str| text.chars().map(Value::from).collect();
    Ok(value.as_str().map(characters).unwrap_or(value))
}

/// `dict(…)` and `dict.fromkeys(…)`.
#[derive(Debug)]
struct Dict;

impl Object for Dict {
    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        let (value, kwargs): (Option<Value>, Kwargs) = from_args(args)?;
        let mut map: indexmap::IndexMap<Value, Value> = indexmap::IndexMap::new();
        if let Some(value) = value {
            let is_map = value.kind() == ValueKind::Map;
            for item in value.try_iter()? {
                if is_map {
                    let value = value.get_item(&item)?;
                    map.insert(item, value);
                } else {
                    map.insert(item.get_item_by_index(0)?, item.get_item_by_index(1)?);
                }
            }
        }
        for key in kwargs.args() {
            map.insert(Value::from(key), kwargs.get(key)?);
        }
        Ok(Value::from_pairs(map))
    }

    fn call_method(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        match method {
            "fromkeys" => {
                let (keys, value): (Value, Option<Value>) = from_args(args)?;
                let value = value.unwrap_or(Value::from(()));
                Ok(Value::from_pairs(
                    keys.try_iter()?.map(|key| (key, value.clone())),
                ))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}
