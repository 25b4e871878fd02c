//! Raw data to tensors and back: tokenizers, tables and chat templates.

pub mod chat_template;
mod error;
pub mod table;
pub mod tokenizer;

pub use chat_template::{ChatTemplate, Message, RenderOptions, Rendered};
pub use error::{Error, Result};
pub use table::{Table, TableEncoding};
pub use tokenizer::Tokenizer;
