//! SentencePiece models (`tokenizer.model`, `spiece.model`, …): Unigram and BPE.

use ahash::AHashMap;
use oxiformers_hub::ModelFiles;
use prost::Message;
use serde_json::{Value, json};
use tokenizers::Tokenizer;
use tokenizers::models::unigram::Unigram;

use super::assemble::{self, Assembly, merges_by_score};
use super::check;
use super::config::TokenizerConfig;
use super::legacy::bpe;
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
    #[prost(int32, optional, tag = "3")]
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
pub(super) fn tokenizer(files: &ModelFiles, config: &mut TokenizerConfig) -> Result<Option<Tokenizer>> {
    for file in NAMES {
        if let Some(content) = files.get(file)? {
            let model = Model::decode(content)
                .map_err(|e| Error::format(file, format!("not a SentencePiece model: {e}")))?;
            return build(file, model, config).map(Some);
        }
    }
    Ok(None)
}

fn build(file: &str, model: Model, config: &mut TokenizerConfig) -> Result<Tokenizer> {
    let trainer = model.trainer.unwrap_or_default();
    let normalizer = model.normalizer.unwrap_or_default();
    if model.pieces.is_empty() {
        return Err(Error::format(file, "the vocabulary has no pieces"));
    }
    let kind = |piece: &Piece| piece.kind.unwrap_or(1);
    let pieces: Vec<(String, f64)> = model
        .pieces
        .iter()
        .map(|piece| {
            (
                piece.piece.clone().unwrap_or_default(),
                f64::from(piece.score.unwrap_or(0.0)),
            )
        })
        .collect();
    let piece_at = |id: i32| {
        pieces
            .get(usize::try_from(id).ok()?)
            .map(|(piece, _)| piece.clone())
    };
    let added: Vec<(String, bool)> = model
        .pieces
        .iter()
        .zip(&pieces)
        .filter(|(piece, _)| matches!(kind(piece), 3 | 4))
        .map(|(piece, (token, _))| (token.clone(), kind(piece) == 3))
        .collect();
    let unk_id = trainer.unk_id.unwrap_or(0);
    for (role, id) in [
        ("unk_token", unk_id),
        ("bos_token", trainer.bos_id.unwrap_or(1)),
        ("eos_token", trainer.eos_id.unwrap_or(2)),
        ("pad_token", trainer.pad_id.unwrap_or(-1)),
    ] {
        if let Some(token) = piece_at(id) {
            config.default_token(role, token);
        }
    }
    let byte_fallback = trainer.byte_fallback.unwrap_or(false);
    let assembly = match trainer.model_type.unwrap_or(1) {
        1 => {
            let mut pieces = pieces.clone();
            for ((_, score), piece) in pieces.iter_mut().zip(&model.pieces) {
                match kind(piece) {
                    // Never found by the search: control tokens and bytes are not text.
                    2 | 3 | 5 | 6 => *score = f64::from(f32::MIN) / 2.0,
                    _ => {}
                }
            }
            // What is unknown is worth a little less than the worst piece, so the worst must be a real one.
            let worst = model
                .pieces
                .iter()
                .filter(|piece| matches!(kind(piece), 1 | 4))
                .map(|piece| f64::from(piece.score.unwrap_or(0.0)))
                .fold(0.0, f64::min);
            for (_, score) in &mut pieces {
                *score = score.max(worst);
            }
            let unk_id = usize::try_from(unk_id).ok();
            let model = check::guard(file, || Unigram::from(pieces, unk_id, byte_fallback))?;
            Assembly::new(file, model)
        }
        2 => {
            let vocab: AHashMap<String, u32> =
                pieces.iter().map(|(piece, _)| piece.clone()).zip(0..).collect();
            let normal = model
                .pieces
                .iter()
                .zip(&pieces)
                .filter(|(piece, _)| matches!(kind(piece), 1 | 4));
            let merges = merges_by_score(file, &vocab, normal.map(|(_, piece)| piece.clone()))?;
            let unknown = piece_at(unk_id);
            let model = bpe(file, vocab, merges, |builder| {
                let builder = builder.byte_fallback(byte_fallback).fuse_unk(true);
                match unknown {
                    Some(token) => builder.unk_token(token),
                    None => builder,
                }
            })?;
            Assembly::new(file, model)
        }
        other => {
            return Err(Error::format(
                file,
                format!("trainer_spec.model_type is {other}; known are 1 (unigram) and 2 (bpe)"),
            ));
        }
    };
    let options = Normalization {
        charsmap: normalizer.precompiled_charsmap.as_deref().unwrap_or_default(),
        remove_extra_whitespaces: normalizer.remove_extra_whitespaces.unwrap_or(true),
        add_dummy_prefix: normalizer.add_dummy_prefix.unwrap_or(true),
    };
    let mut tokenizer = options.apply(file, assembly)?.added(added)?.finish();
    // The file does not say what stands around a text; the classes that read it have these defaults.
    if config.add_bos_token.is_none() && config.add_eos_token.is_none() {
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
        let eos = role("eos_token", &["T5", "Pegasus", "Reformer", "BigBirdPegasus"]);
        if bos.is_some() || eos.is_some() {
            assemble::surround(&mut tokenizer, file, bos, eos)?;
        }
    }
    Ok(tokenizer)
}

/// What SentencePiece does to a text first.
pub(super) struct Normalization<'a> {
    /// Replacements of characters, as the format packs them; empty for none.
    pub charsmap: &'a [u8],
    /// Spaces around the text go, several in a row become one.
    pub remove_extra_whitespaces: bool,
    /// The text begins with a space.
    pub add_dummy_prefix: bool,
}

impl Normalization<'_> {
    pub fn apply<'a>(&self, file: &str, assembly: Assembly<'a>) -> Result<Assembly<'a>> {
        let mut steps: Vec<Value> = Vec::new();
        if !self.charsmap.is_empty() {
            use base64::Engine;
            check::charsmap(file, self.charsmap)?;
            let map = base64::engine::general_purpose::STANDARD.encode(self.charsmap);
            steps.push(json!({"type": "Precompiled", "precompiled_charsmap": map}));
        }
        let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        if self.remove_extra_whitespaces {
            steps.push(replace(json!({"String": "▁"}), " "));
            steps.push(replace(json!({"Regex": "^ +| +$"}), ""));
            steps.push(replace(json!({"Regex": " {2,}"}), " "));
        }
        if self.add_dummy_prefix {
            // Also before a text that begins with a space; the Metaspace step would leave that one out.
            steps.push(json!({"type": "Prepend", "prepend": "▁"}));
        }
        steps.push(replace(json!({"String": " "}), "▁"));
        assembly
            .normalizer(json!({"type": "Sequence", "normalizers": steps}))?
            .sentencepiece_decoder(self.add_dummy_prefix)
    }
}
