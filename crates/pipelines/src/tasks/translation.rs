//! `translation`: the same in another language.

use oxiformers_hub::ModelFiles;
use oxiformers_nn::LoadOptions;
use serde::Deserialize;
use serde_json::Map;

pub use super::text2text_generation::TranslationText;
use super::text2text_generation::{Record, Text2TextGenerationOptions, TextToText};
use crate::{Error, OneOrMany, Pipeline, Result, Task};

/// Translates texts, by an encoder-decoder. Models for one pair of languages need not be told which; T5 is told in words,
/// and multilingual models by tokens. Where neither the model nor the options say otherwise, with 4 beams and at most 256
/// tokens.
///
/// ```no_run
/// use oxiformers::tasks::TranslationOptions;
/// use oxiformers::{FromPretrained, Pipeline, Translation, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let translate = Translation::from_pretrained("google-t5/t5-small")?;
/// let options = TranslationOptions::languages("en", "de");
/// println!("{}", block_on(translate.run(&["How old are you?".into()], &options, 1))?[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Translation {
    model: TextToText,
    /// From which language into which, unless the options say so: those of `translation_xx_to_yy`.
    pub languages: Option<(String, String)>,
}

/// Options of [`Translation`]. As JSON, the fields of `GenerationConfig` stand beside them.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct TranslationOptions {
    /// The language of the texts, as the model calls it.
    pub src_lang: Option<String>,
    /// The language to translate into, as the model calls it.
    pub tgt_lang: Option<String>,
    /// What all tasks from text to text have.
    #[serde(flatten)]
    pub generation: Text2TextGenerationOptions,
}

impl TranslationOptions {
    /// From a language into another.
    pub fn languages(src_lang: impl Into<String>, tgt_lang: impl Into<String>) -> Self {
        Self {
            src_lang: Some(src_lang.into()),
            tgt_lang: Some(tgt_lang.into()),
            ..Self::default()
        }
    }
}

impl Pipeline for Translation {
    const TASK: Task = Task::Translation;
    type Input = String;
    type Options = TranslationOptions;
    type Output = OneOrMany<Record<TranslationText>>;

    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Ok(Self {
            model: TextToText::from_files(files, options)?,
            languages: None,
        })
    }

    async fn run(
        &self,
        inputs: &[String],
        options: &TranslationOptions,
        batch_size: usize,
    ) -> Result<Vec<OneOrMany<Record<TranslationText>>>> {
        let languages = match (&options.src_lang, &options.tgt_lang) {
            (Some(from), Some(to)) => Some((from.as_str(), to.as_str())),
            (None, None) => self
                .languages
                .as_ref()
                .map(|(from, to)| (from.as_str(), to.as_str())),
            (None, Some(_)) => {
                return Err(Error::option(
                    "src_lang",
                    "is missing, and `tgt_lang` is there; give both",
                ));
            }
            (Some(_), None) => {
                return Err(Error::option(
                    "tgt_lang",
                    "is missing, and `src_lang` is there; give both",
                ));
            }
        };
        let task = match languages {
            Some((from, to)) => format!("translation_{from}_to_{to}"),
            None => Self::TASK.name().to_string(),
        };
        let (mut tokenizer, mut forced) = (self.model.model.tokenizer.clone(), Map::new());
        let known = tokenizer.languages();
        if !known.is_empty() {
            let Some((from, to)) = languages else {
                let message = format!(
                    "is missing, and so is `tgt_lang`; the model knows {}",
                    known.join(", ")
                );
                return Err(Error::option("src_lang", message));
            };
            forced.insert("forced_bos_token_id".to_string(), tokenizer.lang_id(to)?.into());
            tokenizer = tokenizer.with_src_lang(from)?;
        }
        self.model
            .run(
                &task,
                &tokenizer,
                inputs,
                &options.generation,
                &forced,
                batch_size,
            )
            .await
    }
}
