//! Texts with holes: T5's span corruption (Raffel et al., 2020) and BART's text infilling (Lewis et al., 2020).

use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::{Batch, Draw, IGNORED, Objective, Row, Targets, Texts, is_blank_line, text};
use crate::shuffle::{below, unit};
use crate::{Error, Result};
use crate::{Example, Preprocessor};

/// Learns to restore texts.
#[derive(Debug, Clone)]
pub struct Denoising {
    texts: Texts,
    column: String,
    noise: Noise,
}

/// How a text is damaged, and what is to be written.
#[derive(Debug, Clone, PartialEq)]
enum Noise {
    /// Spans become sentinels; what stood there is written, each span after its sentinel.
    Spans {
        density: f64,
        mean_length: f64,
        sentinels: Vec<u32>,
    },
    /// Spans, some of no length, become one mask each; the whole text is written.
    Infilling {
        ratio: f64,
        lambda: f64,
        mask_token_id: u32,
    },
}

fn share(name: &str, value: f64) -> Result<f64> {
    match value > 0.0 && value < 1.0 {
        true => Ok(value),
        false => Err(Error::config(
            name,
            format!("is {value}; it must lie between 0 and 1"),
        )),
    }
}

fn length(name: &str, value: f64) -> Result<f64> {
    match (0.5..=100.0).contains(&value) {
        true => Ok(value),
        false => Err(Error::config(
            name,
            format!("is {value}; it must lie between 0.5 and 100 tokens"),
        )),
    }
}

impl Denoising {
    /// T5's: `noise_density` of the tokens, in spans of `mean_noise_span_length` tokens on average (0.15 and 3 in the
    /// paper).
    ///
    /// # Errors
    /// Where the tokenizer has no sentinels (`<extra_id_0>`, …), or a number makes no sense.
    pub fn spans(
        texts: Texts,
        column: &str,
        noise_density: f64,
        mean_noise_span_length: f64,
    ) -> Result<Self> {
        let sentinel = |index| texts.tokenizer.token_to_id(&format!("<extra_id_{index}>"));
        let sentinels: Vec<u32> = (0..1000).map_while(sentinel).collect();
        if sentinels.is_empty() {
            let message = "has no sentinels <extra_id_0>, <extra_id_1>, …, which span corruption needs";
            return Err(Error::config("tokenizer", message));
        }
        Ok(Self {
            column: column.to_string(),
            noise: Noise::Spans {
                density: share("noise_density", noise_density)?,
                mean_length: length("mean_noise_span_length", mean_noise_span_length)?,
                sentinels,
            },
            texts,
        })
    }

    /// BART's: `mask_ratio` of the tokens, in spans whose lengths are Poisson numbers of mean `poisson_lambda` (0.3 and 3
    /// in the paper).
    ///
    /// # Errors
    /// Where the tokenizer has no mask, or a number makes no sense.
    pub fn infilling(texts: Texts, column: &str, mask_ratio: f64, poisson_lambda: f64) -> Result<Self> {
        let mask = texts.tokenizer.mask_token_id();
        Ok(Self {
            column: column.to_string(),
            noise: Noise::Infilling {
                ratio: share("mask_ratio", mask_ratio)?,
                lambda: length("poisson_lambda", poisson_lambda)?,
                mask_token_id: mask
                    .ok_or_else(|| Error::config("tokenizer", "has no mask token, which infilling needs"))?,
            },
            texts,
        })
    }
}

impl Preprocessor for Denoising {
    fn settings(&self) -> Value {
        json!({ "task": "denoising", "text": self.column, "texts": self.texts.settings() })
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        if is_blank_line(record) {
            return Ok(Vec::new());
        }
        let encoding = self.texts.encode(text(record, &self.column)?, None)?;
        let words = encoding
            .special_tokens_mask
            .iter()
            .filter(|special| **special == 0)
            .count();
        match words {
            0 => Err("is a text with no tokens".to_string()),
            // Nothing would be left to restore it from.
            1 => Ok(Vec::new()),
            _ => Ok(vec![Example::default().with_ids("input_ids", &encoding.ids)]),
        }
    }
}

impl Objective for Denoising {
    fn collate(&self, rows: &[Row], draw: Draw) -> Batch {
        let (mut inputs, mut labels) = (Vec::new(), Vec::new());
        let eos = self.texts.tokenizer.eos_token_id();
        for row in rows {
            let ids = row.example.ints("input_ids").unwrap_or_default();
            let mut ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
            let rng = &mut draw.rng(row.index);
            let (input, label) = match &self.noise {
                Noise::Spans {
                    density,
                    mean_length,
                    sentinels,
                } => {
                    if eos.is_some() && ids.last().copied() == eos {
                        ids.pop();
                    }
                    let noise = noise_mask(ids.len(), *density, *mean_length, rng);
                    let end = |mut ids: Vec<u32>| {
                        ids.extend(eos);
                        ids
                    };
                    let kept: Vec<bool> = noise.iter().map(|noise| !noise).collect();
                    (
                        end(with_sentinels(&ids, &noise, sentinels)),
                        end(with_sentinels(&ids, &kept, sentinels)),
                    )
                }
                Noise::Infilling {
                    ratio,
                    lambda,
                    mask_token_id,
                } => {
                    let special = |id: &u32| self.texts.tokenizer.is_special(*id);
                    (infill(&ids, special, *ratio, *lambda, *mask_token_id, rng), ids)
                }
            };
            inputs.push(input);
            labels.push(label.into_iter().map(i64::from).collect());
        }
        self.texts.padding.fill(&mut labels, IGNORED);
        Batch::from_rows(inputs, Vec::new(), self.texts.padding).with_labels(Targets::Tokens(labels))
    }
}

/// Which tokens are taken out: spans of random lengths between spans of random lengths that stay, the first of which
/// begins the text.
fn noise_mask(len: usize, density: f64, mean_length: f64, rng: &mut ChaCha8Rng) -> Vec<bool> {
    if len < 2 {
        return vec![false; len];
    }
    let noise = ((len as f64 * density).round() as usize).clamp(1, len - 1);
    let spans = ((noise as f64 / mean_length).round() as usize).clamp(1, noise.min(len - noise));
    let lengths = segments(noise, spans, rng);
    let between = segments(len - noise, spans, rng);
    let spans = between.into_iter().zip(lengths);
    spans
        .flat_map(|(stays, goes)| std::iter::repeat_n(false, stays).chain(std::iter::repeat_n(true, goes)))
        .collect()
}

/// `items` in `parts` of at least one, each division as likely as the others.
fn segments(items: usize, parts: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    // Places where a new part begins, chosen without repetition (Floyd's algorithm).
    let mut begins = std::collections::BTreeSet::new();
    for at in items - parts + 1..items {
        let chosen = below(rng, at as u64) as usize + 1;
        if !begins.insert(chosen) {
            begins.insert(at);
        }
    }
    let ends: Vec<usize> = begins.iter().copied().chain([items]).collect();
    let starts = std::iter::once(0).chain(begins);
    starts.zip(ends).map(|(start, end)| end - start).collect()
}

/// The text without the spans that `hidden` marks, a sentinel for each. Once there are no more sentinels, the last one
/// stands for them.
fn with_sentinels(ids: &[u32], hidden: &[bool], sentinels: &[u32]) -> Vec<u32> {
    let mut sentinels = sentinels.iter().copied().peekable();
    let mut last = sentinels.peek().copied();
    let mut out = Vec::with_capacity(ids.len());
    let mut before = false;
    for (id, hidden) in ids.iter().zip(hidden) {
        if !hidden {
            out.push(*id);
        } else if !before {
            last = sentinels.next().or(last);
            out.extend(last);
        }
        before = *hidden;
    }
    out
}

/// The text with spans replaced by a mask each.
fn infill(
    ids: &[u32],
    special: impl Fn(&u32) -> bool,
    ratio: f64,
    lambda: f64,
    mask: u32,
    rng: &mut ChaCha8Rng,
) -> Vec<u32> {
    let first = ids.iter().position(|id| !special(id)).unwrap_or(ids.len());
    let last = ids
        .iter()
        .rposition(|id| !special(id))
        .map_or(first, |last| last + 1);
    let mut to_hide = ((last - first) as f64 * ratio).ceil() as usize;
    // What becomes of each place: 0 stays, 1 is hidden, 2 is hidden and begins a span.
    let mut places = vec![0_u8; ids.len()];
    let mut inserted = vec![false; ids.len() + 1];
    // A bound, as places may be taken already.
    for _ in 0..ids.len() * 4 {
        if to_hide == 0 {
            break;
        }
        let at = first + below(rng, (last - first) as u64) as usize;
        let length = poisson(lambda, rng);
        if length == 0 {
            inserted[at] = true;
            continue;
        }
        let end = (at + length.min(to_hide)).min(last);
        // Spans do not touch, so that each keeps a mask of its own.
        let around = places[at.max(first + 1) - 1..(end + 1).min(last)].iter();
        if around.sum::<u8>() > 0 {
            continue;
        }
        places[at..end].fill(1);
        places[at] = 2;
        to_hide -= end - at;
    }
    let mut out = Vec::with_capacity(ids.len());
    for (at, id) in ids.iter().enumerate() {
        if inserted[at] && places[at] == 0 {
            out.push(mask);
        }
        match places[at] {
            0 => out.push(*id),
            2 => out.push(mask),
            _ => {}
        }
    }
    out
}

/// A Poisson number (Knuth's multiplication of uniform ones, right for small means).
fn poisson(lambda: f64, rng: &mut ChaCha8Rng) -> usize {
    let limit = (-lambda).exp();
    let (mut product, mut count) = (unit(rng), 0);
    while product > limit && count < 1000 {
        product *= unit(rng);
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shuffle::rng;

    #[test]
    fn sentinels_stand_for_spans() {
        let ids = [10, 11, 12, 13, 14, 15];
        let noise = [false, true, true, false, true, false];
        let kept: Vec<bool> = noise.iter().map(|noise| !noise).collect();
        assert_eq!(with_sentinels(&ids, &noise, &[99, 98]), [10, 99, 13, 98, 15]);
        assert_eq!(
            with_sentinels(&ids, &kept, &[99, 98, 97]),
            [99, 11, 12, 98, 14, 97]
        );
        assert_eq!(with_sentinels(&ids, &noise, &[99]), [10, 99, 13, 99, 15]);
    }

    #[test]
    fn as_much_noise_as_asked_for() {
        for (len, seed) in [(2, 1), (3, 2), (10, 3), (512, 4), (512, 5)] {
            let mask = noise_mask(len, 0.15, 3.0, &mut rng(seed, "test", [0, 0]));
            assert_eq!(mask.len(), len);
            assert!(!mask[0]);
            let noise = mask.iter().filter(|noise| **noise).count();
            assert_eq!(noise, ((len as f64 * 0.15).round() as usize).max(1));
            let spans = mask.windows(2).filter(|two| !two[0] && two[1]).count();
            assert_eq!(spans, ((noise as f64 / 3.0).round() as usize).max(1));
        }
        assert_eq!(noise_mask(1, 0.15, 3.0, &mut rng(1, "test", [0, 0])), [false]);
    }

    #[test]
    fn infilling_hides_and_never_loses_the_rest() {
        let ids: Vec<u32> = (100..200).collect();
        let special = |id: &u32| *id == 100 || *id == 199;
        let damaged = infill(&ids, special, 0.3, 3.0, 7, &mut rng(3, "test", [0, 0]));
        let kept: Vec<u32> = damaged.iter().copied().filter(|id| *id != 7).collect();
        assert_eq!((kept[0], kept[kept.len() - 1]), (100, 199));
        assert!(kept.is_sorted());
        assert_eq!(ids.len() - kept.len(), 30);
        assert!(damaged.contains(&7));
        assert!(damaged.windows(2).all(|two| two != [7, 7]), "{damaged:?}");
    }
}
