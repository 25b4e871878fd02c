//! Text to token ids and back.
//!
//! [`Tokenizer::from_files`] takes what a model brings, in this order: `tokenizer.json`, the tokenizer inside a
//! GGUF, a SentencePiece model, a tiktoken vocabulary (`*.tiktoken`, `tekken.json`), `vocab.json` with
//! `merges.txt`, `vocab.txt`. A `tokenizer.json` is taken as it is, whatever class the model's configuration
//! names; the other formats are turned into the same pipeline of small parts, with what the class has beside
//! them (ByT5 and CANINE need no vocabulary at all).
//!
//! Texts are `&str`. Bytes that are not UTF-8 are replaced by U+FFFD before encoding
//! ([`Tokenizer::encode_bytes`]), and byte tokens that do not form UTF-8 decode to U+FFFD: Python's
//! `errors="replace"` both ways.

mod around;
mod assemble;
mod bytes;
mod characters;
mod check;
mod config;
mod encode;
mod encoding;
mod family;
mod gguf;
mod languages;
mod legacy;
mod load;
mod model;
mod pre_tokenizers;
mod sentencepiece;
mod stream;
mod tiktoken;

use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value};
use tokenizers::models::ModelWrapper;
use tokenizers::{Decoder, DecoderWrapper, PostProcessorWrapper};

pub use config::{Side, TokenizerConfig};
pub use encoding::{
    BatchEncoding, Characters, EncodeOptions, Encoding, Padding, Sequence, TextInput, Truncation,
    TruncationStrategy,
};
use family::Family;
pub use model::{Model, NoTrainer, Numbered, Pipeline};
pub use stream::DecodeStream;

use crate::{Error, Result};

/// Turns text into token ids and back. Cloning is cheap.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
    /// What is put around texts. It stands beside the pipeline, so that texts can be cut before, and another
    /// language costs no copy of the vocabulary.
    around: Arc<Option<PostProcessorWrapper>>,
}

struct Inner {
    /// The pipeline up to the pieces, without a post-processor.
    backend: Pipeline,
    /// The same tokenizer, blind to special tokens; made when it is first asked for.
    plain: OnceLock<Pipeline>,
    config: TokenizerConfig,
    /// The tokenizer for what the model writes, where that is another one.
    target: Option<Tokenizer>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("config", &self.inner.config)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// A backend and what is known about its special tokens.
    fn new(backend: Pipeline, config: TokenizerConfig) -> Self {
        Self::with_target(backend, config, None)
    }

    fn with_target(mut backend: Pipeline, config: TokenizerConfig, target: Option<Self>) -> Self {
        let around = backend.get_post_processor().cloned();
        backend.with_post_processor(None::<PostProcessorWrapper>);
        Self {
            around: Arc::new(around),
            inner: Arc::new(Inner {
                backend,
                plain: OnceLock::new(),
                config,
                target,
            }),
        }
    }

    /// The token ids of a text. `add_special_tokens` puts around it what the model expects (BOS, `[CLS]`, …);
    /// a rendered chat template already has these and is encoded without.
    ///
    /// # Errors
    /// [`Error::Tokenize`] when a word is not in a vocabulary that has no unknown token.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let pieces = self
            .inner
            .backend
            .encode_fast(text, false)
            .map_err(Error::tokenize)?;
        let encoding = match add_special_tokens {
            true => self.surround(pieces, None, true)?,
            false => pieces,
        };
        Ok(encoding.get_ids().to_vec())
    }

    /// Like [`Tokenizer::encode`], for bytes: what is not UTF-8 becomes U+FFFD first, as Python's
    /// `bytes.decode(errors="replace")` does.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_bytes(&self, text: &[u8], add_special_tokens: bool) -> Result<Vec<u32>> {
        self.encode(&String::from_utf8_lossy(text), add_special_tokens)
    }

    /// Token ids of a text in which special tokens are text like any other: what a user typed cannot end a
    /// turn or start a system prompt. Nothing is added around it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_text_only(&self, text: &str) -> Result<Vec<u32>> {
        let plain = self.inner.plain.get_or_init(|| {
            let mut plain = self.inner.backend.clone();
            plain.set_encode_special_tokens(true);
            plain
        });
        let encoding = plain.encode_fast(text, false).map_err(Error::tokenize)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids; ids outside of the vocabulary are left out. Byte tokens that do not form UTF-8
    /// give U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenize`] when the tokenizer's decoder refuses.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        if let Some(target) = &self.inner.target {
            return target.decode(ids, skip_special_tokens);
        }
        if self.drops_broken_bytes() {
            let ids = ids
                .iter()
                .filter(|id| !skip_special_tokens || !self.is_special(**id));
            let bytes: Vec<u8> = ids.filter_map(|id| self.token_bytes(*id)).flatten().collect();
            return Ok(bytes.utf8_chunks().map(|chunk| chunk.valid()).collect());
        }
        let text = self
            .inner
            .backend
            .decode(ids, skip_special_tokens)
            .map_err(Error::tokenize)?;
        Ok(if self.cleans_up() { clean_up(&text) } else { text })
    }

    /// Decodes token by token, as they are generated: see [`DecodeStream`].
    pub fn decode_stream(&self, skip_special_tokens: bool) -> DecodeStream {
        let tokenizer = self.inner.target.as_ref().unwrap_or(self).clone();
        DecodeStream::new(tokenizer, skip_special_tokens)
    }

    /// Spaces before punctuation are only cleaned up where that was meant: not for BPE, which keeps its spaces.
    fn cleans_up(&self) -> bool {
        self.inner.config.clean_up_tokenization_spaces
            && !matches!(
                self.inner.backend.get_model(),
                Model::Library(ModelWrapper::BPE(_))
            )
    }

    /// ByT5 leaves out bytes that do not form UTF-8.
    fn drops_broken_bytes(&self) -> bool {
        self.inner.config.family == Family::ByT5
    }

    /// The id of a token given by its text in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.backend.token_to_id(token)
    }

    /// The text of a token in the vocabulary (bytes in the vocabulary's own spelling).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.backend.id_to_token(id)
    }

    /// The text that tokens make, given by their names in the vocabulary: Python's `convert_tokens_to_string`.
    ///
    /// # Errors
    /// [`Error::Tokenize`] when the tokenizer's decoder refuses.
    pub fn tokens_to_text(&self, tokens: Vec<String>) -> Result<String> {
        match self.inner.backend.get_decoder() {
            Some(decoder) => decoder.decode(tokens).map_err(Error::tokenize),
            None => Ok(tokens.join(" ")),
        }
    }

    /// Whether the names of tokens that go on within a word say so (`##ing`).
    pub fn marks_subwords(&self) -> bool {
        match self.inner.backend.get_model() {
            Model::Library(ModelWrapper::WordPiece(model)) => !model.continuing_subword_prefix.is_empty(),
            Model::Library(ModelWrapper::BPE(model)) => model
                .continuing_subword_prefix
                .as_ref()
                .is_some_and(|p| !p.is_empty()),
            _ => false,
        }
    }

    /// The bytes that a token stands for within a text; of special tokens, those of their names.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.id_to_token(id)?;
        if self
            .inner
            .backend
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .contains_key(&id)
        {
            return Some(token.into_bytes());
        }
        Some(
            match (self.inner.backend.get_decoder(), self.inner.backend.get_model()) {
                (Some(DecoderWrapper::ByteLevel(_)), _) => bytes::unspell(&token),
                (_, Model::Library(ModelWrapper::WordPiece(_))) => match token.strip_prefix("##") {
                    Some(rest) => rest.as_bytes().to_vec(),
                    None => format!(" {token}").into_bytes(),
                },
                _ => match bytes::byte_token(&token) {
                    Some(byte) => vec![byte],
                    // SentencePiece's spelling of a space.
                    None => token.replace('\u{2581}', " ").into_bytes(),
                },
            },
        )
    }

    /// Number of tokens, added ones included. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.backend.get_vocab_size(true)
    }

    /// True for tokens that `skip_special_tokens` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.backend.get_added_vocabulary();
        added
            .get_added_tokens_decoder()
            .get(&id)
            .is_some_and(|token| added.is_special_token(&token.content))
    }

    /// What the model says about its special tokens and lengths.
    pub fn config(&self) -> &TokenizerConfig {
        &self.inner.config
    }

    /// The special token of a role (`bos_token`, `eos_token`, `pad_token`, `unk_token`, `sep_token`,
    /// `cls_token`, `mask_token`, or an extra one that the model names).
    pub fn special_token(&self, role: &str) -> Option<&str> {
        self.inner.config.special_tokens.get(role).map(String::as_str)
    }

    /// The id of the special token of a role.
    pub fn special_token_id(&self, role: &str) -> Option<u32> {
        self.token_to_id(self.special_token(role)?)
    }

    /// The token that begins a sequence.
    pub fn bos_token(&self) -> Option<&str> {
        self.special_token("bos_token")
    }

    /// The token that ends a sequence. More of them may stand in the model's generation configuration.
    pub fn eos_token(&self) -> Option<&str> {
        self.special_token("eos_token")
    }

    /// The token that fills rows.
    pub fn pad_token(&self) -> Option<&str> {
        self.special_token("pad_token")
    }

    /// The token for what is not in the vocabulary.
    pub fn unk_token(&self) -> Option<&str> {
        self.special_token("unk_token")
    }

    /// The token that stands for a word to be guessed.
    pub fn mask_token(&self) -> Option<&str> {
        self.special_token("mask_token")
    }

    /// The token that ends each text of a pair.
    pub fn sep_token(&self) -> Option<&str> {
        self.special_token("sep_token")
    }

    /// The token whose hidden state stands for the whole text.
    pub fn cls_token(&self) -> Option<&str> {
        self.special_token("cls_token")
    }

    /// Id of [`Tokenizer::mask_token`].
    pub fn mask_token_id(&self) -> Option<u32> {
        self.special_token_id("mask_token")
    }

    /// Id of [`Tokenizer::sep_token`].
    pub fn sep_token_id(&self) -> Option<u32> {
        self.special_token_id("sep_token")
    }

    /// Id of [`Tokenizer::cls_token`].
    pub fn cls_token_id(&self) -> Option<u32> {
        self.special_token_id("cls_token")
    }

    /// Id of [`Tokenizer::bos_token`].
    pub fn bos_token_id(&self) -> Option<u32> {
        self.special_token_id("bos_token")
    }

    /// Id of [`Tokenizer::eos_token`].
    pub fn eos_token_id(&self) -> Option<u32> {
        self.special_token_id("eos_token")
    }

    /// Id of [`Tokenizer::pad_token`].
    pub fn pad_token_id(&self) -> Option<u32> {
        self.special_token_id("pad_token")
    }

    /// Id of [`Tokenizer::unk_token`].
    pub fn unk_token_id(&self) -> Option<u32> {
        self.special_token_id("unk_token")
    }

    /// Special tokens by role, as chat templates see them.
    pub fn special_tokens_map(&self) -> Map<String, Value> {
        self.inner
            .config
            .special_tokens
            .iter()
            .map(|(role, token)| (role.clone(), Value::String(token.clone())))
            .collect()
    }

    /// The pipeline up to the pieces; what is put around them is not a part of it.
    pub fn backend(&self) -> &Pipeline {
        &self.inner.backend
    }

    /// The whole tokenizer as the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Tokenize`] when a part cannot be written.
    pub fn to_json(&self, pretty: bool) -> Result<String> {
        let mut whole = self.inner.backend.clone();
        whole.with_post_processor(self.around.as_ref().clone());
        whole.to_string(pretty).map_err(Error::tokenize)
    }
}

/// Takes out the spaces that word-piece vocabularies leave before punctuation and English contractions.
fn clean_up(text: &str) -> String {
    const PAIRS: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    PAIRS
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}
