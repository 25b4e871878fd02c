//! How deep a template may nest values.
//!
//! Printing, comparing and dropping a value recurse over what it contains, so a template that wraps a list in a
//! list again and again would use up the stack. Every place that can keep a value passes it through a filter
//! (see `rewrite`); what one expression can add to the depth is bounded by its length.

use indexmap::IndexMap;
use minijinja::value::{Object, Rest, Tuple, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, functions};

/// Deepest nesting of a value that a template keeps; more than messages may have.
const MAX_DEPTH: usize = 160;
/// Filter around what a variable is set to: bounded depth, and lists instead of lazy sequences, which could
/// hide more of the same.
pub(super) const BOUNDED: &str = "__bounded__";
/// Filter around what a namespace keeps: data alone, as namespaces, macros and loops could hold each other.
pub(super) const DATA: &str = "__data__";

pub(super) fn add_to(env: &mut Environment<'static>) {
    env.add_filter(BOUNDED, |state: &State, value: Value| {
        keep(state, value, Objects::Pass)
    });
    env.add_filter(DATA, |state: &State, value: Value| {
        keep(state, value, Objects::Refuse)
    });
    env.add_function("namespace", namespace);
    env.add_function("cycler", |state: &State, items: Rest<Value>| {
        let items: Result<Vec<_>, _> = items.0.into_iter().map(|item| data(state, item)).collect();
        minijinja_contrib::globals::cycler(items?)
    });
    env.add_function("joiner", |state: &State, separator: Option<Value>| {
        let separator = separator.map(|separator| data(state, separator)).transpose()?;
        Ok::<_, Error>(minijinja_contrib::globals::joiner(separator))
    });
}

/// What becomes of objects that are no data: namespaces, macros, loops, functions.
#[derive(Clone, Copy, PartialEq)]
enum Objects {
    Pass,
    Refuse,
}

fn data(state: &State, value: Value) -> Result<Value, Error> {
    keep(state, value, Objects::Refuse)
}

fn keep(state: &State, value: Value, objects: Objects) -> Result<Value, Error> {
    let mut visited = 0;
    let kept = bounded(state, &value, objects, 0, &mut visited);
    state.consume_fuel(visited)?;
    Ok(kept?.unwrap_or(value))
}

/// Checks a value; returns what to keep in its place if that is another.
fn bounded(
    state: &State,
    value: &Value,
    objects: Objects,
    depth: usize,
    visited: &mut u64,
) -> Result<Option<Value>, Error> {
    if depth > MAX_DEPTH {
        return Err(refuse(format!(
            "a value is nested deeper than {MAX_DEPTH} levels"
        )));
    }
    *visited += 1;
    if *visited > 1024 {
        state.consume_fuel(std::mem::take(visited))?;
    }
    let mut each = |value: &Value| bounded(state, value, objects, depth + 1, visited);
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let plain = is::<Vec<Value>>(value) || is::<Tuple>(value);
            let mut changed = !plain;
            let mut items = Vec::new();
            for (index, item) in value.try_iter()?.checked().enumerate() {
                let item = item?;
                match each(&item)? {
                    Some(kept) => {
                        if !changed {
                            items = value.try_iter()?.take(index).collect();
                            changed = true;
                        }
                        items.push(kept);
                    }
                    None if changed => items.push(item),
                    None => {}
                }
            }
            Ok(changed.then(|| Value::from(items)))
        }
        ValueKind::Map if is::<IndexMap<Value, Value>>(value) => {
            let mut changed = IndexMap::new();
            for key in value.try_iter()? {
                if let Some(kept) = each(&value.get_item(&key)?)? {
                    changed.insert(key, kept);
                }
            }
            if changed.is_empty() {
                return Ok(None);
            }
            let pair = |key: Value| {
                let item = match changed.get(&key) {
                    Some(kept) => kept.clone(),
                    None => value.get_item(&key)?,
                };
                Ok::<_, Error>((key, item))
            };
            let pairs: Result<Vec<_>, _> = value.try_iter()?.map(pair).collect();
            Ok(Some(Value::from_pairs(pairs?)))
        }
        _ if value.as_object().is_some() && objects == Objects::Refuse => Err(refuse(
            "namespaces, macros and loops cannot be kept in a namespace".to_owned(),
        )),
        _ => Ok(None),
    }
}

fn is<T: Object + 'static>(value: &Value) -> bool {
    value.downcast_object_ref::<T>().is_some()
}

/// `namespace(…)`, which takes no name with a leading underscore.
fn namespace(state: &State, defaults: Option<minijinja::value::ValueOrKwargs>) -> Result<Value, Error> {
    let defaults = match defaults.map(minijinja::value::ValueOrKwargs::into_value) {
        Some(defaults) => {
            let mut checked = Vec::new();
            for name in defaults.try_iter()? {
                if name.as_str().is_some_and(|name| name.starts_with('_')) {
                    return Err(refuse(format!(
                        "a namespace takes no name with a leading underscore, but got {name}; rename it"
                    )));
                }
                let value = defaults.get_item(&name)?;
                checked.push((name, data(state, value)?));
            }
            Some(Value::from_pairs(checked).into())
        }
        None => None,
    };
    functions::namespace(defaults)
}

fn refuse(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
