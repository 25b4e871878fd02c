//! The parts that tokenizers of other formats are put together from.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper};

use super::check;
use super::model::{Model, Pipeline};
use crate::{Error, Result};

/// A part from its description in the words of `tokenizer.json`.
fn part<T: DeserializeOwned>(file: &str, description: Value) -> Result<T> {
    serde_json::from_value(description).map_err(|e| Error::format(file, e.to_string()))
}

/// Describes a tokenizer piece by piece; `file` is for messages.
pub(super) struct Assembly<'a> {
    file: &'a str,
    tokenizer: Pipeline,
}

impl<'a> Assembly<'a> {
    pub fn new(file: &'a str, model: impl Into<Model>) -> Self {
        Self {
            file,
            tokenizer: Pipeline::new(model.into()),
        }
    }

    pub fn normalizer(mut self, description: Value) -> Result<Self> {
        let part: NormalizerWrapper = part(self.file, description)?;
        self.tokenizer
            .with_normalizer(Some(part))
            .map_err(|e| Error::format(self.file, e.to_string()))?;
        Ok(self)
    }

    pub fn pre_tokenizer(mut self, description: Value) -> Result<Self> {
        let part: PreTokenizerWrapper = part(self.file, description)?;
        self.tokenizer.with_pre_tokenizer(Some(part));
        Ok(self)
    }

    pub fn decoder(mut self, description: Value) -> Result<Self> {
        let part: DecoderWrapper = part(self.file, description)?;
        self.tokenizer.with_decoder(Some(part));
        Ok(self)
    }

    /// Pieces cut by regular expressions, then spelled in the byte alphabet; the decoder undoes the latter.
    pub fn byte_level(self, splits: &[&str]) -> Result<Self> {
        let mut steps: Vec<Value> = splits.iter().map(|pattern| split(pattern)).collect();
        steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}));
        self.pre_tokenizer(json!({"type": "Sequence", "pretokenizers": steps}))?
            .decoder(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}))
    }

    /// GPT-2's words in the byte alphabet, one more space before each stretch of text if `prefix`.
    pub fn byte_level_words(self, prefix: bool) -> Result<Self> {
        self.pre_tokenizer(
            json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true}),
        )?
        .decoder(
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        )
    }

    /// `▁` for spaces; byte tokens back to bytes; `strip` takes out the space that encoding put first.
    pub fn sentencepiece_decoder(self, strip: bool) -> Result<Self> {
        let mut steps = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if strip {
            steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        self.decoder(json!({"type": "Sequence", "decoders": steps}))
    }

    /// Tokens that are found in the text before anything else, and whether they are special.
    pub fn added(mut self, tokens: impl IntoIterator<Item = (String, bool)>) -> Result<Self> {
        let tokens: Vec<_> = tokens
            .into_iter()
            .map(|(content, special)| AddedToken::from(content, special).normalized(false))
            .collect();
        add(&mut self.tokenizer, self.file, tokens)?;
        Ok(self)
    }

    pub fn finish(self) -> Pipeline {
        self.tokenizer
    }
}

/// Adds tokens, in order.
pub(super) fn add(tokenizer: &mut Pipeline, file: &str, tokens: Vec<AddedToken>) -> Result<()> {
    check::guard(file, || tokenizer.add_tokens(tokens)).map(|_| ())
}

/// A split that keeps matches and gaps.
pub(super) fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

/// What stands at a place around texts, and its type.
pub(super) type Slot<'a> = (Place<'a>, u32);

/// What stands at a place around texts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    First,
    Second,
    Token(&'a str),
}

/// Puts tokens before and after every text: `[BOS] A [EOS]`, and for pairs `[BOS] A [EOS] [BOS] B [EOS]`.
pub(super) fn surround(
    tokenizer: &mut Pipeline,
    file: &str,
    before: Option<&str>,
    after: Option<&str>,
) -> Result<()> {
    let around = |text: Place<'static>, type_id: u32| -> Vec<Slot<'_>> {
        let before = before.map(|token| (Place::Token(token), type_id));
        let after = after.map(|token| (Place::Token(token), type_id));
        before.into_iter().chain([(text, type_id)]).chain(after).collect()
    };
    let single = around(Place::First, 0);
    let pair = [single.clone(), around(Place::Second, 1)].concat();
    let processor = template(file, &single, &pair, |token| tokenizer.token_to_id(token))?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

/// As BERT has it: `[CLS] A [SEP]`, `[CLS] A [SEP] B [SEP]`.
pub(super) fn surround_as_bert(tokenizer: &mut Pipeline, file: &str, cls: &str, sep: &str) -> Result<()> {
    use Place::{First, Second, Token};
    let single = [(Token(cls), 0), (First, 0), (Token(sep), 0)];
    let pair = [&single[..], &[(Second, 1), (Token(sep), 1)]].concat();
    let processor = template(file, &single, &pair, |token| tokenizer.token_to_id(token))?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

/// What puts special tokens around one text and around two.
pub(super) fn template(
    file: &str,
    single: &[Slot<'_>],
    pair: &[Slot<'_>],
    id: impl Fn(&str) -> Option<u32>,
) -> Result<PostProcessorWrapper> {
    let describe = |slots: &[Slot<'_>]| -> Vec<Value> {
        slots
            .iter()
            .map(|(place, type_id)| match place {
                Place::First => json!({"Sequence": {"id": "A", "type_id": type_id}}),
                Place::Second => json!({"Sequence": {"id": "B", "type_id": type_id}}),
                Place::Token(token) => json!({"SpecialToken": {"id": token, "type_id": type_id}}),
            })
            .collect()
    };
    let mut tokens = serde_json::Map::new();
    for (place, _) in single.iter().chain(pair) {
        if let Place::Token(token) = place {
            let id = id(token).ok_or_else(|| missing(file, token))?;
            tokens.insert(
                (*token).to_owned(),
                json!({"id": token, "ids": [id], "tokens": [token]}),
            );
        }
    }
    part(
        file,
        json!({"type": "TemplateProcessing", "single": describe(single), "pair": describe(pair), "special_tokens": tokens}),
    )
}

/// As RoBERTa has it: `<s> A </s>`, `<s> A </s></s> B </s>`, all of one type. If `trim`, the space that a piece
/// begins with is not a part of what it stands for.
pub(super) fn surround_as_roberta(
    tokenizer: &mut Pipeline,
    file: &str,
    (cls, sep): (&str, &str),
    trim: bool,
    prefix: bool,
) -> Result<()> {
    let id = |token: &str| tokenizer.token_to_id(token).ok_or_else(|| missing(file, token));
    let description = json!({
        "type": "RobertaProcessing", "cls": [cls, id(cls)?], "sep": [sep, id(sep)?],
        "trim_offsets": trim, "add_prefix_space": prefix,
    });
    let processor: PostProcessorWrapper = part(file, description)?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

fn missing(file: &str, token: &str) -> Error {
    Error::format(
        file,
        format!("the special token {token:?} is not in the vocabulary"),
    )
}

/// Merges that a vocabulary with priorities implies: each way to put a token together out of two others, the
/// token of the highest priority first. Priorities are scores (SentencePiece).
pub(super) fn merges_by_score(
    file: &str,
    vocab: &ahash::AHashMap<String, u32>,
    pieces: impl Iterator<Item = (String, f64)>,
) -> Result<Vec<(String, String)>> {
    let mut merges = Vec::new();
    for (piece, score) in pieces {
        check::length(file, piece.len())?;
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(l), Some(r)) = (vocab.get(left), vocab.get(right)) {
                merges.push((score, *l, *r, left.to_owned(), right.to_owned()));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    Ok(merges
        .into_iter()
        .map(|(.., left, right)| (left, right))
        .collect())
}
