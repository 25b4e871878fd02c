//! The parts that tokenizers of other formats are put together from.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer,
};

use super::check;
use crate::{Error, Result};

/// A part from its description in the words of `tokenizer.json`.
fn part<T: DeserializeOwned>(file: &str, description: Value) -> Result<T> {
    serde_json::from_value(description).map_err(|e| Error::format(file, e.to_string()))
}

/// Describes a tokenizer piece by piece; `file` is for messages.
pub(super) struct Assembly<'a> {
    file: &'a str,
    tokenizer: Tokenizer,
}

impl<'a> Assembly<'a> {
    pub fn new(file: &'a str, model: impl Into<ModelWrapper>) -> Self {
        Self {
            file,
            tokenizer: Tokenizer::new(model),
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

    pub fn finish(self) -> Tokenizer {
        self.tokenizer
    }
}

/// Adds tokens, in order.
pub(super) fn add(tokenizer: &mut Tokenizer, file: &str, tokens: Vec<AddedToken>) -> Result<()> {
    check::guard(file, || tokenizer.add_tokens(tokens)).map(|_| ())
}

/// A split that keeps matches and gaps.
pub(super) fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

/// Puts tokens before and after every text: `[BOS] A [EOS]`, and for pairs `[BOS] A [EOS] [BOS] B [EOS]`.
pub(super) fn surround(
    tokenizer: &mut Tokenizer,
    file: &str,
    before: Option<&str>,
    after: Option<&str>,
) -> Result<()> {
    template(tokenizer, file, (before, after), (before, after))
}

/// As BERT has it: `[CLS] A [SEP]`, `[CLS] A [SEP] B [SEP]`.
pub(super) fn surround_as_bert(tokenizer: &mut Tokenizer, file: &str, cls: &str, sep: &str) -> Result<()> {
    template(tokenizer, file, (Some(cls), Some(sep)), (None, Some(sep)))
}

fn template(
    tokenizer: &mut Tokenizer,
    file: &str,
    first: (Option<&str>, Option<&str>),
    second: (Option<&str>, Option<&str>),
) -> Result<()> {
    let sequence = |(before, after): (Option<&str>, Option<&str>), id: &str, type_id: u32| {
        let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": type_id}});
        before
            .map(special)
            .into_iter()
            .chain([json!({"Sequence": {"id": id, "type_id": type_id}})])
            .chain(after.map(special))
            .collect::<Vec<_>>()
    };
    let single = sequence(first, "A", 0);
    let pair: Vec<_> = single.iter().cloned().chain(sequence(second, "B", 1)).collect();
    let mut tokens = serde_json::Map::new();
    for token in [first.0, first.1, second.0, second.1].into_iter().flatten() {
        let id = tokenizer.token_to_id(token).ok_or_else(|| {
            Error::format(
                file,
                format!("the special token {token:?} is not in the vocabulary"),
            )
        })?;
        tokens.insert(
            token.to_owned(),
            json!({"id": token, "ids": [id], "tokens": [token]}),
        );
    }
    let processor: PostProcessorWrapper = part(
        file,
        json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}),
    )?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
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
