//! The decoding loop: from a prompt's token ids to new ones.
//!
//! [`Generator`] binds a model to a [`GenerationConfig`]; [`Generator::generate`] answers prompts at once,
//! [`Generator::start`] step by step, and [`Generator::stream`] as an async stream of text.
//!
//! Logits are read back from the device asynchronously, so everything here is an `async fn`; on native
//! platforms `futures::executor::block_on` runs it.

mod assisted;
mod beam;
mod config;
mod constrained;
mod error;
mod generation;
pub mod logits;
mod sampling;
mod text;

pub use assisted::Draft;
pub use config::{CacheConfig, EarlyStopping, GenerationConfig};
pub use constrained::{Constraint, Grammar};
pub use error::{Error, Result};
pub use generation::{FinishReason, Generated, Generation, Generator, PromptCache, Step, Token};
pub use logits::{LogitsProcessor, LogitsProcessors};
pub use sampling::{Sampler, fresh_seed};
