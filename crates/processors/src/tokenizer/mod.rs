//! Text to token ids and back.
//!
//! [`Tokenizer::from_files`] takes what a model brings, in this order: `tokenizer.json`, the tokenizer inside a
//! GGUF, a SentencePiece model, a tiktoken vocabulary (`*.tiktoken`, `tekken.json`), `vocab.json` with
//! `merges.txt`, `vocab.txt`. A `tokenizer.json` is taken as it is, whatever class the model's configuration
//! names; the other formats are turned into the same pipeline of small parts.
//!
//! Texts are `&str`. Bytes that are not UTF-8 are replaced by U+FFFD before encoding
//! ([`Tokenizer::encode_bytes`]), and byte tokens that do not form UTF-8 decode to U+FFFD: Python's
//! `errors="replace"` both ways.

mod assemble;
mod bytes;
mod check;
mod config;
mod gguf;
mod legacy;
mod load;
mod pre_tokenizers;
mod sentencepiece;
mod stream;
mod tiktoken;

use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value};
use tokenizers::DecoderWrapper;
use tokenizers::models::ModelWrapper;

pub use config::{PaddingSide, TokenizerConfig};
pub use stream::DecodeStream;

use crate::{Error, Result};

/// A text as token ids, with where each token came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token, the bytes of the text it stands for, `start..end`; `(0, 0)` for added special tokens.
    pub offsets: Vec<(usize, usize)>,
    /// 1 for tokens that the tokenizer added around the text (BOS, `[CLS]`, …), else 0.
    pub special_tokens_mask: Vec<u32>,
    /// 0 for the first text, 1 for the second of a pair.
    pub token_type_ids: Vec<u32>,
}

/// Several texts as rows of equal length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BatchEncoding {
    /// Token ids, one row per text, padded to the longest.
    pub input_ids: Vec<Vec<u32>>,
    /// 1 for tokens, 0 for padding.
    pub attention_mask: Vec<Vec<u32>>,
    /// 0 for the first text of a pair and for padding, 1 for the second.
    pub token_type_ids: Vec<Vec<u32>>,
}

/// Turns text into token ids and back. Cloning is cheap.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    backend: tokenizers::Tokenizer,
    /// The same tokenizer, blind to special tokens; made when it is first asked for.
    plain: OnceLock<tokenizers::Tokenizer>,
    config: TokenizerConfig,
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
    fn new(backend: tokenizers::Tokenizer, config: TokenizerConfig) -> Self {
        Self {
            inner: Arc::new(Inner {
                backend,
                plain: OnceLock::new(),
                config,
            }),
        }
    }

    /// The token ids of a text. `add_special_tokens` puts around it what the model expects (BOS, `[CLS]`, …);
    /// a rendered chat template already has these and is encoded without.
    ///
    /// # Errors
    /// [`Error::Tokenize`] when a word is not in a vocabulary that has no unknown token.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .backend
            .encode_fast(text, add_special_tokens)
            .map_err(Error::tokenize)?;
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

    /// Like [`Tokenizer::encode`], with byte offsets into the text and the mask of added tokens.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str, add_special_tokens: bool) -> Result<Encoding> {
        let encoding = self
            .inner
            .backend
            .encode(text, add_special_tokens)
            .map_err(Error::tokenize)?;
        Ok((&encoding).into())
    }

    /// Two texts as one sequence (question and context, premise and hypothesis), joined as the model expects.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pair(&self, first: &str, second: &str, add_special_tokens: bool) -> Result<Encoding> {
        let encoding = self
            .inner
            .backend
            .encode((first, second), add_special_tokens)
            .map_err(Error::tokenize)?;
        Ok((&encoding).into())
    }

    /// Several texts as rows of equal length, padded with `pad_token` at `side`, by default the tokenizer's own.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; and when rows differ in length and there is no padding token.
    pub fn encode_batch(
        &self,
        texts: &[&str],
        add_special_tokens: bool,
        side: Option<PaddingSide>,
    ) -> Result<BatchEncoding> {
        let rows = texts
            .iter()
            .map(|text| self.encode_with_offsets(text, add_special_tokens))
            .collect::<Result<Vec<_>>>()?;
        self.pad(&rows, side)
    }

    /// Rows of equal length from encodings, padded at `side` (by default the tokenizer's own).
    ///
    /// # Errors
    /// [`Error::NoToken`] when rows differ in length and there is no padding token.
    pub fn pad(&self, rows: &[Encoding], side: Option<PaddingSide>) -> Result<BatchEncoding> {
        let width = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let pad = match self.pad_token_id() {
            Some(id) => id,
            None if rows.iter().all(|row| row.ids.len() == width) => 0,
            None => return Err(Error::NoToken { role: "pad_token" }),
        };
        let side = side.unwrap_or(self.inner.config.padding_side);
        let fill = |values: &[u32], with: u32| {
            let missing = std::iter::repeat_n(with, width - values.len());
            match side {
                PaddingSide::Left => missing.chain(values.iter().copied()).collect::<Vec<_>>(),
                PaddingSide::Right => values.iter().copied().chain(missing).collect(),
            }
        };
        Ok(BatchEncoding {
            input_ids: rows.iter().map(|row| fill(&row.ids, pad)).collect(),
            attention_mask: rows.iter().map(|row| fill(&vec![1; row.ids.len()], 0)).collect(),
            token_type_ids: rows.iter().map(|row| fill(&row.token_type_ids, 0)).collect(),
        })
    }

    /// The text of token ids; ids outside of the vocabulary are left out. Byte tokens that do not form UTF-8
    /// give U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenize`] when the tokenizer's decoder refuses.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let text = self
            .inner
            .backend
            .decode(ids, skip_special_tokens)
            .map_err(Error::tokenize)?;
        Ok(if self.cleans_up() { clean_up(&text) } else { text })
    }

    /// Decodes token by token, as they are generated: see [`DecodeStream`].
    pub fn decode_stream(&self, skip_special_tokens: bool) -> DecodeStream {
        DecodeStream::new(self.clone(), skip_special_tokens)
    }

    /// Spaces before punctuation are only cleaned up where that was meant: not for BPE, which keeps its spaces.
    fn cleans_up(&self) -> bool {
        self.inner.config.clean_up_tokenization_spaces
            && !matches!(self.inner.backend.get_model(), ModelWrapper::BPE(_))
    }

    /// The id of a token given by its text in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.backend.token_to_id(token)
    }

    /// The text of a token in the vocabulary (bytes in the vocabulary's own spelling).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.backend.id_to_token(id)
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
                (_, ModelWrapper::WordPiece(_)) => match token.strip_prefix("##") {
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

    /// The pipeline itself.
    pub fn backend(&self) -> &tokenizers::Tokenizer {
        &self.inner.backend
    }

    /// The whole tokenizer as the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Tokenize`] when a part cannot be written.
    pub fn to_json(&self, pretty: bool) -> Result<String> {
        self.inner.backend.to_string(pretty).map_err(Error::tokenize)
    }
}

impl From<&tokenizers::Encoding> for Encoding {
    fn from(encoding: &tokenizers::Encoding) -> Self {
        Self {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
            special_tokens_mask: encoding.get_special_tokens_mask().to_vec(),
            token_type_ids: encoding.get_type_ids().to_vec(),
        }
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
