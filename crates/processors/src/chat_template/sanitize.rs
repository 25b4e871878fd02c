//! Control tokens that a user wrote: to be encoded as plain text, not as the tokens they spell.
//!
//! The strings that go into a template are marked with two private-use characters around every control token;
//! the rendered text then falls into pieces, those of the template and those of the user.

use serde_json::{Map, Value};

/// Markers around a control token in user input (Transformers uses the same).
const START: char = '\u{f0000}';
const END: char = '\u{f0001}';

/// A model's control tokens.
#[derive(Debug, Clone)]
pub struct ControlTokens {
    /// Longest first, so that a token goes before the tokens inside it.
    tokens: Vec<String>,
}

/// A stretch of rendered text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Encode normally: special tokens in it are the template's.
    Template(String),
    /// A control token that the user spelled: encode without any added token.
    Plain(String),
}

impl ControlTokens {
    /// The special tokens of a tokenizer (and those added tokens that its template writes).
    pub fn new<T: Into<String>>(tokens: impl IntoIterator<Item = T>) -> Self {
        let mut tokens: Vec<String> = tokens
            .into_iter()
            .map(Into::into)
            .filter(|t: &String| !t.is_empty())
            .collect();
        tokens.sort_by_key(|token| std::cmp::Reverse(token.chars().count()));
        Self { tokens }
    }

    /// Marks the control tokens in every string of a value; keys stay.
    pub fn mark(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => self.mark_text(text).into(),
            Value::Array(items) => items.iter().map(|item| self.mark(item)).collect(),
            Value::Object(items) => Value::Object(
                items
                    .iter()
                    .map(|(k, v)| (k.clone(), self.mark(v)))
                    .collect::<Map<_, _>>(),
            ),
            other => other.clone(),
        }
    }

    fn mark_text(&self, text: &str) -> String {
        // Markers already there could forge a marked token.
        let text = text.replace([START, END], "");
        let mut out = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some(c) = rest.chars().next() {
            match self.at(rest) {
                Some(token) => {
                    out.push(START);
                    out.push_str(token);
                    out.push(END);
                    rest = &rest[token.len()..];
                }
                None => {
                    out.push(c);
                    rest = &rest[c.len_utf8()..];
                }
            }
        }
        out
    }

    fn at(&self, text: &str) -> Option<&str> {
        self.tokens
            .iter()
            .find(|token| text.starts_with(token.as_str()))
            .map(String::as_str)
    }

    /// Splits a text rendered from marked input. A marker that the template tore off its token is dropped but
    /// still ends the piece, so that the text on its sides cannot join into a control token.
    pub fn split(&self, rendered: &str) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut current = String::new();
        let mut rest = rendered;
        while let Some(c) = rest.chars().next() {
            let tail = &rest[c.len_utf8()..];
            if c != START && c != END {
                current.push(c);
                rest = tail;
                continue;
            }
            if !current.is_empty() {
                pieces.push(Piece::Template(std::mem::take(&mut current)));
            }
            rest = tail;
            if c == START {
                let marked = self.at(tail).filter(|token| tail[token.len()..].starts_with(END));
                if let Some(token) = marked {
                    pieces.push(Piece::Plain(token.to_string()));
                    rest = &tail[token.len() + END.len_utf8()..];
                }
            }
        }
        if !current.is_empty() {
            pieces.push(Piece::Template(current));
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn user_tokens_are_told_apart() {
        let control = ControlTokens::new(["<eos>", "<eos>x", "<s>"]);
        let marked = control.mark(&json!({"content": ["a<eos>xb<s>", "\u{f0000}<s>\u{f0001}", 1]}));
        let text = format!("<s>{}<eos>", marked["content"][0].as_str().unwrap());
        assert_eq!(
            control.split(&text),
            [
                Piece::Template("<s>a".into()),
                Piece::Plain("<eos>x".into()),
                Piece::Template("b".into()),
                Piece::Plain("<s>".into()),
                Piece::Template("<eos>".into()),
            ]
        );
        assert_eq!(
            control.split("<e\u{f0000}os>"),
            [Piece::Template("<e".into()), Piece::Template("os>".into())]
        );
        assert_eq!(marked["content"][1], "\u{f0000}<s>\u{f0001}");
    }
}
