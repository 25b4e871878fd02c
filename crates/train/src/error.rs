//! What can go wrong.

use std::fmt::Display;

/// The result of what can fail in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that makes no sense.
    #[error("`{field}` {message}")]
    Config {
        /// The setting.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// An optimizer's state that does not fit.
    #[error("optimizer state: `{name}` {message}; resume with the model and the optimizer that wrote it")]
    State {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        message: String,
    },
}

impl Error {
    /// A setting that makes no sense.
    pub fn config(field: impl Display, message: impl Display) -> Self {
        Self::Config {
            field: field.to_string(),
            message: message.to_string(),
        }
    }

    /// An optimizer's state that does not fit.
    pub fn state(name: &str, message: impl Display) -> Self {
        Self::State {
            name: name.to_string(),
            message: message.to_string(),
        }
    }
}
