//! What is done to the logits before a token is chosen.
//!
//! Every processor is the one of that name in Transformers (`generation/logits_process.py`), on one row of
//! logits `[vocab_size]` at a time. `ids` is the row's whole sequence: the prompt without padding, and what was
//! generated.

use std::collections::HashMap;

pub use oxiformers_kernels::softmax;

use crate::{GenerationConfig, Result};

const NEVER: f32 = f32::NEG_INFINITY;

/// Changes the logits of the next token.
pub trait LogitsProcessor: Send + Sync {
    /// `ids` are the tokens so far, `logits` `[vocab_size]` what the model gives for the next one.
    fn process(&self, ids: &[u32], logits: &mut [f32]);
}

/// Processors in order.
#[derive(Default)]
pub struct LogitsProcessors(Vec<Box<dyn LogitsProcessor>>);

impl LogitsProcessors {
    /// The processors that a configuration asks for, in Transformers' order, for a sequence that begins with
    /// `prompt` and will have `max_length` tokens at most. `source` is the text that was given: the prompt, or what an
    /// encoder has read.
    ///
    /// # Errors
    /// Where a field makes no sense.
    pub fn new(config: &GenerationConfig, prompt: &[u32], source: &[u32], max_length: usize) -> Result<Self> {
        config.validate()?;
        let mut all = Self::default();
        let eos = &config.eos_token_id;
        if !config.sequence_bias.is_empty() {
            all.push(SequenceBias::new(config.sequence_bias.iter().cloned()));
        }
        if config.encoder_repetition_penalty != 1.0 {
            let penalty = 1.0 / config.encoder_repetition_penalty as f32;
            all.push(EncoderRepetitionPenalty {
                penalty,
                source: source.to_vec(),
            });
        }
        if config.repetition_penalty != 1.0 {
            all.push(RepetitionPenalty {
                penalty: config.repetition_penalty as f32,
            });
        }
        if config.presence_penalty != 0.0 || config.frequency_penalty != 0.0 {
            all.push(PresencePenalty {
                presence: config.presence_penalty as f32,
                frequency: config.frequency_penalty as f32,
                prompt_len: prompt.len(),
            });
        }
        if config.no_repeat_ngram_size > 0 {
            all.push(NoRepeatNGram {
                size: config.no_repeat_ngram_size,
            });
        }
        if config.encoder_no_repeat_ngram_size > 0 {
            all.push(EncoderNoRepeatNGram {
                size: config.encoder_no_repeat_ngram_size,
                source: source.to_vec(),
            });
        }
        if !config.bad_words_ids.is_empty() {
            let bad = config
                .bad_words_ids
                .iter()
                .filter(|ids| !matches!(ids[..], [id] if eos.contains(&id)));
            all.push(SequenceBias::new(bad.map(|ids| (ids.clone(), f64::NEG_INFINITY))));
        }
        let min_length = config
            .min_new_tokens
            .map_or(config.min_length, |new| prompt.len() + new);
        if min_length > 0 && !eos.is_empty() {
            all.push(MinLength {
                min_length,
                eos: eos.clone(),
            });
        }
        if let Some(id) = config.forced_bos_token_id {
            all.push(Forced { at: 1, ids: vec![id] });
        }
        if !config.forced_eos_token_id.is_empty() {
            all.push(Forced {
                at: max_length.saturating_sub(1),
                ids: config.forced_eos_token_id.clone(),
            });
        }
        if config.remove_invalid_values {
            all.push(InfNanRemove);
        }
        if let Some((start, factor)) = config.exponential_decay_length_penalty {
            all.push(ExponentialDecayLengthPenalty {
                start: start + prompt.len(),
                factor,
                eos: eos.clone(),
            });
        }
        if !config.suppress_tokens.is_empty() {
            all.push(SuppressTokens {
                ids: config.suppress_tokens.clone(),
                at: None,
            });
        }
        if !config.begin_suppress_tokens.is_empty() {
            let first_is_forced = prompt.len() <= 1 && config.forced_bos_token_id.is_some();
            let at = Some(prompt.len() + usize::from(first_is_forced));
            all.push(SuppressTokens {
                ids: config.begin_suppress_tokens.clone(),
                at,
            });
        }
        if config.do_sample {
            // Beams need a token to go on with when all ends of text are among the candidates.
            let keep = if config.num_beams > 1 { eos.len() + 1 } else { 1 };
            if config.temperature != 1.0 {
                all.push(Temperature(config.temperature as f32));
            }
            if let Some(top_h) = config.top_h {
                all.push(TopH(top_h));
            }
            if config.top_k != 0 {
                all.push(TopK(config.top_k.max(keep)));
            }
            if config.top_p < 1.0 {
                all.push(TopP {
                    top_p: config.top_p,
                    keep,
                });
            }
            if let Some(min_p) = config.min_p {
                all.push(MinP {
                    min_p: min_p as f32,
                    keep,
                });
            }
            if config.typical_p < 1.0 {
                all.push(Typical {
                    mass: config.typical_p,
                    keep,
                });
            }
            if config.epsilon_cutoff > 0.0 && config.epsilon_cutoff < 1.0 {
                all.push(Epsilon {
                    epsilon: config.epsilon_cutoff as f32,
                    keep,
                });
            }
            if config.eta_cutoff > 0.0 && config.eta_cutoff < 1.0 {
                all.push(Eta {
                    epsilon: config.eta_cutoff as f32,
                    keep,
                });
            }
        }
        if config.renormalize_logits {
            all.push(LogSoftmax);
        }
        Ok(all)
    }

    /// Appends a processor.
    pub fn push(&mut self, processor: impl LogitsProcessor + 'static) {
        self.0.push(Box::new(processor));
    }
}

impl LogitsProcessor for LogitsProcessors {
    fn process(&self, ids: &[u32], logits: &mut [f32]) {
        for processor in &self.0 {
            processor.process(ids, logits);
        }
    }
}

/// Adds a bias to the last token of a sequence when the tokens before it have just come.
pub struct SequenceBias(Vec<(Vec<u32>, u32, f32)>);

impl SequenceBias {
    /// Sequences with their biases; of a sequence given twice, the last bias counts.
    pub fn new(biases: impl IntoIterator<Item = (Vec<u32>, f64)>) -> Self {
        let unique: HashMap<Vec<u32>, f64> = biases.into_iter().collect();
        let split = |(mut ids, bias): (Vec<u32>, f64)| ids.pop().map(|last| (ids, last, bias as f32));
        Self(unique.into_iter().filter_map(split).collect())
    }
}

impl LogitsProcessor for SequenceBias {
    fn process(&self, ids: &[u32], logits: &mut [f32]) {
        for (prefix, last, bias) in &self.0 {
            if let Some(logit) = logits.get_mut(*last as usize).filter(|_| ids.ends_with(prefix)) {
                *logit += bias;
            }
        }
    }
}

/// Divides positive logits by the penalty and multiplies negative ones.
fn penalize(logits: &mut [f32], ids: &[u32], penalty: f32) {
    let mut seen: Vec<u32> = ids.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for id in seen {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit < 0.0 {
                *logit * penalty
            } else {
                *logit / penalty
            };
        }
    }
}

/// Makes tokens of the whole sequence less likely (Keskar et al., 2019).
pub struct RepetitionPenalty {
    /// Above 1 discourages.
    pub penalty: f32,
}

impl LogitsProcessor for RepetitionPenalty {
    fn process(&self, ids: &[u32], logits: &mut [f32]) {
        penalize(logits, ids, self.penalty);
    }
}

/// Makes tokens of the source likelier.
pub struct EncoderRepetitionPenalty {
    /// Below 1 encourages.
    pub penalty: f32,
    /// The prompt, or what an encoder has read.
    pub source: Vec<u32>,
}

impl LogitsProcessor for EncoderRepetitionPenalty {
    fn process(&self, _: &[u32], logits: &mut [f32]) {
        penalize(logits, &self.source, self.penalty);
    }
}

/// Takes a constant, and one for each time, from the logits of generated tokens (as the OpenAI API has it).
pub struct PresencePenalty {
    /// Once for each token.
    pub presence: f32,
    /// For each time.
    pub frequency: f32,
    /// Where the generated tokens begin.
    pub prompt_len: usize,
}

impl LogitsProcessor for PresencePenalty {
    fn process(&self, ids: &[u32], logits: &mut [f32]) {
        let mut counts: HashMap<u32, u32> = HashMap::new();
        for id in ids.iter().skip(self.prompt_len) {
            *counts.entry(*id).or_default() += 1;
        }
        for (id, count) in counts {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit -= self.presence + self.frequency * count as f32;
            }
        }
    }
}

/// Bans what follows the last `size - 1` tokens wherever they stand in `text`.
fn ban_repeats(text: &[u32], ids: &[u32], size: usize, logits: &mut [f32]) {
    if size == 0 || ids.len() + 1 < size {
        return;
    }
    let prefix = &ids[ids.len() + 1 - size..];
    for window in text.windows(size) {
        if let Some((last, before)) = window.split_last()
            && before == prefix
            && let Some(logit) = logits.get_mut(*last as usize)
        {
            *logit = NEVER;
        }
    }
}

/// No n-gram of the sequence comes twice.
pub struct NoRepeatNGram {
    /// Length of the n-grams.
    pub size: usize,
}

impl LogitsProcessor for NoRepeatNGram {
    fn process(&self, ids: &[u32], logits: &mut [f32]) {
        ban_repeats(ids, ids, self.size, logits);
    }
}

/// No n-gram of the source comes again.
pub struct EncoderNoRepeatNGram {
    /// Length of the n-grams.
    pub size: usize,
    /// The prompt, or what an encoder has read.
    pub source: Vec<u32>,
}

impl LogitsProcessor for EncoderNoRepeatNGram {
    fn process(&self, ids: &[u32], logits: &mut [f32]) {
        ban_repeats(&self.source, ids, self.size, logits);
    }
}

fn set(logits: &mut [f32], ids: &[u32], value: f32) {
    for id in ids {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit = value;
        }
    }
}

/// The text does not end before it has a certain length.
pub struct MinLength {
    /// In tokens, the prompt included.
    pub min_length: usize,
    /// Tokens that would end it.
    pub eos: Vec<u32>,
}

impl LogitsProcessor for MinLength {
    fn process(&self, ids: &[u32], logits: &mut [f32]) {
        if ids.len() < self.min_length {
            set(logits, &self.eos, NEVER);
        }
    }
}

/// When the sequence has a certain length, one of these tokens comes.
pub struct Forced {
    /// The length.
    pub at: usize,
    /// The tokens.
    pub ids: Vec<u32>,
}

impl LogitsProcessor for Forced {
    fn process(&self, ids: &[u32], logits: &mut [f32]) {
        if ids.len() == self.at {
            logits.fill(NEVER);
            set(logits, &self.ids, 0.0);
        }
    }
}

/// Makes NaN 0 and infinities the largest finite numbers.
pub struct InfNanRemove;

impl LogitsProcessor for InfNanRemove {
    fn process(&self, _: &[u32], logits: &mut [f32]) {
        for logit in logits {
            *logit = if logit.is_nan() {
                0.0
            } else {
                logit.clamp(f32::MIN, f32::MAX)
            };
        }
    }
}

/// Makes ends of text likelier and likelier.
pub struct ExponentialDecayLengthPenalty {
    /// Length of the sequence from which on it does.
    pub start: usize,
    /// Growth per token.
    pub factor: f64,
    /// The ends of text.
    pub eos: Vec<u32>,
}

impl LogitsProcessor for ExponentialDecayLengthPenalty {
    fn process(&self, ids: &[u32], logits: &mut [f32]) {
        let Some(over) = ids.len().checked_sub(self.start).filter(|over| *over > 0) else {
            return;
        };
        let growth = (self.factor.powf(over as f64) - 1.0) as f32;
        for id in &self.eos {
            if let Some(logit) = logits.get_mut(*id as usize).filter(|logit| logit.is_finite()) {
                *logit += logit.abs() * growth;
            }
        }
    }
}

/// Tokens that never come, or not at a certain length.
pub struct SuppressTokens {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The length; `None` is always.
    pub at: Option<usize>,
}

impl LogitsProcessor for SuppressTokens {
    fn process(&self, ids: &[u32], logits: &mut [f32]) {
        if self.at.is_none_or(|at| ids.len() == at) {
            set(logits, &self.ids, NEVER);
        }
    }
}

/// Divides the logits.
pub struct Temperature(pub f32);

impl LogitsProcessor for Temperature {
    fn process(&self, _: &[u32], logits: &mut [f32]) {
        for logit in logits {
            *logit /= self.0;
        }
    }
}

/// `log Σ exp(logits)`, summed in f64.
pub fn log_sum_exp(logits: &[f32]) -> f32 {
    let max = logits.iter().copied().fold(NEVER, f32::max);
    if max == NEVER {
        return NEVER;
    }
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - max).exp())).sum();
    max + sum.ln() as f32
}

/// The tokens that can come at all, likeliest first.
fn descending(logits: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).filter(|id| logits[*id] > NEVER).collect();
    sort_descending(&mut order, logits);
    order
}

fn sort_descending(order: &mut [usize], logits: &[f32]) {
    order.sort_unstable_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
}

/// The logit of the `k`-th likeliest token.
fn kth_largest(logits: &[f32], k: usize) -> f32 {
    let mut values: Vec<f32> = logits.to_vec();
    let index = k.clamp(1, values.len().max(1)) - 1;
    if values.is_empty() {
        return NEVER;
    }
    *values.select_nth_unstable_by(index, |a, b| b.total_cmp(a)).1
}

/// The `k` likeliest tokens (Fan et al., 2018).
pub struct TopK(pub usize);

impl LogitsProcessor for TopK {
    fn process(&self, _: &[u32], logits: &mut [f32]) {
        let limit = kth_largest(logits, self.0);
        for logit in logits.iter_mut().filter(|logit| **logit < limit) {
            *logit = NEVER;
        }
    }
}

/// The likeliest tokens that together reach a probability (Holtzman et al., 2020).
pub struct TopP {
    /// The probability.
    pub top_p: f64,
    /// Fewest tokens to keep.
    pub keep: usize,
}

impl LogitsProcessor for TopP {
    fn process(&self, _: &[u32], logits: &mut [f32]) {
        let probs = softmax(logits);
        // Tokens so rare cannot reach what may go even together: they need no order.
        let rare = ((1.0 - self.top_p) / logits.len().max(1) as f64) as f32;
        let mut order: Vec<usize> = (0..logits.len()).filter(|id| probs[*id] > rare).collect();
        let mut below = 0.0;
        if order.len() < self.keep {
            order = descending(logits);
        } else {
            sort_descending(&mut order, logits);
            for (logit, p) in logits.iter_mut().zip(&probs).filter(|(_, p)| **p <= rare) {
                below += f64::from(*p);
                *logit = NEVER;
            }
        }
        // From the least likely upwards, as the reference counts.
        for (rank, id) in order.iter().enumerate().rev() {
            below += f64::from(probs[*id]);
            if below as f32 <= (1.0 - self.top_p) as f32 && rank >= self.keep {
                logits[*id] = NEVER;
            }
        }
    }
}

/// The likeliest tokens that together have a fraction of the entropy (Potraghloo et al., 2025).
pub struct TopH(pub f64);

impl LogitsProcessor for TopH {
    fn process(&self, _: &[u32], logits: &mut [f32]) {
        let order = descending(logits);
        let top = &order[..order.len().min(100)];
        let values: Vec<f32> = top.iter().map(|id| logits[*id]).collect();
        let terms: Vec<f64> = softmax(&values)
            .iter()
            .map(|p| f64::from(*p))
            .map(|p| if p > 0.0 { -p * p.ln() } else { 0.0 })
            .collect();
        let threshold = terms.iter().sum::<f64>() * self.0;
        let mut sum = 0.0;
        let kept = terms.iter().position(|term| {
            sum += term;
            sum > threshold
        });
        for id in &order[kept.unwrap_or(top.len()).max(1).min(order.len())..] {
            logits[*id] = NEVER;
        }
    }
}

/// Tokens at least a fraction as likely as the likeliest (Nguyen et al., 2024).
pub struct MinP {
    /// The fraction.
    pub min_p: f32,
    /// Fewest tokens to keep.
    pub keep: usize,
}

impl LogitsProcessor for MinP {
    fn process(&self, _: &[u32], logits: &mut [f32]) {
        let probs = softmax(logits);
        let limit = self.min_p * probs.iter().copied().fold(0.0, f32::max);
        let kept = kth_largest(logits, self.keep);
        for (logit, p) in logits.iter_mut().zip(probs) {
            if p < limit && *logit < kept {
                *logit = NEVER;
            }
        }
    }
}

/// `−Σ p log p` of the distribution.
fn entropy(logits: &[f32], log_norm: f32) -> f32 {
    let terms = logits
        .iter()
        .map(|logit| logit - log_norm)
        .filter(|log_p| *log_p > NEVER);
    -terms
        .map(|log_p| f64::from(log_p) * f64::from(log_p).exp())
        .sum::<f64>() as f32
}

/// Tokens whose information is nearest to the expected one (Meister et al., 2022).
pub struct Typical {
    /// Probability that they have together.
    pub mass: f64,
    /// Fewest tokens to keep.
    pub keep: usize,
}

impl LogitsProcessor for Typical {
    fn process(&self, _: &[u32], logits: &mut [f32]) {
        let log_norm = log_sum_exp(logits);
        let entropy = entropy(logits, log_norm);
        let distance = |id: usize| (log_norm - logits[id] - entropy).abs();
        let mut order = descending(logits);
        order.sort_by(|a, b| distance(*a).total_cmp(&distance(*b)));
        let mut sum = 0.0;
        let last = order.iter().position(|id| {
            sum += f64::from((logits[*id] - log_norm).exp());
            sum as f32 >= self.mass as f32
        });
        let Some(limit) = last.map(|rank| distance(order[rank])) else {
            return;
        };
        let gone: Vec<usize> = order
            .into_iter()
            .skip(self.keep)
            .filter(|id| distance(*id) > limit)
            .collect();
        for id in gone {
            logits[id] = NEVER;
        }
    }
}

fn cut_below(logits: &mut [f32], limit: f32, keep: usize) {
    let probs = softmax(logits);
    let kept = kth_largest(logits, keep);
    for (logit, p) in logits.iter_mut().zip(probs) {
        if p < limit && *logit < kept {
            *logit = NEVER;
        }
    }
}

/// Tokens at least so likely (Hewitt et al., 2022).
pub struct Epsilon {
    /// The probability.
    pub epsilon: f32,
    /// Fewest tokens to keep.
    pub keep: usize,
}

impl LogitsProcessor for Epsilon {
    fn process(&self, _: &[u32], logits: &mut [f32]) {
        cut_below(logits, self.epsilon, self.keep);
    }
}

/// Tokens at least so likely, less where the distribution is flat (Hewitt et al., 2022).
pub struct Eta {
    /// The probability.
    pub epsilon: f32,
    /// Fewest tokens to keep.
    pub keep: usize,
}

impl LogitsProcessor for Eta {
    fn process(&self, _: &[u32], logits: &mut [f32]) {
        let entropy = entropy(logits, log_sum_exp(logits));
        cut_below(
            logits,
            self.epsilon.min(self.epsilon.sqrt() * (-entropy).exp()),
            self.keep,
        );
    }
}

/// Logits as log-probabilities.
pub struct LogSoftmax;

impl LogitsProcessor for LogSoftmax {
    fn process(&self, _: &[u32], logits: &mut [f32]) {
        let log_norm = log_sum_exp(logits);
        for logit in logits {
            *logit -= log_norm;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(processor: impl LogitsProcessor, mut logits: Vec<f32>) -> Vec<usize> {
        processor.process(&[], &mut logits);
        (0..logits.len()).filter(|id| logits[*id] > NEVER).collect()
    }

    #[test]
    fn extremes_keep_something() {
        let flat = || vec![0.0; 4];
        assert_eq!(kept(TopP { top_p: 0.0, keep: 1 }, vec![1.0, 3.0, 2.0]), [1]);
        assert_eq!(kept(TopK(100), flat()).len(), 4);
        assert_eq!(kept(TopH(1e-9), vec![1.0, 3.0, 2.0]), [1]);
        assert_eq!(kept(MinP { min_p: 1.0, keep: 1 }, vec![1.0, 3.0, 2.0]), [1]);
        assert_eq!(
            kept(
                Epsilon {
                    epsilon: 0.99,
                    keep: 2
                },
                vec![1.0, 3.0, 2.0]
            ),
            [1, 2]
        );
        for processor in [
            Box::new(TopP { top_p: 0.5, keep: 1 }) as Box<dyn LogitsProcessor>,
            Box::new(TopK(2)),
            Box::new(TopH(0.5)),
            Box::new(MinP { min_p: 0.5, keep: 1 }),
            Box::new(Typical { mass: 0.5, keep: 1 }),
            Box::new(Epsilon {
                epsilon: 0.5,
                keep: 1,
            }),
            Box::new(Eta {
                epsilon: 0.5,
                keep: 1,
            }),
            Box::new(LogSoftmax),
        ] {
            processor.process(&[], &mut []);
            processor.process(&[], &mut [NEVER; 3]);
            processor.process(&[], &mut [NEVER, 1.0, NEVER]);
        }
    }

    #[test]
    fn a_prefix_longer_than_the_text_is_no_match() {
        let bias = SequenceBias::new([(vec![1, 2, 0], -1.0)]);
        let mut logits = [0.0; 3];
        bias.process(&[2], &mut logits);
        assert_eq!(logits, [0.0; 3]);
        bias.process(&[1, 2], &mut logits);
        assert_eq!(logits, [-1.0, 0.0, 0.0]);
    }

    #[test]
    fn penalties_count_generated_tokens() {
        let penalty = PresencePenalty {
            presence: 1.0,
            frequency: 0.5,
            prompt_len: 1,
        };
        let mut logits = [0.0; 3];
        penalty.process(&[0, 1, 1, 2], &mut logits);
        assert_eq!(logits, [0.0, -2.0, -1.5]);
    }
}
