//! Where a training is.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Schedule;

/// Where a training is: `trainer_state.json`, by the names that Transformers gives it.
///
/// All that is random is computed from the seeds and the numbers here, so there is no generator's state to keep.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainerState {
    /// Steps that are done.
    pub global_step: u64,
    /// Epochs that are done, with a fraction.
    pub epoch: f64,
    /// Steps of the training.
    pub max_steps: u64,
    /// Tokens that were read.
    pub num_input_tokens_seen: u64,
    /// The best metric so far.
    pub best_metric: Option<f64>,
    /// The step that it was found after.
    pub best_global_step: Option<u64>,
    /// The checkpoint of that step.
    pub best_model_checkpoint: Option<PathBuf>,
    /// All logs.
    pub log_history: Vec<Map<String, Value>>,
    /// Sum of the losses since the last log.
    pub loss_since_log: f64,
    /// Steps since the last log.
    pub steps_since_log: u64,
    /// Evaluations in a row that were no better.
    pub patience_counter: usize,
    /// Steps that were left out.
    pub skipped_steps: u64,
    /// What tells the data from other.
    pub data: String,
    /// The schedule, where it depends on more than the step.
    pub schedule: Option<Schedule>,
    /// Seeds, batch size and all else that the order of examples depends on.
    pub order: Value,
}
