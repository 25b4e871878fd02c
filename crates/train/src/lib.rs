//! Training: what a gradient does to a parameter.
//!
//! [`clip`] brings the norm of the gradients of a step down, an [`optim::Optimizer`] changes each parameter in place by its
//! gradient, and a [`Schedule`] says by which learning rate.

pub mod clip;
pub mod decay;
pub mod error;
pub mod optim;
pub mod schedule;

pub use error::{Error, Result};
pub use optim::{Optimizer, OptimizerConfig, OptimizerName};
pub use schedule::{Schedule, ScheduleConfig, SchedulerType};
