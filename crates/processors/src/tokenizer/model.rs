//! The pipeline that a tokenizer is made of, and the models of it that the library does not have.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ahash::AHashMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token,
    TokenizerImpl, Trainer,
};

/// A tokenizer of the `tokenizers` crate over our [`Model`].
pub type Pipeline =
    TokenizerImpl<Model, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// What cuts words into pieces and numbers these.
#[derive(Debug, Clone)]
pub enum Model {
    /// A model of the library.
    Library(ModelWrapper),
    /// Pieces of one file, numbered by another or by a rule.
    Numbered(Numbered),
    /// Characters; their code points are their ids.
    CodePoints,
}

/// Cuts with one vocabulary and numbers with another: models that fairseq or Marian trained.
#[derive(Debug, Clone)]
pub struct Numbered {
    cut: ModelWrapper,
    ids: AHashMap<String, u32>,
    tokens: AHashMap<u32, String>,
    unknown: u32,
}

impl Numbered {
    /// `unknown` is the id of pieces that `ids` does not have.
    pub(super) fn new(cut: ModelWrapper, ids: AHashMap<String, u32>, unknown: u32) -> Self {
        Self {
            tokens: ids.iter().map(|(token, id)| (*id, token.clone())).collect(),
            cut,
            ids,
            unknown,
        }
    }
}

impl From<ModelWrapper> for Model {
    fn from(model: ModelWrapper) -> Self {
        Self::Library(model)
    }
}

impl From<Numbered> for Model {
    fn from(model: Numbered) -> Self {
        Self::Numbered(model)
    }
}

impl From<BPE> for Model {
    fn from(model: BPE) -> Self {
        Self::Library(model.into())
    }
}

impl From<Unigram> for Model {
    fn from(model: Unigram) -> Self {
        Self::Library(model.into())
    }
}

impl From<WordPiece> for Model {
    fn from(model: WordPiece) -> Self {
        Self::Library(model.into())
    }
}

/// What training, saving and writing say: those are of the library's models.
const READ_ONLY: &str = "this tokenizer is built from several files and can only be used";

impl tokenizers::Model for Model {
    type Trainer = NoTrainer;

    fn tokenize(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        match self {
            Self::Library(model) => model.tokenize(text),
            Self::Numbered(numbered) => {
                let mut pieces = numbered.cut.tokenize(text)?;
                for piece in &mut pieces {
                    piece.id = numbered
                        .ids
                        .get(&piece.value)
                        .copied()
                        .unwrap_or(numbered.unknown);
                }
                Ok(pieces)
            }
            Self::CodePoints => Ok(text
                .char_indices()
                .map(|(at, char)| Token::new(char.into(), char.to_string(), (at, at + char.len_utf8())))
                .collect()),
        }
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Library(model) => model.token_to_id(token),
            Self::Numbered(numbered) => numbered.ids.get(token).copied(),
            Self::CodePoints => {
                let mut chars = token.chars();
                chars.next().filter(|_| chars.next().is_none()).map(u32::from)
            }
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Self::Library(model) => model.id_to_token(id),
            Self::Numbered(numbered) => numbered.tokens.get(&id).cloned(),
            Self::CodePoints => char::from_u32(id).map(String::from),
        }
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        match self {
            Self::Library(model) => model.get_vocab(),
            Self::Numbered(numbered) => numbered
                .ids
                .iter()
                .map(|(token, id)| (token.clone(), *id))
                .collect(),
            Self::CodePoints => ('\0'..=char::MAX)
                .map(|char| (char.to_string(), char.into()))
                .collect(),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match self {
            Self::Library(model) => model.get_vocab_size(),
            Self::Numbered(numbered) => numbered.ids.len(),
            // Surrogates have numbers too.
            Self::CodePoints => char::MAX as usize + 1,
        }
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        match self {
            Self::Library(model) => model.save(folder, prefix),
            _ => Err(READ_ONLY.into()),
        }
    }

    fn get_trainer(&self) -> NoTrainer {
        NoTrainer
    }
}

impl Serialize for Model {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Library(model) => model.serialize(serializer),
            _ => Err(serde::ser::Error::custom(READ_ONLY)),
        }
    }
}

impl<'de> Deserialize<'de> for Model {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        ModelWrapper::deserialize(deserializer).map(Self::Library)
    }
}

/// Models that come with a checkpoint are not trained any further.
#[derive(Debug, Clone, Copy)]
pub struct NoTrainer;

impl Trainer for NoTrainer {
    type Model = Model;

    fn should_show_progress(&self) -> bool {
        false
    }

    fn train(&self, _model: &mut Model) -> tokenizers::Result<Vec<AddedToken>> {
        Err(READ_ONLY.into())
    }

    fn feed<I, S, F>(&mut self, _iterator: I, _process: F) -> tokenizers::Result<()>
    where
        I: Iterator<Item = S> + Send,
        S: AsRef<str> + Send,
        F: Fn(&str) -> tokenizers::Result<Vec<String>> + Sync,
    {
        Err(READ_ONLY.into())
    }
}
