//! Sequences that grow by a token a step.
//!
//! A decoder-only model continues its prompts. An encoder-decoder reads them, and its decoder begins a sequence of its
//! own for each: once a [`Prompt`] says what stands where, and the cache holds what was read, both are the same.

use burn::tensor::{Device, Int, Tensor, TensorData};
use futures::Stream;
use oxiformers_models::CausalLM;
use oxiformers_nn::{Cache, CacheKind, CachePrecision, LogitsFor};
use oxiformers_processors::Tokenizer;
use web_time::{Duration, Instant};

use crate::assisted::{Draft, Drafter};
use crate::constrained::{Constraint, ConstraintState};
use crate::logits::{LogitsProcessor, LogitsProcessors, log_sum_exp};
use crate::sampling::{Sampler, fresh_seed};
use crate::text::TextOut;
use crate::{Error, GenerationConfig, Result, beam};

/// Tokens of a prompt that run at a time unless the configuration says otherwise: enough to keep the device
/// busy, and few enough that attention scores stay small and an interruption comes through soon.
const PREFILL_CHUNK: usize = 512;

/// New tokens that the cache has room for from the start.
const ROOM: usize = 512;

/// A model and how it is to generate.
#[derive(Clone)]
pub struct Generator<'a> {
    pub(crate) model: &'a dyn CausalLM,
    pub(crate) config: GenerationConfig,
    pub(crate) tokenizer: Option<&'a Tokenizer>,
    pub(crate) constraint: Option<Constraint>,
    pub(crate) draft: Option<Draft<'a>>,
}

impl std::fmt::Debug for Generator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A token that ends texts came, or the constraint is fulfilled.
    Stop,
    /// A stop string came.
    StopString,
    /// The length is used up.
    Length,
    /// The time is used up.
    Time,
}

impl FinishReason {
    /// Its name in JSON: `stop`, `stop_string`, `length` or `time`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::StopString => "stop_string",
            Self::Length => "length",
            Self::Time => "time",
        }
    }
}

/// A new token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Index of its sequence: sequences of one prompt stand together.
    pub sequence: usize,
    /// Its id.
    pub id: u32,
    /// Its log-probability after all processors, with `output_scores`.
    pub logprob: Option<f32>,
    /// The text that it completes; empty without a tokenizer. What may be the beginning of a stop string waits.
    pub text: String,
    /// Set on the last token of a sequence.
    pub finish_reason: Option<FinishReason>,
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Ran a part of the prompt.
    Prompt {
        /// Tokens of the prompt that have run.
        done: usize,
        /// Tokens of the longest prompt.
        total: usize,
    },
    /// Chose new tokens, one or more for every sequence that had not ended.
    Tokens(Vec<Token>),
    /// Nothing: all sequences have ended.
    Done,
}

/// A sequence that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The new tokens.
    pub ids: Vec<u32>,
    /// Their text without special tokens, up to a stop string; empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// With beam search, the sum of log-probabilities over `length ^ length_penalty`.
    pub score: Option<f32>,
    /// With `output_scores`, the processed scores `[vocab_size]` of each step (not with beam search).
    pub scores: Vec<Vec<f32>>,
    /// With `output_logits`, the raw logits `[vocab_size]` of each step (not with beam search).
    pub logits: Vec<Vec<f32>>,
}

/// Keys and values of a sequence, for a prompt that begins in the same way.
#[derive(Debug, Clone)]
pub struct PromptCache {
    cache: Cache,
    ids: Vec<u32>,
}

impl PromptCache {
    /// The tokens that it holds.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
}

/// What a sequence begins with.
pub(crate) struct Prompt {
    /// Its own first tokens.
    pub(crate) ids: Vec<u32>,
    /// What an encoder reads.
    source: Option<Vec<u32>>,
}

impl Prompt {
    /// The text that was given: what the encoder reads, if there is one.
    pub(crate) fn source(&self) -> &[u32] {
        self.source.as_ref().unwrap_or(&self.ids)
    }
}

/// An empty cache for the sequences, with what an encoder reads.
pub(crate) fn new_cache(
    model: &dyn CausalLM,
    kind: CacheKind,
    precision: Option<CachePrecision>,
    prompts: &[Prompt],
) -> Cache {
    let precision = precision.unwrap_or(model.cache_precision());
    let longest = |len: fn(&Prompt) -> usize| prompts.iter().map(len).max().unwrap_or(0);
    let total = longest(|prompt| prompt.ids.len());
    let padding = prompts.iter().map(|prompt| total - prompt.ids.len()).collect();
    let mut cache = model.new_cache(kind, padding).with_precision(precision);
    if let Some(encoder) = model.as_seq2seq() {
        let width = longest(|prompt| prompt.source().len());
        let row = |prompt: &Prompt| {
            let mut row = prompt.source().to_vec();
            row.resize(width, 0);
            row
        };
        let sources: Vec<Vec<u32>> = prompts.iter().map(row).collect();
        let tokens = prompts.iter().map(|prompt| 0..prompt.source().len()).collect();
        encoder.encode(batch(&sources, &model.device()), tokens, &mut cache);
    }
    cache
}

impl<'a> Generator<'a> {
    /// Generates with `model` as `config` says.
    pub fn new(model: &'a dyn CausalLM, config: GenerationConfig) -> Self {
        Self {
            model,
            config,
            tokenizer: None,
            constraint: None,
            draft: None,
        }
    }

    /// Turns tokens into text; stop strings need it.
    #[must_use]
    pub fn with_tokenizer(mut self, tokenizer: &'a Tokenizer) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }

    /// Allows only text that the constraint does.
    #[must_use]
    pub fn with_constraint(mut self, constraint: Constraint) -> Self {
        self.constraint = Some(constraint);
        self
    }

    /// Drafts tokens for the model to check, several in one pass; for one prompt at a time.
    #[must_use]
    pub fn with_draft(mut self, draft: Draft<'a>) -> Self {
        self.draft = Some(draft);
        self
    }

    /// How it generates.
    pub fn config(&self) -> &GenerationConfig {
        &self.config
    }

    /// Continues prompts, given as token ids, or answers what an encoder reads; `num_return_sequences` results for each,
    /// in order.
    ///
    /// # Errors
    /// A configuration that makes no sense, a prompt that is empty or too long, a constraint that cannot be
    /// followed, or a device that fails.
    pub async fn generate(&self, prompts: &[Vec<u32>]) -> Result<Vec<Generated>> {
        if self.config.num_beams > 1 {
            return beam::search(self, prompts).await;
        }
        let mut generation = self.start(prompts, None)?;
        while generation.step().await? != Step::Done {}
        Ok(generation.finish())
    }

    /// Begins to continue prompts, step by step. `past` spares running what a single prompt has in common with
    /// an earlier sequence.
    ///
    /// # Errors
    /// As [`generate`](Self::generate); beam search has no steps.
    pub fn start(&self, prompts: &[Vec<u32>], past: Option<PromptCache>) -> Result<Generation<'a>> {
        Generation::new(self, prompts, past)
    }

    /// Continues one prompt as an async stream of tokens with their text.
    ///
    /// # Errors
    /// As [`start`](Self::start); later errors come as items and end the stream.
    pub fn stream(&self, prompt: &[u32]) -> Result<impl Stream<Item = Result<Token>> + use<'a>> {
        let generation = self.start(&[prompt.to_vec()], None)?;
        let ready = std::collections::VecDeque::new();
        Ok(futures::stream::try_unfold(
            (generation, ready),
            |(mut generation, mut ready)| async move {
                loop {
                    if let Some(token) = ready.pop_front() {
                        return Ok(Some((token, (generation, ready))));
                    }
                    match generation.step().await? {
                        Step::Prompt { .. } => {}
                        Step::Tokens(tokens) => ready.extend(tokens),
                        Step::Done => return Ok(None),
                    }
                }
            },
        ))
    }

    /// Checks prompts, gives an empty one the token that begins sequences, and the decoder of an encoder-decoder the one
    /// that it starts with.
    pub(crate) fn prompts(&self, prompts: &[Vec<u32>]) -> Result<Vec<Prompt>> {
        self.config.validate()?;
        if !self.config.stop_strings.is_empty() && self.tokenizer.is_none() {
            return Err(Error::config(
                "stop_strings",
                "need a tokenizer: call `with_tokenizer`",
            ));
        }
        let encoder = self.model.as_seq2seq();
        let vocab_size = encoder.map_or(self.model.vocab_size(), |model| model.source_vocab_size());
        let begin = |prompt: &Vec<u32>| match (prompt.is_empty(), self.config.bos_token_id) {
            (true, Some(bos)) if encoder.is_none() => Ok(vec![bos]),
            (true, _) => Err(Error::Prompt(
                "is empty, and the model has no token to begin with".into(),
            )),
            (false, _) => Ok(prompt.clone()),
        };
        let prompts = prompts.iter().map(begin).collect::<Result<Vec<_>>>()?;
        for prompt in &prompts {
            if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab_size) {
                let message =
                    format!("has the token {id}, and the model knows {vocab_size}: is it its tokenizer?");
                return Err(Error::Prompt(message));
            }
            if let Some(most) = self
                .model
                .max_position_embeddings()
                .filter(|most| prompt.len() > *most)
            {
                let message = format!(
                    "has {} tokens, and the model was made for {most}: shorten it",
                    prompt.len()
                );
                return Err(Error::Prompt(message));
            }
        }
        if encoder.is_none() {
            let own = |ids| Prompt { ids, source: None };
            return Ok(prompts.into_iter().map(own).collect());
        }
        let start = self.config.decoder_start_token_id.or(self.config.bos_token_id);
        let Some(start) = start.filter(|id| (*id as usize) < self.model.vocab_size()) else {
            let message = "or `bos_token_id` must be a token of the model, for its decoder to start with";
            return Err(Error::config("decoder_start_token_id", message));
        };
        let read = |source| Prompt {
            ids: vec![start],
            source: Some(source),
        };
        Ok(prompts.into_iter().map(read).collect())
    }

    /// Most new tokens after a prompt.
    pub(crate) fn limit(&self, prompt: &[u32]) -> usize {
        self.config
            .new_token_limit(prompt.len(), self.model.max_position_embeddings())
    }
}

/// One sequence.
struct Row {
    ids: Vec<u32>,
    prompt_len: usize,
    limit: usize,
    processors: LogitsProcessors,
    sampler: Sampler,
    constraint: Option<ConstraintState>,
    out: Option<TextOut>,
    text: String,
    scores: Vec<Vec<f32>>,
    logits: Vec<Vec<f32>>,
    finish_reason: Option<FinishReason>,
}

impl Row {
    fn room(&self) -> usize {
        self.limit - (self.ids.len() - self.prompt_len)
    }

    /// Constraint and processors.
    fn process(&mut self, logits: &mut [f32]) -> Result<()> {
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(logits)?;
        }
        self.processors.process(&self.ids, logits);
        Ok(())
    }
}

/// Sequences being generated.
pub struct Generation<'a> {
    model: &'a dyn CausalLM,
    config: GenerationConfig,
    cache: Cache,
    rows: Vec<Row>,
    /// The rows that go on, in the order of the cache.
    live: Vec<usize>,
    /// Tokens that have not run: left-padded prompts at first, then the last token of each live row.
    pending: Vec<Vec<u32>>,
    prompt_done: usize,
    prompt_total: usize,
    drafter: Option<Drafter<'a>>,
    deadline: Option<Instant>,
}

impl std::fmt::Debug for Generation<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generation")
            .field("sequences", &self.rows.len())
            .field("live", &self.live)
            .field("cached", &self.cache.len())
            .finish_non_exhaustive()
    }
}

impl<'a> Generation<'a> {
    fn new(generator: &Generator<'a>, prompts: &[Vec<u32>], past: Option<PromptCache>) -> Result<Self> {
        let config = generator.config.clone();
        if config.num_beams > 1 {
            return Err(Error::config(
                "num_beams",
                "is above 1, and beam search cannot be streamed: use `generate`",
            ));
        }
        let prompts = generator.prompts(prompts)?;
        let copies = config.num_return_sequences;
        let single = prompts.len() == 1 && copies == 1;
        if generator.draft.is_some() && !single {
            return Err(Error::config(
                "num_return_sequences",
                "drafting works on one sequence at a time",
            ));
        }
        let seed = if config.do_sample {
            Some(config.seed.unwrap_or_else(fresh_seed))
        } else {
            None
        };
        let mut rows = Vec::with_capacity(prompts.len() * copies);
        for index in 0..prompts.len() * copies {
            let prompt = &prompts[index / copies];
            let (ids, source) = (&prompt.ids, prompt.source());
            let limit = generator.limit(ids);
            rows.push(Row {
                ids: ids.clone(),
                prompt_len: ids.len(),
                limit,
                processors: LogitsProcessors::new(&config, ids, source, ids.len() + limit)?,
                sampler: seed.map_or_else(Sampler::greedy, |seed| Sampler::random(seed, index as u64)),
                constraint: generator.constraint.as_ref().map(Constraint::start),
                out: generator
                    .tokenizer
                    .map(|tokenizer| TextOut::new(tokenizer, &config.stop_strings)),
                text: String::new(),
                scores: Vec::new(),
                logits: Vec::new(),
                finish_reason: (limit == 0).then_some(FinishReason::Length),
            });
        }
        let total = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
        let longest = rows
            .iter()
            .map(|row| row.prompt_len + row.limit)
            .max()
            .unwrap_or(0);
        let (mut cache, mut done) = (None, 0);
        let precision = config.cache_precision()?;
        let past = past
            .filter(|past| past.cache.precision() == precision.unwrap_or(generator.model.cache_precision()));
        if let (Some(past), [Prompt { ids, source: None }]) = (past, prompts.as_slice()) {
            // The last token of the prompt must run again, because its logits are needed.
            let same = past
                .ids
                .iter()
                .zip(ids)
                .take_while(|(a, b)| a == b)
                .count()
                .min(ids.len() - 1);
            let mut old = past.cache;
            if old.prepare(ids.len()) && old.truncate(same) {
                (cache, done) = (Some(old), same);
            }
        }
        let kind = match config.cache_kind(longest)? {
            // Drafts that turn out wrong, and chats that go on from an earlier point, cut it back.
            CacheKind::Dynamic if single => CacheKind::Full,
            kind => kind,
        };
        let mut cache = cache.unwrap_or_else(|| new_cache(generator.model, kind, precision, &prompts));
        cache.prepare(total);
        cache.reserve(longest.min(total + ROOM));
        let pending = padded(
            prompts.iter().map(|prompt| prompt.ids.as_slice()),
            cache.padding(),
            done,
        );
        let live = if rows.iter().all(|row| row.limit == 0) {
            Vec::new()
        } else {
            (0..rows.len()).collect()
        };
        let drafter = match &generator.draft {
            Some(draft) => Some(Drafter::new(draft, generator.model, &config, &prompts)?),
            None => None,
        };
        Ok(Self {
            model: generator.model,
            cache,
            rows,
            live,
            pending,
            prompt_done: done,
            prompt_total: total,
            drafter,
            deadline: config
                .max_time
                .and_then(|seconds| Instant::now().checked_add(Duration::try_from_secs_f64(seconds).ok()?)),
            config,
        })
    }

    /// The seed's sequences, each with its prompt.
    pub fn sequences(&self) -> impl Iterator<Item = &[u32]> {
        self.rows.iter().map(|row| row.ids.as_slice())
    }

    /// Runs a part of the prompt, or chooses the next token of every sequence that goes on.
    ///
    /// # Errors
    /// A constraint that cannot be followed, nothing to choose from, or a device that fails.
    pub async fn step(&mut self) -> Result<Step> {
        if self.live.is_empty() {
            return Ok(Step::Done);
        }
        if self.prompt_done < self.prompt_total {
            return self.step_prompt().await;
        }
        let longest = self.live.iter().map(|row| self.rows[*row].ids.len()).max();
        if !self.cache.prepare(longest.unwrap_or(0)) {
            let rows = self.live.iter().map(|row| self.rows[*row].ids.as_slice());
            self.pending = padded(rows, self.cache.padding(), 0);
            self.prompt_done = 0;
            self.prompt_total = self.pending.first().map_or(0, Vec::len);
            return self.step_prompt().await;
        }
        if self.drafter.is_some() {
            return self.step_drafted().await.map(Step::Tokens);
        }
        let logits = self.forward(LogitsFor::Last).await?;
        self.choose(logits).map(Step::Tokens)
    }

    async fn step_prompt(&mut self) -> Result<Step> {
        let chunk = self.config.prefill_chunk_size.unwrap_or(PREFILL_CHUNK).max(1);
        let left = self.prompt_total - self.prompt_done;
        // Where tokens are drafted, the last one waits for the first draft.
        let target = if self.drafter.is_some() { left - 1 } else { left };
        let len = chunk.min(target);
        if len == 0 {
            self.prompt_done = self.prompt_total;
            return Ok(Step::Prompt {
                done: self.prompt_total,
                total: self.prompt_total,
            });
        }
        let rest: Vec<Vec<u32>> = self.pending.iter_mut().map(|row| row.split_off(len)).collect();
        let logits = self.forward(LogitsFor::Last).await?;
        self.prompt_done += len;
        if self.prompt_done < self.prompt_total {
            self.pending = rest;
            return Ok(Step::Prompt {
                done: self.prompt_done,
                total: self.prompt_total,
            });
        }
        // At first the copies of a prompt share a row.
        let copies = self.live.len() / self.pending.len().max(1);
        if copies > 1 {
            let rows: Vec<usize> = (0..self.live.len()).map(|row| row / copies).collect();
            self.cache.select(&rows);
        }
        let vocab_size = self.model.vocab_size();
        let logits = if copies > 1 {
            logits
                .chunks_exact(vocab_size)
                .flat_map(|row| row.repeat(copies))
                .collect()
        } else {
            logits
        };
        self.choose(logits).map(Step::Tokens)
    }

    /// Runs the pending tokens.
    async fn forward(&mut self, logits_for: LogitsFor) -> Result<Vec<f32>> {
        let input = batch(&self.pending, &self.model.device());
        read(self.model.forward(input, &mut self.cache, logits_for)).await
    }

    /// The next token of every live row, from logits `[live, vocab_size]`.
    fn choose(&mut self, mut logits: Vec<f32>) -> Result<Vec<Token>> {
        let vocab_size = self.model.vocab_size();
        let live = std::mem::take(&mut self.live);
        let mut tokens = Vec::with_capacity(live.len());
        let mut kept = Vec::with_capacity(live.len());
        self.pending.clear();
        for (position, (index, logits)) in live.iter().zip(logits.chunks_exact_mut(vocab_size)).enumerate() {
            let row = &mut self.rows[*index];
            if row.finish_reason.is_some() {
                continue;
            }
            let raw = self.config.output_logits.then(|| logits.to_vec());
            row.process(logits)?;
            let id = row.sampler.choose(logits)?;
            let token = self.accept(*index, id, logits, raw)?;
            if token.finish_reason.is_none() {
                kept.push(position);
                self.pending.push(vec![id]);
            }
            tokens.push(token);
        }
        if !kept.is_empty() && kept.len() < live.len() {
            self.cache.select(&kept);
        }
        self.live = kept.into_iter().map(|position| live[position]).collect();
        Ok(tokens)
    }

    /// Checks a draft in one pass, and takes as much of it as the model agrees with and one token more.
    async fn step_drafted(&mut self) -> Result<Vec<Token>> {
        let Some(mut drafter) = self.drafter.take() else {
            return Ok(Vec::new());
        };
        let row = &mut self.rows[0];
        let most = (row.room() - 1).min(self.cache.until_switch().unwrap_or(usize::MAX));
        let draft = drafter
            .draft(&row.ids, most, &row.processors, &mut row.sampler)
            .await?;
        let [pending] = self.pending.as_mut_slice() else {
            return Ok(Vec::new());
        };
        let first = pending.len() - 1;
        pending.extend(&draft.ids);
        let mut logits = self.forward(LogitsFor::All).await?;
        let vocab_size = self.model.vocab_size();
        let mut tokens = Vec::new();
        for (index, logits) in logits.chunks_exact_mut(vocab_size).skip(first).enumerate() {
            let row = &mut self.rows[0];
            let raw = self.config.output_logits.then(|| logits.to_vec());
            row.process(logits)?;
            let drafted = draft.ids.get(index).copied();
            let id = match (drafted, draft.probs.get(index)) {
                (Some(id), Some(probs)) => crate::assisted::verify(id, probs, logits, &mut row.sampler)?,
                _ => row.sampler.choose(logits)?,
            };
            let token = self.accept(0, id, logits, raw)?;
            let ended = token.finish_reason.is_some();
            tokens.push(token);
            if ended || drafted != Some(id) {
                break;
            }
        }
        drafter.learn(draft.ids.len(), tokens.len() - 1);
        self.drafter = Some(drafter);
        let row = &self.rows[0];
        // All but the last token have run.
        self.cache.truncate(row.ids.len() - 1);
        if row.finish_reason.is_some() {
            self.live.clear();
        }
        self.pending = vec![row.ids[row.ids.len() - 1..].to_vec()];
        Ok(tokens)
    }

    /// Appends a token to a row.
    fn accept(&mut self, index: usize, id: u32, scores: &[f32], raw: Option<Vec<f32>>) -> Result<Token> {
        let late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let row = &mut self.rows[index];
        row.ids.push(id);
        let mut logprob = None;
        if self.config.output_scores {
            logprob = scores.get(id as usize).map(|score| score - log_sum_exp(scores));
            row.scores.push(scores.to_vec());
        }
        row.logits.extend(raw);
        let complete = match &mut row.constraint {
            Some(constraint) => constraint.push(id)?,
            None => false,
        };
        let (mut text, mut stopped) = match &mut row.out {
            Some(out) => out.push(id)?,
            None => (String::new(), false),
        };
        let mut finish_reason = if stopped {
            Some(FinishReason::StopString)
        } else if complete || self.config.eos_token_id.contains(&id) {
            Some(FinishReason::Stop)
        } else if row.room() == 0 {
            Some(FinishReason::Length)
        } else if late {
            Some(FinishReason::Time)
        } else {
            None
        };
        if let (Some(out), Some(_), false) = (&mut row.out, finish_reason, stopped) {
            let (rest, found) = out.finish()?;
            text.push_str(&rest);
            stopped = found;
        }
        if stopped {
            finish_reason = Some(FinishReason::StopString);
        }
        row.text.push_str(&text);
        row.finish_reason = finish_reason;
        Ok(Token {
            sequence: index,
            id,
            logprob,
            text,
            finish_reason,
        })
    }

    /// The sequences as they are now; one that has not ended counts as cut off by its length.
    pub fn finish(self) -> Vec<Generated> {
        self.rows.into_iter().map(generated).collect()
    }

    /// The sequences as [`finish`](Self::finish) gives them, and, of a single one, what a prompt that begins in
    /// the same way can go on from.
    pub fn finish_with_cache(self) -> (Vec<Generated>, Option<PromptCache>) {
        let past = match self.rows.as_slice() {
            // What an encoder has read belongs to one prompt alone.
            [row] if self.cache.len() <= row.ids.len() && !self.cache.has_source() => Some(PromptCache {
                ids: row.ids[..self.cache.len()].to_vec(),
                cache: self.cache,
            }),
            _ => None,
        };
        (self.rows.into_iter().map(generated).collect(), past)
    }
}

fn generated(mut row: Row) -> Generated {
    if row.finish_reason.is_none() {
        // What is cut off here will not become a stop string any more.
        if let Some(Ok((rest, _))) = row.out.as_mut().map(TextOut::finish) {
            row.text.push_str(&rest);
        }
    }
    Generated {
        ids: row.ids.split_off(row.prompt_len),
        text: row.text,
        finish_reason: row.finish_reason.unwrap_or(FinishReason::Length),
        score: None,
        scores: row.scores,
        logits: row.logits,
    }
}

/// Rows from position `from` on, each with its padding before it. Which token pads does not matter: no other
/// token sees it.
pub(crate) fn padded<'r>(
    rows: impl Iterator<Item = &'r [u32]>,
    padding: &[usize],
    from: usize,
) -> Vec<Vec<u32>> {
    let row = |(row, padding): (&[u32], &usize)| {
        let pad = std::iter::repeat_n(0, *padding);
        pad.chain(row.iter().copied()).skip(from).collect()
    };
    rows.zip(padding).map(row).collect()
}

/// Rows of equal length as `[batch, seq]`.
pub(crate) fn batch(rows: &[Vec<u32>], device: &Device) -> Tensor<2, Int> {
    let shape = [rows.len(), rows.first().map_or(0, Vec::len)];
    let ids: Vec<i32> = rows.iter().flatten().map(|id| *id as i32).collect();
    Tensor::from_data(TensorData::new(ids, shape), device)
}

/// The values of logits on the host.
pub(crate) async fn read(logits: Tensor<3>) -> Result<Vec<f32>> {
    let data = logits.into_data_async().await.map_err(Error::device)?;
    data.convert::<f32>()
        .try_into_vec()
        .map_err(|error| Error::device(format!("{error:?}")))
}
