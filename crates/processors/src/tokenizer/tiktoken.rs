//! tiktoken vocabularies: `*.tiktoken` and Mistral's `tekken.json`. Both list byte strings by rank.

use std::collections::HashMap;

use ahash::AHashMap;
use base64::Engine;
use oxiformers_hub::ModelFiles;
use serde::Deserialize;

use super::assemble::Assembly;
use super::config::TokenizerConfig;
use super::legacy::bpe;
use super::model::Pipeline;
use super::{bytes, check};
use crate::{Error, Result};

/// The pattern of GPT-4's and most later vocabularies, for files that carry none.
const DEFAULT_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn base64(file: &str, text: &str) -> Result<Vec<u8>> {
    base64::engine::general_purpose::STANDARD
        .decode(text)
        .map_err(|e| Error::format(file, format!("{text:?} is not a token in base64: {e}")))
}

/// A file of lines `BASE64 RANK`. The pattern is the configuration's `pat_str` or `pattern`; the special tokens
/// are those of its `added_tokens_decoder`.
pub(super) fn ranks_file(files: &ModelFiles, config: &TokenizerConfig) -> Result<Option<Pipeline>> {
    let is_ranks = |name: &&str| name.ends_with(".tiktoken") || *name == "tiktoken.model";
    let Some(file) = files.names().find(is_ranks).map(str::to_owned) else {
        return Ok(None);
    };
    let text = files.text(&file)?.unwrap_or_default();
    let mut ranks = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let (token, rank) = line
            .split_once(' ')
            .and_then(|(token, rank)| Some((token, rank.trim().parse::<u32>().ok()?)))
            .ok_or_else(|| Error::format(&file, format!("{line:?} is not a token and its rank")))?;
        // GPT-2's padding line: "=" alone stands for no bytes at all.
        let token = if token == "=" {
            Vec::new()
        } else {
            base64(&file, token)?
        };
        ranks.push((token, rank));
    }
    let pattern = ["pat_str", "pattern"]
        .iter()
        .find_map(|name| config.setting(name)?.as_str());
    let special = config
        .added()
        .iter()
        .map(|(id, token)| (token.content.clone(), *id))
        .collect();
    build(&file, ranks, special, pattern.unwrap_or(DEFAULT_PATTERN)).map(Some)
}

/// Mistral's format: special tokens have the first ids, the ranks follow.
pub(super) fn tekken(files: &ModelFiles, config: &mut TokenizerConfig) -> Result<Option<Pipeline>> {
    #[derive(Deserialize)]
    struct Tekken {
        config: Settings,
        vocab: Vec<Entry>,
        #[serde(default)]
        special_tokens: Vec<Special>,
    }
    #[derive(Deserialize)]
    struct Settings {
        pattern: String,
        default_vocab_size: Option<u32>,
        default_num_special_tokens: u32,
    }
    #[derive(Deserialize)]
    struct Entry {
        token_bytes: String,
    }
    #[derive(Deserialize)]
    struct Special {
        rank: u32,
        token_str: String,
    }
    const FILE: &str = "tekken.json";
    let Some(tekken) = files.json::<Tekken>(FILE)? else {
        return Ok(None);
    };
    let reserved = tekken.config.default_num_special_tokens;
    // Every reserved id has a name, so the count must be one that a vocabulary could have.
    if reserved > 1 << 16 {
        return Err(Error::format(
            FILE,
            format!("default_num_special_tokens is {reserved}: too many"),
        ));
    }
    let size = tekken
        .config
        .default_vocab_size
        .unwrap_or(u32::MAX)
        .saturating_sub(reserved);
    let ranks = tekken
        .vocab
        .iter()
        .zip(0..size)
        .map(|(entry, rank)| Ok((base64(FILE, &entry.token_bytes)?, rank + reserved)))
        .collect::<Result<Vec<_>>>()?;
    let given: HashMap<u32, String> = tekken
        .special_tokens
        .into_iter()
        .map(|token| (token.rank, token.token_str))
        .collect();
    // Files older than the list of special tokens have these.
    const FIRST: [&str; 3] = ["<unk>", "<s>", "</s>"];
    let special = (0..reserved)
        .map(|rank| {
            let usual = || match FIRST.get(rank as usize) {
                Some(token) => (*token).to_owned(),
                None => format!("<SPECIAL_{rank}>"),
            };
            (given.get(&rank).cloned().unwrap_or_else(usual), rank)
        })
        .collect();
    let mut tokenizer = build(FILE, ranks, special, &tekken.config.pattern)?;
    for (role, token) in [
        ("unk_token", "<unk>"),
        ("bos_token", "<s>"),
        ("eos_token", "</s>"),
        ("pad_token", "<pad>"),
    ] {
        if tokenizer.token_to_id(token).is_some() {
            config.default_token(role, token);
        }
    }
    if config.add_bos_token.is_none() {
        let bos = config.special_tokens.get("bos_token").map(String::as_str);
        super::assemble::surround(&mut tokenizer, FILE, bos, None)?;
    }
    Ok(Some(tokenizer))
}

/// Byte-level BPE with the merges that the ranks imply.
fn build(
    file: &str,
    ranks: Vec<(Vec<u8>, u32)>,
    special: Vec<(String, u32)>,
    pattern: &str,
) -> Result<Pipeline> {
    let by_bytes: AHashMap<&[u8], u32> = ranks
        .iter()
        .map(|(token, rank)| (token.as_slice(), *rank))
        .collect();
    let mut merges = Vec::new();
    for (token, rank) in &ranks {
        check::length(file, token.len())?;
        for at in 1..token.len() {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (by_bytes.get(left), by_bytes.get(right)) {
                merges.push((*rank, *l, *r, left, right));
            }
        }
    }
    merges.sort_unstable();
    let merges = merges
        .into_iter()
        .map(|(.., left, right)| (bytes::spell(left), bytes::spell(right)))
        .collect();
    let mut vocab: AHashMap<String, u32> = ranks
        .iter()
        .map(|(token, rank)| (bytes::spell(token), *rank))
        .collect();
    let names: Vec<_> = special.iter().map(|(token, _)| (token.clone(), true)).collect();
    vocab.extend(special);
    let model = bpe(file, vocab, merges, |builder| builder.ignore_merges(true))?;
    Ok(Assembly::new(file, model)
        .byte_level(&[pattern])?
        .added(names)?
        .finish())
}
