//! Tokenizers from a corpus: byte-level BPE as GPT-2 has it, WordPiece as BERT has it, Unigram as T5 has it.
//!
//! What comes out is the pair of files that models bring, `tokenizer.json` and `tokenizer_config.json`.

use std::collections::HashSet;
use std::io::Write;
use std::path::Path;
use std::str::FromStr;
use std::sync::Mutex;

use oxiformers_hub::OutputFile;
use serde_json::{Map, Value, json};
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::unigram::{Unigram, UnigramTrainer};
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::normalizers::unicode::NFKC;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use crate::{Error, Result};

/// How words are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// Pairs of pieces that often stand together become one (Sennrich et al., 2016), beginning with bytes, so that every
    /// text has tokens (Radford et al., 2019).
    Bpe,
    /// The same by likelihood, beginning with characters, pieces within a word marked by `##` (Schuster and Nakajima,
    /// 2012).
    WordPiece,
    /// Pieces are taken out of many as long as the text stays likely (Kudo, 2018).
    Unigram,
}

impl FromStr for Algorithm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "bpe" => Self::Bpe,
            "wordpiece" => Self::WordPiece,
            "unigram" => Self::Unigram,
            _ => {
                let message = format!("is `{text}`; it must be bpe, wordpiece or unigram");
                return Err(Error::config("algorithm", message));
            }
        })
    }
}

impl Algorithm {
    /// Special tokens by role, in the order of their ids.
    fn special_tokens(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Bpe => &[
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
                ("unk_token", "<|endoftext|>"),
                ("pad_token", "<|endoftext|>"),
            ],
            Self::WordPiece => &[
                ("pad_token", "[PAD]"),
                ("unk_token", "[UNK]"),
                ("cls_token", "[CLS]"),
                ("sep_token", "[SEP]"),
                ("mask_token", "[MASK]"),
            ],
            Self::Unigram => &[
                ("pad_token", "<pad>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
            ],
        }
    }
}

/// How a tokenizer is trained.
#[derive(Debug, Clone)]
pub struct TokenizerTraining {
    /// How words are cut.
    pub algorithm: Algorithm,
    /// Number of tokens, special ones included.
    pub vocab_size: usize,
    /// What occurs less often becomes no piece (not of Unigram).
    pub min_frequency: u64,
    /// Whether all text is put into small letters without accents (WordPiece only).
    pub lowercase: bool,
    /// Further special tokens, such as those of a chat template.
    pub special_tokens: Vec<String>,
    /// How many sentinels `<extra_id_0>`, … there are, as T5 needs them (Unigram only).
    pub extra_ids: usize,
    /// The longest input in tokens, written for those who use the tokenizer.
    pub model_max_length: Option<usize>,
}

impl TokenizerTraining {
    /// A tokenizer with so many tokens.
    pub fn new(algorithm: Algorithm, vocab_size: usize) -> Self {
        Self {
            algorithm,
            vocab_size,
            min_frequency: 2,
            lowercase: true,
            special_tokens: Vec::new(),
            extra_ids: 0,
            model_max_length: None,
        }
    }

    /// All special tokens, in the order of their ids.
    fn specials(&self) -> Vec<AddedToken> {
        let roles = self
            .algorithm
            .special_tokens()
            .iter()
            .map(|(_, token)| token.to_string());
        let sentinels = (0..self.extra_ids).map(|id| format!("<extra_id_{id}>"));
        let mut seen = HashSet::new();
        let tokens = roles.chain(self.special_tokens.iter().cloned()).chain(sentinels);
        let tokens = tokens.filter(|token| seen.insert(token.clone()));
        tokens
            .map(|token| {
                let mask = token == "[MASK]";
                AddedToken::from(token, true).lstrip(mask)
            })
            .collect()
    }

    /// Trains on `texts`, which are read once and need not fit into memory; their words do.
    ///
    /// # Errors
    /// The first error among the texts; a vocabulary that is too small; no text at all.
    pub fn train(&self, texts: impl Iterator<Item = Result<String>> + Send) -> Result<Trained> {
        let specials = self.specials();
        let least = specials.len() + if self.algorithm == Algorithm::Bpe { 256 } else { 1 };
        if self.vocab_size < least {
            let message = format!(
                "is {}; at least {least} are needed for bytes and special tokens",
                self.vocab_size
            );
            return Err(Error::config("vocab_size", message));
        }
        if self.extra_ids > 0 && self.algorithm != Algorithm::Unigram {
            return Err(Error::config("extra_ids", "belong to Unigram tokenizers"));
        }
        let wrong = |error: tokenizers::Error| Error::config("tokenizer", error.to_string());
        let (mut tokenizer, mut trainer) = self.pipeline(&specials).map_err(wrong)?;
        let failed = Mutex::new(None);
        let mut seen = 0_u64;
        let texts = texts.map_while(|text| match text {
            Ok(text) => {
                seen += u64::from(!text.trim().is_empty());
                Some(text)
            }
            Err(error) => {
                if let Ok(mut failed) = failed.lock() {
                    *failed = Some(error);
                }
                None
            }
        });
        let trained = tokenizer.train(&mut trainer, texts).map(|_| ());
        if let Some(error) = failed.into_inner().ok().flatten() {
            return Err(error);
        }
        if seen == 0 {
            return Err(Error::config("files", "hold no text to train a tokenizer on"));
        }
        trained.map_err(wrong)?;
        let id = |token: &str| tokenizer.token_to_id(token);
        let around = match self.algorithm {
            Algorithm::Bpe => None,
            Algorithm::WordPiece => Some((
                "[CLS] $A [SEP]",
                Some("[CLS] $A [SEP] $B:1 [SEP]:1"),
                ["[CLS]", "[SEP]"],
            )),
            Algorithm::Unigram => Some(("$A </s>", Some("$A </s> $B </s>"), ["</s>", "</s>"])),
        };
        match around {
            None => {
                let offsets = ByteLevel::default().trim_offsets(false).add_prefix_space(false);
                tokenizer.with_post_processor(Some(offsets));
            }
            Some((single, pair, specials)) => {
                let mut seen = HashSet::new();
                let specials = specials.iter().filter(|token| seen.insert(**token));
                let specials: Vec<_> = specials
                    .filter_map(|token| Some((token.to_string(), id(token)?)))
                    .collect();
                let mut builder = TemplateProcessing::builder();
                builder.try_single(single).map_err(|error| wrong(error.into()))?;
                if let Some(pair) = pair {
                    builder.try_pair(pair).map_err(|error| wrong(error.into()))?;
                }
                let around = builder.special_tokens(specials).build();
                tokenizer.with_post_processor(Some(around.map_err(|error| wrong(error.to_string().into()))?));
            }
        }
        Ok(Trained {
            vocab_size: tokenizer.get_vocab_size(true),
            texts: seen,
            tokenizer: tokenizer.to_string(true).map_err(wrong)?,
            config: self.config(),
        })
    }

    /// An empty tokenizer with everything around its model, and what trains it.
    fn pipeline(&self, specials: &[AddedToken]) -> Result<(Tokenizer, TrainerWrapper), tokenizers::Error> {
        let size = self.vocab_size;
        Ok(match self.algorithm {
            Algorithm::Bpe => {
                let mut tokenizer = Tokenizer::new(ModelWrapper::BPE(BPE::default()));
                let bytes = ByteLevel::default().add_prefix_space(false);
                tokenizer
                    .with_pre_tokenizer(Some(bytes))
                    .with_decoder(Some(ByteLevel::default()));
                let trainer = BpeTrainer::builder()
                    .vocab_size(size)
                    .min_frequency(self.min_frequency)
                    .show_progress(false)
                    .special_tokens(specials.to_vec())
                    .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
                    .build();
                (tokenizer, TrainerWrapper::BpeTrainer(trainer))
            }
            Algorithm::WordPiece => {
                let model = WordPiece::builder().unk_token("[UNK]".into()).build()?;
                let mut tokenizer = Tokenizer::new(ModelWrapper::WordPiece(model));
                let normalizer = BertNormalizer::new(true, true, None, self.lowercase);
                tokenizer
                    .with_normalizer(Some(normalizer))?
                    .with_pre_tokenizer(Some(BertPreTokenizer))
                    .with_decoder(Some(WordPieceDecoder::default()));
                let trainer = WordPieceTrainer::builder()
                    .vocab_size(size)
                    .min_frequency(self.min_frequency)
                    .show_progress(false)
                    .special_tokens(specials.to_vec())
                    .continuing_subword_prefix("##".into())
                    .build();
                (tokenizer, TrainerWrapper::WordPieceTrainer(trainer))
            }
            Algorithm::Unigram => {
                let mut tokenizer = Tokenizer::new(ModelWrapper::Unigram(Unigram::default()));
                let spaces = Metaspace::new('▁', PrependScheme::Always, true);
                tokenizer
                    .with_normalizer(Some(NFKC))?
                    .with_pre_tokenizer(Some(spaces.clone()))
                    .with_decoder(Some(spaces));
                let trainer = UnigramTrainer::builder()
                    .vocab_size(u32::try_from(size)?)
                    .show_progress(false)
                    .special_tokens(specials.to_vec())
                    .unk_token(Some("<unk>".to_string()))
                    .build()
                    .map_err(|error| error.to_string())?;
                (tokenizer, TrainerWrapper::UnigramTrainer(trainer))
            }
        })
    }

    /// The `tokenizer_config.json`.
    fn config(&self) -> Value {
        let mut config = Map::new();
        for (role, token) in self.algorithm.special_tokens() {
            config.insert(role.to_string(), json!(token));
        }
        let sentinels = (0..self.extra_ids).map(|id| format!("<extra_id_{id}>"));
        let extra: Vec<String> = self.special_tokens.iter().cloned().chain(sentinels).collect();
        if !extra.is_empty() {
            config.insert("additional_special_tokens".into(), json!(extra));
        }
        // What Python writes where there is no limit.
        let longest = self.model_max_length.map_or(json!(1e30), |length| json!(length));
        config.insert("model_max_length".into(), longest);
        if self.algorithm != Algorithm::WordPiece {
            config.insert("model_input_names".into(), json!(["input_ids", "attention_mask"]));
        }
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        // The class that takes `tokenizer.json` as it is.
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        Value::Object(config)
    }
}

/// A tokenizer that was trained.
#[derive(Debug, Clone)]
pub struct Trained {
    /// The text of `tokenizer.json`.
    pub tokenizer: String,
    /// The contents of `tokenizer_config.json`.
    pub config: Value,
    /// Number of tokens; fewer than asked for where the texts have no more.
    pub vocab_size: usize,
    /// Number of texts that were not empty.
    pub texts: u64,
}

impl Trained {
    /// Writes both files into a folder, which is made if it is not there.
    ///
    /// # Errors
    /// Where they cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let config = serde_json::to_string_pretty(&self.config).unwrap_or_default();
        for (name, text) in [
            ("tokenizer.json", &self.tokenizer),
            ("tokenizer_config.json", &config),
        ] {
            let path = folder.join(name);
            let mut file = OutputFile::create(&path)?;
            file.write_all(text.as_bytes()).map_err(Error::io(&path))?;
            file.finish()?;
        }
        Ok(())
    }
}
