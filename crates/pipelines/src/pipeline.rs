//! What all tasks have in common.

use std::fmt;

use oxiformers_hub::ModelFiles;
use oxiformers_nn::LoadOptions;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::tasks::{
    Embeddings, FeatureExtraction, FillMask, QuestionAnswering, Reranking, SentenceSimilarity, Summarization,
    TableQuestionAnswering, Text2TextGeneration, TextClassification, TextGeneration, TokenClassification,
    Translation, ZeroShotClassification,
};
use crate::{Error, FromPretrained, Result};

/// A task with a model that does it.
#[allow(async_fn_in_trait)]
pub trait Pipeline: Sized {
    /// The task.
    const TASK: Task;
    /// What it is given.
    type Input: DeserializeOwned;
    /// What can be asked for beside it. As JSON, options that are left out have their defaults.
    type Options: DeserializeOwned + Default;
    /// What it answers. Its text is for people.
    type Output: Serialize + fmt::Display;

    /// Loads the model and what belongs to it; [`from_pretrained`](FromPretrained::from_pretrained) does so by its name.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor.
    fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self>;

    /// Answers inputs, `batch_size` of similar length at a time; the answers are in the order of the inputs, and do not
    /// depend on `batch_size`.
    ///
    /// # Errors
    /// [`Error::Input`] for an input that does not fit, as one that is too long for the model; [`Error::Option`]; or a
    /// device that fails.
    async fn run(
        &self,
        inputs: &[Self::Input],
        options: &Self::Options,
        batch_size: usize,
    ) -> Result<Vec<Self::Output>>;
}

impl<P: Pipeline> FromPretrained for P {
    fn from_files_with(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        P::from_files(files, options)
    }
}

/// One answer, or several where several were asked for: as JSON the answer itself, or a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// Several, or none.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The answers.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(answer) => std::slice::from_ref(answer),
            Self::Many(answers) => answers,
        }
    }

    /// One as itself, anything else as a list.
    pub(crate) fn of(mut answers: Vec<T>) -> Self {
        match (answers.pop(), answers.is_empty()) {
            (Some(answer), true) => Self::One(answer),
            (last, _) => {
                answers.extend(last);
                Self::Many(answers)
            }
        }
    }
}

impl<T: fmt::Display> fmt::Display for OneOrMany<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        lines(f, self.as_slice())
    }
}

/// One line for each.
pub(crate) fn lines<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: &[T]) -> fmt::Result {
    for (index, item) in items.iter().enumerate() {
        let end = if index + 1 < items.len() { "\n" } else { "" };
        write!(f, "{item}{end}")?;
    }
    Ok(())
}

macro_rules! tasks {
    ($($(#[$doc:meta])* $task:ident = $name:literal $(| $alias:literal)*, $model:literal;)+) => {
        /// What a pipeline is for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Task {
            $($(#[$doc])* $task,)+
        }

        /// Of [`Task::parse`].
        const TASKS: &[(&str, Task)] = &[$(($name, Task::$task), $(($alias, Task::$task),)*)+];

        impl Task {
            /// All tasks.
            pub const ALL: &[Task] = &[$(Self::$task),+];

            /// Its name in Transformers.
            pub fn name(self) -> &'static str {
                match self { $(Self::$task => $name,)+ }
            }

            /// The model that does it where none is named: Transformers' choice, if it has the task.
            pub fn default_model(self) -> &'static str {
                match self { $(Self::$task => $model,)+ }
            }
        }

        /// A pipeline of a task that is known only at run time: JSON in, JSON out.
        #[derive(Debug)]
        pub enum AnyPipeline {
            $($(#[$doc])* $task(Box<$task>),)+
        }

        impl AnyPipeline {
            /// Loads the model of a task. `task` is a name that [`Task::parse`] takes.
            ///
            /// # Errors
            /// Where there is no such task, or a file, a field or a tensor of the model does not fit.
            pub fn from_files(task: &str, files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
                let mut pipeline = match Task::parse(task)? {
                    $(Task::$task => Self::$task(Box::new($task::from_files(files, options)?)),)+
                };
                if let (Self::Translation(translation), Some(languages)) = (&mut pipeline, languages(task)) {
                    translation.languages = Some(languages);
                }
                Ok(pipeline)
            }

            /// What it is for.
            pub fn task(&self) -> Task {
                match self { $(Self::$task(_) => Task::$task,)+ }
            }

            /// Answers inputs: see [`Pipeline::run`]. `options` is an object, or null.
            ///
            /// # Errors
            /// As [`Pipeline::run`]; and where an input or an option is not what the task takes.
            pub async fn run(&self, inputs: &[Value], options: &Value, batch_size: usize) -> Result<Vec<Value>> {
                match self {
                    $(Self::$task(pipeline) => {
                        let answers = answer(&**pipeline, inputs, options, batch_size).await?;
                        let json = answers.iter().map(serde_json::to_value);
                        json.collect::<serde_json::Result<_>>().map_err(Error::read_back)
                    })+
                }
            }

            /// Like [`run`](Self::run), with each answer as JSON in one line, which takes less than a [`Value`].
            ///
            /// # Errors
            /// As [`run`](Self::run).
            pub async fn run_to_json(
                &self,
                inputs: &[Value],
                options: &Value,
                batch_size: usize,
            ) -> Result<Vec<String>> {
                match self {
                    $(Self::$task(pipeline) => {
                        let answers = answer(&**pipeline, inputs, options, batch_size).await?;
                        let json = answers.iter().map(serde_json::to_string);
                        json.collect::<serde_json::Result<_>>().map_err(Error::read_back)
                    })+
                }
            }

            /// Like [`run`](Self::run), with answers as people read them.
            ///
            /// # Errors
            /// As [`run`](Self::run).
            pub async fn run_to_text(
                &self,
                inputs: &[Value],
                options: &Value,
                batch_size: usize,
            ) -> Result<Vec<String>> {
                match self {
                    $(Self::$task(pipeline) => {
                        let answers = answer(&**pipeline, inputs, options, batch_size).await?;
                        Ok(answers.iter().map(ToString::to_string).collect())
                    })+
                }
            }
        }
    };
}

tasks! {
    /// What a model makes of each token.
    FeatureExtraction = "feature-extraction", "distilbert/distilbert-base-cased";
    /// What a text is.
    TextClassification = "text-classification" | "sentiment-analysis",
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english";
    /// What the words of a text are.
    TokenClassification = "token-classification" | "ner", "dbmdz/bert-large-cased-finetuned-conll03-english";
    /// Where in a text the answer to a question stands.
    QuestionAnswering = "question-answering", "distilbert/distilbert-base-cased-distilled-squad";
    /// Which cells of a table answer a question.
    TableQuestionAnswering = "table-question-answering", "google/tapas-base-finetuned-wtq";
    /// What stands behind a mask.
    FillMask = "fill-mask", "distilbert/distilroberta-base";
    /// Which of some labels fits a text, for labels that the model was not trained on.
    ZeroShotClassification = "zero-shot-classification", "facebook/bart-large-mnli";
    /// How a text goes on, or a conversation.
    TextGeneration = "text-generation", "HuggingFaceTB/SmolLM3-3B";
    /// A text from a text.
    Text2TextGeneration = "text2text-generation", "google-t5/t5-base";
    /// A shorter text.
    Summarization = "summarization", "sshleifer/distilbart-cnn-12-6";
    /// The same in another language.
    Translation = "translation", "google-t5/t5-base";
    /// How much sentences mean the same as another one.
    SentenceSimilarity = "sentence-similarity", "sentence-transformers/all-MiniLM-L6-v2";
    /// What a sentence means, as a vector.
    Embeddings = "embeddings", "sentence-transformers/all-MiniLM-L6-v2";
    /// Which documents fit a query best.
    Reranking = "reranking" | "text-ranking", "cross-encoder/ms-marco-MiniLM-L6-v2";
}

impl Task {
    /// The task of a name, or of an alias: `sentiment-analysis`, `ner`, `text-ranking`, `translation_xx_to_yy`.
    ///
    /// # Errors
    /// [`Error::UnknownTask`].
    pub fn parse(name: &str) -> Result<Self> {
        let known = TASKS.iter().find(|(known, _)| *known == name);
        match (known, languages(name)) {
            (Some((_, task)), _) => Ok(*task),
            (None, Some(_)) => Ok(Self::Translation),
            (None, None) => Err(Error::UnknownTask {
                name: name.to_string(),
            }),
        }
    }

    /// All names and aliases.
    pub fn names() -> Vec<&'static str> {
        TASKS
            .iter()
            .map(|(name, _)| *name)
            .chain(["translation_xx_to_yy"])
            .collect()
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The languages in a name such as `translation_en_to_de`.
fn languages(task: &str) -> Option<(String, String)> {
    let (from, to) = task.strip_prefix("translation_")?.split_once("_to_")?;
    (!from.is_empty() && !to.is_empty()).then(|| (from.to_string(), to.to_string()))
}

async fn answer<P: Pipeline>(
    pipeline: &P,
    inputs: &[Value],
    options: &Value,
    batch_size: usize,
) -> Result<Vec<P::Output>> {
    let read = |(index, input): (usize, &Value)| {
        let bad =
            |error: serde_json::Error| Error::input(index, format!("is not what {} takes: {error}", P::TASK));
        P::Input::deserialize(input).map_err(bad)
    };
    let inputs = inputs.iter().enumerate().map(read).collect::<Result<Vec<_>>>()?;
    let options = match options {
        Value::Null => P::Options::default(),
        given => {
            let bad = |error: serde_json::Error| Error::Options(error.to_string());
            P::Options::deserialize(given).map_err(bad)?
        }
    };
    pipeline.run(&inputs, &options, batch_size).await
}

/// The pipeline of a task, with the model of this name, or the one that Transformers would take.
///
/// ```no_run
/// use oxiformers::{block_on, pipeline};
/// use serde_json::{Value, json};
///
/// # fn main() -> Result<(), oxiformers::Error> {
/// let classify = pipeline("sentiment-analysis", None)?;
/// let answers = block_on(classify.run(&["I love this film.".into()], &Value::Null, 1))?;
/// println!("{}", answers[0]["label"]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Where there is no such task, the model is not found, or it cannot do the task.
#[cfg(all(feature = "fetch", not(target_arch = "wasm32")))]
pub fn pipeline(task: &str, model: Option<&str>) -> Result<AnyPipeline> {
    let model = model.unwrap_or(Task::parse(task)?.default_model());
    let source: oxiformers_hub::Source = model.parse()?;
    let files = oxiformers_hub::resolve(&source, &oxiformers_hub::FetchOptions::from_env())?;
    AnyPipeline::from_files(task, &files, &LoadOptions::default())
}
