//! The tokenizer inside a GGUF (`tokenizer.ggml.*`).

use ahash::AHashMap;
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::gguf::Metadata;
use serde_json::{Value, json};
use tokenizers::models::unigram::Unigram;

use super::assemble::{self, Assembly, merges_by_score};
use super::config::TokenizerConfig;
use super::legacy::{BertOptions, bpe, wordpiece};
use super::model::Pipeline;
use super::{check, pre_tokenizers};
use crate::{Error, Result};

/// `tokenizer.ggml.token_type`.
mod kind {
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
}

/// What the file says, with the format's defaults.
struct Vocabulary<'a> {
    file: &'a str,
    fields: &'a Metadata,
    tokens: Vec<String>,
    scores: Vec<f64>,
    kinds: Vec<i64>,
}

/// The tokenizer of a GGUF, if that is what the model is and it has one.
pub(super) fn tokenizer(files: &ModelFiles, config: &mut TokenizerConfig) -> Result<Option<Pipeline>> {
    let Some((file, fields)) = files.gguf().zip(files.gguf_metadata()?) else {
        return Ok(None);
    };
    let file = files.describe(file);
    let Some(model) = fields
        .get_str("tokenizer.ggml.model")
        .filter(|model| *model != "no_vocab")
    else {
        return Ok(None);
    };
    let mut tokens = fields
        .get_strings("tokenizer.ggml.tokens")
        .map(<[String]>::to_vec)
        .ok_or_else(|| Error::format(&file, "tokenizer.ggml.tokens is missing or not a list of texts"))?;
    for (id, token) in tokens
        .iter_mut()
        .enumerate()
        .filter(|(_, token)| token.is_empty())
    {
        *token = format!("[EMPTY_{id}]");
    }
    let vocabulary = Vocabulary {
        scores: fields
            .get_numbers("tokenizer.ggml.scores")
            .map(<[f64]>::to_vec)
            .unwrap_or_default(),
        kinds: fields
            .get_integers("tokenizer.ggml.token_type")
            .map(<[i64]>::to_vec)
            .unwrap_or_default(),
        file: &file,
        fields,
        tokens,
    };
    vocabulary.check()?;
    vocabulary.build(model, config).map(Some)
}

impl Vocabulary<'_> {
    fn check(&self) -> Result<()> {
        let fits = |list: usize| list == 0 || list >= self.tokens.len();
        for (name, length) in [("scores", self.scores.len()), ("token_type", self.kinds.len())] {
            if !fits(length) {
                let what = format!(
                    "tokenizer.ggml.{name} has {length} entries for {} tokens",
                    self.tokens.len()
                );
                return Err(Error::format(self.file, what));
            }
        }
        if u32::try_from(self.tokens.len()).is_err() || self.tokens.is_empty() {
            return Err(Error::format(
                self.file,
                "tokenizer.ggml.tokens: no tokens, or too many",
            ));
        }
        Ok(())
    }

    fn flag(&self, name: &str) -> Option<bool> {
        self.fields.get_bool(&format!("tokenizer.ggml.{name}"))
    }

    /// The token that `tokenizer.ggml.ROLE_token_id` names, or the format's default for the kind of model.
    fn special(&self, role: &str, default: Option<u64>) -> Option<&str> {
        let id = self
            .fields
            .get_u64(&format!("tokenizer.ggml.{role}_token_id"))
            .or(default)?;
        self.tokens.get(usize::try_from(id).ok()?).map(String::as_str)
    }

    /// Control tokens are special, user-defined ones are found in the text all the same.
    fn added(&self) -> Vec<(String, bool)> {
        self.kinds
            .iter()
            .zip(&self.tokens)
            .filter(|(kind, _)| matches!(**kind, kind::UNKNOWN | kind::CONTROL | kind::USER_DEFINED))
            .map(|(kind, token)| (token.clone(), *kind != kind::USER_DEFINED))
            .collect()
    }

    fn vocab(&self) -> Result<AHashMap<String, u32>> {
        let vocab: AHashMap<String, u32> = self.tokens.iter().cloned().zip(0..).collect();
        if vocab.len() == self.tokens.len() {
            return Ok(vocab);
        }
        let twice = self
            .tokens
            .iter()
            .zip(0..)
            .find(|(token, id)| vocab.get(*token) != Some(id));
        let token = twice.map(|(token, _)| token.as_str()).unwrap_or_default();
        Err(Error::format(
            self.file,
            format!("tokenizer.ggml.tokens has the token {token:?} twice"),
        ))
    }

    fn merges(&self) -> Result<Vec<(String, String)>> {
        self.fields
            .get_strings("tokenizer.ggml.merges")
            .unwrap_or_default()
            .iter()
            .map(|merge| {
                // A token may begin with a space, so the first character is never the separator.
                let at = merge
                    .char_indices()
                    .skip(1)
                    .find(|(_, char)| *char == ' ')
                    .map(|(at, _)| at);
                let halves = at.map(|at| (merge[..at].to_owned(), merge[at + 1..].to_owned()));
                halves.ok_or_else(|| {
                    Error::format(
                        self.file,
                        format!("tokenizer.ggml.merges: {merge:?} is not two tokens"),
                    )
                })
            })
            .collect()
    }

    fn build(&self, model: &str, config: &mut TokenizerConfig) -> Result<Pipeline> {
        let (mut tokenizer, add_bos, add_eos) = match model {
            "gpt2" | "gemma4" => self.byte_pair(model)?,
            "llama" => self.sentencepiece_bpe()?,
            "t5" => self.unigram()?,
            "bert" => {
                self.name_tokens(
                    config,
                    [
                        Some(101),
                        None,
                        Some(100),
                        Some(102),
                        Some(0),
                        Some(101),
                        Some(103),
                    ],
                );
                return self.bert(config);
            }
            other => {
                return Err(Error::format(
                    self.file,
                    format!(
                        "tokenizer.ggml.model is {other:?}; known are gpt2, llama, t5, bert and gemma4: \
                         put the model's tokenizer.json beside the file"
                    ),
                ));
            }
        };
        let defaults = match model {
            "llama" => [Some(1), Some(2), Some(0), None, None, None, None],
            "t5" => [None, Some(1), Some(2), None, Some(0), None, None],
            "gpt2" => [Some(11), Some(11), None, None, None, None, None],
            _ => [None; 7],
        };
        self.name_tokens(config, defaults);
        let role = |name: &str| config.special_tokens.get(name).map(String::as_str);
        let bos = role("bos_token").filter(|_| {
            config
                .add_bos_token
                .or(self.flag("add_bos_token"))
                .unwrap_or(add_bos)
        });
        let eos = role("eos_token").filter(|_| {
            config
                .add_eos_token
                .or(self.flag("add_eos_token"))
                .unwrap_or(add_eos)
        });
        if bos.is_some() || eos.is_some() {
            assemble::surround(&mut tokenizer, self.file, bos, eos)?;
        }
        Ok(tokenizer)
    }

    /// Takes the names of special tokens from the file where no configuration gives them.
    fn name_tokens(&self, config: &mut TokenizerConfig, defaults: [Option<u64>; 7]) {
        const ROLES: [(&str, &str); 7] = [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("sep_token", "seperator"), // the format's own spelling
            ("pad_token", "padding"),
            ("cls_token", "cls"),
            ("mask_token", "mask"),
        ];
        for ((role, key), default) in ROLES.into_iter().zip(defaults) {
            // Newer files name `[CLS]` as the token that begins a sequence only.
            let first = || self.special("bos", None).filter(|_| role == "cls_token");
            if let Some(token) = self
                .special(key, None)
                .or_else(first)
                .or_else(|| self.special(key, default))
            {
                config.default_token(role, token);
            }
        }
        for (role, key) in [("eot_token", "eot"), ("eom_token", "eom")] {
            if let Some(token) = self.special(key, None) {
                config.default_token(role, token);
            }
        }
    }

    /// BPE with merges; also whether BOS and EOS are added by default.
    fn byte_pair(&self, model: &str) -> Result<(Pipeline, bool, bool)> {
        let name = match model {
            "gemma4" => "gemma4",
            _ => self.fields.get_str("tokenizer.ggml.pre").unwrap_or("default"),
        };
        let pre = pre_tokenizers::named(name).ok_or_else(|| {
            Error::format(
                self.file,
                format!("tokenizer.ggml.pre is {name:?}, which is not known: put the model's tokenizer.json beside the file"),
            )
        })?;
        let model = bpe(self.file, self.vocab()?, self.merges()?, |builder| {
            builder
                .ignore_merges(pre.ignore_merges)
                .byte_fallback(!pre.byte_level)
        })?;
        let mut assembly = Assembly::new(self.file, model);
        if pre.nfc {
            assembly = assembly.normalizer(json!({"type": "NFC"}))?;
        }
        let assembly = if pre.byte_level {
            assembly.byte_level(pre.splits)?
        } else {
            let steps: Vec<Value> = pre
                .splits
                .iter()
                .map(|pattern| assemble::split(pattern))
                .collect();
            assembly
                .normalizer(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}))?
                .pre_tokenizer(json!({"type": "Sequence", "pretokenizers": steps}))?
                .sentencepiece_decoder(false)?
        };
        Ok((assembly.added(self.added())?.finish(), pre.add_bos, false))
    }

    /// SentencePiece's BPE: the pair whose token has the highest score is merged first; what is left over goes
    /// byte by byte.
    fn sentencepiece_bpe(&self) -> Result<(Pipeline, bool, bool)> {
        let vocab = self.vocab()?;
        let scores = self.scores.iter().copied().chain(std::iter::repeat(0.0));
        // Special tokens are not put together out of others.
        let kinds = self.kinds.iter().copied().chain(std::iter::repeat(1));
        let pieces = self
            .tokens
            .iter()
            .zip(scores)
            .zip(kinds)
            .filter(|(_, kind)| *kind != kind::CONTROL);
        let merges = merges_by_score(
            self.file,
            &vocab,
            pieces.map(|((token, score), _)| (token.clone(), score)),
        )?;
        let unknown = self.special("unknown", Some(0)).map(str::to_owned);
        let model = bpe(self.file, vocab, merges, |builder| {
            let builder = builder.byte_fallback(true).fuse_unk(true);
            match unknown {
                Some(token) => builder.unk_token(token),
                None => builder,
            }
        })?;
        let prefix = self.flag("add_space_prefix").unwrap_or(true);
        let tokenizer = Assembly::new(self.file, model)
            .normalizer(spaces(prefix))?
            .sentencepiece_decoder(prefix)?
            .added(self.added())?
            .finish();
        Ok((tokenizer, true, false))
    }

    fn unigram(&self) -> Result<(Pipeline, bool, bool)> {
        if self.scores.is_empty() {
            return Err(Error::format(self.file, "tokenizer.ggml.scores is missing"));
        }
        let pieces: Vec<_> = self
            .tokens
            .iter()
            .cloned()
            .zip(self.scores.iter().copied())
            .collect();
        let unknown = self
            .fields
            .get_u64("tokenizer.ggml.unknown_token_id")
            .unwrap_or(2);
        let bytes = self.tokens.iter().any(|token| token == "<0x00>");
        let model = check::guard(self.file, || {
            Unigram::from(pieces, usize::try_from(unknown).ok(), bytes)
        })?;
        let charsmap = self
            .fields
            .get_integers("tokenizer.ggml.precompiled_charsmap")
            .map(|values| values.iter().map(|value| *value as u8).collect::<Vec<_>>());
        let options = super::sentencepiece::Normalization {
            charsmap: charsmap.as_deref().unwrap_or_default(),
            remove_extra_whitespaces: self.flag("remove_extra_whitespaces").unwrap_or(false),
            add_dummy_prefix: self.flag("add_space_prefix").unwrap_or(false),
            ..super::sentencepiece::Normalization::default()
        };
        let tokenizer = options
            .apply(self.file, Assembly::new(self.file, model))?
            .added(self.added())?
            .finish();
        Ok((tokenizer, false, true))
    }

    /// WordPiece. The format marks the beginnings of words with `▁` where BERT marks the other pieces with `##`.
    fn bert(&self, config: &mut TokenizerConfig) -> Result<Pipeline> {
        let tokens = self.tokens.iter().map(|token| match token.strip_prefix('▁') {
            Some(word) => word.to_owned(),
            None if token.starts_with('[') && token.ends_with(']') => token.clone(),
            None => format!("##{token}"),
        });
        let lowercase = self
            .fields
            .get_bool("tokenizer.ggml.normalizer.lowercase")
            .unwrap_or(true);
        let options = BertOptions {
            lowercase,
            strip_accents: self.fields.get_bool("tokenizer.ggml.normalizer.strip_accents"),
            chinese: true,
        };
        let mut tokenizer = wordpiece(self.file, tokens, &options, config)?;
        let role = |name: &str| config.special_tokens.get(name);
        if let (Some(cls), Some(sep)) = (role("cls_token"), role("sep_token")) {
            assemble::surround_as_bert(&mut tokenizer, self.file, cls, sep)?;
        }
        Ok(tokenizer)
    }
}

/// Spaces as `▁`, one more of them before each stretch of text if `prefix`.
fn spaces(prefix: bool) -> Value {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    match prefix {
        true => json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}),
        false => replace,
    }
}
