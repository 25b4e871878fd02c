use std::path::{Path, PathBuf};

/// What can go wrong with data. Every message names the file, the line or the setting and says what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read or write a path.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file or a checkpoint could not be found, fetched, read or written.
    #[error(transparent)]
    Hub(#[from] oxiformers_hub::Error),
    /// A tokenizer or a chat template could not be read, or cannot do what it was asked for.
    #[error(transparent)]
    Processors(#[from] oxiformers_processors::Error),
    /// An example cannot be trained on.
    #[error("{place}: {message}")]
    Data {
        /// File and line (or row), counted from 1.
        place: String,
        /// The field, what was found there and what was expected.
        message: String,
    },
    /// A setting does not fit, alone or together with another.
    #[error("`{field}` {message}")]
    Config {
        /// Its name.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// The loss, or a gradient, is no number.
    #[error("{0}")]
    Diverged(String),
    /// Somebody asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A file breaks the rules of its format.
    #[error("{file}: {message}")]
    Format {
        /// The file.
        file: String,
        /// What was found and what was expected.
        message: String,
    },
}

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`] at `path`; to be used in `map_err`.
    pub(crate) fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io {
            path: path.as_ref().to_path_buf(),
            source,
        }
    }

    pub(crate) fn config(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Config {
            field: field.into(),
            message: message.into(),
        }
    }

    pub(crate) fn format(file: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Format {
            file: file.into(),
            message: message.into(),
        }
    }
}
