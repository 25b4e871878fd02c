//! Distillation: a model learns to answer as another one does.

use std::collections::BTreeMap;

use burn::tensor::{Int, Tensor, TensorData, activation};
use oxiformers_data::tasks::{Batch, Draw, IGNORED, Row, Targets};
use oxiformers_models::nn::training::Pass;
use serde::{Deserialize, Serialize};

use crate::preferences::positive;
use crate::recipe::TaskName;
use crate::task::{Answers, Logits, LossOptions, Metrics, Outputs, Size, Task};
use crate::tasks::next_tokens;
use crate::{Error, Result};

/// What distillation goes by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillationConfig {
    /// The model that is learned from.
    pub teacher_model_name_or_path: String,
    /// What both do: `causal-lm` or `text-classification`.
    pub student_task: TaskName,
    /// What the labels' cross entropy counts; the rest counts what the teacher answers.
    pub alpha: f64,
    /// What the logits of both are divided by before they are compared.
    pub temperature: f64,
    /// How they are compared: 0 is the divergence from the teacher (forward), 1 that from the student (reverse), and between
    /// them lies the generalized Jensen-Shannon divergence (Agarwal et al., 2023).
    pub beta: f64,
}

impl Default for DistillationConfig {
    fn default() -> Self {
        Self {
            teacher_model_name_or_path: String::new(),
            student_task: TaskName::CausalLm,
            alpha: 0.5,
            temperature: 1.0,
            beta: 0.0,
        }
    }
}

impl DistillationConfig {
    fn check(&self) -> Result<()> {
        positive("objective.temperature", self.temperature)?;
        for (name, share) in [("alpha", self.alpha), ("beta", self.beta)] {
            if !(0.0..=1.0).contains(&share) {
                let message = format!("is {share}; it lies from 0 to 1");
                return Err(Error::config(format!("objective.{name}"), message));
            }
        }
        Ok(())
    }
}

/// Which answers are learned, row by row of the logits.
type Learned = fn(&Batch) -> Vec<i64>;

/// Learns a task, and to answer as a teacher does (Hinton et al., 2015):
/// `α · loss + (1 − α) · T² · D(teacher, student)`, where D compares their answers at the temperature T.
pub struct Distillation<T: Task> {
    of: T,
    teacher: T::Model,
    config: DistillationConfig,
    learned: Learned,
}

impl<T: Task<Batch = Batch>> Distillation<T> {
    /// The task `of`, with a teacher of it. `learned` says what is to be answered for each row of its logits, which is
    /// [`IGNORED`] where the teacher is not heard.
    ///
    /// # Errors
    /// Numbers that make no sense.
    pub fn new(of: T, teacher: T::Model, config: DistillationConfig, learned: Learned) -> Result<Self> {
        config.check()?;
        Ok(Self {
            of,
            teacher,
            config,
            learned,
        })
    }
}

/// The tokens that follow those of a batch.
pub fn following(batch: &Batch) -> Vec<i64> {
    match &batch.labels {
        Targets::Tokens(labels) => next_tokens(batch, labels),
        _ => Vec::new(),
    }
}

/// The labels of rows, where each has one.
pub fn classes(batch: &Batch) -> Vec<i64> {
    match &batch.labels {
        Targets::Classes(classes) => classes.clone(),
        _ => vec![0; batch.lengths.len()],
    }
}

/// Logits as rows.
fn rows(logits: Logits) -> Result<Tensor<2>> {
    match logits {
        Logits::Tokens(logits) => {
            let [batch, seq, classes] = logits.dims();
            Ok(logits.reshape([batch * seq, classes]))
        }
        Logits::Rows(logits) => Ok(logits),
        Logits::Spans(_) | Logits::None => Err(Error::config(
            "objective.student_task",
            "has no answers that could be compared with a teacher's",
        )),
    }
}

/// The generalized Jensen-Shannon divergence of each row's classes: log-probabilities `[rows, classes]` to `[rows, 1]`.
fn divergence(teacher: Tensor<2>, student: Tensor<2>, beta: f64) -> Tensor<2> {
    let of = |one: &Tensor<2>, other: Tensor<2>| (one.clone().exp() * (one.clone() - other)).sum_dim(1);
    if beta == 0.0 {
        return of(&teacher, student);
    }
    if beta == 1.0 {
        return of(&student, teacher);
    }
    let (a, b) = (student.clone() + (1.0 - beta).ln(), teacher.clone() + beta.ln());
    let most = a.clone().max_pair(b.clone()).detach();
    let mixture = ((a - most.clone()).exp() + (b - most.clone()).exp()).log() + most;
    of(&teacher, mixture.clone()) * beta + of(&student, mixture) * (1.0 - beta)
}

/// A batch, and what the teacher answers of it.
#[derive(Debug)]
pub struct Taught {
    batch: Batch,
    /// Which rows of the logits the teacher is heard about.
    places: Vec<i32>,
    /// Its logits of these rows, `[places, classes]`.
    teacher: Tensor<2>,
}

/// The rows at these places.
fn at(logits: Logits, places: &[i32]) -> Result<Tensor<2>> {
    let logits = rows(logits)?;
    let places = TensorData::new(places.to_vec(), [places.len()]);
    let places = Tensor::<1, Int>::from_data(places, &logits.device());
    Ok(logits.select(0, places))
}

const ANSWERING: LossOptions = LossOptions {
    label_smoothing: 0.0,
    answers: true,
};

impl<T: Task<Batch = Batch, Model: Sync>> Task for Distillation<T> {
    type Model = T::Model;
    type Batch = Taught;

    async fn collate(&self, model: &Self::Model, rows: &[Row], draw: Draw) -> Result<Taught> {
        let batch = self.of.collate(model, rows, draw).await?;
        let learned = (self.learned)(&batch);
        let places = (0..).zip(&learned).filter(|(_, label)| **label != IGNORED);
        let places: Vec<i32> = places.map(|(at, _)| at).collect();
        // While the batch is made nothing is dropped out.
        let theirs = self.of.loss(&self.teacher, &batch, ANSWERING)?;
        Ok(Taught {
            teacher: at(theirs.logits, &places)?,
            places,
            batch,
        })
    }

    fn size(&self, taught: &Taught) -> Size {
        self.of.size(&taught.batch)
    }

    fn loss(&self, model: &Self::Model, taught: &Taught, options: LossOptions) -> Result<Outputs> {
        let DistillationConfig {
            alpha,
            temperature,
            beta,
            ..
        } = self.config;
        let answering = LossOptions {
            answers: true,
            ..options
        };
        let ours = self.of.loss(model, &taught.batch, answering)?;
        let Some(loss) = ours.loss.clone() else {
            return Ok(ours);
        };
        let (student, teacher) = (at(ours.logits.clone(), &taught.places)?, taught.teacher.clone());
        if student.dims() != teacher.dims() {
            let message = format!(
                "answers with {} classes, and the student with {}; both need one vocabulary",
                teacher.dims()[1],
                student.dims()[1]
            );
            return Err(Error::config("objective.teacher_model_name_or_path", message));
        }
        let probabilities = |logits: Tensor<2>| activation::log_softmax(logits / temperature, 1);
        let divergence = divergence(probabilities(teacher), probabilities(student), beta).mean();
        let whole = loss.clone() * alpha + divergence.clone() * ((1.0 - alpha) * temperature * temperature);
        let mut logs = ours.logs;
        logs.push(("task_loss".into(), loss.detach()));
        logs.push(("divergence".into(), divergence.detach()));
        Ok(Outputs {
            loss: Some(whole),
            logits: if options.answers {
                ours.logits
            } else {
                Logits::None
            },
            logs,
        })
    }

    fn metrics(&self) -> Box<dyn Metrics<Taught>> {
        Box::new(Of(self.of.metrics()))
    }

    fn pass(&self) -> Pass {
        self.of.pass()
    }
}

/// The metrics of the task.
struct Of(Box<dyn Metrics<Batch>>);

impl Metrics<Taught> for Of {
    fn add(&mut self, answers: &Answers, taught: &Taught) {
        self.0.add(answers, &taught.batch);
    }

    fn finish(&self) -> BTreeMap<String, f64> {
        self.0.finish()
    }
}
