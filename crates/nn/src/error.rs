//! What can go wrong while a model is built, and with what it is given.

/// A failure while parameters are loaded or a configuration is read, or of inputs that do not fit.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint could not be read.
    #[error(transparent)]
    Hub(#[from] oxiformers_hub::Error),
    /// The architecture asks for a tensor that the checkpoint does not hold.
    #[error("{origin}: the tensor `{name}` is missing; the checkpoint does not match its config.json")]
    MissingTensor {
        /// The checkpoint.
        origin: String,
        /// Name of the tensor.
        name: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{origin}: the tensor `{name}` has the shape {found:?}, the configuration says {expected:?}")]
    Shape {
        /// The checkpoint.
        origin: String,
        /// Name of the tensor.
        name: String,
        /// Shape in the checkpoint.
        found: Vec<usize>,
        /// Shape that the architecture expects.
        expected: Vec<usize>,
    },
    /// A tensor's storage format cannot be used here.
    #[error("{origin}: the tensor `{name}` is stored as {dtype}, which {reason}")]
    Dtype {
        /// The checkpoint.
        origin: String,
        /// Name of the tensor.
        name: String,
        /// Its storage format.
        dtype: String,
        /// Why it does not fit.
        reason: String,
    },
    /// A module is not stored as its scheme stores modules, or cannot be quantized.
    #[error("{origin}: `{module}`: {reason}")]
    Quantization {
        /// The checkpoint.
        origin: String,
        /// Name of the module.
        module: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The checkpoint holds tensors that the architecture does not know.
    #[error("{origin}: {} tensors belong to no part of the model: {}", names.len(), preview(names))]
    LeftOver {
        /// The checkpoint.
        origin: String,
        /// Names of the tensors.
        names: Vec<String>,
    },
    /// An adapter does not fit the model.
    #[error("the adapter {adapter}: {message}")]
    Adapter {
        /// The adapter.
        adapter: String,
        /// Which part does not fit, and why.
        message: String,
    },
    /// A field of the configuration is missing, contradictory or not supported.
    #[error("config.json: `{field}`: {message}")]
    Config {
        /// Name of the field.
        field: String,
        /// What was found and what is possible.
        message: String,
    },
    /// What a model is given does not fit it.
    #[error("`{field}`: {message}")]
    Input {
        /// Which of the inputs.
        field: String,
        /// What was found and what is possible.
        message: String,
    },
}

impl Error {
    /// An [`Error::Config`].
    pub fn config(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Config {
            field: field.into(),
            message: message.into(),
        }
    }

    /// An [`Error::Input`].
    pub fn input(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Input {
            field: field.into(),
            message: message.into(),
        }
    }
}

fn preview(names: &[String]) -> String {
    let mut text = names
        .iter()
        .take(5)
        .map(|n| format!("`{n}`"))
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > 5 {
        text.push_str(", …");
    }
    text
}

/// The result of building a model.
pub type Result<T, E = Error> = std::result::Result<T, E>;
