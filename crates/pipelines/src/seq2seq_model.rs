//! An encoder-decoder with everything that belongs to it.

use oxiformers_generate::{Generated, GenerationConfig, Generator};
use oxiformers_hub::ModelFiles;
use oxiformers_models::{AutoModelForSeq2SeqLM, CausalLM};
use oxiformers_nn::LoadOptions;
use oxiformers_processors::Tokenizer;

use crate::Result;
use crate::language_model::generation_config;

/// An encoder-decoder with its tokenizer and generation settings: it reads a text and writes another one, as models
/// that translate, summarize or correct do.
///
/// ```no_run
/// use oxiformers::{FromPretrained, Seq2SeqModel};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let model = Seq2SeqModel::from_pretrained("google/flan-t5-small")?;
/// let config = model.generation_config.clone();
/// let answers = oxiformers::block_on(model.generate(&["translate English to German: How old are you?"], config))?;
/// println!("{}", answers[0].text);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Seq2SeqModel {
    /// What to call it in messages.
    pub name: String,
    /// The network.
    pub model: AutoModelForSeq2SeqLM,
    /// Text to token ids and back.
    pub tokenizer: Tokenizer,
    /// How its makers suggest to generate.
    pub generation_config: GenerationConfig,
}

impl Seq2SeqModel {
    /// Loads a model from its files; [`from_pretrained`](crate::FromPretrained::from_pretrained) does so by its name.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor.
    pub fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let tokenizer = Tokenizer::from_files(files)?;
        Ok(Self {
            name: files.name().to_string(),
            generation_config: generation_config(files, &tokenizer)?,
            model: AutoModelForSeq2SeqLM::from_files(files, options)?,
            tokenizer,
        })
    }

    /// The model for texts in one language and answers in another, for models that have tokens for languages (mBART,
    /// M2M-100, NLLB): Python's `tokenizer.src_lang` and `forced_bos_token_id`. What is `None` stays as the
    /// model's files say.
    ///
    /// # Errors
    /// When the model does not know a language: the message lists those that it knows.
    pub fn with_languages(mut self, source: Option<&str>, target: Option<&str>) -> Result<Self> {
        if let Some(lang) = target {
            self.generation_config.forced_bos_token_id = Some(self.tokenizer.lang_id(lang)?);
        }
        if let Some(lang) = source {
            self.tokenizer = self.tokenizer.with_src_lang(lang)?;
        }
        Ok(self)
    }

    /// A generator for this model, with its tokenizer: its prompts are what the model reads.
    pub fn generator(&self, config: GenerationConfig) -> Generator<'_> {
        Generator::new(&self.model, config).with_tokenizer(&self.tokenizer)
    }

    /// Reads texts, and writes `num_return_sequences` texts for each, in order.
    ///
    /// # Errors
    /// A configuration that makes no sense, a text that is too long, or a device that fails.
    pub async fn generate(
        &self,
        texts: &[impl AsRef<str>],
        config: GenerationConfig,
    ) -> Result<Vec<Generated>> {
        let encode = |text: &_| self.tokenizer.encode(AsRef::<str>::as_ref(text), true);
        let sources = texts.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
        Ok(self.generator(config).generate(&sources).await?)
    }

    /// Longest text that the model was made for, in tokens, if it says so.
    pub fn max_positions(&self) -> Option<usize> {
        self.model.max_position_embeddings()
    }
}
