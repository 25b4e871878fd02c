//! What can go wrong.

use std::fmt::Display;
use std::path::{Path, PathBuf};

/// The result of what can fail in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

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
    /// A checkpoint that training cannot go on from.
    #[error("{}: {message}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The loss, or a gradient, is no number.
    #[error(
        "step {step}: {what} is {value}; the batch: {}. The last checkpoint is as it was; lower the learning rate, or leave \
         such steps out (on_nan = \"skip\")",
        examples.join("; ")
    )]
    Diverged {
        /// The step, counted from 1.
        step: u64,
        /// What is no number.
        what: String,
        /// What it is.
        value: f64,
        /// Where the examples of the batch stand.
        examples: Vec<String>,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Data cannot be read, or an example cannot be trained on.
    #[error(transparent)]
    Data(#[from] oxiformers_data::Error),
    /// A model cannot be loaded, or is given what does not fit it.
    #[error(transparent)]
    Model(#[from] oxiformers_models::Error),
    /// Labels that are no classes of the model.
    #[error("labels: {0}")]
    Labels(#[from] oxiformers_models::nn::LabelError),
    /// An adapter cannot be begun or written.
    #[error(transparent)]
    Adapter(#[from] oxiformers_peft::Error),
    /// A model cannot be let answer.
    #[error(transparent)]
    Generate(#[from] oxiformers_generate::Error),
    /// Values cannot be read back from the device.
    #[error("the device: {0}")]
    Device(String),
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

    /// A checkpoint that training cannot go on from.
    pub fn checkpoint(path: impl AsRef<Path>, message: impl Display) -> Self {
        Self::Checkpoint {
            path: path.as_ref().to_path_buf(),
            message: message.to_string(),
        }
    }

    /// An [`Error::Io`] at `path`; to be used in `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io {
            path: path.as_ref().to_path_buf(),
            source,
        }
    }
}

impl From<oxiformers_hub::Error> for Error {
    fn from(error: oxiformers_hub::Error) -> Self {
        Self::Data(error.into())
    }
}

impl From<oxiformers_models::nn::Error> for Error {
    fn from(error: oxiformers_models::nn::Error) -> Self {
        Self::Model(error.into())
    }
}
