//! What can go wrong while a model is found and loaded, and with what it is given.

/// A failure of [`AutoConfig`](crate::AutoConfig) or of a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error(transparent)]
    Hub(#[from] oxiformers_hub::Error),
    /// A parameter or a field of the configuration does not fit.
    #[error("{}", named(model, source))]
    Model {
        /// The model.
        model: String,
        /// What does not fit.
        source: oxiformers_nn::Error,
    },
    /// There is no `config.json` and no GGUF.
    #[error("{model}: no config.json and no .gguf file; this is no model folder")]
    NoConfig {
        /// The model.
        model: String,
    },
    /// `config.json` is not what the architecture expects.
    #[error("{model}: config.json: {message}")]
    Config {
        /// The model.
        model: String,
        /// Field and problem.
        message: String,
    },
    /// The architecture is unknown.
    #[error(
        "{model}: the architecture `{model_type}` is not supported; supported are {}",
        supported.join(", ")
    )]
    Unsupported {
        /// The model.
        model: String,
        /// Its `model_type`.
        model_type: String,
        /// All that are known.
        supported: Vec<&'static str>,
    },
    /// The architecture has no head for a task.
    #[error("{model}: the architecture `{model_type}` knows no {task:?}")]
    NoTask {
        /// The model.
        model: String,
        /// Its `model_type`.
        model_type: String,
        /// The task.
        task: crate::Task,
    },
    /// The checkpoint has no head for a task.
    #[error(
        "{model}: the checkpoint has no head for {task:?}: `{tensor}` is missing; it was saved as {saved_as}"
    )]
    NoHead {
        /// The model.
        model: String,
        /// The task.
        task: crate::Task,
        /// Name of the tensor.
        tensor: String,
        /// What the checkpoint was saved as.
        saved_as: String,
    },
    /// A file beside `config.json` is not what it should be.
    #[error("{file}: {message}")]
    File {
        /// The file.
        file: String,
        /// Field and problem.
        message: String,
    },
    /// What a model is given does not fit it.
    #[error(transparent)]
    Input(#[from] oxiformers_nn::Error),
}

/// A failure with the name of the model, which failures of checkpoints begin with.
fn named(model: &str, error: &oxiformers_nn::Error) -> String {
    let text = error.to_string();
    match text.strip_prefix(model) {
        Some(rest) if rest.starts_with([':', '/']) => text,
        _ => format!("{model}: {text}"),
    }
}

impl Error {
    /// Says which model does not fit.
    pub(crate) fn of(model: &str) -> impl FnOnce(oxiformers_nn::Error) -> Self {
        move |source| Self::Model {
            model: model.to_string(),
            source,
        }
    }
}

/// The result of loading a model.
pub type Result<T, E = Error> = std::result::Result<T, E>;
