//! `tokenizer_config.json` and `special_tokens_map.json`: what a model says beside its tokenizer.

use std::collections::{HashMap, HashSet};

use indexmap::{IndexMap, IndexSet};
use oxiformers_hub::ModelFiles;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::assemble;
use super::family::{self, Family};
use super::model::Pipeline;
use crate::Result;

/// An end of a sequence, where it is filled or cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Side {
    /// Before the text: what decoders need to generate in batches.
    Left,
    /// After the text.
    #[default]
    Right,
}

/// Special tokens by role and the other settings of a tokenizer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenizerConfig {
    /// Text of each special token by role (`bos_token`, …).
    pub special_tokens: IndexMap<String, String>,
    /// Further special tokens without a role.
    pub extra_special_tokens: Vec<String>,
    /// Whether BOS comes first, if the model says so; it overrides `tokenizer.json`.
    pub add_bos_token: Option<bool>,
    /// Whether EOS comes last, if the model says so; it overrides `tokenizer.json`.
    pub add_eos_token: Option<bool>,
    /// The longest input in tokens, if there is a limit.
    pub model_max_length: Option<usize>,
    /// Where batches are padded.
    pub padding_side: Side,
    /// Where texts are cut.
    pub truncation_side: Side,
    /// Token type of padding.
    pub pad_token_type_id: u32,
    /// What the model takes: `input_ids`, `attention_mask` and, for some, `token_type_ids`.
    pub model_input_names: Vec<String>,
    /// Whether decoding takes out spaces before punctuation (never with BPE).
    pub clean_up_tokenization_spaces: bool,
    /// Class name of the tokenizer in Python (without `Fast`), for what its default settings are: as the files
    /// name it, or that of the model's type.
    pub tokenizer_class: Option<String>,
    /// The kind of tokenizer that the class is.
    pub(super) family: Family,
    /// Special tokens that a file describes as objects, by text.
    described: HashMap<String, AddedToken>,
    /// All of `tokenizer_config.json`, for settings of one kind of tokenizer alone.
    settings: Map<String, Value>,
    /// Tokens that the configuration adds, by id.
    added: Vec<(u32, AddedToken)>,
}

/// Roles with a meaning of their own, in the order that Python lists them.
const ROLES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl TokenizerConfig {
    /// Reads both files; what is in neither keeps its default.
    pub(super) fn read(files: &ModelFiles) -> Result<Self> {
        let json: Map<String, Value> = files.json("tokenizer_config.json")?.unwrap_or_default();
        let map: Map<String, Value> = files.json("special_tokens_map.json")?.unwrap_or_default();
        let (tokenizer_class, family) = family::of(files, &json)?;
        let flag = |name: &str| json.get(name).and_then(Value::as_bool);
        let side = |name: &str| match json.get(name)?.as_str()? {
            "left" => Some(Side::Left),
            _ => Some(Side::Right),
        };
        let mut config = Self {
            add_bos_token: flag("add_bos_token"),
            add_eos_token: flag("add_eos_token"),
            // Python writes 1e30 for "no limit".
            model_max_length: json
                .get("model_max_length")
                .and_then(Value::as_u64)
                .and_then(|length| usize::try_from(length).ok()),
            padding_side: side("padding_side").unwrap_or(family.padding_side()),
            truncation_side: side("truncation_side").unwrap_or_default(),
            pad_token_type_id: family.pad_token_type_id(),
            model_input_names: match json.get("model_input_names").and_then(Value::as_array) {
                Some(names) => names
                    .iter()
                    .filter_map(Value::as_str)
                    .map(str::to_owned)
                    .collect(),
                None => family
                    .model_input_names()
                    .iter()
                    .map(|name| (*name).to_owned())
                    .collect(),
            },
            clean_up_tokenization_spaces: flag("clean_up_tokenization_spaces").unwrap_or(false),
            tokenizer_class,
            family,
            ..Self::default()
        };
        for role in ROLES {
            let given = json.get(role).or_else(|| map.get(role));
            if let Some(token) = given.and_then(content) {
                config.special_tokens.insert(role.to_owned(), token);
            }
            if let Some(token) = given.filter(|token| token.is_object()).and_then(added_token) {
                config.described.insert(token.content.clone(), token);
            }
        }
        let extra = ["extra_special_tokens", "additional_special_tokens"]
            .iter()
            .find_map(|name| json.get(*name).or_else(|| map.get(*name)));
        match extra {
            Some(Value::Array(tokens)) => config
                .extra_special_tokens
                .extend(tokens.iter().filter_map(content)),
            // By role: `{"image_token": "<image>"}`.
            Some(Value::Object(tokens)) => config.special_tokens.extend(
                tokens
                    .iter()
                    .filter_map(|(role, token)| Some((role.clone(), content(token)?))),
            ),
            _ => {}
        }
        // Roles of the model's own, as multimodal models have them.
        for (role, token) in &json {
            if role.ends_with("_token")
                && !role.starts_with("add_")
                && !config.special_tokens.contains_key(role)
                && let Some(token) = content(token)
            {
                config.special_tokens.insert(role.clone(), token);
            }
        }
        if let Some(added) = json.get("added_tokens_decoder").and_then(Value::as_object) {
            config.added = added
                .iter()
                .filter_map(|(id, token)| Some((id.parse().ok()?, added_token(token)?)))
                .collect();
            config.added.sort_by_key(|(id, _)| *id);
        } else if let Some(added) = files.json::<HashMap<String, u32>>("added_tokens.json")? {
            // How it was written before.
            let plain = |token: String| AddedToken::from(token, false).normalized(false);
            config.added = added.into_iter().map(|(token, id)| (id, plain(token))).collect();
            config.added.sort_by_key(|(id, _)| *id);
        }
        config.settings = json;
        Ok(config)
    }

    /// Tokens that the configuration adds, by id.
    pub(super) fn added(&self) -> &[(u32, AddedToken)] {
        &self.added
    }

    /// A setting of one kind of tokenizer alone.
    pub(crate) fn setting(&self, name: &str) -> Option<&Value> {
        self.settings.get(name)
    }

    /// Such a setting that is true or false.
    pub(crate) fn flag(&self, name: &str) -> Option<bool> {
        self.setting(name)?.as_bool()
    }

    /// Sets roles that no file names to what models of this kind have, if `known` knows the token.
    pub(super) fn default_tokens(&mut self, known: impl Fn(&str) -> bool) {
        for (role, token) in self.family.special_tokens() {
            // A role that is null has no token.
            if !self.settings.contains_key(*role) && known(token) {
                self.default_token(role, *token);
            }
        }
        let rank = |role: &str| {
            ROLES
                .iter()
                .position(|other| *other == role)
                .unwrap_or(ROLES.len())
        };
        self.special_tokens
            .sort_by(|one, _, other, _| rank(one).cmp(&rank(other)));
    }

    /// Sets a role that no file names.
    pub(super) fn default_token(&mut self, role: &str, token: impl Into<String>) {
        self.special_tokens
            .entry(role.to_owned())
            .or_insert_with(|| token.into());
    }

    /// Adds the tokens that the configuration names and the tokenizer lacks.
    pub(super) fn add_tokens(&self, tokenizer: &mut Pipeline, file: &str) -> Result<()> {
        let special: IndexSet<&String> = self
            .special_tokens
            .values()
            .chain(&self.extra_special_tokens)
            .collect();
        let mut known: HashSet<String> = tokenizer
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .values()
            .map(|token| token.content.clone())
            .collect();
        let mut missing = Vec::new();
        for (_, token) in &self.added {
            if known.insert(token.content.clone()) {
                let mut token = token.clone();
                token.special |= special.contains(&token.content);
                missing.push(token);
            }
        }
        let mask = self.special_tokens.get("mask_token");
        for token in special {
            if !known.insert(token.clone()) {
                continue;
            }
            let takes_spaces = mask == Some(token) && self.family.mask_takes_spaces();
            let both_sides = match self.family {
                Family::ByT5 => self.special_tokens.values().any(|other| other == token),
                Family::T5 => self.flag("legacy") == Some(false) && token.starts_with("<extra_id_"),
                _ => false,
            };
            let mut added = self.described.get(token).cloned().unwrap_or_else(|| {
                AddedToken::from(token.clone(), true)
                    .normalized(false)
                    .lstrip(takes_spaces || both_sides)
                    .rstrip(both_sides)
            });
            added.special = true;
            missing.push(added);
        }
        match missing.is_empty() {
            true => Ok(()),
            false => assemble::add(tokenizer, file, missing),
        }
    }

    /// Puts BOS and EOS around texts if a setting says whether to.
    pub(super) fn surround(&self, tokenizer: &mut Pipeline, file: &str) -> Result<()> {
        if self.add_bos_token.is_none() && self.add_eos_token.is_none() {
            return Ok(());
        }
        let wanted = |flag: Option<bool>, role: &str| {
            flag.unwrap_or(false)
                .then(|| self.special_tokens.get(role).map(String::as_str))
                .flatten()
        };
        let bos = wanted(self.add_bos_token, "bos_token");
        let eos = wanted(self.add_eos_token, "eos_token");
        assemble::surround(tokenizer, file, bos, eos)
    }
}

/// The text of a token, given plain or as an object.
fn content(token: &Value) -> Option<String> {
    token
        .as_str()
        .or_else(|| token.get("content")?.as_str())
        .map(str::to_owned)
}

fn added_token(token: &Value) -> Option<AddedToken> {
    let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
    Some(
        AddedToken::from(content(token)?, flag("special"))
            .normalized(flag("normalized"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .single_word(flag("single_word")),
    )
}
