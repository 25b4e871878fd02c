//! `text2text-generation` and `summarization`: a text from a text.

use std::fmt;
use std::marker::PhantomData;

use oxiformers_generate::{Generated, GenerationConfig};
use oxiformers_hub::ModelFiles;
use oxiformers_nn::LoadOptions;
use oxiformers_processors::Tokenizer;
use oxiformers_processors::tokenizer::TruncationStrategy;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::generation::{changed, generate, with_defaults};
use crate::texts::Texts;
use crate::{OneOrMany, Pipeline, Result, Seq2SeqModel, Task};

/// Answers texts with texts, by an encoder-decoder. Where neither the model nor the options say otherwise, with 4 beams
/// and at most 256 tokens.
///
/// ```no_run
/// use oxiformers::{FromPretrained, Pipeline, Text2TextGeneration, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let answer = Text2TextGeneration::from_pretrained("google/flan-t5-small")?;
/// let texts = ["Answer the question: what color is the sky?".into()];
/// println!("{}", block_on(answer.run(&texts, &Default::default(), 1))?[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Text2TextGeneration(pub(crate) TextToText);

/// Shortens texts, by an encoder-decoder. Where neither the model nor the options say otherwise, with 4 beams and at most
/// 256 tokens.
///
/// ```no_run
/// use oxiformers::{FromPretrained, Pipeline, Summarization, block_on};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let summarize = Summarization::from_pretrained("sshleifer/distilbart-cnn-12-6")?;
/// let article = std::fs::read_to_string("article.txt").unwrap_or_default();
/// println!("{}", block_on(summarize.run(&[article], &Default::default(), 1))?[0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Summarization(pub(crate) TextToText);

/// Options of [`Text2TextGeneration`] and [`Summarization`]. As JSON, the fields of [`GenerationConfig`] stand beside
/// them.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Text2TextGenerationOptions {
    /// Whether to give token ids instead of text.
    pub return_tensors: bool,
    /// Whether texts that are too long for the model are cut.
    pub truncation: bool,
    /// Settings of generation, by name.
    #[serde(flatten)]
    pub generation: Map<String, Value>,
}

/// What the generated text is called in JSON.
pub trait Output {
    /// The keys of a text, and of token ids.
    const KEYS: [&'static str; 2];
}

macro_rules! outputs {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $ids:literal;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct $name;

        impl Output for $name {
            const KEYS: [&'static str; 2] = [$text, $ids];
        }
    )+};
}

outputs! {
    /// `generated_text`.
    PlainText = "generated_text", "generated_token_ids";
    /// `summary_text`.
    SummaryText = "summary_text", "summary_token_ids";
    /// `translation_text`.
    TranslationText = "translation_text", "translation_token_ids";
}

/// A generated text.
#[derive(Debug, Clone, PartialEq)]
pub struct Record<O> {
    /// The text.
    pub text: String,
    /// Its tokens, where they were asked for.
    pub ids: Option<Vec<u32>>,
    key: PhantomData<O>,
}

impl<O: Output> Serialize for Record<O> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.ids {
            Some(ids) => serializer.collect_map([(O::KEYS[1], ids)]),
            None => serializer.collect_map([(O::KEYS[0], &self.text)]),
        }
    }
}

impl<O> fmt::Display for Record<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// An encoder-decoder as a task has it.
#[derive(Debug)]
pub(crate) struct TextToText {
    pub model: Seq2SeqModel,
    config: GenerationConfig,
    /// `task_specific_params` of `config.json`, by the names of tasks.
    by_task: Map<String, Value>,
}

impl TextToText {
    pub fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let model = Seq2SeqModel::from_files(files, options)?;
        let defaults = json!({ "max_new_tokens": 256, "num_beams": 4 });
        let config = &model.model.config.json;
        Ok(Self {
            config: with_defaults(
                files,
                model.generation_config.clone(),
                defaults.as_object().cloned().unwrap_or_default(),
            )?,
            by_task: (config.get("task_specific_params").and_then(Value::as_object))
                .cloned()
                .unwrap_or_default(),
            model,
        })
    }

    /// What the model's configuration says of a task.
    pub fn params(&self, task: &str) -> Option<&Map<String, Value>> {
        self.by_task.get(task)?.as_object()
    }

    /// Answers texts. `task` is the name under which the model's configuration may have a prefix and settings; `forced`
    /// are settings that go before all others.
    pub async fn run<O>(
        &self,
        task: &str,
        tokenizer: &Tokenizer,
        inputs: &[String],
        options: &Text2TextGenerationOptions,
        forced: &Map<String, Value>,
        batch_size: usize,
    ) -> Result<Vec<OneOrMany<Record<O>>>> {
        let mut settings = self.params(task).cloned().unwrap_or_default();
        let prefix = settings.remove("prefix");
        let own = self.model.model.config.json.get("prefix");
        let prefix = prefix
            .as_ref()
            .or(own)
            .and_then(Value::as_str)
            .unwrap_or_default();
        // Unlike the user's, these do not say that a limit of another kind is void.
        let config = settings
            .into_iter()
            .try_fold(self.config.clone(), |config, (name, value)| {
                let limit = config.max_new_tokens;
                let mut config = changed(&config, &Map::from_iter([(name, value)]))?;
                config.max_new_tokens = config.max_new_tokens.or(limit);
                Ok::<_, crate::Error>(config)
            })?;
        let config = changed(&changed(&config, &options.generation)?, forced)?;
        let texts = Texts::new(&self.model.name, tokenizer.clone(), self.model.max_positions());
        let cut = options.truncation.then_some(TruncationStrategy::LongestFirst);
        let inputs: Vec<String> = inputs.iter().map(|text| format!("{prefix}{text}")).collect();
        let rows = texts.rows(&inputs, cut)?;
        let prompts: Vec<Vec<u32>> = rows.into_iter().map(|row| row.ids).collect();
        let generated = generate(&self.model.generator(config), &prompts, batch_size).await?;
        let written = self.model.tokenizer.for_target(None)?;
        let record = |generated: Generated| {
            Ok(Record {
                text: written.decode(&generated.ids, true)?,
                ids: options.return_tensors.then_some(generated.ids),
                key: PhantomData,
            })
        };
        let answer = |generated: Vec<Generated>| {
            Ok(OneOrMany::of(
                generated.into_iter().map(record).collect::<Result<_>>()?,
            ))
        };
        generated.into_iter().map(answer).collect()
    }
}

macro_rules! tasks {
    ($($task:ident -> $output:ty;)+) => {$(
        impl Pipeline for $task {
            const TASK: Task = Task::$task;
            type Input = String;
            type Options = Text2TextGenerationOptions;
            type Output = OneOrMany<Record<$output>>;

            fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
                TextToText::from_files(files, options).map(Self)
            }

            async fn run(
                &self,
                inputs: &[String],
                options: &Text2TextGenerationOptions,
                batch_size: usize,
            ) -> Result<Vec<Self::Output>> {
                let (task, none) = (Self::TASK.name(), Map::new());
                self.0.run(task, &self.0.model.tokenizer, inputs, options, &none, batch_size).await
            }
        }
    )+};
}

tasks! {
    Text2TextGeneration -> PlainText;
    Summarization -> SummaryText;
}
