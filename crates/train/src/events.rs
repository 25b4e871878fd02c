//! What a training tells those who watch it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use crate::state::TrainerState;
use crate::{Result, TrainingArguments};

/// What is known before the first step.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Examples of the data.
    pub examples: u64,
    /// Examples that are evaluated.
    pub eval_examples: u64,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Steps of the training.
    pub max_steps: u64,
    /// Steps that a checkpoint has already.
    pub first_step: u64,
    /// Values that are trained.
    pub trainable_parameters: usize,
    /// Values in all.
    pub all_parameters: usize,
}

/// Something that happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// The first step follows.
    Begin(&'a Plan),
    /// A step is done.
    Step {
        /// Its loss.
        loss: f64,
        /// The norm of its gradients before they were clipped.
        grad_norm: f64,
        /// Its learning rate.
        learning_rate: f64,
        /// Tokens that it has read.
        tokens: u64,
        /// How long it took.
        took: Duration,
    },
    /// A step was left out: its loss was no number.
    Skipped(&'a str),
    /// A batch of an evaluation is done.
    Evaluating {
        /// Batches that are done.
        done: u64,
        /// Batches in all.
        all: u64,
    },
    /// Numbers of the steps since the last log, or of an evaluation (`eval_…`).
    Log(&'a Map<String, Value>),
    /// A checkpoint was written.
    Saved(&'a Path),
    /// The training is over, or stopped.
    End {
        /// Whether all steps were done, or it stopped early because it got no better.
        finished: bool,
    },
}

/// Watches a training.
pub trait Callback: Send {
    /// Hears what happened.
    ///
    /// # Errors
    /// Stops the training.
    fn on_event(&mut self, event: &Event, state: &TrainerState, arguments: &TrainingArguments) -> Result<()>;
}

/// Writes every log as a line of JSON; goes on where a resumed training was.
pub struct MetricsFile {
    path: PathBuf,
}

impl MetricsFile {
    /// The name of the file within the output folder.
    pub const NAME: &'static str = "metrics.jsonl";

    /// Lines of this file.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }
}

impl Callback for MetricsFile {
    fn on_event(&mut self, event: &Event, state: &TrainerState, _: &TrainingArguments) -> Result<()> {
        use std::io::Write;
        match event {
            Event::Begin(_) => {
                // What a training wrote after the checkpoint that goes on here is written again.
                let lines: Vec<String> = state
                    .log_history
                    .iter()
                    .map(|log| format!("{}\n", Value::Object(log.clone())))
                    .collect();
                std::fs::write(&self.path, lines.concat()).map_err(crate::Error::io(&self.path))
            }
            Event::Log(_) => {
                let Some(log) = state.log_history.last() else {
                    return Ok(());
                };
                let file = std::fs::OpenOptions::new()
                    .append(true)
                    .create(true)
                    .open(&self.path);
                let line = format!("{}\n", Value::Object(log.clone()));
                file.and_then(|mut file| file.write_all(line.as_bytes()))
                    .map_err(crate::Error::io(&self.path))
            }
            _ => Ok(()),
        }
    }
}
