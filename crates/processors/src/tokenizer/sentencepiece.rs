//! SentencePiece models (`tokenizer.model`, `spiece.model`, …): Unigram and BPE.

use ahash::AHashMap;
use oxiformers_hub::ModelFiles;
use prost::Message;
use serde_json::{Value, json};
use tokenizers::models::ModelWrapper;
use tokenizers::models::unigram::Unigram;

use super::assemble::{self, Assembly, merges_by_score};
use super::config::TokenizerConfig;
use super::family::Family;
use super::legacy::bpe;
use super::model::{Numbered, Pipeline};
use super::{check, languages};
use crate::{Error, Result};

/// The parts of `sentencepiece_model.proto` that say how text is cut.
#[derive(Clone, PartialEq, Message)]
struct Model {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    /// 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    #[prost(int32, optional, tag = "3", default = "1")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Trainer {
    /// 1 unigram, 2 BPE, 3 words, 4 characters.
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    eos_id: Option<i32>,
    #[prost(int32, optional, tag = "43")]
    pad_id: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Normalizer {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
}

/// Names under which models keep the file.
const NAMES: [&str; 5] = [
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "sentencepiece.model",
];

/// The tokenizer of a model's SentencePiece file, if it has one.
pub(super) fn tokenizer(files: &ModelFiles, config: &mut TokenizerConfig) -> Result<Option<Pipeline>> {
    let names: &[&str] = match config.family {
        Family::Marian => &["source.spm"],
        _ => &NAMES,
    };
    for file in names {
        if let Some(model) = Model::read(files, file)? {
            let vocabulary = vocabulary(files, "vocab.json", config, &model)?;
            return model.build(file, vocabulary, config).map(Some);
        }
    }
    Ok(None)
}

/// Marian's tokenizer for what the model writes.
pub(super) fn target(files: &ModelFiles, config: &TokenizerConfig) -> Result<Option<Pipeline>> {
    const FILE: &str = "target.spm";
    if config.family != Family::Marian {
        return Ok(None);
    }
    let Some(model) = Model::read(files, FILE)? else {
        return Ok(None);
    };
    let own = config.flag("separate_vocabs").unwrap_or(false);
    let vocab = if own { "target_vocab.json" } else { "vocab.json" };
    let vocabulary = vocabulary(files, vocab, config, &model)?;
    model.build(FILE, vocabulary, &mut config.clone()).map(Some)
}

/// Number of tokens for gaps, `<extra_id_0>` and so on.
pub(super) fn extra_ids(file: &str, config: &TokenizerConfig, default: u64) -> Result<u64> {
    let count = config
        .setting("extra_ids")
        .and_then(Value::as_u64)
        .unwrap_or(default);
    match count <= 1 << 12 {
        true => Ok(count),
        false => Err(Error::format(file, format!("extra_ids is {count}: too many"))),
    }
}

/// Ids of the pieces where they are not their places in the file, and the id of unknown ones.
fn vocabulary(
    files: &ModelFiles,
    vocab: &str,
    config: &TokenizerConfig,
    model: &Model,
) -> Result<Option<(AHashMap<String, u32>, u32)>> {
    let role = |name: &str| config.special_tokens.get(name).cloned().unwrap_or_default();
    let languages = || {
        languages::codes(config)
            .into_iter()
            .map(|code| languages::token(config.family, code))
    };
    // fairseq put its own special tokens first.
    let fairseq = || {
        vec![
            "<s>".to_owned(),
            role("pad_token"),
            role("eos_token"),
            role("unk_token"),
        ]
    };
    let (first, skipped, last): (Vec<String>, usize, Vec<String>) = match config.family {
        Family::XlmRoberta => (fairseq(), 3, vec![role("mask_token")]),
        Family::MBart | Family::MBart50 | Family::Nllb => {
            (fairseq(), 3, languages().chain([role("mask_token")]).collect())
        }
        Family::PLBart => {
            let multi = config
                .setting("language_codes")
                .is_some_and(|codes| codes == "multi");
            let mask = (!multi).then(|| role("mask_token"));
            (fairseq(), 3, languages().chain(mask).collect())
        }
        Family::XGlm => (
            fairseq(),
            3,
            (0..7).map(|at| format!("<madeupword{at}>")).collect(),
        ),
        Family::Camembert => {
            let unused = |token: &str| format!("{token}NOTUSED");
            let first = [
                unused("<s>"),
                role("pad_token"),
                unused("</s>"),
                role("unk_token"),
                unused("<unk>"),
            ];
            (first.into(), 1, vec![role("mask_token")])
        }
        Family::Pegasus => {
            let first = [
                role("pad_token"),
                role("eos_token"),
                "<mask_1>".to_owned(),
                role("mask_token"),
            ];
            let offset = config
                .setting("offset")
                .and_then(Value::as_u64)
                .unwrap_or(103)
                .min(1 << 16);
            let unused = (2..offset).map(|at| format!("<unk_{at}>"));
            (first.into_iter().chain(unused).collect(), 2, Vec::new())
        }
        Family::M2M100 | Family::Marian => {
            let mut ids: AHashMap<String, u32> = files
                .json::<std::collections::HashMap<String, u32>>(vocab)?
                .ok_or_else(|| {
                    Error::format(vocab, "missing; it numbers the pieces of the SentencePiece model")
                })?
                .into_iter()
                .collect();
            let unknown = *ids.get(&role("unk_token")).ok_or_else(|| {
                Error::format(
                    vocab,
                    format!("there is no unknown token {:?}", role("unk_token")),
                )
            })?;
            for (language, id) in languages().zip(ids.len() as u32..) {
                ids.entry(language).or_insert(id);
            }
            return Ok(Some((ids, unknown)));
        }
        _ => return Ok(None),
    };
    let pieces = model.pieces.len().saturating_sub(skipped);
    let behind = first.len() + pieces;
    let mut ids = AHashMap::with_capacity(behind + last.len());
    let rest = model.pieces.iter().skip(skipped).map(Piece::piece);
    for (token, id) in first.iter().map(String::as_str).zip(0..) {
        ids.entry(token.to_owned()).or_insert(id);
    }
    for (token, id) in last.iter().zip(behind as u32..) {
        ids.entry(token.clone()).or_insert(id);
    }
    for (token, id) in rest.zip(first.len() as u32..) {
        ids.entry(token.to_owned()).or_insert(id);
    }
    let unknown = match config.family {
        // The pieces that are skipped come before the unknown one.
        Family::Pegasus => first.len() as u32,
        _ => 3,
    };
    Ok(Some((ids, unknown)))
}

impl Model {
    fn read(files: &ModelFiles, file: &str) -> Result<Option<Self>> {
        let Some(content) = files.get(file)? else {
            return Ok(None);
        };
        let model = Self::decode(content)
            .map_err(|e| Error::format(file, format!("not a SentencePiece model: {e}")))?;
        match model.pieces.is_empty() {
            true => Err(Error::format(file, "the vocabulary has no pieces")),
            false => Ok(Some(model)),
        }
    }

    /// The tokenizer, with the ids of `vocabulary` if there are others than the places of pieces.
    fn build(
        &self,
        file: &str,
        vocabulary: Option<(AHashMap<String, u32>, u32)>,
        config: &mut TokenizerConfig,
    ) -> Result<Pipeline> {
        let trainer = self.trainer.clone().unwrap_or_default();
        let normalizer = self.normalizer.clone().unwrap_or_default();
        let family = config.family;
        let piece_at = |id: i32| {
            let piece = self.pieces.get(usize::try_from(id).ok()?)?;
            Some(piece.piece().to_owned())
        };
        // Of other kinds, the class names them.
        let named_here = matches!(family, Family::Llama | Family::Other);
        if named_here {
            for (role, id) in [
                ("unk_token", trainer.unk_id.unwrap_or(0)),
                ("bos_token", trainer.bos_id.unwrap_or(1)),
                ("eos_token", trainer.eos_id.unwrap_or(2)),
                ("pad_token", trainer.pad_id.unwrap_or(-1)),
            ] {
                if let Some(token) = piece_at(id) {
                    config.default_token(role, token);
                }
            }
        }
        let unigram = trainer.model_type.unwrap_or(1) == 1;
        let cut = self.cut(file, &trainer, config, vocabulary.is_some())?;
        let codes: Vec<(String, bool)> = match (&vocabulary, family) {
            (Some((ids, _)), Family::Marian) => ids
                .keys()
                .filter(|token| token.starts_with(">>") && token.ends_with("<<"))
                .map(|token| (token.clone(), false))
                .collect(),
            _ => Vec::new(),
        };
        let assembly = match vocabulary {
            Some((ids, unknown)) => Assembly::new(file, Numbered::new(cut, ids, unknown)),
            None => Assembly::new(file, cut),
        };
        let options = Normalization {
            before: before(config),
            charsmap: normalizer.precompiled_charsmap.as_deref().unwrap_or_default(),
            remove_extra_whitespaces: normalizer.remove_extra_whitespaces.unwrap_or(true),
            add_dummy_prefix: normalizer.add_dummy_prefix.unwrap_or(true),
            words: !self.pieces.iter().any(crosses_words),
            bare: matches!(
                family,
                Family::Albert
                    | Family::Camembert
                    | Family::FNet
                    | Family::MBart
                    | Family::T5
                    | Family::XLNet
                    | Family::XlmRoberta
            ) && config.flag("legacy") != Some(false),
            punctuation: family == Family::DebertaV2 && config.flag("split_by_punct").unwrap_or(false),
            first_only: family == Family::T5 && config.flag("legacy") == Some(false),
        };
        let added = self
            .pieces
            .iter()
            .filter(|piece| match piece.kind() {
                3 => named_here,
                // Unigram finds these by their scores.
                4 => !unigram,
                _ => false,
            })
            .map(|piece| (piece.piece().to_owned(), piece.kind() == 3));
        let mut tokenizer = options.apply(file, assembly)?.added(added.chain(codes))?.finish();
        match family {
            Family::Camembert => {
                let unused = ["<s>", "</s>", "<unk>"].map(|token| format!("{token}NOTUSED"));
                config.extra_special_tokens.extend(unused);
            }
            Family::Pegasus => {
                let known = |token: &String| tokenizer.token_to_id(token).is_some();
                let unused = (2..103).map(|at| format!("<unk_{at}>"));
                let tokens = std::iter::once("<mask_1>".to_owned()).chain(unused).filter(known);
                config.extra_special_tokens.extend(tokens);
            }
            Family::XLNet => {
                let ends = ["<eop>", "<eod>"].map(str::to_owned);
                config.extra_special_tokens.extend(ends);
            }
            Family::T5 => {
                let gaps = (0..extra_ids(file, config, 100)?).map(|gap| format!("<extra_id_{gap}>"));
                let gaps = gaps.filter(|gap| !config.extra_special_tokens.contains(gap));
                let gaps: Vec<String> = gaps.collect();
                config.extra_special_tokens.extend(gaps);
            }
            _ => {
                let codes = languages::codes(config);
                let tokens = codes.into_iter().map(|code| languages::token(family, code));
                config.extra_special_tokens.extend(tokens);
            }
        }
        // The file does not say what stands around a text; the classes that read it have these defaults.
        if named_here && config.add_bos_token.is_none() && config.add_eos_token.is_none() {
            let class = config.tokenizer_class.clone().unwrap_or_default();
            let role = |name: &str, classes: &[&str]| {
                let wanted = classes.iter().any(|start| class.starts_with(start));
                config
                    .special_tokens
                    .get(name)
                    .map(String::as_str)
                    .filter(|_| wanted)
            };
            let bos = role("bos_token", &["Llama", "Gemma", "CodeLlama"]);
            let eos = role("eos_token", &["Reformer"]);
            if bos.is_some() || eos.is_some() {
                assemble::surround(&mut tokenizer, file, bos, eos)?;
            }
        }
        Ok(tokenizer)
    }

    /// The model that cuts words into pieces. If they are `renumbered`, only what it cuts counts.
    fn cut(
        &self,
        file: &str,
        trainer: &Trainer,
        config: &TokenizerConfig,
        renumbered: bool,
    ) -> Result<ModelWrapper> {
        let byte_fallback = trainer.byte_fallback.unwrap_or(false);
        let unk_id = trainer.unk_id.unwrap_or(0);
        match trainer.model_type.unwrap_or(1) {
            1 => {
                let normal = || {
                    self.pieces
                        .iter()
                        .filter(|piece| piece.kind() == 1)
                        .map(|piece| f64::from(piece.score()))
                };
                let (worst, best) = (
                    normal().fold(0.0, f64::min),
                    normal().fold(f64::NEG_INFINITY, f64::max),
                );
                let score = |(id, piece): (usize, &Piece)| {
                    let text = piece.piece();
                    match piece.kind() {
                        // Always taken where it is found.
                        4 => (text.to_owned(), text.chars().count() as f64 * best - 0.1),
                        // Not text. What is unknown is worth a little less than the worst piece, so these may
                        // not be worse; where their names do not count, no text has such a name.
                        2 | 3 | 5 if renumbered => (format!("\u{10FFFF}{id}"), worst),
                        2 | 3 | 5 | 6 => (text.to_owned(), worst),
                        _ if splits_numbers(config.family, text) => {
                            (text.to_owned(), f64::from(piece.score()) - 100.0)
                        }
                        _ => (text.to_owned(), f64::from(piece.score()).max(worst)),
                    }
                };
                let mut pieces: Vec<(String, f64)> = self.pieces.iter().enumerate().map(score).collect();
                if config.family == Family::T5 {
                    let gaps = (0..extra_ids(file, config, 100)?).rev();
                    pieces.extend(gaps.map(|gap| (format!("<extra_id_{gap}>"), worst)));
                }
                let unk_id = usize::try_from(unk_id).ok();
                Ok(check::guard(file, || Unigram::from(pieces, unk_id, byte_fallback))?.into())
            }
            2 => {
                let text = |piece: &Piece| piece.piece().to_owned();
                let vocab: AHashMap<String, u32> = self.pieces.iter().map(text).zip(0..).collect();
                let normal = self.pieces.iter().filter(|piece| matches!(piece.kind(), 1 | 4));
                let merges = merges_by_score(
                    file,
                    &vocab,
                    normal.map(|piece| (text(piece), f64::from(piece.score()))),
                )?;
                let unknown = usize::try_from(unk_id)
                    .ok()
                    .and_then(|id| self.pieces.get(id))
                    .map(text);
                let model = bpe(file, vocab, merges, |builder| {
                    let builder = builder.byte_fallback(byte_fallback).fuse_unk(true);
                    match unknown {
                        Some(token) => builder.unk_token(token),
                        None => builder,
                    }
                })?;
                Ok(model.into())
            }
            other => Err(Error::format(
                file,
                format!("trainer_spec.model_type is {other}; known are 1 (unigram) and 2 (bpe)"),
            )),
        }
    }
}

/// Pieces like `1,` that ALBERT and XLNet take apart.
fn splits_numbers(family: Family, piece: &str) -> bool {
    matches!(family, Family::Albert | Family::FNet | Family::XLNet)
        && piece
            .strip_suffix(',')
            .is_some_and(|rest| rest.ends_with(char::is_numeric))
}

/// Whether a piece is more than a part of one word with the space before it.
fn crosses_words(piece: &Piece) -> bool {
    matches!(piece.kind(), 1 | 4)
        && piece
            .piece()
            .chars()
            .skip(1)
            .any(|char| char == '▁' || char == ' ')
}

/// What models of this kind do to a text before SentencePiece sees it.
fn before(config: &TokenizerConfig) -> Vec<Value> {
    let replace =
        |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let (lowercase, keep_accents) = match config.family {
        Family::Albert => (true, false),
        Family::FNet => (false, true),
        Family::XLNet => (false, false),
        Family::DebertaV2 if config.flag("do_lower_case") == Some(true) => {
            return vec![json!({"type": "Lowercase"})];
        }
        _ => return Vec::new(),
    };
    let mut steps = vec![
        // Python's idea of white space.
        replace(json!({"Regex": r"[\s\x1c-\x1f\x{85}]+"}), " "),
        replace(json!({"String": "``"}), "\""),
        replace(json!({"String": "''"}), "\""),
    ];
    if !config.flag("keep_accents").unwrap_or(keep_accents) {
        steps.push(json!({"type": "NFKD"}));
        steps.push(json!({"type": "StripAccents"}));
    }
    if config.flag("do_lower_case").unwrap_or(lowercase) {
        steps.push(json!({"type": "Lowercase"}));
    }
    steps
}

/// What happens to a text before it is cut into pieces.
#[derive(Default)]
pub(super) struct Normalization<'a> {
    /// Steps that come first.
    pub before: Vec<Value>,
    /// Replacements of characters, as the format packs them; empty for none.
    pub charsmap: &'a [u8],
    /// Spaces around the text go, several in a row become one.
    pub remove_extra_whitespaces: bool,
    /// The text begins with a space.
    pub add_dummy_prefix: bool,
    /// Words can be cut one by one: no piece is a part of two.
    pub words: bool,
    /// The space before a word is not a part of what its first piece stands for. (A word that itself begins
    /// with `▁` does not get another.)
    pub bare: bool,
    /// Punctuation is cut off first.
    pub punctuation: bool,
    /// Of the stretches between special tokens, only the first begins with a space.
    pub first_only: bool,
}

impl Normalization<'_> {
    pub fn apply<'a>(mut self, file: &str, assembly: Assembly<'a>) -> Result<Assembly<'a>> {
        let mut steps = std::mem::take(&mut self.before);
        if !self.charsmap.is_empty() {
            use base64::Engine;
            check::charsmap(file, self.charsmap)?;
            let map = base64::engine::general_purpose::STANDARD.encode(self.charsmap);
            steps.push(json!({"type": "Precompiled", "precompiled_charsmap": map}));
        }
        let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let cut = |pattern: Value, behavior: &str| json!({"type": "Split", "pattern": pattern, "behavior": behavior, "invert": false});
        let words = self.words && self.remove_extra_whitespaces && self.add_dummy_prefix;
        let word_by_word = words && (self.bare || self.punctuation);
        if self.remove_extra_whitespaces {
            steps.push(replace(json!({"Regex": "[ ▁]+$"}), ""));
            if word_by_word || !self.add_dummy_prefix {
                steps.push(replace(json!({"Regex": "^ +"}), ""));
            } else if !self.first_only {
                // The first word has one space before it, its own where there is one.
                steps.push(json!({"type": "Prepend", "prepend": " "}));
            }
            steps.push(replace(json!({"Regex": " {2,}"}), " "));
        }
        if word_by_word {
            let marked =
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false});
            let mut cuts = vec![cut(json!({"String": " "}), "Removed"), marked];
            if self.punctuation {
                cuts.insert(0, json!({"type": "Punctuation", "behavior": "Isolated"}));
            }
            return assembly
                .normalizer(json!({"type": "Sequence", "normalizers": steps}))?
                .pre_tokenizer(json!({"type": "Sequence", "pretokenizers": cuts}))?
                .sentencepiece_decoder(true);
        }
        if self.first_only {
            let marked = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": self.words});
            return assembly
                .normalizer(json!({"type": "Sequence", "normalizers": steps}))?
                .pre_tokenizer(marked)?
                .sentencepiece_decoder(self.add_dummy_prefix);
        }
        if self.add_dummy_prefix && !self.remove_extra_whitespaces {
            // Also before a text that begins with a space; the Metaspace step would leave that one out.
            steps.push(json!({"type": "Prepend", "prepend": "▁"}));
        }
        steps.push(replace(json!({"String": " "}), "▁"));
        let assembly = assembly.normalizer(json!({"type": "Sequence", "normalizers": steps}))?;
        let assembly = match words {
            true => assembly.pre_tokenizer(cut(json!({"String": "▁"}), "MergedWithNext"))?,
            false => assembly,
        };
        assembly.sentencepiece_decoder(self.add_dummy_prefix)
    }
}
