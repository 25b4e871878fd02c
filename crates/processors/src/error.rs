//! What can go wrong between raw data and tensors.

/// Errors of tokenizers and chat templates.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the model could not be found, read or parsed.
    #[error(transparent)]
    Hub(#[from] oxiformers_hub::Error),
    /// None of the model's files is a tokenizer.
    #[error(
        "{model} has no tokenizer: none of tokenizer.json, a GGUF with tokenizer.ggml.tokens, a \
         SentencePiece model (tokenizer.model, spiece.model, …), tekken.json, *.tiktoken, vocab.json with merges.txt, vocab.txt"
    )]
    NoTokenizer {
        /// The model's name.
        model: String,
    },
    /// A special token is needed that the tokenizer does not have.
    #[error("the tokenizer has no {role}; name one in tokenizer_config.json")]
    NoToken {
        /// `pad_token`, `bos_token`, …
        role: &'static str,
    },
    /// The model does not translate from or into a language.
    #[error("the tokenizer has no language {lang:?}; it has: {known}")]
    NoLanguage {
        /// The code that was asked for.
        lang: String,
        /// The codes that there are.
        known: String,
    },
    /// A table or a question about it does not fit.
    #[error("the table cannot be read: {0}")]
    Table(String),
    /// A text cannot be encoded, or ids cannot be decoded.
    #[error("the tokenizer cannot do this text: {0}")]
    Tokenize(String),
    /// A chat template is not valid Jinja.
    #[error("the chat template {name:?} does not compile: {message}; check the model's chat_template.jinja")]
    TemplateSyntax {
        /// Which of the model's templates.
        name: String,
        /// What the parser says, with the line.
        message: String,
    },
    /// A chat template failed while rendering.
    #[error("the chat template {name:?} cannot render this conversation: {message}")]
    TemplateRender {
        /// Which of the model's templates.
        name: String,
        /// What went wrong, with the line.
        message: String,
    },
    /// The template itself refused the conversation by calling `raise_exception`.
    #[error("the chat template refuses this conversation: {message}")]
    TemplateRaised {
        /// The template's own words.
        message: String,
    },
    /// No template, or none of that name.
    #[error("{0}")]
    NoTemplate(String),
    /// The conversation or an option has a shape that no template can take.
    #[error("{field}: {message}")]
    Chat {
        /// Which input: `messages`, `tools`, `documents`, `continue_final_message`, …
        field: &'static str,
        /// What was expected instead.
        message: String,
    },
}

impl Error {
    /// A file of the model that breaks the rules of its format.
    pub(crate) fn format(file: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Hub(oxiformers_hub::Error::format(file, what))
    }

    /// What the tokenizer library says, in `map_err`.
    pub(crate) fn tokenize(error: impl ToString) -> Self {
        Self::Tokenize(error.to_string())
    }

    pub(crate) fn chat(field: &'static str, message: impl Into<String>) -> Self {
        Self::Chat {
            field,
            message: message.into(),
        }
    }
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
