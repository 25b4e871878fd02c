use std::path::{Path, PathBuf};

/// What can go wrong while finding, fetching or reading a model. Every message names the file or place and,
/// where there is something to do about it, says what.
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
    /// A JSON file does not parse, or does not have the expected fields.
    #[error("{file}: not the expected JSON: {source}")]
    Json {
        /// Name of the file.
        file: String,
        /// Line, column and field.
        source: serde_json::Error,
    },
    /// A file breaks the rules of its format.
    #[error("{file}: {what}")]
    Format {
        /// Name of the file.
        file: String,
        /// The field or offset, what was found there, what was expected and, if known, what to do.
        what: String,
    },
    /// A file asks for something that is understood but deliberately not done, or not supported.
    #[error("{file}: {what} is not supported{}", advice(.hint))]
    Unsupported {
        /// Name of the file.
        file: String,
        /// The feature, by the name that the format gives it.
        what: String,
        /// What to do instead; may be empty.
        hint: String,
    },
    /// A file, tensor, repository, revision or package does not exist.
    #[error("{what} was not found in {place}{}", advice(.hint))]
    NotFound {
        /// What was looked for.
        what: String,
        /// Where.
        place: String,
        /// What to do; may be empty.
        hint: String,
    },
    /// A name, file name or archive member would lead outside of its folder.
    #[error("{place}: the name {name:?} leads outside of its folder: refused")]
    UnsafePath {
        /// The archive, repository or file that holds the name.
        place: String,
        /// The offending name.
        name: String,
    },
    /// The text does not name a model.
    #[error("{given:?} does not name a model: {expected}")]
    Source {
        /// The text.
        given: String,
        /// What was expected.
        expected: String,
    },
    /// Something is not in the cache and the network may not be used (`HF_HUB_OFFLINE`).
    #[error("{what} is not in the cache, and HF_HUB_OFFLINE forbids the network{}", advice(.hint))]
    Offline {
        /// What was wanted.
        what: String,
        /// What to do; may be empty.
        hint: String,
    },
    /// A server cannot be reached at all (no name, no route, refused, or no answer in time).
    #[error("{host} cannot be reached: {reason}")]
    Unreachable {
        /// Host name, with the port if it is not the usual one.
        host: String,
        /// The first cause, in words.
        reason: String,
    },
    /// A server was reached, and the exchange failed.
    #[error("{url}: {reason}")]
    Network {
        /// The address, without credentials.
        url: String,
        /// The HTTP status, if there was an answer.
        status: Option<u16>,
        /// The status or the cause, in words.
        reason: String,
    },
    /// The server wants an account with access.
    #[error("{what}: access denied (HTTP {status}); set HF_TOKEN to a token of an account that may read it")]
    Denied {
        /// The repository or file.
        what: String,
        /// 401 or 403.
        status: u16,
    },
    /// The content of a file is not what its publisher signed.
    #[error("{file}: the checksum is {actual}, not {expected}; remove the file and fetch it again")]
    Checksum {
        /// Name of the file.
        file: String,
        /// The published digest, hexadecimal.
        expected: String,
        /// The digest of what is there, hexadecimal.
        actual: String,
    },
}

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] at `path`; to be used in `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io {
            path: path.as_ref().to_path_buf(),
            source,
        }
    }

    /// An [`Error::Format`].
    pub fn format(file: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Format {
            file: file.into(),
            what: what.into(),
        }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(file: impl Into<String>, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Unsupported {
            file: file.into(),
            what: what.into(),
            hint: hint.into(),
        }
    }

    /// An [`Error::NotFound`].
    pub fn not_found(what: impl Into<String>, place: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::NotFound {
            what: what.into(),
            place: place.into(),
            hint: hint.into(),
        }
    }

    /// True when another place may still have what this one could not give: the server is out of reach, or
    /// the network may not be used.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Offline { .. })
    }
}

/// The hint as the end of a sentence.
fn advice(hint: &str) -> String {
    if hint.is_empty() {
        String::new()
    } else {
        format!("; {hint}")
    }
}
