//! What can go wrong, from finding a model to its last token.

/// Errors of the whole stack.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model could not be found, fetched or read.
    #[error(transparent)]
    Hub(#[from] oxiformers_hub::Error),
    /// A model could not be built from its files.
    #[error(transparent)]
    Model(#[from] oxiformers_models::Error),
    /// A tokenizer or a chat template failed.
    #[error(transparent)]
    Processors(#[from] oxiformers_processors::Error),
    /// Text could not be generated.
    #[error(transparent)]
    Generate(#[from] oxiformers_generate::Error),
    /// This build does not have the device.
    #[error(transparent)]
    Device(#[from] crate::device::UnknownDevice),
    /// The device failed to give back values.
    #[error("the device failed to give back values: {0}")]
    ReadBack(String),
    /// The model cannot be talked to.
    #[error("{0} has no chat template: it continues text, but cannot be talked to")]
    NoChatTemplate(String),
}

impl Error {
    pub(crate) fn device(error: impl ToString) -> Self {
        Self::ReadBack(error.to_string())
    }
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
