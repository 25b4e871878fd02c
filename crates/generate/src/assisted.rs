//! Drafting tokens for the model to check several at a time (Leviathan et al., 2023; Chen et al., 2023).

use oxiformers_models::CausalLM;
use oxiformers_nn::{Cache, CacheKind, LogitsFor};

use crate::generation::{Prompt, batch, new_cache, read};
use crate::logits::{LogitsProcessor, LogitsProcessors, softmax};
use crate::sampling::Sampler;
use crate::{Error, GenerationConfig, Result};

/// Prompt tokens that an assistant runs at a time.
const PREFILL_CHUNK: usize = 512;

/// Where drafts come from. What is generated has the same distribution as without.
#[derive(Clone)]
pub enum Draft<'a> {
    /// A smaller model of the same kind, with the same tokenizer.
    Assistant(&'a dyn CausalLM),
    /// What followed the last tokens earlier in the text (Saxena, 2023).
    PromptLookup,
}

/// Drafts for one sequence.
pub(crate) struct Drafter<'a> {
    source: Source<'a>,
    num_tokens: usize,
    heuristic: bool,
}

enum Source<'a> {
    Assistant {
        model: &'a dyn CausalLM,
        cache: Cache,
        cached: Vec<u32>,
        threshold: f64,
        eos: Vec<u32>,
    },
    PromptLookup {
        max_ngram: usize,
    },
}

/// Tokens that may come next, with the distributions that they were drawn from, if they were.
#[derive(Default)]
pub(crate) struct Drafted {
    pub(crate) ids: Vec<u32>,
    pub(crate) probs: Vec<Vec<f32>>,
}

impl<'a> Drafter<'a> {
    /// Drafts for `prompts`, of which there is one.
    pub(crate) fn new(
        draft: &Draft<'a>,
        target: &dyn CausalLM,
        config: &GenerationConfig,
        prompts: &[Prompt],
    ) -> Result<Self> {
        let (source, num_tokens) = match draft {
            Draft::Assistant(model) => {
                if model.as_seq2seq().is_some() != target.as_seq2seq().is_some() {
                    return Err(Error::config(
                        "assistant",
                        "reads and writes in another way than the model: either both are encoder-decoders or neither is",
                    ));
                }
                let source = Source::Assistant {
                    model: *model,
                    cache: new_cache(*model, CacheKind::Full, config.cache_precision()?, prompts),
                    cached: Vec::new(),
                    threshold: config.assistant_confidence_threshold,
                    eos: config.eos_token_id.clone(),
                };
                (source, config.num_assistant_tokens)
            }
            Draft::PromptLookup => {
                let source = Source::PromptLookup {
                    max_ngram: config.max_matching_ngram_size.unwrap_or(2).max(1),
                };
                (source, config.prompt_lookup_num_tokens.unwrap_or(10))
            }
        };
        let heuristic = config.num_assistant_tokens_schedule.starts_with("heuristic");
        Ok(Self {
            source,
            num_tokens: num_tokens.max(1),
            heuristic,
        })
    }

    /// At most `most` tokens to follow `ids`.
    pub(crate) async fn draft(
        &mut self,
        ids: &[u32],
        most: usize,
        processors: &LogitsProcessors,
        sampler: &mut Sampler,
    ) -> Result<Drafted> {
        let most = most.min(self.num_tokens);
        match &mut self.source {
            _ if most == 0 => Ok(Drafted::default()),
            Source::PromptLookup { max_ngram } => Ok(Drafted {
                ids: look_up(ids, *max_ngram, most).to_vec(),
                probs: Vec::new(),
            }),
            Source::Assistant {
                model,
                cache,
                cached,
                threshold,
                eos,
            } => {
                let most = match model.max_position_embeddings() {
                    Some(positions) => most.min(positions.saturating_sub(ids.len())),
                    None => most,
                };
                let mut drafted = Drafted::default();
                if most == 0 {
                    return Ok(drafted);
                }
                let same = cached
                    .iter()
                    .zip(ids)
                    .take_while(|(a, b)| a == b)
                    .count()
                    .min(ids.len() - 1);
                cache.truncate(same);
                let mut text = ids.to_vec();
                let mut at = same;
                while drafted.ids.len() < most {
                    if !cache.prepare(text.len()) {
                        at = 0;
                    }
                    let end = text.len().min(at + PREFILL_CHUNK);
                    let input = batch(&[text[at..end].to_vec()], &model.device());
                    let mut logits = read(model.forward(input, cache, LogitsFor::Last)).await?;
                    at = end;
                    if at < text.len() {
                        continue;
                    }
                    processors.process(&text, &mut logits);
                    let probs = softmax(&logits);
                    let id = if sampler.is_random() {
                        sampler.draw(&probs)?
                    } else {
                        sampler.choose(&logits)?
                    };
                    text.push(id);
                    drafted.ids.push(id);
                    let sure = probs
                        .get(id as usize)
                        .is_some_and(|p| f64::from(*p) >= *threshold);
                    if sampler.is_random() {
                        drafted.probs.push(probs);
                    }
                    if !sure || eos.contains(&id) {
                        break;
                    }
                }
                text.truncate(at);
                *cached = text;
                Ok(drafted)
            }
        }
    }

    /// Learns how many tokens of a draft were right.
    pub(crate) fn learn(&mut self, drafted: usize, right: usize) {
        if self.heuristic {
            self.num_tokens = if right >= drafted {
                self.num_tokens + 2
            } else {
                self.num_tokens.max(2) - 1
            };
        }
    }
}

/// What followed the longest n-gram, at most `max_ngram` long, that the text ends with.
fn look_up(ids: &[u32], max_ngram: usize, most: usize) -> &[u32] {
    for size in (1..=max_ngram.min(ids.len().saturating_sub(1))).rev() {
        let end = &ids[ids.len() - size..];
        if let Some(at) = ids[..ids.len() - 1]
            .windows(size)
            .position(|window| window == end)
        {
            let from = at + size;
            return &ids[from..ids.len().min(from + most)];
        }
    }
    &[]
}

/// Keeps a drafted token, drawn from `probs`, or draws another one, so that the result is distributed as
/// `logits` say.
pub(crate) fn verify(id: u32, probs: &[f32], logits: &[f32], sampler: &mut Sampler) -> Result<u32> {
    let target = softmax(logits);
    let of = |probs: &[f32], id: usize| f64::from(probs.get(id).copied().unwrap_or(0.0));
    if sampler.uniform() * of(probs, id as usize) < of(&target, id as usize) {
        return Ok(id);
    }
    let rest: Vec<f32> = (0..target.len())
        .map(|id| (of(&target, id) - of(probs, id)).max(0.0) as f32)
        .collect();
    // Rounding may leave nothing where both distributions are the same.
    sampler.draw(&rest).or_else(|_| sampler.draw(&target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_repetition_is_looked_up() {
        assert_eq!(look_up(&[1, 2, 3, 4, 9, 2, 3], 2, 10), [4, 9, 2, 3]);
        assert_eq!(look_up(&[1, 2, 3, 4, 9, 2, 3], 2, 2), [4, 9]);
        assert_eq!(look_up(&[5, 6, 5], 2, 3), [6, 5]);
        assert_eq!(look_up(&[1, 2, 3], 2, 3), [0u32; 0]);
        assert_eq!(look_up(&[1], 2, 3), [0u32; 0]);
        assert_eq!(look_up(&[7, 7], 3, 3), [7]);
    }

    #[test]
    fn verified_drafts_have_the_distribution_of_the_target() {
        let target = [0.6f32.ln(), 0.3f32.ln(), 0.1f32.ln()];
        let draft = [0.2f32, 0.2, 0.6];
        let mut sampler = Sampler::random(3, 0);
        let mut counts = [0f64; 3];
        let n = 40_000;
        for _ in 0..n {
            let id = sampler.draw(&draft).unwrap();
            counts[verify(id, &draft, &target, &mut sampler).unwrap() as usize] += 1.0;
        }
        for (count, p) in counts.iter().zip([0.6, 0.3, 0.1]) {
            // Five standard deviations.
            assert!((count / f64::from(n) - p).abs() < 0.0125, "{counts:?}");
        }
    }
}
