//! Schedules that follow a metric.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Whether less or more of a metric is better.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Less.
    #[default]
    Min,
    /// More.
    Max,
}

/// What a threshold is compared with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ThresholdMode {
    /// The share by which a metric gets better.
    #[default]
    Rel,
    /// The difference.
    Abs,
}

/// Numbers of `reduce_lr_on_plateau`, those of `torch.optim.lr_scheduler.ReduceLROnPlateau`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlateauSettings {
    /// Whether less or more is better.
    pub mode: Mode,
    /// What the learning rate is multiplied by.
    pub factor: f64,
    /// Metrics that may be no better before it falls.
    pub patience: usize,
    /// How much better a metric must be.
    pub threshold: f64,
    /// What the threshold is compared with.
    pub threshold_mode: ThresholdMode,
    /// Metrics after a fall that do not count.
    pub cooldown: usize,
    /// Least learning rate.
    pub min_lr: f64,
    /// Smallest change that is made.
    pub eps: f64,
}

impl Default for PlateauSettings {
    fn default() -> Self {
        Self {
            mode: Mode::Min,
            factor: 0.1,
            patience: 10,
            threshold: 1e-4,
            threshold_mode: ThresholdMode::Rel,
            cooldown: 0,
            min_lr: 0.0,
            eps: 1e-8,
        }
    }
}

/// Numbers of `greedy`, those of Transformers' `GreedyLR`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GreedySettings {
    /// Whether less or more is better.
    pub mode: Mode,
    /// What the learning rate is multiplied or divided by.
    pub factor: f64,
    /// Metrics in a row before it changes.
    pub patience: usize,
    /// How much better a metric must be.
    pub threshold: f64,
    /// What the threshold is compared with.
    pub threshold_mode: ThresholdMode,
    /// Metrics after a fall that do not count.
    pub cooldown: usize,
    /// Metrics after a rise that do not count.
    pub warmup: usize,
    /// Least learning rate.
    pub min_lr: f64,
    /// Largest learning rate.
    pub max_lr: f64,
    /// Smallest change that is made.
    pub eps: f64,
    /// Whether the metric is averaged.
    pub smooth: bool,
    /// Metrics of that average.
    pub window_size: usize,
    /// Falls at the least learning rate before everything starts anew.
    pub reset_start: usize,
}

impl Default for GreedySettings {
    fn default() -> Self {
        Self {
            mode: Mode::Min,
            factor: 0.95,
            patience: 10,
            threshold: 1e-6,
            threshold_mode: ThresholdMode::Abs,
            cooldown: 0,
            warmup: 0,
            min_lr: 1e-3,
            max_lr: 1.0,
            eps: 1e-8,
            smooth: false,
            window_size: 50,
            reset_start: 500,
        }
    }
}

/// A learning rate that a metric moves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    settings: GreedySettings,
    /// Whether it also rises.
    greedy: bool,
    first: f64,
    now: f64,
    best: Option<f64>,
    bad: usize,
    good: usize,
    cooldown: usize,
    warmup: usize,
    reset: i64,
    window: VecDeque<f64>,
    sum: f64,
}

impl Metric {
    /// A learning rate that falls when the metric gets no better.
    ///
    /// # Errors
    /// [`Error::Config`] where the factor is not below 1.
    pub fn plateau(settings: PlateauSettings, learning_rate: f64) -> Result<Self> {
        let settings = GreedySettings {
            mode: settings.mode,
            factor: settings.factor,
            patience: settings.patience,
            threshold: settings.threshold,
            threshold_mode: settings.threshold_mode,
            cooldown: settings.cooldown,
            min_lr: settings.min_lr,
            eps: settings.eps,
            ..GreedySettings::default()
        };
        Self::new(settings, false, learning_rate)
    }

    /// A learning rate that also rises.
    ///
    /// # Errors
    /// As [`plateau`](Self::plateau).
    pub fn greedy(settings: GreedySettings, learning_rate: f64) -> Result<Self> {
        Self::new(settings, true, learning_rate)
    }

    fn new(settings: GreedySettings, greedy: bool, learning_rate: f64) -> Result<Self> {
        if !(f64::MIN_POSITIVE..1.0).contains(&settings.factor) {
            return Err(Error::config(
                "factor",
                format!("is {}; it must lie between 0 and 1", settings.factor),
            ));
        }
        Ok(Self {
            settings,
            greedy,
            first: learning_rate,
            now: learning_rate,
            best: None,
            bad: 0,
            good: 0,
            cooldown: 0,
            warmup: 0,
            reset: settings.reset_start as i64,
            window: VecDeque::new(),
            sum: 0.0,
        })
    }

    /// The learning rate.
    pub fn learning_rate(&self) -> f64 {
        self.now
    }

    /// Takes note of a metric.
    pub fn observe(&mut self, metric: f64) {
        let metric = if self.settings.smooth {
            self.smoothed(metric)
        } else {
            metric
        };
        if self.greedy {
            self.observe_greedily(metric)
        } else {
            self.observe_plateau(metric)
        }
    }

    fn smoothed(&mut self, metric: f64) -> f64 {
        self.window.push_back(metric);
        self.sum += metric;
        if self.window.len() > self.settings.window_size {
            self.sum -= self.window.pop_front().unwrap_or(0.0);
        }
        self.sum / self.window.len() as f64
    }

    fn is_better(&self, metric: f64) -> bool {
        let (mode, threshold) = (self.settings.mode, self.settings.threshold);
        let best = self.best.unwrap_or(match mode {
            Mode::Min => f64::INFINITY,
            Mode::Max => f64::NEG_INFINITY,
        });
        match (mode, self.settings.threshold_mode) {
            (Mode::Min, ThresholdMode::Rel) => metric < best * (1.0 - threshold),
            (Mode::Min, ThresholdMode::Abs) => metric < best - threshold,
            (Mode::Max, ThresholdMode::Rel) => metric > best * (1.0 + threshold),
            (Mode::Max, ThresholdMode::Abs) => metric > best + threshold,
        }
    }

    fn observe_plateau(&mut self, metric: f64) {
        if self.is_better(metric) {
            self.best = Some(metric);
            self.bad = 0;
        } else {
            self.bad += 1;
        }
        if self.cooldown > 0 {
            self.cooldown -= 1;
            self.bad = 0;
        }
        if self.bad > self.settings.patience {
            self.reduce();
            self.cooldown = self.settings.cooldown;
            self.bad = 0;
        }
    }

    fn observe_greedily(&mut self, metric: f64) {
        if self.cooldown > 0 || self.warmup > 0 {
            if self.cooldown > 0 {
                self.cooldown -= 1;
            } else {
                self.warmup -= 1;
            }
            (self.bad, self.good) = (0, 0);
            return;
        }
        if self.is_better(metric) {
            self.best = Some(metric);
            self.bad = 0;
            self.good += 1;
        } else {
            self.bad += 1;
            self.good = 0;
        }
        if self.good > self.settings.patience {
            let raised = (self.now / self.settings.factor).min(self.settings.max_lr);
            if raised - self.now > self.settings.eps {
                self.now = raised;
            }
            self.reset = self.settings.reset_start as i64;
            self.warmup = self.settings.warmup;
            self.good = 0;
        } else if self.bad > self.settings.patience {
            self.reduce();
            // Starting anew forgets the cooldown, and this sets it again, as in the original.
            if self.now <= self.settings.min_lr {
                self.reset -= 1;
                if self.reset <= 0 {
                    self.start_anew();
                }
            }
            self.cooldown = self.settings.cooldown;
            self.bad = 0;
        }
    }

    fn reduce(&mut self) {
        let reduced = (self.now * self.settings.factor).max(self.settings.min_lr);
        if self.now - reduced > self.settings.eps {
            self.now = reduced;
        }
    }

    fn start_anew(&mut self) {
        self.now = self.first;
        self.best = None;
        (self.bad, self.good, self.warmup) = (0, 0, 0);
        self.reset = self.settings.reset_start as i64;
        self.window.clear();
        self.sum = 0.0;
    }
}
