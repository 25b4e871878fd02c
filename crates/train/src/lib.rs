//! Training: models learn from data as they do with Transformers' Trainer.
//!
//! A [`Task`] says what is learned, a [`Trainer`] trains: forward, backward, [`clip`], an [`optim::Optimizer`] that changes
//! each parameter in place by its gradient, and a [`Schedule`] that says by which learning rate. What is trained is named
//! by a [`Parameters`](oxiformers_models::nn::Parameters) that was filled when the model was loaded, and a
//! [`Saver`] writes it: a whole model, or adapters beside one. [`Callback`]s hear of every step.

pub mod adapter;
pub mod arguments;
pub mod buffer;
pub mod card;
pub mod checkpoint;
pub mod clip;
pub mod decay;
pub mod distillation;
pub mod error;
pub mod events;
pub mod grpo;
pub mod loss;
pub mod metrics;
pub mod optim;
pub mod preferences;
pub mod recipe;
pub mod reference;
pub mod reward;
pub mod rewards;
pub mod schedule;
pub mod state;
pub mod straight_through;
pub mod task;
pub mod tasks;
pub mod tensorboard;
pub mod trainer;

pub use adapter::AdapterSaver;
pub use arguments::{OnNan, Resume, SaveDtype, Strategy, TrainingArguments};
pub use checkpoint::{ModelSaver, Saver};
pub use error::{Error, Result};
pub use events::{Callback, Event, MetricsFile, Plan};
pub use optim::{Optimizer, OptimizerConfig, OptimizerName};
pub use recipe::{Job, Recipe, Surroundings, TaskName};
pub use schedule::{Schedule, ScheduleConfig, SchedulerType};
pub use state::TrainerState;
pub use task::{LossOptions, Metrics, Network, Outputs, Size, Task};
pub use tensorboard::TensorBoard;
pub use trainer::{Outcome, TrainOutput, Trained, Trainer};
