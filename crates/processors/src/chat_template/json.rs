//! The `tojson` filter of Transformers' template environment, which is Python's `json.dumps`.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, State};

/// Nesting of a value; Python's own recursion limit is near 1000.
const MAX_DEPTH: usize = 256;
/// Longest document that one call may write.
const MAX_LEN: usize = 32 << 20;

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`.
pub(super) fn tojson(state: &State, value: Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    type Arguments = (Option<Value>, Option<Value>, Option<Value>, Option<Value>, Kwargs);
    let (ensure_ascii, indent, separators, sort_keys, kwargs): Arguments =
        from_args(&arguments.into_values())?;
    let argument = |name, given: Option<Value>| -> Result<Option<Value>, Error> {
        let value = match given {
            Some(value) => Some(value),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument("ensure_ascii", ensure_ascii)?.is_some_and(|value| value.is_true());
    let sort_keys = argument("sort_keys", sort_keys)?.is_some_and(|value| value.is_true());
    let indent = match argument("indent", indent)? {
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_string(),
            None => " ".repeat(i64::try_from(value)?.clamp(0, 256) as usize),
        }),
        None => None,
    };
    let (item, key) = match argument("separators", separators)? {
        Some(pair) => {
            let pair: Vec<Value> = pair.try_iter()?.take(3).collect();
            match pair.as_slice() {
                [item, key] => (item.to_string(), key.to_string()),
                _ => return Err(refuse("separators must be a pair of strings")),
            }
        }
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    kwargs.assert_all_used()?;
    // Shared parts of a value are written once per use, so the text can outgrow what the value cost to build.
    let budget = state.fuel_levels().map_or(MAX_LEN, |(_, left)| {
        MAX_LEN.min((left as usize).saturating_mul(16))
    });
    let mut dump = Dump {
        out: String::new(),
        ensure_ascii,
        sort_keys,
        indent,
        item,
        key,
        budget,
    };
    dump.value(&value, 0)?;
    state.consume_fuel(dump.out.len() as u64 / 16)?;
    Ok(Value::from(dump.out))
}

struct Dump {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item: String,
    key: String,
    budget: usize,
}

impl Dump {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(refuse("tojson: nested too deeply"));
        }
        self.check()?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let mut any = false;
                self.out.push('[');
                for item in value.try_iter()? {
                    self.between(any, depth + 1);
                    self.value(&item, depth + 1)?;
                    any = true;
                }
                self.close(any, depth, ']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.out.push('{');
                for (index, key) in keys.iter().enumerate() {
                    self.between(index > 0, depth + 1);
                    match key.kind() {
                        ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                        ValueKind::None => self.string("null"),
                        ValueKind::Bool => self.string(if key.is_true() { "true" } else { "false" }),
                        ValueKind::Number => self.string(&number(key)),
                        kind => return Err(refuse(format!("tojson: a {kind} cannot be a key"))),
                    }
                    self.out.push_str(&self.key);
                    self.value(&value.get_item(key)?, depth + 1)?;
                }
                self.close(!keys.is_empty(), depth, '}');
            }
            kind => return Err(refuse(format!("tojson: {kind} is not JSON serializable"))),
        }
        self.check()
    }

    fn check(&self) -> Result<(), Error> {
        if self.out.len() > self.budget {
            return Err(Error::new(ErrorKind::OutOfFuel, "tojson: the text is too long"));
        }
        Ok(())
    }

    /// Separator and line break before an item.
    fn between(&mut self, any: bool, depth: usize) {
        if any {
            self.out.push_str(&self.item);
        }
        self.newline(depth);
    }

    fn close(&mut self, any: bool, depth: usize, bracket: char) {
        if any {
            self.newline(depth);
        }
        self.out.push(bracket);
    }

    fn newline(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x08' => self.out.push_str("\\b"),
                '\x0c' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A number as `json.dumps` writes it.
fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => match float_repr(float).as_str() {
            "nan" => "NaN".into(),
            "inf" => "Infinity".into(),
            "-inf" => "-Infinity".into(),
            text => text.into(),
        },
        _ => value.to_string(),
    }
}

/// Python's `repr(float)`.
pub(super) fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    // Rust's debug form is the same shortest text with the same thresholds, but for the exponent's padding.
    let text = format!("{value:?}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => {
            let (sign, digits) = match exponent.strip_prefix('-') {
                Some(digits) => ('-', digits),
                None => ('+', exponent),
            };
            format!("{mantissa}e{sign}{digits:0>2}")
        }
        None => text,
    }
}

fn refuse(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
