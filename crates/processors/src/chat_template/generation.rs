//! `{% generation %}` blocks: which part of a rendered conversation the assistant wrote.
//!
//! The tags become call blocks (see `rewrite`). The function that they call notes how much text has been written
//! by then: the start of the block.

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

/// One flag per token: does the token hold text of a generation block?
///
/// `offsets` are the character ranges of the tokens in the rendered text; as in Transformers, from the token
/// with a span's first character to the token with its last.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mask_follows_spans() {
        let offsets = [0..2, 2..5, 5..6, 6..9];
        let of = |spans: &[Range<usize>]| assistant_mask(spans, &offsets);
        let one = |span: Range<usize>| of(std::slice::from_ref(&span));
        assert_eq!(one(3..6), [false, true, true, false]);
        assert_eq!(of(&[0..1, 6..20]), [true, false, false, true]);
        assert_eq!(one(30..40), [false; 4]);
    }
}
