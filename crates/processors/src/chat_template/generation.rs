//! `{% generation %}` blocks: which part of a rendered conversation the assistant wrote.
//!
//! Jinja2 knows custom tags, minijinja does not, but Transformers' extension is nothing more than a call block.
//! So `{% generation %}…{% endgeneration %}` is rewritten to `{% call __generation__() %}…{% endcall %}` before
//! compiling; only the words inside the tags change, which leaves whitespace control as it was. The function
//! notes how much text has been written when it is called: the start of the block.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind, State};

/// Name of the function behind the rewritten blocks.
pub(super) const FUNCTION: &str = "__generation__";

/// What has been written so far, in characters.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub written: usize,
    pub spans: Vec<Range<usize>>,
}

/// The function that a rewritten block calls.
pub(super) fn function(progress: Arc<Mutex<Progress>>) -> Value {
    Value::from_function(move |state: &mut State, kwargs: Kwargs| -> Result<Value, Error> {
        let text = kwargs.get::<Value>("caller")?.call(state, &[])?;
        let length = text.as_str().map_or(0, |text| text.chars().count());
        let mut progress = progress
            .lock()
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, "a generation block was interrupted"))?;
        let start = progress.written;
        progress.spans.push(start..start + length);
        Ok(text)
    })
}

/// Rewrites the tags of generation blocks; everything else stays byte by byte.
pub(super) fn rewrite(source: &str) -> Result<String, String> {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let (piece, tail) = match tag.as_bytes().get(1) {
            Some(b'#') => tag.split_at(tag.find("#}").map_or(tag.len(), |end| end + 2)),
            Some(b'{') => tag.split_at(tag_end(tag, "}}")),
            Some(b'%') => {
                let (block, tail) = tag.split_at(tag_end(tag, "%}"));
                let inner = block
                    .trim_start_matches("{%")
                    .trim_start_matches(['-', '+'])
                    .trim_start();
                let word: &str = inner
                    .split(|c: char| !c.is_alphanumeric() && c != '_')
                    .next()
                    .unwrap_or_default();
                let replacement = match word {
                    "generation" => Some("call __generation__()"),
                    "endgeneration" => Some("endcall"),
                    _ => None,
                };
                if let Some(replacement) = replacement {
                    let start = block.len() - inner.len();
                    out.push_str(&block[..start]);
                    out.push_str(replacement);
                    out.push_str(&inner[word.len()..]);
                    rest = tail;
                    continue;
                }
                if word == "raw" {
                    tag.split_at(raw_end(tag, block.len()))
                } else {
                    if word == "set" && refused_target(&inner[3..]) {
                        return Err(format!(
                            "a namespace takes no name with a leading underscore: {block}"
                        ));
                    }
                    (block, tail)
                }
            }
            _ => tag.split_at(1),
        };
        out.push_str(piece);
        rest = tail;
    }
    out.push_str(rest);
    Ok(out)
}

/// `set ns._name = …`, which Transformers refuses.
fn refused_target(assignment: &str) -> bool {
    let target = assignment.split(['=', '%']).next().unwrap_or_default();
    target
        .split('.')
        .skip(1)
        .any(|name| name.trim_start().starts_with('_'))
}

/// Length of the tag that opens `text`, its end mark included; strings and brackets inside are skipped.
fn tag_end(text: &str, mark: &str) -> usize {
    let bytes = text.as_bytes();
    let mut depth = 0usize;
    let mut at = 2;
    while let Some(&byte) = bytes.get(at) {
        if depth == 0 && bytes[at..].starts_with(mark.as_bytes()) {
            return at + 2;
        }
        match byte {
            b'"' | b'\'' => {
                at += 1;
                while bytes.get(at).is_some_and(|&b| b != byte) {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    text.len()
}

/// Where the raw block that opens `text` ends, `{% endraw %}` included.
fn raw_end(text: &str, body: usize) -> usize {
    let mut from = body;
    while let Some(at) = text[from..].find("{%") {
        let tag = &text[from + at..];
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        if tag[2..end]
            .trim_start_matches(['-', '+'])
            .trim_start()
            .starts_with("endraw")
        {
            return from + at + end;
        }
        from += at + 2;
    }
    text.len()
}

/// One flag per token: does the token hold text of a generation block?
///
/// `offsets` are the character ranges of the tokens in the rendered text (add them up over a tokenizer that
/// counts bytes with [`char_to_byte_spans`] on the spans instead); as in Transformers, from the token with a
/// span's first character to the token with its last.
pub fn assistant_mask(spans: &[Range<usize>], offsets: &[Range<usize>]) -> Vec<bool> {
    let mut mask = vec![false; offsets.len()];
    let token_at = |at: usize| offsets.iter().position(|token| token.contains(&at));
    for span in spans.iter().filter(|span| !span.is_empty()) {
        // A start beyond the last token: the text was truncated.
        let Some(first) = token_at(span.start) else { break };
        let last = token_at(span.end - 1).unwrap_or(offsets.len().saturating_sub(1));
        mask.iter_mut()
            .take(last + 1)
            .skip(first)
            .for_each(|flag| *flag = true);
    }
    mask
}

/// Turns character ranges into byte ranges of `text`.
pub fn char_to_byte_spans(text: &str, spans: &[Range<usize>]) -> Vec<Range<usize>> {
    let starts: Vec<usize> = text
        .char_indices()
        .map(|(at, _)| at)
        .chain([text.len()])
        .collect();
    let byte = |at: usize| starts.get(at).copied().unwrap_or(text.len());
    spans
        .iter()
        .map(|span| byte(span.start)..byte(span.end))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tags_are_rewritten() {
        let source = "{# {% generation %} #}{{ '{% generation %}' }}{%- generation -%}x{%+ endgeneration %}\
                      {% raw %}{% generation %}{% endraw %}{% generations %} { {{ {'a': {}} }}";
        let expected = "{# {% generation %} #}{{ '{% generation %}' }}{%- call __generation__() -%}x{%+ endcall %}\
                        {% raw %}{% generation %}{% endraw %}{% generations %} { {{ {'a': {}} }}";
        assert_eq!(rewrite(source).unwrap(), expected);
        assert!(rewrite("{% set ns._x = 1 %}").is_err());
        assert!(rewrite("{% set ns.x = a._x %}").is_ok());
    }

    #[test]
    fn mask_follows_spans() {
        let offsets = [0..2, 2..5, 5..6, 6..9];
        let of = |spans: &[Range<usize>]| assistant_mask(spans, &offsets);
        assert_eq!(of(&[3..6]), [false, true, true, false]);
        assert_eq!(of(&[0..1, 6..20]), [true, false, false, true]);
        assert_eq!(of(&[30..40]), [false; 4]);
        assert_eq!(char_to_byte_spans("aé€b", &[1..3, 3..9]), [1..6, 6..7]);
    }
}
