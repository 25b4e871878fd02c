//! Text that follows a JSON schema, a regular expression or a grammar, by means of `llguidance`.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use oxiformers_processors::Tokenizer;
use serde_json::Value;

use crate::{Error, Result};

/// What the text must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// JSON that a JSON schema allows.
    JsonSchema(Value),
    /// Text that a regular expression matches as a whole.
    Regex(String),
    /// Text of a grammar in llguidance's dialect of Lark.
    Lark(String),
}

/// A grammar, ready for a model's tokens. Cloning is cheap.
#[derive(Clone)]
pub struct Constraint {
    start: Matcher,
    eos: Arc<[u32]>,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint")
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl Constraint {
    /// Compiles a grammar for a tokenizer and a model of `vocab_size` logits; `eos` are the tokens that end a
    /// text.
    ///
    /// # Errors
    /// [`Error::Constraint`] when the grammar is broken or there is no token that ends a text.
    pub fn new(grammar: &Grammar, tokenizer: &Tokenizer, vocab_size: usize, eos: &[u32]) -> Result<Self> {
        let broken = |error: anyhow::Error| Error::Constraint(format!("cannot be compiled: {error}"));
        let Some(first) = eos.first() else {
            let message = "needs a token that ends the text: name one as eos_token_id";
            return Err(Error::Constraint(message.into()));
        };
        let env = vocabulary(tokenizer, vocab_size, *first);
        let mut factory = ParserFactory::new_simple(&env).map_err(broken)?;
        factory.quiet();
        let grammar = match grammar {
            Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(schema.clone()),
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let start = Matcher::new(factory.create_parser(grammar));
        match start.get_error() {
            Some(error) => Err(Error::Constraint(format!("cannot be compiled: {error}"))),
            None => Ok(Self {
                start,
                eos: eos.into(),
            }),
        }
    }

    /// The state before the first token.
    pub(crate) fn start(&self) -> ConstraintState {
        ConstraintState {
            matcher: self.start.deep_clone(),
            eos: self.eos.clone(),
        }
    }
}

/// How far a text has come in its grammar.
pub(crate) struct ConstraintState {
    matcher: Matcher,
    eos: Arc<[u32]>,
}

impl ConstraintState {
    /// Rules out the tokens that the grammar does not allow next.
    pub(crate) fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(Self::lost)?;
        let ends = self.eos.first().is_some_and(|eos| allowed.is_allowed(*eos));
        for (id, logit) in logits.iter_mut().enumerate() {
            let id = id as u32;
            if !(allowed.is_allowed(id) || ends && self.eos.contains(&id)) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Takes the chosen token; returns whether the text is complete and can only end.
    pub(crate) fn push(&mut self, id: u32) -> Result<bool> {
        if self.eos.contains(&id) {
            return Ok(true);
        }
        self.matcher.consume_token(id).map_err(Self::lost)?;
        Ok(self.matcher.is_stopped())
    }

    fn lost(error: anyhow::Error) -> Error {
        Error::Constraint(format!("cannot be followed further: {error}"))
    }
}

/// The bytes of every token; special ones are marked, so that no text can contain them.
fn vocabulary(tokenizer: &Tokenizer, vocab_size: usize, eos: u32) -> TokEnv {
    let words: Vec<Vec<u8>> = (0..vocab_size as u32)
        .map(|id| match tokenizer.id_to_token(id) {
            Some(token) if tokenizer.is_special(id) => {
                let mut marked = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                marked.extend(token.into_bytes());
                marked
            }
            _ => tokenizer.token_bytes(id).unwrap_or_default(),
        })
        .collect();
    let info = TokRxInfo::new(vocab_size as u32, eos);
    Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)))
}
