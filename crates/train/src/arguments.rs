//! How a training goes: the names and defaults of Transformers' `TrainingArguments`.

use std::path::PathBuf;

use oxiformers_data::SamplingStrategy;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, OptimizerConfig, Result, ScheduleConfig};

/// When something is done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Never.
    No,
    /// Every so many steps.
    #[default]
    Steps,
    /// After every epoch.
    Epoch,
    /// For checkpoints: when the metric is the best one so far.
    Best,
}

/// What to do when the loss or a gradient is no number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnNan {
    /// Stop, and name the examples.
    #[default]
    Stop,
    /// Leave the step out, count it, and name the examples.
    Skip,
}

/// The float type of saved weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum SaveDtype {
    #[default]
    Float32,
    Bfloat16,
    Float16,
}

/// How a training goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingArguments {
    /// Where checkpoints and the trained model are written.
    pub output_dir: PathBuf,
    /// Rows of a batch.
    pub per_device_train_batch_size: usize,
    /// Rows of a batch in evaluation.
    pub per_device_eval_batch_size: usize,
    /// Batches whose gradients make one step.
    pub gradient_accumulation_steps: usize,
    /// How often the data is seen.
    pub num_train_epochs: f64,
    /// Number of steps; below 0, the epochs say it.
    pub max_steps: i64,
    /// The peak of the learning rate.
    pub learning_rate: f64,
    /// Steps over which the learning rate rises; below 1, the share of all steps.
    pub warmup_steps: f64,
    /// The largest norm of the gradients of a step; 0 for any.
    pub max_grad_norm: f64,
    /// The share of a label that is spread over all classes (Szegedy et al., 2016).
    pub label_smoothing_factor: f64,
    /// Strength of the noise on embeddings (NEFTune: Jain et al., 2023).
    pub neftune_noise_alpha: Option<f64>,
    /// Whether weights are bfloat16, with copies in f32 that learn.
    pub bf16: bool,
    /// Whether the hidden states between layers are computed again instead of kept.
    pub gradient_checkpointing: bool,
    /// When to log.
    pub logging_strategy: Strategy,
    /// Steps between logs; below 1, a share of all steps.
    pub logging_steps: f64,
    /// Whether the first step is logged, too.
    pub logging_first_step: bool,
    /// When to evaluate.
    pub eval_strategy: Strategy,
    /// Steps between evaluations; those between logs where `None`. Below 1, a share of all steps.
    pub eval_steps: Option<f64>,
    /// Steps or epochs before the first evaluation.
    pub eval_delay: f64,
    /// Whether to evaluate before the first step.
    pub eval_on_start: bool,
    /// When to write a checkpoint.
    pub save_strategy: Strategy,
    /// Steps between checkpoints; below 1, a share of all steps.
    pub save_steps: f64,
    /// How many checkpoints are kept; the best one is always among them if it is loaded at the end.
    pub save_total_limit: Option<usize>,
    /// Float type of the weights in the trained model.
    pub save_dtype: SaveDtype,
    /// Whether the model at the end is the best one, instead of the last.
    pub load_best_model_at_end: bool,
    /// What is best, such as `loss` or `accuracy`; the loss where `None`.
    pub metric_for_best_model: Option<String>,
    /// Whether more of it is better; where `None`, unless it is a loss.
    pub greater_is_better: Option<bool>,
    /// Evaluations without a better metric after which training stops.
    pub early_stopping_patience: Option<usize>,
    /// By how much a metric must be better for that.
    pub early_stopping_threshold: f64,
    /// Seed of everything that is random.
    pub seed: u64,
    /// Seed of the order of examples; `seed` where `None`.
    pub data_seed: Option<u64>,
    /// In which order examples are seen.
    pub train_sampling_strategy: SamplingStrategy,
    /// Whether a last batch that is not full is left out.
    pub dataloader_drop_last: bool,
    /// What to do when the loss is no number.
    pub on_nan: OnNan,
    /// A checkpoint to go on from; `true` for the last one in the output folder.
    pub resume_from_checkpoint: Option<Resume>,
    /// Who is told about metrics besides `metrics.jsonl`: `tensorboard`.
    pub report_to: Vec<String>,
    /// The optimizer and its numbers.
    #[serde(skip)]
    pub optimizer: OptimizerConfig,
    /// The schedule and its numbers.
    #[serde(skip)]
    pub schedule: ScheduleConfig,
}

/// Where to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Resume {
    /// At the last checkpoint of the output folder, if there is one.
    Last(bool),
    /// At this one.
    At(PathBuf),
}

impl Default for TrainingArguments {
    fn default() -> Self {
        Self {
            output_dir: PathBuf::from("trainer_output"),
            per_device_train_batch_size: 8,
            per_device_eval_batch_size: 8,
            gradient_accumulation_steps: 1,
            num_train_epochs: 3.0,
            max_steps: -1,
            learning_rate: 5e-5,
            warmup_steps: 0.0,
            max_grad_norm: 1.0,
            label_smoothing_factor: 0.0,
            neftune_noise_alpha: None,
            bf16: false,
            gradient_checkpointing: false,
            logging_strategy: Strategy::Steps,
            logging_steps: 500.0,
            logging_first_step: false,
            eval_strategy: Strategy::No,
            eval_steps: None,
            eval_delay: 0.0,
            eval_on_start: false,
            save_strategy: Strategy::Steps,
            save_steps: 500.0,
            save_total_limit: None,
            save_dtype: SaveDtype::Float32,
            load_best_model_at_end: false,
            metric_for_best_model: None,
            greater_is_better: None,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            seed: 42,
            data_seed: None,
            train_sampling_strategy: SamplingStrategy::Random,
            dataloader_drop_last: false,
            on_nan: OnNan::Stop,
            resume_from_checkpoint: None,
            report_to: Vec::new(),
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig::default(),
        }
    }
}

/// The fields that a type has in JSON.
fn fields<T: Default + Serialize>() -> Vec<String> {
    match serde_json::to_value(T::default()) {
        Ok(Value::Object(map)) => map.into_iter().map(|(name, _)| name).collect(),
        _ => Vec::new(),
    }
}

/// Reads a type from fields; an error says which one does not fit.
fn read<T: for<'a> Deserialize<'a> + Default + Serialize>(map: Map<String, Value>) -> Result<T> {
    // One after the other, so that the message can name the field.
    for (name, value) in &map {
        let one = Value::Object([(name.clone(), value.clone())].into_iter().collect());
        if let Err(error) = serde_json::from_value::<T>(one) {
            return Err(Error::config(name, format!("is {value}: {error}")));
        }
    }
    serde_json::from_value(Value::Object(map)).map_err(|error| Error::config("arguments", error))
}

impl TrainingArguments {
    /// Reads arguments by the names of `TrainingArguments`; numbers of the optimizer and the schedule stand among them, or
    /// those of the schedule in `lr_scheduler_kwargs`.
    ///
    /// # Errors
    /// [`Error::Config`] names the field that is unknown or makes no sense.
    pub fn from_json(mut map: Map<String, Value>) -> Result<Self> {
        if let Some(Value::Object(kwargs)) = map.remove("lr_scheduler_kwargs") {
            map.extend(kwargs);
        }
        let (of_optimizer, of_schedule) = (fields::<OptimizerConfig>(), fields::<ScheduleConfig>());
        let (mut own, mut optimizer, mut schedule) = (Map::new(), Map::new(), Map::new());
        for (name, value) in map {
            match &name {
                name if name == "warmup_steps" => own.insert(name.clone(), value),
                name if of_optimizer.contains(name) => optimizer.insert(name.clone(), value),
                name if of_schedule.contains(name) => schedule.insert(name.clone(), value),
                _ => own.insert(name, value),
            };
        }
        let arguments = Self {
            optimizer: read(optimizer)?,
            schedule: read(schedule)?,
            ..read(own)?
        };
        arguments.check()?;
        Ok(arguments)
    }

    /// All arguments as JSON, in one table.
    pub fn to_json(&self) -> Map<String, Value> {
        let object = |value: serde_json::Result<Value>| match value {
            Ok(Value::Object(map)) => map,
            _ => Map::new(),
        };
        let mut map = object(serde_json::to_value(self));
        map.extend(object(serde_json::to_value(self.optimizer)));
        let mut schedule = object(serde_json::to_value(&self.schedule));
        schedule.remove("warmup_steps");
        map.extend(schedule);
        map
    }

    /// The names of all arguments.
    pub fn names() -> Vec<String> {
        Self::default()
            .to_json()
            .into_iter()
            .map(|(name, _)| name)
            .collect()
    }

    fn check(&self) -> Result<()> {
        let positive = |name: &str, value: usize| match value {
            0 => Err(Error::config(name, "is 0; it must be at least 1")),
            _ => Ok(()),
        };
        positive("per_device_train_batch_size", self.per_device_train_batch_size)?;
        positive("per_device_eval_batch_size", self.per_device_eval_batch_size)?;
        positive("gradient_accumulation_steps", self.gradient_accumulation_steps)?;
        let number = |name: &str, value: f64, least: f64| match value.is_finite() && value >= least {
            true => Ok(()),
            false => Err(Error::config(
                name,
                format!("is {value}; it must be {least} or more"),
            )),
        };
        number("warmup_steps", self.warmup_steps, 0.0)?;
        number("max_grad_norm", self.max_grad_norm, 0.0)?;
        number("early_stopping_threshold", self.early_stopping_threshold, 0.0)?;
        if !(0.0..1.0).contains(&self.label_smoothing_factor) {
            let message = format!(
                "is {}; it must lie from 0 to below 1",
                self.label_smoothing_factor
            );
            return Err(Error::config("label_smoothing_factor", message));
        }
        if self.max_steps < 1 && (self.num_train_epochs <= 0.0 || !self.num_train_epochs.is_finite()) {
            return Err(Error::config(
                "num_train_epochs",
                "must be above 0, or `max_steps` be given",
            ));
        }
        for (name, strategy, steps) in [
            ("logging_steps", self.logging_strategy, self.logging_steps),
            ("save_steps", self.save_strategy, self.save_steps),
            (
                "eval_steps",
                self.eval_strategy,
                self.eval_steps.unwrap_or(self.logging_steps),
            ),
        ] {
            if strategy == Strategy::Steps && !(steps.is_finite() && steps > 0.0) {
                return Err(Error::config(name, format!("is {steps}; it must be above 0")));
            }
        }
        let needs_eval = [
            ("load_best_model_at_end", self.load_best_model_at_end),
            ("early_stopping_patience", self.early_stopping_patience.is_some()),
            ("save_strategy", self.save_strategy == Strategy::Best),
        ];
        if let Some((name, _)) = needs_eval
            .iter()
            .find(|(_, needs)| *needs && self.eval_strategy == Strategy::No)
        {
            return Err(Error::config(*name, "needs an `eval_strategy`: steps or epoch"));
        }
        if self.eval_strategy == Strategy::Best || self.logging_strategy == Strategy::Best {
            return Err(Error::config(
                "eval_strategy",
                "must be no, steps or epoch, and so must `logging_strategy`",
            ));
        }
        if self.load_best_model_at_end && self.save_strategy != Strategy::Best {
            if self.save_strategy != self.eval_strategy {
                return Err(Error::config(
                    "save_strategy",
                    "must be that of evaluation for `load_best_model_at_end`: the best model has to be saved",
                ));
            }
            let (save, eval) = (self.save_steps, self.eval_steps.unwrap_or(self.logging_steps));
            if self.save_strategy == Strategy::Steps && save >= 1.0 && eval >= 1.0 && save % eval != 0.0 {
                let message = format!(
                    "is {save}; for `load_best_model_at_end` it must be a multiple of {eval} (eval_steps)"
                );
                return Err(Error::config("save_steps", message));
            }
        }
        if let Some(other) = self
            .report_to
            .iter()
            .find(|name| !["tensorboard", "none"].contains(&name.as_str()))
        {
            return Err(Error::config(
                "report_to",
                format!("is `{other}`; it must be `tensorboard` or `none`"),
            ));
        }
        Ok(())
    }

    /// Steps that are given as a number or as a share of all.
    pub fn steps_of(&self, given: f64, max_steps: u64) -> u64 {
        if given < 1.0 {
            ((max_steps as f64 * given).ceil() as u64).max(1)
        } else {
            given as u64
        }
    }

    /// What the best model is chosen by, as evaluation calls it.
    pub fn best_metric(&self) -> String {
        let name = self.metric_for_best_model.as_deref().unwrap_or("loss");
        match name.starts_with("eval_") {
            true => name.to_string(),
            false => format!("eval_{name}"),
        }
    }

    /// Whether more of [`best_metric`](Self::best_metric) is better.
    pub fn greater_is_better(&self) -> bool {
        let metric = self.best_metric();
        self.greater_is_better.unwrap_or(
            !metric.ends_with("loss") && !metric.ends_with("perplexity") && !metric.ends_with("mse"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<TrainingArguments, String> {
        let Value::Object(map) = value else {
            panic!("no object")
        };
        TrainingArguments::from_json(map).map_err(|error| error.to_string())
    }

    #[test]
    fn arguments_by_their_names() {
        let arguments = read(json!({
            "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2.0},
            "warmup_steps": 0.1, "weight_decay": 0.01, "optim": "lion", "eval_strategy": "epoch",
        }));
        let arguments = arguments.expect("arguments");
        assert_eq!(arguments.schedule.num_cycles, Some(2.0));
        assert_eq!(arguments.optimizer.weight_decay, 0.01);
        assert_eq!(arguments.warmup_steps, 0.1);
        let again = TrainingArguments::from_json(arguments.to_json()).expect("again");
        assert_eq!(again, arguments);
        assert_eq!(read(json!({})), Ok(TrainingArguments::default()));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (value, part) in [
            (json!({"learning_rat": 1}), "learning_rat"),
            (json!({"learning_rate": "fast"}), "learning_rate"),
            (json!({"lr_scheduler_type": "sine"}), "lr_scheduler_type"),
            (
                json!({"gradient_accumulation_steps": 0}),
                "gradient_accumulation_steps",
            ),
            (json!({"load_best_model_at_end": true}), "eval_strategy"),
            (
                json!({"load_best_model_at_end": true, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 10}),
                "multiple",
            ),
            (json!({"report_to": ["wandb"]}), "tensorboard"),
        ] {
            let error = read(value.clone()).expect_err("error");
            assert!(error.contains(part), "{value}: {error}");
        }
    }

    #[test]
    fn the_best_metric() {
        let of = |name: Option<&str>| {
            let arguments = TrainingArguments {
                metric_for_best_model: name.map(str::to_string),
                ..TrainingArguments::default()
            };
            (arguments.best_metric(), arguments.greater_is_better())
        };
        assert_eq!(of(None), ("eval_loss".to_string(), false));
        assert_eq!(of(Some("accuracy")), ("eval_accuracy".to_string(), true));
        assert_eq!(
            of(Some("eval_perplexity")),
            ("eval_perplexity".to_string(), false)
        );
    }
}
