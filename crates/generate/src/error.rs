//! What can go wrong while text is generated.

/// Errors of the decoding loop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the model could not be found, read or parsed.
    #[error(transparent)]
    Hub(#[from] oxiformers_hub::Error),
    /// Ids could not be turned into text.
    #[error(transparent)]
    Processors(#[from] oxiformers_processors::Error),
    /// A field of the generation configuration has a value that makes no sense.
    #[error("generation config: `{field}` {message}")]
    Config {
        /// The field.
        field: &'static str,
        /// What is wrong with it and what to do.
        message: String,
    },
    /// The prompt cannot be continued.
    #[error("the prompt {0}")]
    Prompt(String),
    /// The grammar, schema or regular expression that the text must follow is broken, or cannot be followed.
    #[error("the constraint {0}")]
    Constraint(String),
    /// Every token has been ruled out.
    #[error("no token is left to choose from: processors and constraints rule out the whole vocabulary")]
    NoToken,
    /// The device failed to give back values.
    #[error("the device failed to give back logits: {0}")]
    Device(String),
}

impl Error {
    pub(crate) fn config(field: &'static str, message: impl Into<String>) -> Self {
        Self::Config {
            field,
            message: message.into(),
        }
    }

    pub(crate) fn device(error: impl ToString) -> Self {
        Self::Device(error.to_string())
    }
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
