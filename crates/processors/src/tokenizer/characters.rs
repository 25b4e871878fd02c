//! Tokenizers without a vocabulary file: ByT5's bytes and CANINE's code points.

use ahash::AHashMap;
use serde_json::json;

use super::assemble::Assembly;
use super::config::TokenizerConfig;
use super::family::Family;
use super::legacy::bpe;
use super::model::{Model, Pipeline};
use super::{bytes, sentencepiece};
use crate::Result;

/// Stands for the file in messages.
const FILE: &str = "tokenizer_config.json";

/// The tokenizer of a model of these kinds.
pub(super) fn tokenizer(config: &mut TokenizerConfig) -> Result<Option<Pipeline>> {
    match config.family {
        Family::ByT5 => byt5(config).map(Some),
        Family::Canine => Ok(Some(
            Assembly::new(FILE, Model::CodePoints)
                .decoder(json!({"type": "Fuse"}))?
                .finish(),
        )),
        _ => Ok(None),
    }
}

/// Three special tokens, the bytes, and tokens for gaps (Xue et al., "ByT5: Towards a Token-Free Future with
/// Pre-trained Byte-to-Byte Models").
fn byt5(config: &mut TokenizerConfig) -> Result<Pipeline> {
    let special = ["<pad>", "</s>", "<unk>"].map(str::to_owned);
    let alphabet = (0..=u8::MAX).map(|byte| bytes::spell(&[byte]));
    let vocab: AHashMap<String, u32> = special.into_iter().chain(alphabet).zip(0..).collect();
    let gaps = (0..sentencepiece::extra_ids(FILE, config, 125)?).map(|gap| format!("<extra_id_{gap}>"));
    for token in gaps {
        if !config.extra_special_tokens.contains(&token) {
            config.extra_special_tokens.push(token);
        }
    }
    let model = bpe(FILE, vocab, Vec::new(), |builder| builder)?;
    Ok(Assembly::new(FILE, model).byte_level(&[])?.finish())
}
