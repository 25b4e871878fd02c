//! Optimizers: what a gradient does to a parameter.
//!
//! An update is one pass over the parameter, its gradient and its moments, in place and on all threads. Formulas are
//! those of the optimizers that Transformers' Trainer knows by the same names, to the order of operations.

use std::collections::BTreeMap;

use rayon::iter::{IntoParallelIterator, ParallelIterator};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

pub mod adafactor;
pub mod adamw;
pub mod adamw_8bit;
pub mod dynamic_map;
pub mod lion;
pub mod sgd;
pub mod state;

pub use adafactor::Adafactor;
pub use adamw::AdamW;
pub use adamw_8bit::AdamW8bit;
pub use lion::Lion;
pub use sgd::Sgd;
pub use state::TensorView;

/// What an optimizer remembers, as named tensors: the parameter's name, a dot, and the moment's
/// (`model.norm.weight.exp_avg`).
pub type State = BTreeMap<String, TensorView>;

/// The shapes of parameters, by their names.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// The parameter of an update.
#[derive(Debug, Clone, Copy)]
pub struct Parameter<'a> {
    /// Its whole name, as in a checkpoint.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
    /// Whether it decays: see [`decays`](crate::decay::decays).
    pub decays: bool,
    /// Whether it is a table of embeddings, which the 8-bit optimizer keeps in 32 bits.
    pub embedding: bool,
}

/// Numbers of one step.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Learning rate.
    pub lr: f64,
    /// Factor of the gradients: 1, or less where they are clipped.
    pub grad_scale: f32,
}

/// Changes parameters.
pub trait Optimizer: Send {
    /// Changes the values of one parameter by its gradient, both of `parameter.shape` and row-major.
    fn update(&mut self, parameter: Parameter<'_>, values: &mut [f32], grad: &[f32], step: Step);

    /// What it remembers.
    fn state(&self) -> State;

    /// Remembers what [`state`](Self::state) gave; `shapes` are those of all parameters.
    ///
    /// # Errors
    /// [`Error::State`] names the tensor that is missing, misshapen or not known. Nothing is changed then.
    fn load_state(&mut self, state: &State, shapes: &Shapes) -> Result<()>;
}

/// The optimizers, by the names that `TrainingArguments.optim` gives them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerName {
    /// AdamW (Loshchilov and Hutter, 2019).
    #[default]
    #[serde(alias = "adamw_torch_fused", alias = "adamw")]
    AdamwTorch,
    /// Adafactor (Shazeer and Stern, 2018).
    Adafactor,
    /// Lion (Chen et al., 2023).
    #[serde(rename = "lion_32bit", alias = "lion")]
    Lion32bit,
    /// Stochastic gradient descent.
    Sgd,
    /// AdamW with moments of 8 bits (Dettmers et al., 2022).
    #[serde(rename = "adamw_bnb_8bit", alias = "adamw_8bit")]
    AdamwBnb8bit,
}

/// Which optimizer, and its numbers; names and defaults are those of `TrainingArguments`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The optimizer.
    pub optim: OptimizerName,
    /// Share of a parameter that is lost per step, times the learning rate.
    pub weight_decay: f64,
    /// Decay of the mean of gradients, for AdamW and Lion.
    pub adam_beta1: f64,
    /// Decay of the mean of squares, for AdamW; of the mean of gradients, for Lion.
    pub adam_beta2: f64,
    /// Added to AdamW's divisor.
    pub adam_epsilon: f64,
    /// SGD's momentum.
    pub momentum: f64,
    /// Whether SGD looks ahead (Nesterov, 1983).
    pub nesterov: bool,
    /// Whether Adafactor's steps are relative to the size of a parameter.
    pub scale_parameter: bool,
    /// Whether Adafactor chooses its learning rate itself; the schedule then has no say.
    pub relative_step: bool,
    /// Whether that learning rate starts small.
    pub warmup_init: bool,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            optim: OptimizerName::AdamwTorch,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            momentum: 0.0,
            nesterov: false,
            scale_parameter: false,
            relative_step: false,
            warmup_init: false,
        }
    }
}

impl OptimizerConfig {
    /// Builds the optimizer.
    ///
    /// # Errors
    /// [`Error::Config`] names the field whose value makes no sense.
    pub fn build(&self) -> Result<Box<dyn Optimizer>> {
        let within = |field: &'static str, value: f64, fits: bool, range: &str| match fits {
            true => Ok(()),
            false => Err(Error::config(field, format!("is {value}; it must be {range}"))),
        };
        let share = |field, value| within(field, value, (0.0..1.0).contains(&value), "from 0 to below 1");
        share("adam_beta1", self.adam_beta1)?;
        share("adam_beta2", self.adam_beta2)?;
        share("momentum", self.momentum)?;
        let decay = self.weight_decay;
        within(
            "weight_decay",
            decay,
            decay >= 0.0 && decay.is_finite(),
            "0 or more",
        )?;
        let eps = self.adam_epsilon;
        within("adam_epsilon", eps, eps >= 0.0 && eps.is_finite(), "0 or more")?;
        if self.nesterov && self.momentum == 0.0 {
            return Err(Error::config("nesterov", "needs a `momentum` above 0"));
        }
        if self.warmup_init && !self.relative_step {
            return Err(Error::config("warmup_init", "needs `relative_step`"));
        }
        let betas = [self.adam_beta1, self.adam_beta2];
        Ok(match self.optim {
            OptimizerName::AdamwTorch => Box::new(AdamW::new(betas, eps, decay)),
            OptimizerName::Adafactor => Box::new(Adafactor {
                weight_decay: decay,
                scale_parameter: self.scale_parameter,
                relative_step: self.relative_step,
                warmup_init: self.warmup_init,
                ..Adafactor::default()
            }),
            OptimizerName::Lion32bit => Box::new(Lion::new(betas, decay)),
            OptimizerName::Sgd => Box::new(Sgd::new(self.momentum, self.nesterov, decay)),
            OptimizerName::AdamwBnb8bit => Box::new(AdamW8bit::new(betas, eps, decay)),
        })
    }
}

/// Values that a task changes: enough that handing it over does not count, few enough for the nearest caches.
pub(crate) const CHUNK: usize = 1 << 14;

/// Gives each item to a task, on all threads; what they make of them, in the order of the items.
pub(crate) fn parallel<T: Send, R: Send>(
    items: impl Iterator<Item = T>,
    task: impl Fn(T) -> R + Sync + Send,
) -> Vec<R> {
    let items: Vec<T> = items.collect();
    items.into_par_iter().map(task).collect()
}
