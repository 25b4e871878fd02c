//! Objectives: language models, and every head that judges texts.

use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData};
use oxiformers_data::tasks::{Batch, Draw, IGNORED, Objective, Row, Targets};
use oxiformers_models::dropout::dropout;
use oxiformers_models::nn::training::Pass;
use oxiformers_models::nn::{Cache, CacheKind, EncoderInputs, LogitsFor};
use oxiformers_models::tasks::{
    MaskedLM, MultipleChoice, QuestionAnswering, SequenceClassification, TaskType, TokenClassification,
};
use oxiformers_models::{
    AutoConfig, AutoModelFor, AutoModelForCausalLM, AutoModelForSeq2SeqLM, CausalLM, ProblemType, Seq2SeqLM,
    SpanLogits,
};
use serde_json::Value;

use crate::loss::{binary_cross_entropy, cross_entropy, mean_squared_error};
use crate::metrics::{Classes, MultiLabel, Regression, Spans, Tags, TokenAccuracy};
use crate::task::{Logits, LossOptions, Metrics, Outputs, Size, Task};
use crate::{Error, Result};

/// Rows of token ids as a tensor.
fn ids(rows: &[Vec<u32>], device: &burn::tensor::Device) -> Tensor<2, Int> {
    let flat: Vec<i32> = rows.iter().flatten().map(|id| *id as i32).collect();
    let shape = [rows.len(), rows.first().map_or(0, Vec::len)];
    Tensor::from_data(TensorData::new(flat, shape), device)
}

/// Checks that all ids are within a vocabulary: on the device nobody would notice.
fn check_ids(name: &str, rows: &[Vec<u32>], vocab_size: usize) -> Result<()> {
    match rows.iter().flatten().find(|id| **id as usize >= vocab_size) {
        None => Ok(()),
        Some(id) => {
            let message = format!(
                "holds the token {id}, and the model knows {vocab_size}; is the tokenizer another model's?"
            );
            Err(Error::config(name, message))
        }
    }
}

/// Checks that a batch is not longer than the model was made for.
fn check_length(seq: usize, most: Option<usize>) -> Result<()> {
    match most.filter(|most| seq > *most) {
        None => Ok(()),
        Some(most) => {
            let message =
                format!("lets through a sequence of {seq} tokens, and the model was made for {most}");
            Err(Error::config("max_length", message))
        }
    }
}

pub(crate) fn wrong_targets(task: &str) -> Error {
    Error::config(
        "task",
        format!("is {task}, and the batch has the labels of another one"),
    )
}

/// Classes that are not ignored.
fn learned<'a>(labels: impl Iterator<Item = &'a i64>) -> u64 {
    labels.filter(|label| **label != IGNORED).count() as u64
}

/// Learns to continue texts: the loss of `ForCausalLMLoss`.
pub struct CausalLanguageModeling {
    objective: Arc<dyn Objective>,
    pass: Pass,
}

impl CausalLanguageModeling {
    /// Texts as `objective` makes them.
    pub fn new(objective: Arc<dyn Objective>, config: &AutoConfig) -> Self {
        Self {
            objective,
            pass: pass(&config.json, None),
        }
    }
}

pub(crate) fn pass(config: &Value, task: Option<oxiformers_models::Task>) -> Pass {
    Pass {
        dropout: dropout(config, task),
        ..Pass::default()
    }
}

/// The logits of every token `[batch, seq, vocab_size]`.
pub(crate) fn logits(model: &AutoModelForCausalLM, batch: &Batch) -> Result<Tensor<3>> {
    Ok(forward(model, batch)?.0)
}

/// The same, and what layers have kept.
fn forward(model: &AutoModelForCausalLM, batch: &Batch) -> Result<(Tensor<3>, Cache)> {
    let [rows, seq] = batch.dims();
    check_ids("input_ids", &batch.input_ids, model.vocab_size())?;
    // Positions begin anew in each sequence of a row.
    if batch.segments.is_empty() {
        check_length(seq, model.max_position_embeddings())?;
    }
    let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; rows]);
    if !batch.segments.is_empty() {
        cache.set_segments(&batch.segments);
    }
    let logits = model.forward(ids(&batch.input_ids, &model.device()), &mut cache, LogitsFor::All);
    Ok((logits, cache))
}

/// What each token is to be followed by. The first token of a sequence follows none.
pub(crate) fn next_tokens(batch: &Batch, labels: &[Vec<i64>]) -> Vec<i64> {
    let row = |(row, labels): (usize, &Vec<i64>)| {
        let segments = batch.segments.get(row);
        let next = |at: usize| match labels.get(at + 1) {
            Some(label) if segments.is_none_or(|segments| segments[at] == segments[at + 1]) => *label,
            _ => IGNORED,
        };
        (0..labels.len()).map(next).collect::<Vec<_>>()
    };
    labels.iter().enumerate().flat_map(row).collect()
}

impl Task for CausalLanguageModeling {
    type Model = AutoModelForCausalLM;
    type Batch = Batch;

    async fn collate(&self, _: &Self::Model, rows: &[Row], draw: Draw) -> Result<Batch> {
        Ok(self.objective.collate(rows, draw))
    }

    fn size(&self, batch: &Batch) -> Size {
        let items = match &batch.labels {
            Targets::Tokens(labels) => learned(next_tokens(batch, labels).iter()),
            _ => 0,
        };
        Size {
            items,
            tokens: batch.tokens() as u64,
        }
    }

    fn loss(&self, model: &Self::Model, batch: &Batch, options: LossOptions) -> Result<Outputs> {
        let Targets::Tokens(labels) = &batch.labels else {
            return Err(wrong_targets("causal-lm"));
        };
        let (logits, mut cache) = forward(model, batch)?;
        let [rows, seq, classes] = logits.dims();
        let mut targets = next_tokens(batch, labels);
        // Where nobody else holds them, logits become their own gradient.
        let answers = match options.answers {
            true => Logits::Tokens(logits.clone()),
            false => Logits::None,
        };
        let mut judged = logits.reshape([rows * seq, classes]);
        if let Some(state) = cache.take_prompt_state() {
            // The first token follows the last virtual one.
            targets.extend(
                labels
                    .iter()
                    .map(|labels| labels.first().copied().unwrap_or(IGNORED)),
            );
            let first = model.decoder.logits(state).reshape([rows, classes]);
            judged = Tensor::cat(vec![judged, first], 0);
        }
        drop(cache);
        let loss = cross_entropy(judged, &targets, options.label_smoothing)?;
        Ok(Outputs {
            logits: answers,
            ..Outputs::new(loss)
        })
    }

    fn metrics(&self) -> Box<dyn Metrics<Batch>> {
        Box::new(TokenAccuracy::of(|batch, labels| {
            let seq = labels.first().map_or(1, Vec::len);
            next_tokens(batch, labels)
                .chunks(seq.max(1))
                .map(<[i64]>::to_vec)
                .collect()
        }))
    }

    fn of_loss(&self, loss: f64) -> Option<(&'static str, f64)> {
        Some(("perplexity", loss.exp()))
    }

    fn pass(&self) -> Pass {
        self.pass
    }
}

/// A head that a batch of texts can be trained with.
pub trait TrainedHead: TaskType {
    /// What it is called in recipes.
    const NAME: &'static str;

    /// The loss of logits, and what metrics see of them.
    ///
    /// # Errors
    /// Where the labels are another task's.
    fn loss(
        logits: Self::Logits,
        labels: &Targets,
        problem: ProblemType,
        smoothing: f64,
    ) -> Result<(Option<Tensor<1>>, Logits)>;

    /// Metrics of an evaluation; `labels` are the names of classes.
    fn metrics(problem: ProblemType, labels: &[String]) -> Box<dyn Metrics<Batch>>;
}

/// Classes of each token.
fn of_tokens(
    logits: Tensor<3>,
    labels: &Targets,
    name: &str,
    smoothing: f64,
) -> Result<(Option<Tensor<1>>, Logits)> {
    let Targets::Tokens(labels) = labels else {
        return Err(wrong_targets(name));
    };
    let [batch, seq, classes] = logits.dims();
    let labels: Vec<i64> = labels.iter().flatten().copied().collect();
    let loss = cross_entropy(logits.clone().reshape([batch * seq, classes]), &labels, smoothing)?;
    Ok((loss, Logits::Tokens(logits)))
}

impl TrainedHead for MaskedLM {
    const NAME: &'static str = "masked-lm";

    fn loss(
        logits: Tensor<3>,
        labels: &Targets,
        _: ProblemType,
        smoothing: f64,
    ) -> Result<(Option<Tensor<1>>, Logits)> {
        of_tokens(logits, labels, Self::NAME, smoothing)
    }

    fn metrics(_: ProblemType, _: &[String]) -> Box<dyn Metrics<Batch>> {
        Box::new(TokenAccuracy::of(|_, labels| labels.to_vec()))
    }
}

impl TrainedHead for TokenClassification {
    const NAME: &'static str = "token-classification";

    fn loss(
        logits: Tensor<3>,
        labels: &Targets,
        _: ProblemType,
        smoothing: f64,
    ) -> Result<(Option<Tensor<1>>, Logits)> {
        of_tokens(logits, labels, Self::NAME, smoothing)
    }

    fn metrics(_: ProblemType, labels: &[String]) -> Box<dyn Metrics<Batch>> {
        Box::new(Tags::new(labels))
    }
}

impl TrainedHead for SequenceClassification {
    const NAME: &'static str = "text-classification";

    fn loss(
        logits: Tensor<2>,
        labels: &Targets,
        problem: ProblemType,
        smoothing: f64,
    ) -> Result<(Option<Tensor<1>>, Logits)> {
        let flat = |numbers: &[Vec<f32>]| numbers.iter().flatten().copied().collect::<Vec<f32>>();
        let loss = match (problem, labels) {
            (ProblemType::SingleLabelClassification, Targets::Classes(classes)) => {
                cross_entropy(logits.clone(), classes, smoothing)?
            }
            (ProblemType::MultiLabelClassification, Targets::Numbers(numbers)) => {
                Some(binary_cross_entropy(logits.clone(), flat(numbers)))
            }
            (ProblemType::Regression, Targets::Numbers(numbers)) => {
                Some(mean_squared_error(logits.clone(), flat(numbers)))
            }
            _ => {
                return Err(Error::config(
                    "problem_type",
                    format!("is {problem:?}, and the labels are of another kind"),
                ));
            }
        };
        Ok((loss, Logits::Rows(logits)))
    }

    fn metrics(problem: ProblemType, labels: &[String]) -> Box<dyn Metrics<Batch>> {
        match problem {
            ProblemType::SingleLabelClassification => Box::new(Classes::new(labels.len())),
            ProblemType::MultiLabelClassification => Box::new(MultiLabel::default()),
            ProblemType::Regression => Box::new(Regression::default()),
        }
    }
}

impl TrainedHead for MultipleChoice {
    const NAME: &'static str = "multiple-choice";

    fn loss(
        logits: Tensor<2>,
        labels: &Targets,
        _: ProblemType,
        smoothing: f64,
    ) -> Result<(Option<Tensor<1>>, Logits)> {
        let Targets::Classes(classes) = labels else {
            return Err(wrong_targets(Self::NAME));
        };
        Ok((
            cross_entropy(logits.clone(), classes, smoothing)?,
            Logits::Rows(logits),
        ))
    }

    fn metrics(_: ProblemType, _: &[String]) -> Box<dyn Metrics<Batch>> {
        Box::new(Classes::new(0))
    }
}

impl TrainedHead for QuestionAnswering {
    const NAME: &'static str = "question-answering";

    fn loss(
        logits: SpanLogits,
        labels: &Targets,
        _: ProblemType,
        smoothing: f64,
    ) -> Result<(Option<Tensor<1>>, Logits)> {
        let Targets::Spans { start, end } = labels else {
            return Err(wrong_targets(Self::NAME));
        };
        let [_, seq] = logits.start_logits.dims();
        // Places outside of the window are not learned.
        let within = |places: &[i64]| -> Vec<i64> {
            let one = |at: &i64| {
                if (0..seq as i64).contains(at) {
                    *at
                } else {
                    IGNORED
                }
            };
            places.iter().map(one).collect()
        };
        let start = cross_entropy(logits.start_logits.clone(), &within(start), smoothing)?;
        let end = cross_entropy(logits.end_logits.clone(), &within(end), smoothing)?;
        let loss = match (start, end) {
            (Some(start), Some(end)) => Some((start + end) / 2.0),
            (one, other) => one.or(other),
        };
        Ok((loss, Logits::Spans(logits)))
    }

    fn metrics(_: ProblemType, _: &[String]) -> Box<dyn Metrics<Batch>> {
        Box::new(Spans::default())
    }
}

/// A batch as models with heads take it.
pub(crate) fn inputs(batch: &Batch) -> EncoderInputs {
    EncoderInputs {
        input_ids: batch.input_ids.clone(),
        tokens: batch.lengths.iter().map(|length| 0..*length).collect(),
        token_type_ids: batch.token_type_ids.clone(),
        num_choices: batch.num_choices,
        ..EncoderInputs::default()
    }
}

/// Learns to judge texts, with any head.
pub struct TextTask {
    objective: Arc<dyn Objective>,
    problem: ProblemType,
    labels: Vec<String>,
    /// What `config.json` says.
    config: Value,
}

impl TextTask {
    /// Texts as `objective` makes them, for a model of this configuration.
    ///
    /// # Errors
    /// Where its labels do not fit.
    pub fn new(objective: Arc<dyn Objective>, config: &AutoConfig) -> Result<Self> {
        let labels = oxiformers_models::Labels::from_json(&config.json)?;
        Ok(Self {
            objective,
            problem: labels.problem_type(),
            labels: (0..labels.len()).map(|id| labels.label(id)).collect(),
            config: config.json.clone(),
        })
    }

    /// The task with the head `T`.
    pub fn with_head<T: TrainedHead>(self) -> HeadTask<T> {
        HeadTask {
            pass: pass(&self.config, Some(T::TASK)),
            of: self,
            head: std::marker::PhantomData,
        }
    }
}

/// [`TextTask`] with a head.
pub struct HeadTask<T> {
    of: TextTask,
    pass: Pass,
    head: std::marker::PhantomData<T>,
}

impl<T: TrainedHead> Task for HeadTask<T> {
    type Model = AutoModelFor<T>;
    type Batch = Batch;

    async fn collate(&self, _: &Self::Model, rows: &[Row], draw: Draw) -> Result<Batch> {
        Ok(self.of.objective.collate(rows, draw))
    }

    fn size(&self, batch: &Batch) -> Size {
        let items = match &batch.labels {
            Targets::Tokens(labels) => learned(labels.iter().flatten()),
            Targets::Classes(labels) => learned(labels.iter()),
            Targets::Numbers(labels) => labels.len() as u64,
            Targets::Spans { start, .. } => start.len() as u64,
        };
        Size {
            items,
            tokens: batch.tokens() as u64,
        }
    }

    fn loss(&self, model: &Self::Model, batch: &Batch, options: LossOptions) -> Result<Outputs> {
        let output = model.forward(&inputs(batch))?;
        let (loss, logits) = T::loss(
            output.logits,
            &batch.labels,
            self.of.problem,
            options.label_smoothing,
        )?;
        Ok(Outputs {
            logits: if options.answers { logits } else { Logits::None },
            ..Outputs::new(loss)
        })
    }

    fn metrics(&self) -> Box<dyn Metrics<Batch>> {
        T::metrics(self.of.problem, &self.of.labels)
    }

    fn of_loss(&self, loss: f64) -> Option<(&'static str, f64)> {
        (T::TASK == oxiformers_models::Task::MaskedLM).then(|| ("perplexity", loss.exp()))
    }

    fn pass(&self) -> Pass {
        self.pass
    }
}

/// What the decoder of an encoder-decoder reads while it learns: its labels one place to the right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shift {
    /// After this token.
    After(u32),
    /// After the last token of the text, its language, in mBART.
    Around,
}

/// Learns to write texts that belong to others.
pub struct Seq2SeqLanguageModeling {
    objective: Arc<dyn Objective>,
    shift: Shift,
    pad: u32,
    pass: Pass,
}

impl Seq2SeqLanguageModeling {
    /// Texts as `objective` makes them, for a model of this configuration.
    ///
    /// # Errors
    /// Where it does not say what the decoder begins with.
    pub fn new(objective: Arc<dyn Objective>, config: &AutoConfig) -> Result<Self> {
        let id = |name: &str| config.json.get(name).and_then(Value::as_u64).map(|id| id as u32);
        let pad = id("pad_token_id");
        let shift = match config.model_type.as_str() {
            "mbart" | "plbart" => Shift::Around,
            // As their configurations say where config.json does not.
            "t5" | "mt5" | "umt5" | "pegasus" => {
                Shift::After(id("decoder_start_token_id").or(pad).unwrap_or(0))
            }
            _ => Shift::After(id("decoder_start_token_id").ok_or_else(|| {
                Error::config(
                    "decoder_start_token_id",
                    "is missing in config.json; the decoder has to begin with a token",
                )
            })?),
        };
        Ok(Self {
            objective,
            shift,
            pad: pad.unwrap_or(match config.model_type.as_str() {
                "t5" | "mt5" | "umt5" | "pegasus" => 0,
                _ => 1,
            }),
            pass: pass(&config.json, None),
        })
    }

    fn decoder_inputs(&self, labels: &[Vec<i64>]) -> Vec<Vec<u32>> {
        let row = |labels: &Vec<i64>| {
            let id = |label: &i64| u32::try_from(*label).unwrap_or(self.pad);
            let first = match self.shift {
                Shift::After(token) => token,
                Shift::Around => {
                    let last = labels
                        .iter()
                        .rev()
                        .find(|label| **label >= 0 && **label != i64::from(self.pad));
                    last.map_or(self.pad, id)
                }
            };
            std::iter::once(first)
                .chain(labels.iter().map(id))
                .take(labels.len())
                .collect()
        };
        labels.iter().map(row).collect()
    }
}

impl Task for Seq2SeqLanguageModeling {
    type Model = AutoModelForSeq2SeqLM;
    type Batch = Batch;

    async fn collate(&self, _: &Self::Model, rows: &[Row], draw: Draw) -> Result<Batch> {
        Ok(self.objective.collate(rows, draw))
    }

    fn size(&self, batch: &Batch) -> Size {
        let items = match &batch.labels {
            Targets::Tokens(labels) => learned(labels.iter().flatten()),
            _ => 0,
        };
        Size {
            items,
            tokens: batch.tokens() as u64 + items,
        }
    }

    fn loss(&self, model: &Self::Model, batch: &Batch, options: LossOptions) -> Result<Outputs> {
        let Targets::Tokens(labels) = &batch.labels else {
            return Err(wrong_targets("seq2seq-lm"));
        };
        let device = model.device();
        check_ids("input_ids", &batch.input_ids, model.source_vocab_size())?;
        check_length(batch.dims()[1], model.max_position_embeddings())?;
        let inputs = self.decoder_inputs(labels);
        check_ids("labels", &inputs, model.vocab_size())?;
        let tokens = batch.lengths.iter().map(|length| 0..*length).collect();
        let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; inputs.len()]);
        model.encode(ids(&batch.input_ids, &device), tokens, &mut cache);
        let logits = model.forward(ids(&inputs, &device), &mut cache, LogitsFor::All);
        drop(cache);
        let (loss, logits) = of_tokens(logits, &batch.labels, "seq2seq-lm", options.label_smoothing)?;
        Ok(Outputs {
            logits: if options.answers { logits } else { Logits::None },
            ..Outputs::new(loss)
        })
    }

    fn metrics(&self) -> Box<dyn Metrics<Batch>> {
        Box::new(TokenAccuracy::of(|_, labels| labels.to_vec()))
    }

    fn pass(&self) -> Pass {
        self.pass
    }
}
