//! What can go wrong with an adapter.

/// A failure while an adapter is read, combined, merged or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    Hub(#[from] oxiformers_hub::Error),
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] oxiformers_models::Error),
    /// An adapter does not fit the model.
    #[error(transparent)]
    Part(#[from] oxiformers_nn::Error),
    /// There is no `adapter_config.json`.
    #[error("{place}: no adapter_config.json; this is no folder of an adapter")]
    NoConfig {
        /// The folder.
        place: String,
    },
    /// A field of `adapter_config.json` is not what it should be.
    #[error("{place}: adapter_config.json: {message}")]
    Config {
        /// The folder.
        place: String,
        /// Field and problem.
        message: String,
    },
    /// A tensor is not what it should be.
    #[error("{place}: the tensor `{name}` {message}")]
    Tensor {
        /// The folder.
        place: String,
        /// The tensor.
        name: String,
        /// What is wrong with it.
        message: String,
    },
    /// Adapters cannot be put together, or into a model.
    #[error("{0}")]
    Refused(String),
}

/// The result of working with adapters.
pub type Result<T, E = Error> = std::result::Result<T, E>;
