//! What can go wrong, from finding a model to its answer.

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
    /// An adapter could not be read.
    #[error(transparent)]
    Adapter(#[from] oxiformers_peft::Error),
    /// A tokenizer or a chat template failed.
    #[error(transparent)]
    Processors(#[from] oxiformers_processors::Error),
    /// Text could not be generated.
    #[error(transparent)]
    Generate(#[from] oxiformers_generate::Error),
    /// The device failed to give back values.
    #[error("the device failed to give back values: {0}")]
    ReadBack(String),
    /// The model cannot be talked to.
    #[error("{0} has no chat template: it continues text, but cannot be talked to")]
    NoChatTemplate(String),
    /// There is no such task.
    #[error("there is no task `{name}`; the tasks are {}", crate::Task::names().join(", "))]
    UnknownTask {
        /// What was asked for.
        name: String,
    },
    /// One of the inputs of a task does not fit it, or its model.
    #[error("input {index}: {message}")]
    Input {
        /// Which one, counted from 0.
        index: usize,
        /// What is wrong with it and what to do.
        message: String,
    },
    /// An option of a task has a value that makes no sense.
    #[error("option `{name}`: {message}")]
    Option {
        /// Its name.
        name: String,
        /// What is wrong with it and what to do.
        message: String,
    },
    /// The options of a task are not what it knows.
    #[error("options: {0}")]
    Options(String),
    /// A model cannot do the task.
    #[error("{model}: {message}")]
    Unsuited {
        /// The model.
        model: String,
        /// What it lacks.
        message: String,
    },
}

impl Error {
    /// What a device says that fails to give back values, in `map_err`.
    pub fn read_back(error: impl ToString) -> Self {
        Self::ReadBack(error.to_string())
    }

    pub(crate) fn option(name: &str, message: impl Into<String>) -> Self {
        Self::Option {
            name: name.to_string(),
            message: message.into(),
        }
    }

    pub(crate) fn input(index: usize, message: impl Into<String>) -> Self {
        Self::Input {
            index,
            message: message.into(),
        }
    }
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
