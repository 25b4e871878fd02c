//! Learning rates over the course of a training: the twelve schedules of Transformers, by their names.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

mod metric;

pub use metric::{GreedySettings, Metric, Mode, PlateauSettings, ThresholdMode};

/// The schedules, by the names that `TrainingArguments.lr_scheduler_type` gives them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// Down to 0 in a straight line.
    #[default]
    Linear,
    /// Down along a cosine.
    Cosine,
    /// Down along a cosine, several times.
    CosineWithRestarts,
    /// Down along a power of what is left.
    Polynomial,
    /// Always the same.
    Constant,
    /// Always the same after the warm-up.
    ConstantWithWarmup,
    /// Falls with the square root of the step.
    InverseSqrt,
    /// Falls when the metric does not get better.
    ReduceLrOnPlateau,
    /// Down along a cosine to a learning rate above 0.
    CosineWithMinLr,
    /// The same, one step ahead, and with a warm-up that may start above 0.
    CosineWarmupWithMinLr,
    /// A warm-up, a plateau and a decay (Hu et al., 2024).
    WarmupStableDecay,
    /// Rises while the metric gets better, and falls when it does not.
    Greedy,
}

/// Shape of the warm-up or the decay of [`SchedulerType::WarmupStableDecay`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Curve {
    /// A straight line.
    #[default]
    Linear,
    /// Half a cosine.
    Cosine,
    /// One minus a square root.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

/// Which schedule, and its numbers: `lr_scheduler_kwargs` in Transformers. `None` means the schedule's own default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// The schedule.
    pub lr_scheduler_type: SchedulerType,
    /// Steps over which the learning rate rises.
    pub warmup_steps: usize,
    /// Waves of a cosine; half of one, or one restart, where `None`.
    pub num_cycles: Option<f64>,
    /// Where [`SchedulerType::Polynomial`] ends; 1e-7 where `None`.
    pub lr_end: Option<f64>,
    /// Its power; 1 where `None`.
    pub power: Option<f64>,
    /// Steps in which [`SchedulerType::InverseSqrt`] falls to 1/√2; the warm-up's where `None`.
    pub timescale: Option<usize>,
    /// Least learning rate of the cosines that have one.
    pub min_lr: Option<f64>,
    /// The same as a share of the learning rate.
    pub min_lr_rate: Option<f64>,
    /// Where the warm-up of [`SchedulerType::CosineWarmupWithMinLr`] starts, as a share.
    pub warmup_lr_rate: Option<f64>,
    /// Steps of the decay of [`SchedulerType::WarmupStableDecay`].
    pub num_decay_steps: Option<usize>,
    /// Steps of its plateau; what is left of the training where `None`.
    pub num_stable_steps: Option<usize>,
    /// Shape of its warm-up.
    pub warmup_type: Curve,
    /// Shape of its decay; a cosine where `None`.
    pub decay_type: Option<Curve>,
    /// Where it starts and ends, as a share.
    pub min_lr_ratio: f64,
    /// Numbers of [`SchedulerType::ReduceLrOnPlateau`].
    pub plateau: PlateauSettings,
    /// Numbers of [`SchedulerType::Greedy`].
    pub greedy: GreedySettings,
}

/// The learning rate of each step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    learning_rate: f64,
    steps: usize,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Kind {
    /// A function of the step.
    Step(Box<ScheduleConfig>),
    /// What the metric has made of it.
    Metric(Metric),
}

impl Schedule {
    /// The schedule of a training of `steps` steps whose peak is `learning_rate`.
    ///
    /// # Errors
    /// [`Error::Config`] names the field that is missing or makes no sense.
    pub fn new(config: &ScheduleConfig, learning_rate: f64, steps: usize) -> Result<Self> {
        if !learning_rate.is_finite() || learning_rate < 0.0 {
            return Err(Error::config(
                "learning_rate",
                format!("is {learning_rate}; it must be 0 or more"),
            ));
        }
        let mut config = config.clone();
        let kind = match config.lr_scheduler_type {
            SchedulerType::ReduceLrOnPlateau => Kind::Metric(Metric::plateau(config.plateau, learning_rate)?),
            SchedulerType::Greedy => Kind::Metric(Metric::greedy(config.greedy, learning_rate)?),
            _ => {
                resolve(&mut config, learning_rate, steps)?;
                Kind::Step(Box::new(config))
            }
        };
        Ok(Self {
            learning_rate,
            steps,
            kind,
        })
    }

    /// The learning rate of step `step`, counted from 0.
    pub fn learning_rate(&self, step: usize) -> f64 {
        match &self.kind {
            Kind::Step(config) => self.learning_rate * factor(config, self.learning_rate, step, self.steps),
            Kind::Metric(metric) => metric.learning_rate(),
        }
    }

    /// Takes note of a metric: after each evaluation for [`SchedulerType::ReduceLrOnPlateau`], after each step or
    /// evaluation for [`SchedulerType::Greedy`]. Other schedules do not care.
    pub fn observe(&mut self, metric: f64) {
        if let Kind::Metric(state) = &mut self.kind {
            state.observe(metric);
        }
    }

    /// Whether the learning rate depends on what [`observe`](Self::observe) is told. Such a schedule is to be saved
    /// with a checkpoint; of the others, the step says everything.
    pub fn observes(&self) -> bool {
        matches!(self.kind, Kind::Metric(_))
    }
}

/// Checks what a schedule needs, and puts its defaults where nothing is said.
fn resolve(config: &mut ScheduleConfig, learning_rate: f64, steps: usize) -> Result<()> {
    use SchedulerType::*;
    match config.lr_scheduler_type {
        Polynomial => {
            let end = *config.lr_end.get_or_insert(1e-7);
            if learning_rate <= end {
                let message = format!("is {end}, which must be below the learning rate, {learning_rate}");
                return Err(Error::config("lr_end", message));
            }
        }
        CosineWithMinLr | CosineWarmupWithMinLr => {
            let rate = match (config.min_lr, config.min_lr_rate) {
                (Some(_), Some(_)) => return Err(Error::config("min_lr", "is given besides `min_lr_rate`")),
                (Some(_), None) if learning_rate == 0.0 => 0.0,
                (Some(min), None) => min / learning_rate,
                (None, Some(rate)) => rate,
                (None, None) => {
                    return Err(Error::config(
                        "min_lr",
                        "or `min_lr_rate` must be given for this schedule",
                    ));
                }
            };
            config.min_lr = None;
            config.min_lr_rate = Some(rate);
        }
        WarmupStableDecay => {
            let Some(decay) = config.num_decay_steps else {
                return Err(Error::config(
                    "num_decay_steps",
                    "must be given for warmup_stable_decay",
                ));
            };
            if config.num_stable_steps.is_none() {
                let stable = steps.checked_sub(config.warmup_steps + decay);
                let Some(stable) = stable else {
                    let message = format!("and the warm-up are more than the {steps} steps of the training");
                    return Err(Error::config("num_decay_steps", message));
                };
                config.num_stable_steps = Some(stable);
            }
        }
        _ => {}
    }
    Ok(())
}

/// The share of the peak at a step.
fn factor(config: &ScheduleConfig, peak: f64, step: usize, steps: usize) -> f64 {
    use SchedulerType::*;
    let warmup = config.warmup_steps;
    let (at, total) = (step as f64, steps as f64);
    let left = steps.saturating_sub(warmup).max(1) as f64;
    match config.lr_scheduler_type {
        Constant => return 1.0,
        CosineWarmupWithMinLr => return cosine_warmup(config, at, total),
        WarmupStableDecay => return warmup_stable_decay(config, step),
        _ => {}
    }
    if step < warmup {
        return at / warmup.max(1) as f64;
    }
    let past = at - warmup as f64;
    let progress = past / left;
    match config.lr_scheduler_type {
        Linear => ((total - at) / left).max(0.0),
        Cosine | CosineWithMinLr => {
            let least = config
                .min_lr_rate
                .filter(|_| config.lr_scheduler_type == CosineWithMinLr);
            let least = least.unwrap_or(0.0);
            let wave = 0.5 * (1.0 + (PI * config.num_cycles.unwrap_or(0.5) * 2.0 * progress).cos());
            (wave * (1.0 - least) + least).max(0.0)
        }
        CosineWithRestarts if progress >= 1.0 => 0.0,
        CosineWithRestarts => {
            let cycle = (config.num_cycles.unwrap_or(1.0) * progress) % 1.0;
            (0.5 * (1.0 + (PI * cycle).cos())).max(0.0)
        }
        Polynomial => {
            let end = config.lr_end.unwrap_or(1e-7);
            if step > steps {
                return end / peak;
            }
            let remaining = 1.0 - past / (total - warmup as f64).max(1.0);
            ((peak - end) * remaining.powf(config.power.unwrap_or(1.0)) + end) / peak
        }
        InverseSqrt => {
            let default = if warmup == 0 { 10_000 } else { warmup };
            let timescale = config.timescale.unwrap_or(default).max(1) as f64;
            1.0 / ((at + timescale - warmup as f64) / timescale).sqrt()
        }
        _ => 1.0,
    }
}

fn cosine_warmup(config: &ScheduleConfig, at: f64, total: f64) -> f64 {
    let warmup = config.warmup_steps as f64;
    if at < warmup {
        return match config.warmup_lr_rate {
            None => (at + 1.0) / warmup.max(1.0),
            Some(rate) => rate + (1.0 - rate) * at / (warmup - 1.0).max(1.0),
        };
    }
    let least = config.min_lr_rate.unwrap_or(0.0);
    let progress = (at - warmup + 1.0) / (total - warmup).max(1.0);
    let wave = 0.5 * (1.0 + (PI * config.num_cycles.unwrap_or(0.5) * 2.0 * progress).cos());
    (wave * (1.0 - least) + least).max(0.0)
}

fn warmup_stable_decay(config: &ScheduleConfig, step: usize) -> f64 {
    let (warmup, stable) = (config.warmup_steps, config.num_stable_steps.unwrap_or(0));
    let decay = config.num_decay_steps.unwrap_or(0);
    let least = config.min_lr_ratio;
    let between = |factor: f64| (factor * (1.0 - least) + least).max(0.0);
    let share = |step: usize, of: usize| step as f64 / of.max(1) as f64;
    if step < warmup {
        let progress = share(step, warmup);
        return between(match config.warmup_type {
            Curve::Linear => progress,
            Curve::Cosine => 0.5 * (1.0 - (PI * progress).cos()),
            Curve::OneMinusSqrt => 1.0 - (1.0 - progress).sqrt(),
        });
    }
    let step = step - warmup;
    if step < stable {
        return 1.0;
    }
    let step = step - stable;
    if step < decay {
        let progress = share(step, decay);
        return between(match config.decay_type.unwrap_or(Curve::Cosine) {
            Curve::Linear => 1.0 - progress,
            Curve::Cosine => 0.5 * (1.0 + (PI * config.num_cycles.unwrap_or(0.5) * 2.0 * progress).cos()),
            Curve::OneMinusSqrt => 1.0 - progress.sqrt(),
        });
    }
    least
}
