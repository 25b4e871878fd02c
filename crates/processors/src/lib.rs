//! Raw data to tensors and back: tokenizers and chat templates.

pub mod chat_template;
mod error;

pub use chat_template::{ChatTemplate, Message, RenderOptions, Rendered};
pub use error::{Error, Result};
