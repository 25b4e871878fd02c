//! What is learned: how examples become a batch, and how wrong a model is about it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::Tensor;
use oxiformers_data::tasks::{Draw, Row};
use oxiformers_models::nn::Parameter;
use oxiformers_models::nn::training::Pass;
use oxiformers_models::tasks::TaskType;
use oxiformers_models::{AutoModelFor, AutoModelForCausalLM, AutoModelForSeq2SeqLM, SpanLogits};

use crate::optim::State;
use crate::{Error, Result};

/// A model as training sees it.
pub trait Network: Module {
    /// The same model, of which no gradients are computed: the fast form for evaluation.
    fn without_autodiff(&self) -> Self;
}

impl Network for AutoModelForCausalLM {
    fn without_autodiff(&self) -> Self {
        self.without_autodiff()
    }
}

impl Network for AutoModelForSeq2SeqLM {
    fn without_autodiff(&self) -> Self {
        self.without_autodiff()
    }
}

impl<T: TaskType> Network for AutoModelFor<T> {
    fn without_autodiff(&self) -> Self {
        self.without_autodiff()
    }
}

/// How much a batch counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// What the loss is a mean over: tokens that are predicted, or rows.
    pub items: u64,
    /// Tokens that are read.
    pub tokens: u64,
}

/// What the loss of a batch depends on besides the model.
#[derive(Debug, Clone, Copy, Default)]
pub struct LossOptions {
    /// `label_smoothing_factor`; 0 in evaluation.
    pub label_smoothing: f64,
    /// Whether the answers are wanted, for metrics.
    pub answers: bool,
}

/// What a model makes of a batch.
#[derive(Debug)]
pub struct Outputs {
    /// The mean over the batch's items, `[1]`; `None` where it has none.
    pub loss: Option<Tensor<1>>,
    /// What the model answers, where it was asked for.
    pub logits: Logits,
    /// Other numbers to be logged, by their names, such as the rewards of preferences: `[1]` each.
    pub logs: Vec<(Cow<'static, str>, Tensor<1>)>,
}

impl Outputs {
    /// A loss and nothing else.
    pub fn new(loss: Option<Tensor<1>>) -> Self {
        Self {
            loss,
            logits: Logits::None,
            logs: Vec::new(),
        }
    }
}

/// What a model answers.
#[derive(Debug, Clone)]
pub enum Logits {
    /// Nothing that metrics are computed of.
    None,
    /// Of each token `[batch, seq, classes]`.
    Tokens(Tensor<3>),
    /// Of each row `[batch, classes]`.
    Rows(Tensor<2>),
    /// Where an answer begins and ends.
    Spans(SpanLogits),
}

/// The same, read from the device.
#[derive(Debug, Clone, PartialEq)]
pub enum Answers {
    /// Nothing.
    None,
    /// The likeliest class of each token.
    Tokens(Vec<Vec<i64>>),
    /// The logits of each row.
    Rows(Vec<Vec<f32>>),
    /// The likeliest places.
    Spans {
        /// First token.
        start: Vec<i64>,
        /// Last token.
        end: Vec<i64>,
    },
}

impl Logits {
    /// Reads what metrics need.
    ///
    /// # Errors
    /// [`Error::Device`] where it cannot be read.
    pub async fn read(self) -> Result<Answers> {
        let device = |error| Error::Device(format!("{error:?}"));
        Ok(match self {
            Self::None => Answers::None,
            Self::Tokens(logits) => {
                let [_, seq, _] = logits.dims();
                let best = logits.argmax(2).into_data_async().await.map_err(device)?;
                let best: Vec<i64> = best.iter::<i64>().collect();
                Answers::Tokens(best.chunks(seq.max(1)).map(<[i64]>::to_vec).collect())
            }
            Self::Rows(logits) => {
                let [_, classes] = logits.dims();
                let values = logits.into_data_async().await.map_err(device)?;
                let values: Vec<f32> = values.iter::<f32>().collect();
                Answers::Rows(values.chunks(classes.max(1)).map(<[f32]>::to_vec).collect())
            }
            Self::Spans(SpanLogits {
                start_logits,
                end_logits,
            }) => {
                let start = start_logits.argmax(1).into_data_async().await.map_err(device)?;
                let end = end_logits.argmax(1).into_data_async().await.map_err(device)?;
                Answers::Spans {
                    start: start.iter::<i64>().collect(),
                    end: end.iter::<i64>().collect(),
                }
            }
        })
    }
}

/// Metrics of an evaluation, batch by batch.
pub trait Metrics<B>: Send {
    /// Takes note of what a model answered.
    fn add(&mut self, answers: &Answers, batch: &B);

    /// The metrics of all that was added, by their names, such as `accuracy`.
    fn finish(&self) -> BTreeMap<String, f64>;
}

/// No metrics besides the loss.
impl<B> Metrics<B> for () {
    fn add(&mut self, _: &Answers, _: &B) {}

    fn finish(&self) -> BTreeMap<String, f64> {
        BTreeMap::new()
    }
}

/// What is learned. The objectives of this crate are in [`tasks`](crate::tasks) and beside it; others need only be this.
#[allow(async_fn_in_trait)]
pub trait Task: Send + Sync {
    /// The model; several models are one that has them as fields.
    type Model: Network;
    /// What a step sees of the data.
    type Batch: Send;

    /// Makes a batch of examples. `model` is there for those that ask it for answers first.
    ///
    /// # Errors
    /// Where the examples do not fit together, or the model.
    async fn collate(&self, model: &Self::Model, rows: &[Row], draw: Draw) -> Result<Self::Batch>;

    /// How many rows of a batch an example becomes; batch sizes count rows.
    fn rows_per_example(&self) -> usize {
        1
    }

    /// How many steps learn from the same batches. Evaluation and checkpoints wait for the last of them.
    fn steps_per_batch(&self) -> u64 {
        1
    }

    /// How much a batch counts. The loss of a step is the mean over the items of all its batches.
    fn size(&self, batch: &Self::Batch) -> Size;

    /// How wrong the model is about a batch.
    ///
    /// # Errors
    /// Where the batch does not fit the model.
    fn loss(&self, model: &Self::Model, batch: &Self::Batch, options: LossOptions) -> Result<Outputs>;

    /// Hears that the optimizer has made so many steps, of which the last one has just changed the `trainable` parameters.
    fn after_step(&mut self, _model: &Self::Model, _trainable: &[Parameter], _step: u64) {}

    /// What a checkpoint has to hold for the task to go on as it would have.
    ///
    /// # Errors
    /// Where it cannot be read from the device.
    async fn state(&self, _trainable: &[Parameter]) -> Result<State> {
        Ok(State::default())
    }

    /// Goes on from a [state](Self::state).
    ///
    /// # Errors
    /// Names what is missing.
    fn load_state(&mut self, _state: State, _trainable: &[Parameter]) -> Result<()> {
        Ok(())
    }

    /// Metrics of an evaluation.
    fn metrics(&self) -> Box<dyn Metrics<Self::Batch>> {
        Box::new(())
    }

    /// What a loss amounts to, with a name: the perplexity of a language model.
    fn of_loss(&self, _loss: f64) -> Option<(&'static str, f64)> {
        None
    }

    /// The dropout of training, and noise; the trainer sets its seed.
    fn pass(&self) -> Pass {
        Pass::default()
    }
}
