//! The oldest formats: `vocab.json` with `merges.txt` (GPT-2, RoBERTa, …), and `vocab.txt` (BERT, MPNet, …).

use ahash::AHashMap;
use oxiformers_hub::ModelFiles;
use serde_json::json;
use tokenizers::models::bpe::BPE;
use tokenizers::models::wordpiece::WordPiece;

use super::assemble::Assembly;
use super::check;
use super::config::TokenizerConfig;
use super::family::Family;
use super::model::Pipeline;
use crate::{Error, Result};

/// Byte-level BPE as GPT-2 has it.
pub(super) fn vocab_and_merges(files: &ModelFiles, config: &mut TokenizerConfig) -> Result<Option<Pipeline>> {
    let Some(vocab) = files.json::<std::collections::HashMap<String, u32>>("vocab.json")? else {
        return Ok(None);
    };
    let Some(merges) = files.text("merges.txt")? else {
        return Ok(None);
    };
    let merges = merges
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.trim().is_empty())
        .map(|line| {
            line.split_once(' ')
                .map(|(left, right)| (left.to_owned(), right.to_owned()))
        })
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| Error::format("merges.txt", "every line is two tokens with a space between them"))?;
    let unknown = config.special_tokens.get("unk_token").cloned();
    let model = bpe(
        "merges.txt",
        vocab.into_iter().collect(),
        merges,
        |builder| match unknown {
            Some(token) => builder.unk_token(token),
            None => builder,
        },
    )?;
    let tokenizer = Assembly::new("vocab.json", model)
        .byte_level_words(prefix_space(config))?
        .finish();
    Ok(Some(tokenizer))
}

/// Whether a text begins with a space, so that its first word is spelled like the others.
pub(super) fn prefix_space(config: &TokenizerConfig) -> bool {
    config
        .flag("add_prefix_space")
        .unwrap_or(config.family == Family::Blenderbot)
}

/// A BPE model whose merges were looked at first.
pub(super) fn bpe(
    file: &str,
    vocab: AHashMap<String, u32>,
    merges: Vec<(String, String)>,
    options: impl FnOnce(tokenizers::models::bpe::BpeBuilder) -> tokenizers::models::bpe::BpeBuilder,
) -> Result<BPE> {
    let longest = vocab.keys().map(String::len).max().unwrap_or(0);
    check::merges(
        file,
        longest,
        "",
        merges.iter().map(|(left, right)| (left.as_str(), right.as_str())),
    )?;
    check::guard(file, || {
        options(BPE::builder().vocab_and_merges(vocab, merges)).build()
    })
}

/// WordPiece as BERT has it.
pub(super) fn vocab_txt(text: &str, config: &mut TokenizerConfig) -> Result<Pipeline> {
    if !config.family.has_word_pieces() {
        // The format is BERT's, also where models of this type usually have another one.
        config.family = Family::Bert;
    }
    config.default_tokens(|_| true);
    if config.family == Family::Tapas {
        config.extra_special_tokens.push("[EMPTY]".to_owned());
    }
    let tokens = text.lines().map(str::to_owned);
    let options = BertOptions {
        lowercase: config.flag("do_lower_case").unwrap_or(true),
        strip_accents: config.flag("strip_accents"),
        chinese: config.flag("tokenize_chinese_chars").unwrap_or(true),
    };
    wordpiece("vocab.txt", tokens, &options, config)
}

/// How BERT prepares text.
pub(super) struct BertOptions {
    /// Text is lower-cased.
    pub lowercase: bool,
    /// Accents are taken off; follows `lowercase` when not given.
    pub strip_accents: Option<bool>,
    /// Every CJK character is a word.
    pub chinese: bool,
}

/// A WordPiece tokenizer over `tokens` in order of their ids.
pub(super) fn wordpiece(
    file: &str,
    tokens: impl Iterator<Item = String>,
    options: &BertOptions,
    config: &mut TokenizerConfig,
) -> Result<Pipeline> {
    let vocab: AHashMap<String, u32> = tokens.zip(0..).collect();
    for (role, token) in [
        ("unk_token", "[UNK]"),
        ("sep_token", "[SEP]"),
        ("pad_token", "[PAD]"),
        ("cls_token", "[CLS]"),
        ("mask_token", "[MASK]"),
    ] {
        if vocab.contains_key(token) {
            config.default_token(role, token);
        }
    }
    let unknown = config
        .special_tokens
        .get("unk_token")
        .cloned()
        .filter(|token| vocab.contains_key(token))
        .ok_or_else(|| {
            Error::format(
                file,
                "the vocabulary has no unknown token; name it in tokenizer_config.json",
            )
        })?;
    let model = check::guard(file, || {
        WordPiece::builder().vocab(vocab).unk_token(unknown).build()
    })?;
    Ok(Assembly::new(file, model)
        .normalizer(json!({
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": options.chinese,
            "strip_accents": options.strip_accents,
            "lowercase": options.lowercase,
        }))?
        .pre_tokenizer(json!({"type": "BertPreTokenizer"}))?
        .decoder(json!({"type": "WordPiece", "prefix": "##", "cleanup": true}))?
        .finish())
}
