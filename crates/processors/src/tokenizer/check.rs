//! What must hold before bytes from outside reach code that takes it for granted.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::{Error, Result};

/// Runs code of a library that may panic on nonsense, and makes an error of it. (Where panics abort, as in the
/// browser, only the checks of this module stand before that code.)
pub(super) fn guard<T, E: ToString>(
    file: &str,
    run: impl FnOnce() -> std::result::Result<T, E>,
) -> Result<T> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Error::format(file, error.to_string())),
        Err(_) => Err(Error::format(
            file,
            "the tokenizer is inconsistent; fetch the file again",
        )),
    }
}

/// Checks the merges of BPE: both halves fit into the longest token together, and the second one begins with
/// the prefix that it is about to lose. (The library copies into a buffer of that length.)
pub(super) fn merges<'a>(
    file: &str,
    longest: usize,
    prefix: &str,
    merges: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<()> {
    for (left, right) in merges {
        let sound = right.is_char_boundary(prefix.len())
            && right.len() >= prefix.len()
            && left.len() + right.len() - prefix.len() <= longest;
        if !sound {
            return Err(Error::format(
                file,
                format!("the merge of {left:?} and {right:?} is not a token"),
            ));
        }
    }
    Ok(())
}

/// Longest token that merges are derived for, in bytes. Real ones stay below a few hundred.
const LONGEST: usize = 4096;

/// Refuses a token so long that trying all ways to cut it in two would take for ever.
pub(super) fn length(file: &str, bytes: usize) -> Result<()> {
    if bytes <= LONGEST {
        return Ok(());
    }
    Err(Error::format(
        file,
        format!("the vocabulary has a token of {bytes} bytes; {LONGEST} are the most"),
    ))
}

/// Looks through a `tokenizer.json` for what its own reader would not survive.
pub(super) fn tokenizer_json(file: &str, bytes: &[u8]) -> Result<()> {
    #[derive(Deserialize)]
    struct Outline<'a> {
        #[serde(default)]
        normalizer: Value,
        #[serde(default)]
        post_processor: Value,
        #[serde(borrow)]
        model: Model<'a>,
    }
    #[derive(Deserialize)]
    struct Model<'a> {
        #[serde(default)]
        vocab: Longest,
        #[serde(borrow, default)]
        merges: Vec<Merge<'a>>,
        #[serde(default)]
        continuing_subword_prefix: Option<String>,
    }
    // Bytes alone would let through what is no text in fields that this reader skips.
    let text = std::str::from_utf8(bytes).map_err(|e| Error::format(file, format!("not UTF-8: {e}")))?;
    let outline: Outline<'_> =
        serde_json::from_str(text).map_err(|e| Error::format(file, format!("not a tokenizer: {e}")))?;
    let prefix = outline.model.continuing_subword_prefix.unwrap_or_default();
    let pairs = outline
        .model
        .merges
        .iter()
        .map(Merge::halves)
        .collect::<Option<Vec<_>>>();
    let pairs = pairs.ok_or_else(|| Error::format(file, "model.merges: not pairs of tokens"))?;
    merges(file, outline.model.vocab.0, &prefix, pairs.into_iter())?;
    normalizer(file, &outline.normalizer)?;
    post_processor(file, &outline.post_processor)
}

/// Checks that the special tokens which a template puts around texts are those that it describes.
fn post_processor(file: &str, description: &Value) -> Result<()> {
    let pieces = ["single", "pair"]
        .into_iter()
        .flat_map(|name| inner(description, name));
    for token in pieces.filter_map(|piece| piece.get("SpecialToken")?.get("id")?.as_str()) {
        let known = description
            .get("special_tokens")
            .is_some_and(|tokens| tokens.get(token).is_some());
        if !known {
            return Err(Error::format(
                file,
                format!("post_processor.special_tokens does not describe {token:?}"),
            ));
        }
    }
    // A single text has no second one.
    let second = inner(description, "single")
        .filter_map(|piece| piece.get("Sequence")?.get("id"))
        .any(|id| id != "A");
    if second {
        return Err(Error::format(
            file,
            "post_processor.single: the only sequence is \"A\"",
        ));
    }
    inner(description, "processors").try_for_each(|inner| post_processor(file, inner))
}

/// The parts of a sequence of parts.
fn inner<'a>(description: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    description
        .get(name)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

/// Checks the character maps in a normalizer, however deep.
fn normalizer(file: &str, description: &Value) -> Result<()> {
    if let Some(map) = description.get("precompiled_charsmap") {
        let map = map
            .as_str()
            .ok_or_else(|| Error::format(file, "precompiled_charsmap is not a text"))?;
        use base64::Engine;
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(map)
            .map_err(|e| Error::format(file, format!("precompiled_charsmap: {e}")))?;
        charsmap(file, &bytes)?;
    }
    inner(description, "normalizers").try_for_each(|inner| normalizer(file, inner))
}

/// Checks a `precompiled_charsmap`: `u32` length of the trie in bytes, the trie (a double array of `u32` units
/// in blocks of 256), and the replacement texts, each ended by a zero byte. Every step of a lookup must stay in
/// the array, and every value must point to a text.
pub(super) fn charsmap(file: &str, bytes: &[u8]) -> Result<()> {
    let broken = |what: &str| Error::format(file, format!("precompiled_charsmap: {what}"));
    let (size, rest) = bytes
        .split_first_chunk::<4>()
        .ok_or_else(|| broken("cut short"))?;
    let size = u32::from_le_bytes(*size) as usize;
    let (trie, texts) = rest
        .split_at_checked(size)
        .ok_or_else(|| broken("the trie is cut short"))?;
    let texts = std::str::from_utf8(texts).map_err(|_| broken("the texts are not UTF-8"))?;
    let units: Vec<usize> = trie
        .as_chunks::<4>()
        .0
        .iter()
        .map(|unit| u32::from_le_bytes(*unit) as usize)
        .collect();
    if !size.is_multiple_of(4) || units.is_empty() || !units.len().is_multiple_of(256) {
        return Err(broken("the trie is not made of whole blocks"));
    }
    for (at, unit) in units.iter().enumerate() {
        // A value; but the first unit is where every lookup begins, whatever it looks like.
        if unit >> 31 != 0 && at != 0 {
            continue;
        }
        let next = at ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6));
        let leaf = (unit >> 8) & 1 == 1;
        match units.get(next) {
            // Unused units look like inner ones and may point anywhere, but only a label that leads to them
            // is followed: an inner unit's label is the byte that it was reached by.
            None => return Err(broken("the trie leads outside of itself")),
            Some(value) if leaf && !texts.is_char_boundary(value & 0x7FFF_FFFF) => {
                return Err(broken("a value points outside of the texts"));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Length in bytes of the longest key of a vocabulary given as an object; other shapes count as 0.
#[derive(Default)]
struct Longest(usize);

impl<'de> Deserialize<'de> for Longest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Longest;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Longest, A::Error> {
                let mut longest = 0;
                while let Some((key, _)) = map.next_entry::<Text<'de>, IgnoredAny>()? {
                    longest = longest.max(key.0.len());
                }
                Ok(Longest(longest))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Longest, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Longest(0))
            }
            fn visit_unit<E>(self) -> std::result::Result<Longest, E> {
                Ok(Longest(0))
            }
        }
        deserializer.deserialize_any(Keys)
    }
}

/// A string, borrowed where the JSON has no escapes in it.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A merge in either spelling.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge<'a> {
    Pair(#[serde(borrow)] Text<'a>, #[serde(borrow)] Text<'a>),
    Joined(#[serde(borrow)] Text<'a>),
}

impl Merge<'_> {
    fn halves(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((&left.0, &right.0)),
            Self::Joined(text) => text.0.split_once(' '),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_charsmap_begins_with_an_inner_unit() {
        let mut bytes = 1024u32.to_le_bytes().to_vec();
        bytes.extend([0; 1024]);
        assert!(charsmap("spiece.model", &bytes).is_ok());
        // The mark of a value, which leads far outside.
        bytes[7] = 0x80;
        let error = charsmap("spiece.model", &bytes).unwrap_err().to_string();
        assert!(error.contains("outside"), "{error}");
    }
}
