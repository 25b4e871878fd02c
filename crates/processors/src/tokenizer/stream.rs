//! Text from tokens as they come.

use tokenizers::DecoderWrapper;

use super::{Tokenizer, bytes};
use crate::Result;

/// Decodes token by token. What the steps and [`DecodeStream::flush`] return is, put together, exactly what
/// [`Tokenizer::decode`] returns for all the tokens; a step costs the same however long the text has become.
///
/// No step returns a part of a character: bytes wait for the rest of theirs, or for the token that shows that
/// they are not going to get it.
#[derive(Debug, Clone)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    /// Byte-level decoders: bytes that do not form a character yet, three at most.
    Bytes(Vec<u8>),
    /// Other decoders look at most one token back: the last token whose text is out, and the tokens since.
    Pieces { last: Option<u32>, waiting: Vec<u32> },
    /// Spaces are cleaned up afterwards, or broken bytes left out, over the whole text.
    Whole(Vec<u32>),
}

impl DecodeStream {
    pub(super) fn new(tokenizer: Tokenizer, skip_special_tokens: bool) -> Self {
        let state = match tokenizer.backend().get_decoder() {
            _ if tokenizer.cleans_up() || tokenizer.drops_broken_bytes() => State::Whole(Vec::new()),
            Some(DecoderWrapper::ByteLevel(_)) => State::Bytes(Vec::new()),
            _ => State::Pieces {
                last: None,
                waiting: Vec::new(),
            },
        };
        Self {
            tokenizer,
            skip_special_tokens,
            state,
        }
    }

    /// Takes the next token and returns the text that it completes, which may be empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.skip_special_tokens && self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        // As decoding has it: the spelling of an added token is the one after normalization.
        let backend = self.tokenizer.backend();
        let token = backend
            .get_added_vocabulary()
            .simple_id_to_token(id)
            .or_else(|| backend.id_to_token(id));
        let Some(token) = token else {
            return Ok(String::new());
        };
        match &mut self.state {
            State::Bytes(waiting) => {
                waiting.extend(bytes::unspell(&token));
                let ready = waiting.len() - incomplete(waiting);
                let text = String::from_utf8_lossy(&waiting[..ready]).into_owned();
                waiting.drain(..ready);
                Ok(text)
            }
            State::Pieces { last, waiting } => {
                waiting.push(id);
                // A run of byte tokens is read as a whole.
                if bytes::byte_token(&token).is_some() {
                    return Ok(String::new());
                }
                let text = after(&self.tokenizer, *last, waiting)?;
                waiting.clear();
                *last = Some(id);
                Ok(text)
            }
            State::Whole(ids) => {
                ids.push(id);
                Ok(String::new())
            }
        }
    }

    /// The text of tokens that were still waiting for more, with U+FFFD for bytes that stayed incomplete. After
    /// it the stream begins anew.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn flush(&mut self) -> Result<String> {
        match &mut self.state {
            State::Bytes(waiting) => Ok(String::from_utf8_lossy(&std::mem::take(waiting)).into_owned()),
            State::Pieces { last, waiting } => {
                let text = match waiting.as_slice() {
                    [] => String::new(),
                    ids => after(&self.tokenizer, *last, ids)?,
                };
                waiting.clear();
                *last = None;
                Ok(text)
            }
            State::Whole(ids) => {
                let ids = std::mem::take(ids);
                self.tokenizer.decode(&ids, false)
            }
        }
    }
}

/// What `ids` add to the text after the token `last`.
fn after(tokenizer: &Tokenizer, last: Option<u32>, ids: &[u32]) -> Result<String> {
    let Some(last) = last else {
        return tokenizer.decode(ids, false);
    };
    let before = tokenizer.decode(&[last], false)?;
    let both: Vec<u32> = std::iter::once(last).chain(ids.iter().copied()).collect();
    let text = tokenizer.decode(&both, false)?;
    Ok(text
        .strip_prefix(before.as_str())
        .map_or(text.clone(), str::to_owned))
}

/// Number of bytes at the end that are the beginning of a character.
fn incomplete(bytes: &[u8]) -> usize {
    // A character has four bytes at most, so only the last three can lack something.
    for tail in 1..=bytes.len().min(3) {
        if let Err(error) = std::str::from_utf8(&bytes[bytes.len() - tail..])
            && error.valid_up_to() == 0
            && error.error_len().is_none()
        {
            return tail;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_beginnings_wait() {
        assert_eq!(incomplete(b"abc"), 0);
        assert_eq!(incomplete("a€".as_bytes()), 0);
        assert_eq!(incomplete(&"a€".as_bytes()[..2]), 1);
        assert_eq!(incomplete(&"a€".as_bytes()[..3]), 2);
        assert_eq!(incomplete(&"😀".as_bytes()[..3]), 3);
        assert_eq!(incomplete(&[0xFF]), 0);
        assert_eq!(incomplete(&[0xE2, 0xFF]), 0);
        assert_eq!(incomplete(&[0x80]), 0);
    }
}
