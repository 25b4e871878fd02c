//! Python's methods of strings, lists and dicts, where minijinja-contrib lacks them or counts differently.
//!
//! Methods that change a list or a dict do not exist: the sandbox of Transformers refuses them.

use std::borrow::Cow;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::is_py_space;

/// Calls `value.method(args)`.
pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let own = match (value.kind(), value.as_str()) {
        (_, Some(text)) => of_string(state, text, method, args)?,
        (ValueKind::Seq, _) => of_sequence(value, method, args)?,
        (ValueKind::Map, _) if method == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        _ => None,
    };
    match own {
        Some(value) => Ok(value),
        None => unknown_method_callback(state, value, method, args),
    }
}

fn of_sequence(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "copy" => {
            let () = from_args(args)?;
            value.clone()
        }
        "index" => {
            let (item,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|other| other == *item);
            Value::from(at.ok_or_else(|| refuse("the list has no such item"))?)
        }
        _ => return Ok(None),
    }))
}

fn of_string(state: &State, text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let value = match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let matches = |c: char| chars.map_or_else(|| is_py_space(c), |chars| chars.contains(c));
            Value::from(match method {
                "strip" => text.trim_matches(matches),
                "lstrip" => text.trim_start_matches(matches),
                _ => text.trim_end_matches(matches),
            })
        }
        "split" | "rsplit" => {
            let (separator, limit, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
            let separator = match separator {
                Some(separator) => Some(separator),
                None => kwargs.get("sep")?,
            };
            let limit = match limit {
                Some(limit) => Some(limit),
                None => kwargs.get("maxsplit")?,
            };
            kwargs.assert_all_used()?;
            let limit = limit.and_then(|limit| usize::try_from(limit).ok());
            let limit = limit.unwrap_or(usize::MAX - 1);
            let from_right = method == "rsplit";
            let parts = match separator {
                Some("") => return Err(refuse("empty separator")),
                Some(separator) if from_right => {
                    let mut parts: Vec<_> = text.rsplitn(limit + 1, separator).collect();
                    parts.reverse();
                    parts
                }
                Some(separator) => text.splitn(limit + 1, separator).collect(),
                None => split_spaces(text, limit, from_right),
            };
            parts.into_iter().map(Value::from).collect()
        }
        "splitlines" => {
            let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = match keep {
                Some(keep) => keep,
                None => kwargs.get::<Option<bool>>("keepends")?.unwrap_or(false),
            };
            kwargs.assert_all_used()?;
            lines(text, keep).into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(refuse("empty separator"));
            }
            let (before, middle, after) = match method {
                "partition" => text
                    .split_once(separator)
                    .map_or((text, "", ""), |(before, after)| (before, separator, after)),
                _ => text
                    .rsplit_once(separator)
                    .map_or(("", "", text), |(before, after)| (before, separator, after)),
            };
            Value::from(Tuple::from([before, middle, after].map(Value::from)))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let found = within(text, start, end).and_then(|(before, part)| {
                let at = match method {
                    "find" | "index" => part.find(what),
                    _ => part.rfind(what),
                }?;
                Some(before + part[..at].chars().count())
            });
            match found {
                Some(at) => Value::from(at),
                None if method.ends_with("find") => Value::from(-1),
                None => return Err(refuse("substring not found")),
            }
        }
        "count" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            Value::from(within(text, start, end).map_or(0, |(_, part)| part.matches(what).count()))
        }
        "replace" => {
            let (old, new, limit, kwargs): (&str, &str, Option<i64>, Kwargs) = from_args(args)?;
            let limit = match limit {
                Some(limit) => Some(limit),
                None => kwargs.get("count")?,
            };
            kwargs.assert_all_used()?;
            let limit = limit
                .and_then(|limit| usize::try_from(limit).ok())
                .unwrap_or(usize::MAX);
            let count = text.matches(old).count().min(limit);
            afford(state, count.saturating_mul(new.len()).saturating_add(text.len()))?;
            Value::from(text.replacen(old, new, limit))
        }
        "join" => {
            let (values,): (&Value,) = from_args(args)?;
            let mut out = String::new();
            for (index, value) in values.try_iter()?.checked().enumerate() {
                let value = value?;
                let piece = value
                    .as_str()
                    .ok_or_else(|| refuse(format!("join: item {index} is no string")))?;
                afford(state, out.len() + text.len() + piece.len())?;
                if index > 0 {
                    out.push_str(text);
                }
                out.push_str(piece);
            }
            Value::from(out)
        }
        "format" => {
            // Widths are the only way to more text than there is in the arguments.
            let widths = text
                .split(|c: char| !c.is_ascii_digit())
                .map(|digits| match digits {
                    "" => 0,
                    digits => digits.parse().unwrap_or(usize::MAX),
                })
                .fold(text.len(), usize::saturating_add);
            afford(state, widths.saturating_mul(4))?;
            Value::from(format(FormatStyle::StrFormat, text, args)?)
        }
        "ljust" | "rjust" | "center" | "zfill" => {
            let (width, fill): (i64, Option<char>) = from_args(args)?;
            let length = text.chars().count();
            let missing = usize::try_from(width).unwrap_or(0).saturating_sub(length);
            afford(state, missing.saturating_mul(4).saturating_add(text.len()))?;
            Value::from(pad(text, method, missing, fill.unwrap_or(' ')))
        }
        "title" => {
            let () = from_args(args)?;
            Value::from(title(text))
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| -> String {
                if c.is_uppercase() {
                    c.to_lowercase().collect()
                } else {
                    c.to_uppercase().collect()
                }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "casefold" => {
            let () = from_args(args)?;
            Value::from(text.to_lowercase())
        }
        _ => return Ok(None),
    };
    Ok(Some(value))
}

/// Refuses to make a text that the fuel left cannot pay for.
fn afford(state: &State, bytes: usize) -> Result<(), Error> {
    match state.fuel_levels() {
        Some((_, left)) if bytes as u64 / 64 > left => {
            Err(Error::new(ErrorKind::OutOfFuel, "the text is too long"))
        }
        _ => Ok(()),
    }
}

/// `split()` without a separator: at runs of whitespace, with what is left at the end of the limit in one piece.
fn split_spaces(text: &str, limit: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = if from_right {
        text.trim_end_matches(is_py_space)
    } else {
        text.trim_start_matches(is_py_space)
    };
    while !rest.is_empty() && parts.len() < limit {
        let found = if from_right {
            rest.rfind(is_py_space)
        } else {
            rest.find(is_py_space)
        };
        let Some(at) = found else { break };
        if from_right {
            parts.push(rest[at..].trim_start_matches(is_py_space));
            rest = rest[..at].trim_end_matches(is_py_space);
        } else {
            parts.push(&rest[..at]);
            rest = rest[at..].trim_start_matches(is_py_space);
        }
    }
    if !rest.is_empty() {
        parts.push(rest);
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// `splitlines`, at all the line ends that Python knows.
fn lines(text: &str, keep: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find([
        '\n', '\r', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\u{85}', '\u{2028}', '\u{2029}',
    ]) {
        let mark = match rest[at..].starts_with("\r\n") {
            true => 2,
            false => rest[at..].chars().next().map_or(1, char::len_utf8),
        };
        lines.push(&rest[..if keep { at + mark } else { at }]);
        rest = &rest[at + mark..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// `text[start:end]` and the number of characters before it; `None` when the start lies beyond the end.
fn within(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(usize, &str)> {
    if start.is_none() && end.is_none() {
        return Some((0, text));
    }
    let length = text.chars().count();
    let position = |at: i64| match usize::try_from(at) {
        Ok(at) => at,
        Err(_) => length.saturating_sub(usize::try_from(at.unsigned_abs()).unwrap_or(usize::MAX)),
    };
    let start = position(start.unwrap_or(0));
    let end = end.map_or(length, position).min(length);
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(at, _)| at);
    (start <= end).then(|| (start, &text[byte(start)..byte(end)]))
}

/// `ljust`, `rjust`, `center` and `zfill`, with `missing` characters of `fill`.
fn pad(text: &str, method: &str, missing: usize, fill: char) -> String {
    let fills = |count: usize| String::from(fill).repeat(count);
    match method {
        "ljust" => format!("{text}{}", fills(missing)),
        "rjust" => format!("{}{text}", fills(missing)),
        "zfill" => {
            let sign = if text.starts_with(['+', '-']) { 1 } else { 0 };
            format!("{}{}{}", &text[..sign], "0".repeat(missing), &text[sign..])
        }
        _ => {
            // The odd character goes left when the width is odd.
            let width = missing + text.chars().count();
            let left = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", fills(left), fills(missing - left))
        }
    }
}

/// `title()`: a capital after everything that is no letter.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        let cased = c.is_lowercase() || c.is_uppercase();
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        inside = cased;
    }
    out
}

fn refuse(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
