//! Tokens that are hidden: BERT's masked language model (Devlin et al., 2019), whole words too.

use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::{Batch, Draw, IGNORED, Objective, Row, Targets, Texts, is_blank_line, text};
use crate::shuffle::{below, unit};
use crate::{Error, Result};
use crate::{Example, Preprocessor};

/// Learns to fill in tokens.
#[derive(Debug, Clone)]
pub struct MaskedLM {
    texts: Texts,
    column: String,
    options: MaskOptions,
    mask_token_id: u32,
}

/// Which tokens are hidden, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MaskOptions {
    /// The share of tokens (or words) that are to be predicted.
    pub mlm_probability: f64,
    /// Of these, the share that the mask stands for.
    pub mask_replace_prob: f64,
    /// Of these, the share that a random token stands for; the rest stays as it is.
    pub random_replace_prob: f64,
    /// Hides words as a whole, and always with the mask.
    pub whole_word_mask: bool,
}

impl Default for MaskOptions {
    fn default() -> Self {
        Self {
            mlm_probability: 0.15,
            mask_replace_prob: 0.8,
            random_replace_prob: 0.1,
            whole_word_mask: false,
        }
    }
}

impl MaskedLM {
    /// Texts in the column of that name.
    ///
    /// # Errors
    /// Where the tokenizer has no mask, or a probability is none.
    pub fn new(texts: Texts, column: &str, mut options: MaskOptions) -> Result<Self> {
        let mask_token_id = texts.tokenizer.mask_token_id().ok_or_else(|| {
            Error::config(
                "tokenizer",
                "has no mask token, which masked language models need",
            )
        })?;
        let shares = [
            ("mlm_probability", options.mlm_probability),
            ("mask_replace_prob", options.mask_replace_prob),
            ("random_replace_prob", options.random_replace_prob),
            (
                "mask_replace_prob",
                options.mask_replace_prob + options.random_replace_prob,
            ),
        ];
        if let Some((name, share)) = shares.iter().find(|(_, share)| !(0.0..=1.0).contains(share)) {
            let message = format!(
                "is {share} (with random_replace_prob, where that counts); it must lie between 0 and 1"
            );
            return Err(Error::config(*name, message));
        }
        if options.whole_word_mask {
            (options.mask_replace_prob, options.random_replace_prob) = (1.0, 0.0);
        }
        Ok(Self {
            texts,
            column: column.to_string(),
            options,
            mask_token_id,
        })
    }

    /// Which tokens of a row are to be predicted.
    fn choose(&self, row: &Row, ids: &[u32], rng: &mut ChaCha8Rng) -> Vec<bool> {
        let special = |id: &u32| self.texts.tokenizer.is_special(*id);
        let Some(starts) = row
            .example
            .ints("word_starts")
            .filter(|_| self.options.whole_word_mask)
        else {
            let hide = |id: &u32| unit(rng) < self.options.mlm_probability && !special(id);
            return ids.iter().map(hide).collect();
        };
        let mut hidden = false;
        let hide = |(id, start): (&u32, &i32)| {
            if special(id) {
                hidden = false;
            } else if *start != 0 {
                hidden = unit(rng) < self.options.mlm_probability;
            }
            hidden
        };
        ids.iter().zip(starts).map(hide).collect()
    }
}

impl Preprocessor for MaskedLM {
    fn settings(&self) -> Value {
        let whole = self.options.whole_word_mask;
        json!({ "task": "masked-lm", "text": self.column, "words": whole, "texts": self.texts.settings() })
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        if is_blank_line(record) {
            return Ok(Vec::new());
        }
        let encoding = self.texts.encode(text(record, &self.column)?, None)?;
        if encoding.special_tokens_mask.iter().all(|special| *special != 0) {
            return Err("is a text with no tokens".to_string());
        }
        let example = self.texts.example(&encoding);
        if !self.options.whole_word_mask {
            return Ok(vec![example]);
        }
        // A word goes on where a token begins with the end of the one before it.
        let (mut end, mut was_special) = (None, false);
        let start = |(at, special): (&(usize, usize), &u32)| {
            let special = *special != 0;
            let starts = !special && (was_special || end != Some(at.0));
            (end, was_special) = (Some(at.1), special);
            i32::from(starts)
        };
        let tokens = encoding.offsets.iter().zip(&encoding.special_tokens_mask);
        Ok(vec![example.with("word_starts", tokens.map(start).collect())])
    }
}

impl Objective for MaskedLM {
    fn collate(&self, rows: &[Row], draw: Draw) -> Batch {
        let mut batch = Batch::padded(rows, self.texts.padding);
        let mut labels = Vec::new();
        let random = self.options.random_replace_prob / (1.0 - self.options.mask_replace_prob);
        for ((row, ids), length) in rows.iter().zip(&mut batch.input_ids).zip(&batch.lengths) {
            let rng = &mut draw.rng(row.index);
            let ids_of_row = &mut ids[..*length];
            let chosen = self.choose(row, ids_of_row, rng);
            let mut targets = vec![IGNORED; *length];
            for ((id, target), _) in
                (ids_of_row.iter_mut().zip(&mut targets).zip(chosen)).filter(|(_, chosen)| *chosen)
            {
                *target = i64::from(*id);
                if unit(rng) < self.options.mask_replace_prob {
                    *id = self.mask_token_id;
                } else if unit(rng) < random {
                    *id = below(rng, self.texts.tokenizer.vocab_size() as u64) as u32;
                }
            }
            labels.push(targets);
        }
        self.texts.padding.fill(&mut labels, IGNORED);
        batch.with_labels(Targets::Tokens(labels))
    }
}
