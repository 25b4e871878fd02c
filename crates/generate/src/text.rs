//! The text of a sequence while it grows, and the texts that end it.

use oxiformers_processors::Tokenizer;
use oxiformers_processors::tokenizer::DecodeStream;

use crate::Result;

/// Turns tokens into text, and looks for stop strings.
#[derive(Debug, Clone)]
pub(crate) struct TextOut {
    stream: DecodeStream,
    stops: Vec<String>,
    /// Text that is not out yet, because it may be the beginning of a stop string.
    held: String,
}

impl TextOut {
    pub(crate) fn new(tokenizer: &Tokenizer, stops: &[String]) -> Self {
        Self {
            stream: tokenizer.decode_stream(true),
            stops: stops.to_vec(),
            held: String::new(),
        }
    }

    /// The text that a token completes, and whether a stop string has appeared; the text ends before it.
    pub(crate) fn push(&mut self, id: u32) -> Result<(String, bool)> {
        let piece = self.stream.push(id)?;
        Ok(self.take(&piece))
    }

    /// The rest, when the sequence has ended.
    pub(crate) fn finish(&mut self) -> Result<(String, bool)> {
        let piece = self.stream.flush()?;
        let (mut text, stopped) = self.take(&piece);
        if !stopped {
            text.push_str(&std::mem::take(&mut self.held));
        }
        Ok((text, stopped))
    }

    fn take(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min()
        {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let tail = self
            .stops
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - tail);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

/// Length of the longest end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let ends = stop.char_indices().map(|(at, _)| at).rev();
    ends.into_iter()
        .find(|len| text.ends_with(&stop[..*len]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_that_may_become_a_stop_string() {
        assert_eq!(overlap("ab<", "<end>"), 1);
        assert_eq!(overlap("ab<en", "<end>"), 3);
        assert_eq!(overlap("ab<en>", "<end>"), 0);
        assert_eq!(overlap("aaa", "aaaa"), 3);
        assert_eq!(overlap("x日", "日本"), 3);
        assert_eq!(overlap("", "x"), 0);
    }
}
