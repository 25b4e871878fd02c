//! Where a training is.

use std::collections::BTreeMap;
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
    /// Sums of other numbers since the last log, and of how many.
    pub logs_since_log: BTreeMap<String, (f64, u64)>,
    /// Evaluations in a row that were no better.
    pub patience_counter: usize,
    /// Steps that were left out.
    pub skipped_steps: u64,
    /// What tells the data from other.
    pub data: String,
    /// The schedule, where it depends on more than the step.
    #[serde(with = "exact")]
    pub schedule: Option<Schedule>,
    /// Seeds, batch size and all else that the order of examples depends on.
    pub order: Value,
}

/// Numbers to the last bit: those of JSON are read back a little different now and then.
mod exact {
    use serde::de::{DeserializeOwned, Error as _};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use serde_json::{Value, json};

    const MARK: &str = "f64:";

    fn encode(value: &mut Value) {
        match value {
            Value::Number(number) if number.is_f64() => {
                let bits = number.as_f64().unwrap_or_default().to_bits();
                *value = json!(format!("{MARK}{bits:016x}"));
            }
            Value::Array(list) => list.iter_mut().for_each(encode),
            Value::Object(map) => map.values_mut().for_each(encode),
            _ => {}
        }
    }

    fn decode(value: &mut Value) {
        match value {
            Value::String(text) => {
                let bits = text
                    .strip_prefix(MARK)
                    .and_then(|bits| u64::from_str_radix(bits, 16).ok());
                if let Some(bits) = bits {
                    *value = json!(f64::from_bits(bits));
                }
            }
            Value::Array(list) => list.iter_mut().for_each(decode),
            Value::Object(map) => map.values_mut().for_each(decode),
            _ => {}
        }
    }

    pub fn serialize<T: Serialize, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        let mut value = serde_json::to_value(value).map_err(serde::ser::Error::custom)?;
        encode(&mut value);
        value.serialize(serializer)
    }

    pub fn deserialize<'de, T: DeserializeOwned, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        decode(&mut value);
        serde_json::from_value(value).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ScheduleConfig, SchedulerType};

    #[test]
    fn a_schedule_is_read_back_to_the_last_bit() {
        let config = ScheduleConfig {
            lr_scheduler_type: SchedulerType::Greedy,
            ..ScheduleConfig::default()
        };
        let mut schedule = Schedule::new(&config, 0.1, 100).expect("schedule");
        for step in 0..40 {
            schedule.observe(1.0 / (3.0 + f64::from(step)));
        }
        let state = TrainerState {
            schedule: Some(schedule),
            ..TrainerState::default()
        };
        let text = serde_json::to_string(&state).expect("JSON");
        let again: TrainerState = serde_json::from_str(&text).expect("state");
        assert_eq!(again, state);
    }
}
