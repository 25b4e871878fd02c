//! Beam search and beam sampling, as Transformers' `_beam_search` has them.

use oxiformers_nn::LogitsFor;
use web_time::Instant;

use crate::generation::{FinishReason, Generated, Generator, batch, new_cache, padded, read};
use crate::logits::{LogSoftmax, LogitsProcessor, LogitsProcessors, softmax};
use crate::sampling::{Sampler, fresh_seed};
use crate::text::TextOut;
use crate::{EarlyStopping, Error, Result};

/// Score of a beam that is not to be chosen.
const OUT: f32 = -1e9;

/// A sequence that goes on.
#[derive(Clone)]
struct Beam {
    /// With the prompt.
    ids: Vec<u32>,
    /// Sum of log-probabilities.
    score: f32,
    /// Beam of the last step that it continues, counted over all prompts.
    parent: usize,
    text: Option<TextOut>,
}

/// A sequence that has ended.
struct Finished {
    ids: Vec<u32>,
    score: f32,
    reason: FinishReason,
}

/// The beams of one prompt.
struct Search {
    prompt_len: usize,
    limit: usize,
    processors: LogitsProcessors,
    sampler: Sampler,
    running: Vec<Beam>,
    /// Best first, at most `num_beams`.
    finished: Vec<Finished>,
    improvable: bool,
}

/// Continues prompts by beam search.
pub(crate) async fn search(generator: &Generator<'_>, prompts: &[Vec<u32>]) -> Result<Vec<Generated>> {
    let config = &generator.config;
    if generator.constraint.is_some() {
        return Err(Error::config(
            "num_beams",
            "is above 1, and beam search does not follow constraints",
        ));
    }
    if generator.draft.is_some() {
        return Err(Error::config(
            "num_beams",
            "is above 1, and beam search does not take drafts",
        ));
    }
    let prompts = generator.prompts(prompts)?;
    let model = generator.model;
    let (vocab_size, num_beams) = (model.vocab_size(), config.num_beams);
    let start = Instant::now();
    let seed = if config.do_sample {
        Some(config.seed.unwrap_or_else(fresh_seed))
    } else {
        None
    };
    let mut searches = Vec::with_capacity(prompts.len());
    for (index, prompt) in prompts.iter().enumerate() {
        let (ids, source) = (&prompt.ids, prompt.source());
        let limit = generator.limit(ids);
        let text = generator.tokenizer.filter(|_| !config.stop_strings.is_empty());
        let beam = |score| Beam {
            ids: ids.clone(),
            score,
            parent: index * num_beams,
            text: text.map(|tokenizer| TextOut::new(tokenizer, &config.stop_strings)),
        };
        searches.push(Search {
            prompt_len: ids.len(),
            limit,
            processors: LogitsProcessors::new(config, ids, source, ids.len() + limit)?,
            sampler: seed.map_or_else(Sampler::greedy, |seed| Sampler::random(seed, index as u64)),
            // Only the first beam counts at first: they are all the same.
            running: (0..num_beams)
                .map(|n| beam(if n == 0 { 0.0 } else { OUT }))
                .collect(),
            finished: Vec::new(),
            improvable: limit > 0,
        });
    }
    let longest = searches
        .iter()
        .map(|search| search.prompt_len + search.limit)
        .max()
        .unwrap_or(0);
    if !searches.iter().any(|search| search.improvable) {
        return Ok(results(generator, searches));
    }

    let mut cache = new_cache(
        model,
        config.cache_kind(longest)?,
        config.cache_precision()?,
        &prompts,
    );
    let ids = || prompts.iter().map(|prompt| prompt.ids.as_slice());
    cache.prepare(ids().map(<[u32]>::len).max().unwrap_or(0));
    let pending = padded(ids(), cache.padding(), 0);
    let logits = read(model.forward(batch(&pending, &model.device()), &mut cache, LogitsFor::Last)).await?;
    let mut logits: Vec<f32> = logits
        .chunks_exact(vocab_size)
        .flat_map(|row| row.repeat(num_beams))
        .collect();
    let mut order: Vec<usize> = (0..prompts.len())
        .flat_map(|row| std::iter::repeat_n(row, num_beams))
        .collect();
    loop {
        let late = config
            .max_time
            .is_some_and(|seconds| start.elapsed().as_secs_f64() >= seconds);
        let mut all_hit = true;
        for (index, (search, logits)) in searches
            .iter_mut()
            .zip(logits.chunks_exact_mut(vocab_size * num_beams))
            .enumerate()
        {
            all_hit &= step(search, index, logits, generator, late)?;
        }
        let full = searches.iter().all(|search| search.finished.len() == num_beams);
        let going = searches.iter().any(|search| search.improvable)
            && !(full && config.early_stopping == EarlyStopping::Always)
            && !all_hit;
        if !going {
            return Ok(results(generator, searches));
        }
        let parents = searches
            .iter()
            .flat_map(|search| &search.running)
            .map(|beam| beam.parent);
        // Before the first selection the cache has one row for each prompt.
        order = parents
            .map(|parent| order.get(parent).copied().unwrap_or(parent))
            .collect();
        cache.select(&order);
        order = (0..order.len()).collect();
        let beams = || searches.iter().flat_map(|search| &search.running);
        let longest = beams().map(|beam| beam.ids.len()).max().unwrap_or(0);
        cache.prepare(longest);
        let past = cache.len();
        let pending = padded(beams().map(|beam| beam.ids.as_slice()), cache.padding(), past);
        logits = read(model.forward(batch(&pending, &model.device()), &mut cache, LogitsFor::Last)).await?;
    }
}

/// Continues the beams of one prompt by a token; returns whether every candidate has ended.
fn step(
    search: &mut Search,
    index: usize,
    logits: &mut [f32],
    generator: &Generator,
    late: bool,
) -> Result<bool> {
    let config = &generator.config;
    let num_beams = config.num_beams;
    let vocab_size = logits.len() / num_beams;
    for (beam, logits) in search.running.iter().zip(logits.chunks_exact_mut(vocab_size)) {
        LogSoftmax.process(&beam.ids, logits);
        search.processors.process(&beam.ids, logits);
        logits.iter_mut().for_each(|logit| *logit += beam.score);
    }
    let keep = (1 + config.eos_token_id.len()).max(2) * num_beams;
    let best = if config.do_sample {
        draw(logits, keep, &mut search.sampler)?
    } else {
        top(logits, keep)
    };

    let generated = search.running[0].ids.len() + 1 - search.prompt_len;
    let mut candidates = Vec::with_capacity(best.len());
    for at in best {
        let (from, id) = (at / vocab_size, (at % vocab_size) as u32);
        let mut beam = Beam {
            score: logits[at],
            parent: index * num_beams + from,
            ..search.running[from].clone()
        };
        beam.ids.push(id);
        let stopped = match &mut beam.text {
            Some(text) => text.push(id)?.1,
            None => false,
        };
        let end = if stopped {
            Some(FinishReason::StopString)
        } else if config.eos_token_id.contains(&id) {
            Some(FinishReason::Stop)
        } else if generated >= search.limit {
            Some(FinishReason::Length)
        } else if late {
            Some(FinishReason::Time)
        } else {
            None
        };
        candidates.push((beam, end));
    }

    // A shorter search beside longer ones.
    search.improvable &= generated <= search.limit;
    // Only the best candidates can end; the others are there so that enough of them go on.
    let closed = !search.improvable
        || (search.finished.len() == num_beams && config.early_stopping == EarlyStopping::Always);
    if !closed {
        let length = (generated as f32).powf(config.length_penalty as f32);
        for (beam, end) in candidates.iter().take(num_beams) {
            if let Some(reason) = end {
                search.finished.push(Finished {
                    ids: beam.ids.clone(),
                    score: beam.score / length,
                    reason: *reason,
                });
            }
        }
        search.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        search.finished.truncate(num_beams);
    }
    let all_hit = candidates.iter().all(|(_, end)| end.is_some());
    let mut next: Vec<Beam> = candidates
        .into_iter()
        .map(|(mut beam, end)| {
            beam.score += if end.is_some() { OUT } else { 0.0 };
            beam
        })
        .collect();
    next.sort_by(|a, b| b.score.total_cmp(&a.score));
    next.truncate(num_beams);
    search.running = next;

    let best_length = match config.early_stopping {
        EarlyStopping::Never if config.length_penalty > 0.0 => search.limit,
        _ => generated,
    };
    let best_score = search.running[0].score / (best_length as f32).powf(config.length_penalty as f32);
    let worst = search
        .finished
        .get(num_beams - 1)
        .map_or(OUT, |finished| finished.score);
    search.improvable &= best_score > worst;
    Ok(all_hit)
}

/// The `count` largest, largest first.
fn top(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let by_score = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    let count = count.min(order.len());
    if count > 0 && count < order.len() {
        order.select_nth_unstable_by(count - 1, by_score);
        order.truncate(count);
    }
    order.sort_unstable_by(by_score);
    order
}

/// `count` draws without replacement.
fn draw(scores: &[f32], count: usize, sampler: &mut Sampler) -> Result<Vec<usize>> {
    let mut probs = softmax(scores);
    let mut drawn = Vec::with_capacity(count);
    for _ in 0..count {
        let id = match sampler.draw(&probs) {
            Ok(id) => id as usize,
            // Fewer tokens are possible than beams want.
            Err(_) if !drawn.is_empty() => break,
            Err(error) => return Err(error),
        };
        probs[id] = 0.0;
        drawn.push(id);
    }
    let rest = top(scores, count);
    let missing: Vec<usize> = rest
        .into_iter()
        .filter(|id| !drawn.contains(id))
        .take(count - drawn.len())
        .collect();
    drawn.extend(missing);
    Ok(drawn)
}

fn results(generator: &Generator, searches: Vec<Search>) -> Vec<Generated> {
    let mut all = Vec::new();
    for search in searches {
        let mut finished = search.finished;
        // A search that was cut short may have fewer ends than asked for.
        for beam in search.running {
            let generated = (beam.ids.len() - search.prompt_len).max(1) as f32;
            let score = beam.score / generated.powf(generator.config.length_penalty as f32);
            finished.push(Finished {
                ids: beam.ids,
                score,
                reason: FinishReason::Length,
            });
        }
        for mut beam in finished.into_iter().take(generator.config.num_return_sequences) {
            let ids = beam.ids.split_off(search.prompt_len);
            all.push(Generated {
                text: text(generator, &ids),
                ids,
                finish_reason: beam.reason,
                score: Some(beam.score),
                scores: Vec::new(),
                logits: Vec::new(),
            });
        }
    }
    all
}

fn text(generator: &Generator, ids: &[u32]) -> String {
    let mut all = String::new();
    if let Some(tokenizer) = generator.tokenizer {
        let mut out = TextOut::new(tokenizer, &generator.config.stop_strings);
        for id in ids {
            match out.push(*id) {
                Ok((text, stopped)) => {
                    all.push_str(&text);
                    if stopped {
                        return all;
                    }
                }
                Err(_) => return all,
            }
        }
        if let Ok((text, _)) = out.finish() {
            all.push_str(&text);
        }
    }
    all
}
