//! Forms that fields of several configurations have.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// Reads one value, or a list of them.
///
/// # Errors
/// Where the value is neither.
pub fn one_or_more<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    d: D,
) -> std::result::Result<Vec<T>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMore<T> {
        One(T),
        More(Vec<T>),
    }
    Ok(match OneOrMore::deserialize(d)? {
        OneOrMore::One(one) => vec![one],
        OneOrMore::More(all) => all,
    })
}

/// A configuration with other defaults than its type has: the fields of `json`, and those of `defaults` elsewhere.
pub(crate) fn over_defaults<C: Serialize + DeserializeOwned>(
    defaults: &C,
    json: Value,
) -> serde_json::Result<C> {
    let mut all = serde_json::to_value(defaults)?;
    match (&mut all, json) {
        (Value::Object(all), Value::Object(fields)) => all.extend(fields),
        (all, json) => *all = json,
    }
    serde_json::from_value(all)
}
