//! Which of a model's files its tokenizer is read from.

use oxiformers_hub::ModelFiles;

use super::config::TokenizerConfig;
use super::model::Pipeline;
use super::{Tokenizer, around, characters, check, gguf, legacy, sentencepiece, tiktoken};
use crate::{Error, Result};

impl Tokenizer {
    /// The tokenizer of a model: `tokenizer.json` if there is one, else what a GGUF holds, else a
    /// SentencePiece model, a tiktoken vocabulary, `vocab.json` with `merges.txt`, or `vocab.txt`. Special
    /// tokens and defaults come from `tokenizer_config.json` and `special_tokens_map.json`; what these and the
    /// older formats do not say is what the model's class in Python has.
    ///
    /// # Errors
    /// When no tokenizer is found, or a file is broken or asks for something unknown: the message names file
    /// and field.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        let mut config = TokenizerConfig::read(files)?;
        if let Some(bytes) = files.get("tokenizer.json")? {
            let file = "tokenizer.json";
            let mut backend = from_json(file, &bytes)?;
            config.default_tokens(|token| backend.token_to_id(token).is_some());
            config.add_tokens(&mut backend, file)?;
            config.surround(&mut backend, file)?;
            return Ok(Self::new(backend, config));
        }
        if let Some(mut backend) = gguf::tokenizer(files, &mut config)? {
            config.add_tokens(&mut backend, "the GGUF")?;
            config.surround(&mut backend, "the GGUF")?;
            return Ok(Self::new(backend, config));
        }
        let given = config.clone();
        config.default_tokens(|_| true);
        let (file, mut backend) = if let Some(backend) = characters::tokenizer(&mut config)? {
            ("tokenizer_config.json", backend)
        } else if let Some(backend) = sentencepiece::tokenizer(files, &mut config)? {
            ("the SentencePiece model", backend)
        } else if let Some(backend) = tiktoken::tekken(files, &mut config)? {
            ("tekken.json", backend)
        } else if let Some(backend) = tiktoken::ranks_file(files, &config)? {
            ("the tiktoken vocabulary", backend)
        } else if let Some(backend) = legacy::vocab_and_merges(files, &mut config)? {
            ("vocab.json", backend)
        } else if let Some(text) = files.text("vocab.txt")? {
            config = given;
            ("vocab.txt", legacy::vocab_txt(&text, &mut config)?)
        } else {
            return Err(Error::NoTokenizer {
                model: files.name().to_owned(),
            });
        };
        config.add_tokens(&mut backend, file)?;
        around::set(&mut backend, file, &config)?;
        config.surround(&mut backend, file)?;
        let target = match sentencepiece::target(files, &config)? {
            Some(mut target) => {
                config.add_tokens(&mut target, "target.spm")?;
                around::set(&mut target, "target.spm", &config)?;
                Some(Self::new(target, config.clone()))
            }
            None => None,
        };
        Ok(Self::with_target(backend, config, target))
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

fn from_json(file: &str, bytes: &[u8]) -> Result<Pipeline> {
    check::tokenizer_json(file, bytes)?;
    let mut tokenizer = check::guard(file, || Pipeline::from_bytes(bytes))?;
    // Cutting and padding are asked for call by call; those in the file are left-overs of training.
    tokenizer.with_padding(None);
    check::guard(file, || tokenizer.with_truncation(None).map(|_| ()))?;
    Ok(tokenizer)
}
