//! Which of a model's files its tokenizer is read from.

use oxiformers_hub::ModelFiles;

use super::config::TokenizerConfig;
use super::{Tokenizer, check, gguf, legacy, sentencepiece, tiktoken};
use crate::{Error, Result};

impl Tokenizer {
    /// The tokenizer of a model: `tokenizer.json` if there is one, else what a GGUF holds, else a
    /// SentencePiece model, a tiktoken vocabulary, `vocab.json` with `merges.txt`, or `vocab.txt`. Special
    /// tokens and defaults come from `tokenizer_config.json` and `special_tokens_map.json`.
    ///
    /// # Errors
    /// When no tokenizer is found, or a file is broken or asks for something unknown: the message names file
    /// and field.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        let mut config = TokenizerConfig::read(files)?;
        let (file, mut backend) = if let Some(bytes) = files.get("tokenizer.json")? {
            ("tokenizer.json", from_json("tokenizer.json", &bytes)?)
        } else if let Some(backend) = gguf::tokenizer(files, &mut config)? {
            ("the GGUF", backend)
        } else if let Some(backend) = sentencepiece::tokenizer(files, &mut config)? {
            ("the SentencePiece model", backend)
        } else if let Some(backend) = tiktoken::tekken(files, &mut config)? {
            ("tekken.json", backend)
        } else if let Some(backend) = tiktoken::ranks_file(files, &config)? {
            ("the tiktoken vocabulary", backend)
        } else if let Some(backend) = legacy::vocab_and_merges(files, &mut config)? {
            ("vocab.json", backend)
        } else if let Some(backend) = legacy::vocab_txt(files, &mut config)? {
            ("vocab.txt", backend)
        } else {
            return Err(Error::NoTokenizer {
                model: files.name().to_owned(),
            });
        };
        config.apply(&mut backend, file)?;
        Ok(Self::new(backend, config))
    }

    /// A tokenizer from the content of a `tokenizer.json` alone.
    ///
    /// # Errors
    /// When the content is not a tokenizer.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        Ok(Self::new(
            from_json("tokenizer.json", bytes)?,
            TokenizerConfig::default(),
        ))
    }
}

fn from_json(file: &str, bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    check::tokenizer_json(file, bytes)?;
    let mut tokenizer = check::guard(file, || tokenizers::Tokenizer::from_bytes(bytes))?;
    // Cutting and padding are asked for call by call; those in the file are left-overs of training.
    tokenizer.with_padding(None);
    check::guard(file, || tokenizer.with_truncation(None).map(|_| ()))?;
    Ok(tokenizer)
}
