//! A training as a file says it: the task, the model, the data and the arguments.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use burn::tensor::{Device, FloatDType};
use oxiformers_data::tasks::causal_lm::{CausalLM, Source};
use oxiformers_data::tasks::denoising::Denoising;
use oxiformers_data::tasks::masked_lm::{MaskOptions, MaskedLM as MaskedText};
use oxiformers_data::tasks::multiple_choice::MultipleChoice as ChoiceText;
use oxiformers_data::tasks::preference::{Comparison, PairColumns, Preference, UnpairedPreference};
use oxiformers_data::tasks::prompted::Prompted;
use oxiformers_data::tasks::prompts::Prompts;
use oxiformers_data::tasks::question_answering::QuestionAnswering as QuestionText;
use oxiformers_data::tasks::seq2seq::Seq2Seq;
use oxiformers_data::tasks::text_classification::{Problem, TextClassification};
use oxiformers_data::tasks::token_classification::TokenClassification as TokenText;
use oxiformers_data::tasks::{Objective, Texts};
use oxiformers_data::{
    BadData, CacheOptions, Dataset, Format, Progress, SampleBy, TokenCache, find, prepare,
};
use oxiformers_generate::GenerationConfig;
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::DType;
use oxiformers_models::nn::quant::{MethodOptions, QuantizationConfig, Recipe as QuantizationRecipe};
use oxiformers_models::nn::{Lambda, LoadOptions, Parameters, Survey};
use oxiformers_models::tasks::{
    MaskedLM, MultipleChoice, QuestionAnswering, SequenceClassification, TaskType, TokenClassification,
};
use oxiformers_models::{
    AutoConfig, AutoModelFor, AutoModelForCausalLM, AutoModelForSeq2SeqLM, Labels, ProblemType,
};
use oxiformers_peft::Adapter;
use oxiformers_processors::{ChatTemplate, Tokenizer};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::adapter::{self, AdapterSaver};
use crate::arguments::SaveDtype;
use crate::distillation::{self, Distillation, DistillationConfig};
use crate::grpo::{Grpo, GrpoConfig, ScaleRewards};
use crate::preferences::{Dpo, DpoConfig, Kto, KtoConfig, KtoLoss, Orpo, OrpoConfig};
use crate::reference::{Reference, precompute};
use crate::reward::{RewardConfig, RewardModeling};
use crate::rewards::{Reward, RewardModel};
use crate::straight_through::{LambdaWarmup, PackedSaver};
use crate::tasks::{CausalLanguageModeling, Seq2SeqLanguageModeling, TextTask, TrainedHead};
use crate::{
    Callback, Error, ModelSaver, Plan, Result, Saver, Task, TrainOutput, Trained, Trainer, TrainingArguments,
};

/// What is learned, by the names of recipes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum TaskName {
    CausalLm,
    MaskedLm,
    TextClassification,
    TokenClassification,
    QuestionAnswering,
    MultipleChoice,
    Seq2seqLm,
    /// The denoising of T5 or BART.
    Denoising,
    /// A reward model.
    Reward,
    Dpo,
    Kto,
    Orpo,
    /// A model learns of its own answers.
    Grpo,
    /// Another task, and to answer as a teacher.
    Distillation,
}

impl TaskName {
    /// The learning rate where nothing is said: TRL's for what TRL trains.
    fn learning_rate(self) -> Option<f64> {
        match self {
            Self::Reward => Some(1e-4),
            Self::Dpo | Self::Kto | Self::Orpo | Self::Grpo => Some(1e-6),
            _ => None,
        }
    }
}

/// One or several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn list(&self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one.clone()],
            Self::Many(many) => many.clone(),
        }
    }
}

/// The model that learns.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// The checkpoint to begin with; without it, `config` says what is built anew.
    pub name: Option<String>,
    /// The fields of `config.json` of a new model, or those in which it differs from the checkpoint's.
    pub config: Option<Map<String, Value>>,
    /// Where the tokenizer is, if not with the model.
    pub tokenizer: Option<String>,
    /// Names of the classes.
    pub labels: Option<Vec<String>>,
    /// How labels are meant: single_label_classification, multi_label_classification or regression.
    pub problem_type: Option<ProblemType>,
    /// Whether a head of another shape than the labels say is initialized anew.
    pub ignore_mismatched_sizes: bool,
    /// Only tensors are trained whose names contain one of these; all where empty.
    pub trainable: Vec<String>,
    /// An adapter that is trained instead of the model: the fields of PEFT's `adapter_config.json`.
    pub adapter: Option<Map<String, Value>>,
    /// How linear layers are quantized while the model is loaded, for an adapter over them: `nf4`, `int8`, … (QLoRA).
    pub quantize: Option<String>,
    /// What linear layers are trained for, straight through the rounding, and become when the model is saved: `bitnet`.
    pub straight_through: Option<String>,
    /// Steps over which what quantization changes comes into force; 0 for all of it from the start.
    pub lambda_warmup_steps: usize,
}

/// The data, and what is made of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    train: Option<OneOrMany>,
    eval: Option<OneOrMany>,
    /// The share of the examples that is evaluated, where no files are.
    pub eval_split: f64,
    /// At most so many examples are evaluated.
    pub max_eval_examples: Option<u64>,
    /// At most so many records are read.
    pub max_records: Option<u64>,
    /// `jsonl`, `csv`, `parquet` or `txt`, where the names of files do not say it.
    pub format: Option<String>,
    /// What a record of a text file is: `line`, `paragraph` or `document`.
    pub sample_by: String,
    /// What to do with bad records: `stop` or `skip`.
    pub bad_data: BadData,
    /// Where tokenized data is kept.
    pub cache: Option<PathBuf>,
    /// The longest sequence in tokens; the model's where `None`.
    pub max_length: Option<usize>,
    /// Lengths of rows are rounded up to a multiple of this.
    pub pad_to_multiple_of: Option<usize>,
    /// Texts are joined and cut into blocks of so many tokens (language models).
    pub block_size: Option<usize>,
    /// Whether the texts within a block do not see each other.
    pub packing: bool,
    /// Whether a batch becomes one row without padding.
    pub padding_free: bool,
    /// Whether a text ends with the token that says so.
    pub append_eos: bool,
    text_column: String,
    pair_column: Option<String>,
    label_column: String,
    prompt_column: Option<String>,
    completion_column: Option<String>,
    chosen_column: String,
    rejected_column: String,
    messages_column: Option<String>,
    question_column: String,
    context_column: String,
    answers_column: String,
    choices_columns: Vec<String>,
    tokens_column: String,
    tags_column: String,
    source_column: String,
    target_column: String,
    source_prefix: String,
    max_target_length: Option<usize>,
    label_all_tokens: bool,
    doc_stride: usize,
    mlm_probability: f64,
    whole_word_mask: bool,
    noise_density: f64,
    mean_noise_span_length: f64,
}

impl Default for DataSection {
    fn default() -> Self {
        let name = str::to_string;
        Self {
            train: None,
            eval: None,
            eval_split: 0.0,
            max_eval_examples: None,
            max_records: None,
            format: None,
            sample_by: name("line"),
            bad_data: BadData::Stop,
            cache: None,
            max_length: None,
            pad_to_multiple_of: None,
            block_size: None,
            packing: false,
            padding_free: false,
            append_eos: true,
            text_column: name("text"),
            pair_column: None,
            label_column: name("label"),
            prompt_column: None,
            completion_column: None,
            chosen_column: name("chosen"),
            rejected_column: name("rejected"),
            messages_column: None,
            question_column: name("question"),
            context_column: name("context"),
            answers_column: name("answers"),
            choices_columns: Vec::new(),
            tokens_column: name("tokens"),
            tags_column: name("ner_tags"),
            source_column: name("source"),
            target_column: name("target"),
            source_prefix: String::new(),
            max_target_length: None,
            label_all_tokens: false,
            doc_stride: 128,
            mlm_probability: 0.15,
            whole_word_mask: false,
            noise_density: 0.15,
            mean_noise_span_length: 3.0,
        }
    }
}

/// A training as a file says it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What is learned.
    pub task: TaskName,
    /// The model.
    pub model: ModelSection,
    /// The data.
    pub data: DataSection,
    /// What the task goes by, by the names of TRL.
    #[serde(default)]
    pub objective: Map<String, Value>,
    /// The arguments, by the names of `TrainingArguments`.
    #[serde(default)]
    pub training: Map<String, Value>,
}

/// A training whose task is not known to the caller.
pub trait Job {
    /// See [`Trainer::plan`].
    fn plan(&self) -> Plan;
    /// See [`Trainer::train`].
    ///
    /// # Errors
    /// As there.
    fn train(&mut self) -> Result<TrainOutput>;
    /// See [`Trainer::evaluate`].
    ///
    /// # Errors
    /// As there.
    fn evaluate(&mut self) -> Result<Map<String, Value>>;
    /// Seconds that a step takes, measured. The training cannot be used after it.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    fn measure(&mut self) -> Result<f64>;
    /// See [`Trainer::save_model`].
    ///
    /// # Errors
    /// As there.
    fn save_model(&self, folder: &Path) -> Result<()>;
    /// Lets somebody watch.
    fn watch(&mut self, callback: Box<dyn Callback>);
    /// After the step during which this becomes true, the training stops.
    fn stop_with(&mut self, stop: Arc<AtomicBool>);
    /// See [`Trainer::state`].
    fn state(&self) -> &crate::TrainerState;
    /// See [`Trainer::arguments`].
    fn arguments(&self) -> &TrainingArguments;
}

impl<T: Task> Job for Trainer<T> {
    fn plan(&self) -> Plan {
        self.plan()
    }

    fn train(&mut self) -> Result<TrainOutput> {
        self.train_blocking()
    }

    fn evaluate(&mut self) -> Result<Map<String, Value>> {
        self.evaluate_blocking()
    }

    fn measure(&mut self) -> Result<f64> {
        self.measure_blocking()
    }

    fn save_model(&self, folder: &Path) -> Result<()> {
        self.save_model_blocking(folder)
    }

    fn watch(&mut self, callback: Box<dyn Callback>) {
        self.add_callback(callback);
    }

    fn stop_with(&mut self, stop: Arc<AtomicBool>) {
        self.set_stop(stop);
    }

    fn state(&self) -> &crate::TrainerState {
        self.state()
    }

    fn arguments(&self) -> &TrainingArguments {
        self.arguments()
    }
}

/// Where the parts of a recipe come from.
pub struct Surroundings<'a> {
    /// Finds a model by its name.
    pub resolve: &'a dyn Fn(&str) -> Result<ModelFiles>,
    /// Where the model runs.
    pub device: Device,
    /// Hears how far data is tokenized; may stop it.
    pub report: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    /// Whether only the data for evaluation is needed.
    pub evaluation: bool,
}

impl Recipe {
    /// Reads a recipe from JSON; a TOML file has the same tables.
    ///
    /// # Errors
    /// Names the field that is unknown, missing or of another kind.
    pub fn from_json(json: Value) -> Result<Self> {
        serde_json::from_value(json)
            .map_err(|error| Error::config("recipe", format!("cannot be read: {error}")))
    }

    /// The names of all values besides the arguments, with their tables: `data.train`.
    pub fn names() -> Vec<String> {
        let keys = |table: &str, value: serde_json::Result<Value>| match value {
            Ok(Value::Object(map)) => map
                .into_iter()
                .map(|(name, _)| format!("{table}.{name}"))
                .collect(),
            _ => Vec::new(),
        };
        let objectives: BTreeSet<String> = [
            keys("objective", serde_json::to_value(RewardConfig::default())),
            keys("objective", serde_json::to_value(DpoConfig::default())),
            keys("objective", serde_json::to_value(KtoConfig::default())),
            keys("objective", serde_json::to_value(OrpoConfig::default())),
            keys("objective", serde_json::to_value(GrpoConfig::default())),
            keys("objective", serde_json::to_value(DistillationConfig::default())),
        ]
        .into_iter()
        .flatten()
        .collect();
        [
            vec!["task".to_string()],
            keys("model", serde_json::to_value(ModelSection::default())),
            keys("data", serde_json::to_value(DataSection::default())),
            objectives.into_iter().collect(),
        ]
        .concat()
    }

    /// Loads the model, tokenizes the data, and builds the training.
    ///
    /// # Errors
    /// Whatever does not fit is named.
    pub fn prepare(&self, mut around: Surroundings) -> Result<Box<dyn Job>> {
        self.check_objective()?;
        let student = Self {
            task: self.student_task()?,
            ..self.clone()
        };
        let mut training = self.training.clone();
        if let Some(rate) = self.task.learning_rate() {
            training.entry("learning_rate").or_insert(json!(rate));
        }
        let arguments = TrainingArguments::from_json(training)?;
        let files = self
            .model
            .name
            .as_deref()
            .map(|name| (around.resolve)(name))
            .transpose()?;
        let of_tokenizer = match &self.model.tokenizer {
            Some(name) => Some((around.resolve)(name)?),
            None => files.clone(),
        };
        let of_tokenizer = of_tokenizer.ok_or_else(|| {
            Error::config(
                "model.tokenizer",
                "must be given for a new model: a folder with tokenizer.json",
            )
        })?;
        let tokenizer = Tokenizer::from_files(&of_tokenizer).map_err(oxiformers_data::Error::from)?;
        let config = student.config(files.as_ref(), &tokenizer)?;
        let max_length = student.max_length(&config, &tokenizer);
        let texts = Texts::new(tokenizer, max_length, self.data.pad_to_multiple_of)?;
        let objective = student.objective(texts.clone(), &config, &of_tokenizer)?;
        let (train, eval) = student.datasets(objective.as_ref(), &arguments, &mut around)?;
        let build = Build {
            recipe: self,
            straight_through: self.straight_through()?,
            resolve: around.resolve,
            texts,
            arguments,
            files,
            of_tokenizer,
            config,
            device: around.device,
            train,
            eval,
        };
        build.job(objective)
    }

    /// The task whose data and model this one has.
    fn student_task(&self) -> Result<TaskName> {
        if self.task != TaskName::Distillation {
            return Ok(self.task);
        }
        match self.objective_config::<DistillationConfig>()?.student_task {
            task @ (TaskName::CausalLm | TaskName::TextClassification) => Ok(task),
            _ => Err(Error::config(
                "objective.student_task",
                "must be causal-lm or text-classification",
            )),
        }
    }

    /// The configuration of the model, for this task and its labels.
    fn config(&self, files: Option<&ModelFiles>, tokenizer: &Tokenizer) -> Result<AutoConfig> {
        let config = match (files, &self.model.config) {
            (Some(files), None) => AutoConfig::from_files(files)?,
            (Some(files), Some(changed)) => {
                let mut json = AutoConfig::from_files(files)?.json;
                if let Some(fields) = json.as_object_mut() {
                    fields.extend(changed.clone());
                }
                AutoConfig::from_json(json, files.name())?
            }
            (None, Some(fields)) => {
                let mut fields = fields.clone();
                let ids = [
                    ("vocab_size", Some(tokenizer.vocab_size() as u32)),
                    ("bos_token_id", tokenizer.bos_token_id()),
                    ("eos_token_id", tokenizer.eos_token_id()),
                    (
                        "pad_token_id",
                        tokenizer.pad_token_id().or(tokenizer.eos_token_id()),
                    ),
                ];
                for (name, id) in ids {
                    if let Some(id) = id.filter(|_| !fields.contains_key(name)) {
                        fields.insert(name.to_string(), json!(id));
                    }
                }
                AutoConfig::from_json(Value::Object(fields), "model.config")?
            }
            (None, None) => {
                return Err(Error::config(
                    "model",
                    "needs `name`, a checkpoint to begin with, or `config`, the fields of a new model",
                ));
            }
        };
        let causal = matches!(
            self.task,
            TaskName::CausalLm | TaskName::Dpo | TaskName::Kto | TaskName::Orpo | TaskName::Grpo
        );
        let class = match (self.task, config.model_type.as_str()) {
            (_, "gpt2") if causal => "LMHeadModel",
            _ if causal => "ForCausalLM",
            (TaskName::MaskedLm, _) => "ForMaskedLM",
            (TaskName::TextClassification | TaskName::Reward, _) => "ForSequenceClassification",
            (TaskName::TokenClassification, _) => "ForTokenClassification",
            (TaskName::QuestionAnswering, _) => "ForQuestionAnswering",
            (TaskName::MultipleChoice, _) => "ForMultipleChoice",
            (_, "marian") => "MTModel",
            _ => "ForConditionalGeneration",
        };
        let labelled = matches!(
            self.task,
            TaskName::TextClassification | TaskName::TokenClassification
        );
        let labels = self.model.labels.as_deref().filter(|_| labelled);
        if labelled
            && labels.is_none()
            && config.json.get("id2label").is_none()
            && self.model.problem_type != Some(ProblemType::Regression)
        {
            return Err(Error::config(
                "model.labels",
                "must name the classes: the model does not know any",
            ));
        }
        let (one, reward) = (["value".to_string()], ["LABEL_0".to_string()]);
        let labels = match (labels, self.model.problem_type) {
            (None, Some(ProblemType::Regression)) => Some(one.as_slice()),
            _ if self.task == TaskName::Reward => Some(reward.as_slice()),
            (labels, _) => labels,
        };
        Ok(config.for_task(class, labels, self.model.problem_type.filter(|_| labelled))?)
    }

    /// The size of blocks, where texts are joined at all.
    fn block_size(&self) -> Option<usize> {
        let joins = matches!(
            self.task,
            TaskName::CausalLm | TaskName::MaskedLm | TaskName::Denoising
        );
        self.data.block_size.filter(|_| joins)
    }

    fn max_length(&self, config: &AutoConfig, tokenizer: &Tokenizer) -> Option<usize> {
        let said = self.data.max_length;
        let model = config.architecture.max_position_embeddings();
        // Texts that are cut into blocks are of any length.
        match (said, self.block_size()) {
            (None, Some(_)) => None,
            (Some(said), _) => Some(said),
            (None, None) => [model, tokenizer.config().model_max_length]
                .into_iter()
                .flatten()
                .min(),
        }
    }

    fn objective(&self, texts: Texts, config: &AutoConfig, files: &ModelFiles) -> Result<Arc<dyn Objective>> {
        let data = &self.data;
        let template = |texts: &Texts| {
            ChatTemplate::from_files(files, &texts.tokenizer).map_err(oxiformers_data::Error::from)
        };
        let prompted = |texts: Texts| -> Result<Prompted> {
            Ok(Prompted {
                template: template(&texts)?,
                texts,
                append_eos: data.append_eos,
            })
        };
        let column =
            |name: &Option<String>, otherwise: &str| name.clone().unwrap_or_else(|| otherwise.to_string());
        let pair = || PairColumns {
            prompt: column(&data.prompt_column, "prompt"),
            chosen: data.chosen_column.clone(),
            rejected: data.rejected_column.clone(),
        };
        let labels = Labels::from_json(&config.json)?;
        let names = || (0..labels.len()).map(|id| labels.label(id)).collect::<Vec<_>>();
        Ok(match self.task {
            TaskName::CausalLm | TaskName::Distillation => {
                let source = match (
                    &data.messages_column,
                    &data.prompt_column,
                    &data.completion_column,
                ) {
                    (Some(messages), None, None) => {
                        let template = template(&texts)?.ok_or_else(|| {
                            Error::config(
                                "data.messages_column",
                                "needs a chat template, and the model has none",
                            )
                        })?;
                        Source::Chat {
                            messages: messages.clone(),
                            template,
                        }
                    }
                    (None, Some(prompt), Some(completion)) => Source::Completion {
                        prompt: prompt.clone(),
                        completion: completion.clone(),
                    },
                    (None, None, None) => Source::Text(data.text_column.clone()),
                    _ => {
                        let message =
                            "and `completion_column` belong together, and not beside `messages_column`";
                        return Err(Error::config("data.prompt_column", message));
                    }
                };
                Arc::new(CausalLM {
                    texts,
                    source,
                    append_eos: data.append_eos,
                    padding_free: data.padding_free,
                })
            }
            TaskName::Reward => Arc::new(Comparison {
                prompted: prompted(texts)?,
                columns: pair(),
            }),
            TaskName::Dpo | TaskName::Orpo => Arc::new(Preference {
                prompted: prompted(texts)?,
                columns: pair(),
            }),
            TaskName::Grpo => {
                let config: GrpoConfig = self.objective_config()?;
                let mut texts = texts;
                // Room for the answer, where nothing is said about the prompt.
                if let (None, Some(most)) = (data.max_length, &mut texts.max_length) {
                    *most = most.saturating_sub(config.max_completion_length).max(1);
                }
                Arc::new(Prompts {
                    prompted: prompted(texts)?,
                    prompt_column: column(&data.prompt_column, "prompt"),
                    needed: config
                        .rewards
                        .into_iter()
                        .filter_map(|reward| reward.column)
                        .collect(),
                })
            }
            TaskName::Kto => Arc::new(UnpairedPreference {
                prompted: prompted(texts)?,
                prompt_column: column(&data.prompt_column, "prompt"),
                completion_column: column(&data.completion_column, "completion"),
                label_column: data.label_column.clone(),
            }),
            TaskName::MaskedLm => {
                let options = MaskOptions {
                    mlm_probability: data.mlm_probability,
                    whole_word_mask: data.whole_word_mask,
                    ..MaskOptions::default()
                };
                Arc::new(MaskedText::new(texts, &data.text_column, options)?)
            }
            TaskName::TextClassification => Arc::new(TextClassification {
                texts,
                text_column: data.text_column.clone(),
                pair_column: data.pair_column.clone(),
                label_column: data.label_column.clone(),
                problem: match labels.problem_type() {
                    ProblemType::SingleLabelClassification => Problem::SingleLabel(names()),
                    ProblemType::MultiLabelClassification => Problem::MultiLabel(names()),
                    ProblemType::Regression => Problem::Regression(labels.len()),
                },
            }),
            TaskName::TokenClassification => Arc::new(TokenText {
                texts,
                tokens_column: data.tokens_column.clone(),
                tags_column: data.tags_column.clone(),
                labels: names(),
                label_all_tokens: data.label_all_tokens,
            }),
            TaskName::QuestionAnswering => Arc::new(QuestionText {
                texts,
                doc_stride: data.doc_stride,
                question_column: data.question_column.clone(),
                context_column: data.context_column.clone(),
                answers_column: data.answers_column.clone(),
            }),
            TaskName::MultipleChoice => Arc::new(ChoiceText {
                texts,
                question_column: data.question_column.clone(),
                choices: data.choices_columns.clone(),
                label_column: data.label_column.clone(),
            }),
            TaskName::Seq2seqLm => Arc::new(Seq2Seq {
                target: texts
                    .tokenizer
                    .for_target(None)
                    .map_err(oxiformers_data::Error::from)?,
                texts,
                source_column: data.source_column.clone(),
                target_column: data.target_column.clone(),
                prefix: data.source_prefix.clone(),
                max_target_length: data.max_target_length,
            }),
            TaskName::Denoising => Arc::new(match config.model_type.as_str() {
                "t5" | "mt5" | "umt5" => Denoising::spans(
                    texts,
                    &data.text_column,
                    data.noise_density,
                    data.mean_noise_span_length,
                )?,
                _ => Denoising::infilling(
                    texts,
                    &data.text_column,
                    data.noise_density,
                    data.mean_noise_span_length,
                )?,
            }),
        })
    }

    fn cache(
        &self,
        objective: &dyn Objective,
        named: &OneOrMany,
        around: &mut Surroundings,
        folder: &Path,
    ) -> Result<TokenCache> {
        let format = self
            .data
            .format
            .as_deref()
            .map(str::parse::<Format>)
            .transpose()?;
        let options = CacheOptions {
            folder: folder.to_path_buf(),
            sample_by: self.data.sample_by.parse::<SampleBy>()?,
            bad_data: self.data.bad_data,
            max_records: self.data.max_records,
        };
        let files = find(&named.list(), format)?;
        let objective: &dyn oxiformers_data::Preprocessor = objective;
        Ok(prepare(&files, objective, &options, &mut *around.report)?)
    }

    /// Where tokenized data is kept.
    fn cache_folder(&self, arguments: &TrainingArguments) -> PathBuf {
        let otherwise = || arguments.output_dir.join("cache");
        self.data.cache.clone().unwrap_or_else(otherwise)
    }

    /// What linear layers are trained for, and the number that all of them follow.
    fn straight_through(&self) -> Result<Option<(QuantizationRecipe, Lambda)>> {
        let Some(name) = &self.model.straight_through else {
            return Ok(None);
        };
        let of = "model.straight_through";
        if name != "bitnet" {
            return Err(Error::config(of, format!("is {name}; it must be bitnet")));
        }
        if self.model.adapter.is_some() || self.model.quantize.is_some() {
            return Err(Error::config(
                of,
                "trains the model's own weights: not with `model.adapter` or `model.quantize`",
            ));
        }
        let config = QuantizationConfig::named(name, &MethodOptions::default());
        let config = config.map_err(|error| Error::config(of, error.to_string()))?;
        Ok(Some((config.into(), Lambda::default())))
    }

    /// Whether the task can go by what is said, before anything is loaded.
    fn check_objective(&self) -> Result<()> {
        match self.task {
            TaskName::Reward => self.objective_config::<RewardConfig>().map(drop),
            TaskName::Dpo => (self.objective_config::<DpoConfig>()?).check(self.model.adapter.is_some()),
            TaskName::Kto => self.objective_config::<KtoConfig>().map(drop),
            TaskName::Orpo => self.objective_config::<OrpoConfig>().map(drop),
            TaskName::Grpo => self.objective_config::<GrpoConfig>().map(drop),
            TaskName::Distillation => self.objective_config::<DistillationConfig>().map(drop),
            _ => match self.objective.keys().next() {
                None => Ok(()),
                Some(name) => Err(Error::config(
                    format!("objective.{name}"),
                    "is of another task than this one",
                )),
            },
        }
    }

    /// What the task goes by.
    fn objective_config<C: serde::de::DeserializeOwned>(&self) -> Result<C> {
        serde_json::from_value(Value::Object(self.objective.clone()))
            .map_err(|error| Error::config("objective", format!("cannot be read: {error}")))
    }

    fn datasets(
        &self,
        objective: &dyn Objective,
        arguments: &TrainingArguments,
        around: &mut Surroundings,
    ) -> Result<(Dataset, Option<Dataset>)> {
        let folder = self.cache_folder(arguments);
        let dataset = |cache: TokenCache| match self.block_size() {
            Some(size) => Dataset::blocks(cache, size, self.data.packing),
            None => Ok(Dataset::new(cache)),
        };
        let most = self.data.max_eval_examples.unwrap_or(u64::MAX);
        if let (true, Some(eval)) = (around.evaluation, &self.data.eval) {
            let eval = dataset(self.cache(objective, eval, around, &folder)?)?.take(most);
            return Ok((eval.clone(), Some(eval)));
        }
        let train = self
            .data
            .train
            .as_ref()
            .ok_or_else(|| Error::config("data.train", "must name files of records"))?;
        let train = dataset(self.cache(objective, train, around, &folder)?)?;
        let (train, eval) = match (&self.data.eval, self.data.eval_split) {
            (Some(eval), _) => (
                train,
                Some(dataset(self.cache(objective, eval, around, &folder)?)?),
            ),
            (None, 0.0) => (train, None),
            (None, share) if share > 0.0 && share < 1.0 => {
                let (train, eval) = train.split(share, arguments.data_seed.unwrap_or(arguments.seed));
                (train, Some(eval))
            }
            (None, share) => {
                return Err(Error::config(
                    "data.eval_split",
                    format!("is {share}; it must lie from 0 to below 1"),
                ));
            }
        };
        Ok((train, eval.map(|eval| eval.take(most))))
    }
}

/// A model, its parameters, and the adapter if there is one.
type Loaded<M> = (M, Arc<Parameters>, Option<Arc<Adapter>>);

/// The SHA-256 of bytes, as text.
fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// All that a training is built of.
struct Build<'a> {
    recipe: &'a Recipe,
    resolve: &'a dyn Fn(&str) -> Result<ModelFiles>,
    texts: Texts,
    straight_through: Option<(QuantizationRecipe, Lambda)>,
    arguments: TrainingArguments,
    files: Option<ModelFiles>,
    of_tokenizer: ModelFiles,
    config: AutoConfig,
    device: Device,
    train: Dataset,
    eval: Option<Dataset>,
}

impl Build<'_> {
    fn job(mut self, objective: Arc<dyn Objective>) -> Result<Box<dyn Job>> {
        match self.recipe.task {
            TaskName::CausalLm => {
                let task = CausalLanguageModeling::new(objective, &self.config);
                let (model, parameters, adapter) = self.causal()?;
                self.trainer(task, model, parameters, adapter)
            }
            TaskName::Distillation => {
                let config: DistillationConfig = self.recipe.objective_config()?;
                let (teacher, options) = self.teacher(&config)?;
                if config.student_task == TaskName::TextClassification {
                    let task = TextTask::new(objective, &self.config)?.with_head::<SequenceClassification>();
                    let teacher = AutoModelFor::<SequenceClassification>::from_files(&teacher, &options)?;
                    let (model, parameters, adapter) = self.with_head::<SequenceClassification>()?;
                    let task = Distillation::new(task, teacher, config, distillation::classes)?;
                    return self.trainer(task, model, parameters, adapter);
                }
                let task = CausalLanguageModeling::new(objective, &self.config);
                let teacher = AutoModelForCausalLM::from_files(&teacher, &options)?;
                let (model, parameters, adapter) = self.causal()?;
                let task = Distillation::new(task, teacher, config, distillation::following)?;
                self.trainer(task, model, parameters, adapter)
            }
            TaskName::Reward => {
                let task = RewardModeling::new(objective, &self.config, self.recipe.objective_config()?);
                let (model, parameters, adapter) = self.with_head::<SequenceClassification>()?;
                self.trainer(task, model, parameters, adapter)
            }
            TaskName::Dpo => {
                let config: DpoConfig = self.recipe.objective_config()?;
                let (model, parameters, adapter) = self.causal()?;
                let mut reference = self.reference(&model, adapter.as_ref());
                if config.precompute_ref_log_probs {
                    self.precompute(
                        &reference,
                        &model,
                        objective.as_ref(),
                        config.precompute_ref_batch_size,
                    )?;
                    reference = Reference::Known;
                }
                let task = Dpo::new(objective, &self.config, config, reference)?;
                self.trainer(task, model, parameters, adapter)
            }
            TaskName::Kto => {
                let config: KtoConfig = self.recipe.objective_config()?;
                if config.loss_type == KtoLoss::Kto && self.arguments.per_device_train_batch_size < 2 {
                    return Err(Error::config(
                        "training.per_device_train_batch_size",
                        "must be 2 at least: answers of a batch are compared with the prompts of others",
                    ));
                }
                let (model, parameters, adapter) = self.causal()?;
                let reference = self.reference(&model, adapter.as_ref());
                let task = Kto::new(objective, &self.config, config, reference)?;
                self.trainer(task, model, parameters, adapter)
            }
            TaskName::Orpo => {
                let task = Orpo::new(objective, &self.config, &self.recipe.objective_config()?)?;
                let (model, parameters, adapter) = self.causal()?;
                self.trainer(task, model, parameters, adapter)
            }
            TaskName::Grpo => {
                let config: GrpoConfig = self.recipe.objective_config()?;
                self.check_groups(&config)?;
                let load = |name: &str| self.reward_model(name);
                let rewards = (config.rewards.iter())
                    .map(|section| Ok((Reward::new(section, load)?, section.weight)))
                    .collect::<Result<Vec<_>>>()?;
                let mut eos = GenerationConfig::from_files(&self.of_tokenizer)?.eos_token_id;
                let own = self.texts.tokenizer.eos_token_id();
                eos.extend(own.filter(|id| !eos.contains(id)));
                let (model, parameters, adapter) = self.causal()?;
                let reference = (config.beta > 0.0).then(|| self.reference(&model, adapter.as_ref()));
                let task = Grpo::new(config, rewards, self.texts.clone(), eos, &self.config, reference)?;
                self.trainer(task, model, parameters, adapter)
            }
            TaskName::Seq2seqLm | TaskName::Denoising => {
                let task = Seq2SeqLanguageModeling::new(objective, &self.config)?;
                let (parameters, options, adapter) = self.options()?;
                let model = self.load(
                    &options,
                    adapter.as_deref(),
                    AutoModelForSeq2SeqLM::from_files,
                    AutoModelForSeq2SeqLM::from_config,
                )?;
                self.trainer(task, model, parameters, adapter)
            }
            TaskName::MaskedLm => self.head::<MaskedLM>(objective),
            TaskName::TextClassification => self.head::<SequenceClassification>(objective),
            TaskName::TokenClassification => self.head::<TokenClassification>(objective),
            TaskName::QuestionAnswering => self.head::<QuestionAnswering>(objective),
            TaskName::MultipleChoice => self.head::<MultipleChoice>(objective),
        }
    }

    fn head<T: TrainedHead>(self, objective: Arc<dyn Objective>) -> Result<Box<dyn Job>> {
        let task = TextTask::new(objective, &self.config)?;
        let (model, parameters, adapter) = self.with_head::<T>()?;
        self.trainer(task.with_head::<T>(), model, parameters, adapter)
    }

    fn with_head<T: TaskType>(&self) -> Result<Loaded<AutoModelFor<T>>> {
        let (parameters, options, adapter) = self.options()?;
        let (files, config) = (AutoModelFor::<T>::from_files, AutoModelFor::<T>::from_config);
        let model = self.load(&options, adapter.as_deref(), files, config)?;
        Ok((model, parameters, adapter))
    }

    fn causal(&self) -> Result<Loaded<AutoModelForCausalLM>> {
        let (parameters, options, adapter) = self.options()?;
        let (files, config) = (
            AutoModelForCausalLM::from_files,
            AutoModelForCausalLM::from_config,
        );
        let model = self.load(&options, adapter.as_deref(), files, config)?;
        Ok((model, parameters, adapter))
    }

    /// The files of the model that is learned from, and how it is loaded.
    fn teacher(&self, config: &DistillationConfig) -> Result<(ModelFiles, LoadOptions)> {
        let name = &config.teacher_model_name_or_path;
        if name.is_empty() {
            return Err(Error::config(
                "objective.teacher_model_name_or_path",
                "must name the model that is learned from",
            ));
        }
        let options = LoadOptions {
            device: self.device.clone(),
            dtype: self.arguments.bf16.then_some(FloatDType::BF16),
            ..LoadOptions::default()
        };
        Ok(((self.resolve)(name)?, options))
    }

    /// Whether batches hold whole groups of answers.
    fn check_groups(&self, config: &GrpoConfig) -> Result<()> {
        let (arguments, group) = (&self.arguments, config.num_generations.max(1));
        let mut sizes = vec![(
            "per_device_train_batch_size",
            arguments.per_device_train_batch_size,
        )];
        if self.eval.is_some() {
            sizes.push(("per_device_eval_batch_size", arguments.per_device_eval_batch_size));
        }
        for (name, size) in sizes {
            if size % group != 0 {
                return Err(Error::config(
                    format!("training.{name}"),
                    format!("is {size}; it must be a multiple of objective.num_generations, {group}"),
                ));
            }
        }
        if config.scale_rewards == ScaleRewards::Batch && arguments.gradient_accumulation_steps > 1 {
            return Err(Error::config(
                "objective.scale_rewards",
                "is batch: all answers of a step must be in one, with gradient_accumulation_steps = 1",
            ));
        }
        Ok(())
    }

    fn reward_model(&self, name: &str) -> Result<RewardModel> {
        let files = (self.resolve)(name)?;
        let options = LoadOptions {
            device: self.device.clone(),
            ..LoadOptions::default()
        };
        let data = oxiformers_data::Error::from;
        let tokenizer = Tokenizer::from_files(&files).map_err(data)?;
        Ok(RewardModel {
            model: AutoModelFor::from_files(&files, &options)?,
            template: ChatTemplate::from_files(&files, &tokenizer).map_err(data)?,
            tokenizer,
            prompt_column: self
                .recipe
                .data
                .prompt_column
                .clone()
                .unwrap_or("prompt".to_string()),
        })
    }

    fn reference(&self, model: &AutoModelForCausalLM, adapter: Option<&Arc<Adapter>>) -> Reference {
        Reference::new(model, adapter.map(|adapter| adapter.switch()))
    }

    /// Computes what the reference says about all examples, or finds it where it was computed before.
    fn precompute(
        &mut self,
        reference: &Reference,
        model: &AutoModelForCausalLM,
        objective: &dyn Objective,
        batch_size: Option<usize>,
    ) -> Result<()> {
        let folder = self.recipe.cache_folder(&self.arguments);
        let model_digest = self.digest()?;
        let of = |data: Dataset, rows: usize| {
            let key = format!("{model_digest}/{}", data.fingerprint());
            let file = folder.join(format!("reference-{}.safetensors", hex(key.as_bytes())));
            reference.judge(model, |reference| {
                let rows = batch_size.unwrap_or(rows);
                futures::executor::block_on(precompute(reference, objective, data, rows, &file))
            })
        };
        self.train = of(self.train.clone(), self.arguments.per_device_train_batch_size)?;
        if let Some(eval) = self.eval.take() {
            self.eval = Some(of(eval, self.arguments.per_device_eval_batch_size)?);
        }
        Ok(())
    }

    /// What tells the model from others: its files, and how it is loaded.
    fn digest(&self) -> Result<String> {
        let mut digest = Sha256::new();
        let section = serde_json::to_string(&self.recipe.model).unwrap_or_default();
        digest.update(format!(
            "{section} {} {}",
            self.arguments.bf16, self.arguments.seed
        ));
        digest.update(self.config.json.to_string());
        let files = self.files.iter();
        for (files, name) in files.flat_map(|files| files.names().map(move |name| (files, name))) {
            let weights = [".safetensors", ".bin", ".gguf"];
            if weights.iter().any(|end| name.ends_with(end)) {
                digest.update(files.get(name)?.unwrap_or_default());
            }
        }
        Ok(digest
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect())
    }

    /// The model, from its files or anew.
    fn load<M>(
        &self,
        options: &LoadOptions,
        adapter: Option<&Adapter>,
        from_files: impl Fn(&ModelFiles, &LoadOptions) -> Result<M, oxiformers_models::Error>,
        from_config: impl Fn(AutoConfig, &LoadOptions) -> Result<M, oxiformers_models::Error>,
    ) -> Result<M> {
        let Some(files) = &self.files else {
            return Ok(from_config(self.config.clone(), options)?);
        };
        let files = self.with_config(files)?;
        if let Some(adapter) = adapter.filter(|adapter| adapter.begins_with_a_survey()) {
            let survey = Arc::new(Survey::default());
            let described = LoadOptions {
                survey: Some(survey.clone()),
                new_heads: true,
                ..LoadOptions::default()
            };
            from_files(&files, &described)?;
            adapter.measure(&survey.matrices())?;
        }
        Ok(from_files(&files, options)?)
    }

    /// What is trained, how the model is loaded, and the adapter if there is one.
    fn options(&self) -> Result<(Arc<Parameters>, LoadOptions, Option<Arc<Adapter>>)> {
        let section = &self.recipe.model;
        let seed = self.arguments.seed;
        let adapter = match &section.adapter {
            Some(fields) => {
                let base = section.name.as_deref().unwrap_or_default();
                let (task, model) = (self.recipe.student_task()?, &self.config.json);
                Some(Arc::new(adapter::from_recipe(fields, task, model, base, seed)?))
            }
            None => None,
        };
        let quantization = match (&section.quantize, &adapter) {
            (None, _) => None,
            (Some(name), Some(_)) => {
                let config = QuantizationConfig::named(name, &MethodOptions::default())
                    .map_err(|error| Error::config("model.quantize", error.to_string()))?;
                Some(Arc::new(config.into()))
            }
            (Some(_), None) => {
                return Err(Error::config(
                    "model.quantize",
                    "needs `model.adapter`: weights that are quantized are not trained",
                ));
            }
        };
        let straight_through = self.straight_through.clone();
        let (quantization, straight_through) = match straight_through {
            Some((recipe, lambda)) => (Some(Arc::new(recipe)), Some(lambda)),
            None => (quantization, None),
        };
        let chosen = section.trainable.clone();
        let parameters = Arc::new(match chosen.is_empty() {
            true => Parameters::all(),
            false => Parameters::only(move |name| chosen.iter().any(|part| name.contains(part))),
        });
        let options = LoadOptions {
            device: self.device.clone().autodiff(),
            dtype: self.arguments.bf16.then_some(FloatDType::BF16),
            parameters: Some(parameters.clone()),
            new_heads: true,
            ignore_mismatched_sizes: self.recipe.model.ignore_mismatched_sizes,
            seed,
            adapters: adapter.iter().map(|adapter| adapter.clone() as _).collect(),
            quantization,
            straight_through,
            ..LoadOptions::default()
        };
        Ok((parameters, options, adapter))
    }

    /// The files of a checkpoint with the configuration of this task.
    fn with_config(&self, files: &ModelFiles) -> Result<ModelFiles> {
        let json = serde_json::to_vec(&self.config.json).unwrap_or_default();
        Ok(files.with_file("config.json", json.into()))
    }

    fn trainer<T: Task + 'static>(
        self,
        task: T,
        model: T::Model,
        parameters: Arc<Parameters>,
        adapter: Option<Arc<Adapter>>,
    ) -> Result<Box<dyn Job>> {
        let dense = |files| ModelSaver {
            config: self.config.json.clone(),
            files: Some(files),
            dtype: match self.arguments.save_dtype {
                SaveDtype::Float32 => DType::F32,
                SaveDtype::Bfloat16 => DType::BF16,
                SaveDtype::Float16 => DType::F16,
            },
        };
        let mut warmup = None;
        let saver: Box<dyn Saver> = match (adapter, self.straight_through) {
            (Some(adapter), _) => Box::new(AdapterSaver {
                adapter,
                files: self.of_tokenizer,
            }),
            (None, Some((recipe, lambda))) => {
                let steps = self.recipe.model.lambda_warmup_steps;
                warmup = Some(LambdaWarmup { lambda, steps });
                Box::new(PackedSaver {
                    dense: dense(self.of_tokenizer),
                    recipe,
                })
            }
            (None, None) => Box::new(dense(self.of_tokenizer)),
        };
        let trained = Trained {
            model,
            parameters,
            saver,
        };
        let mut trainer = Trainer::new(self.arguments, task, trained, self.train, self.eval)?;
        if let Some(warmup) = warmup {
            trainer = trainer.with_callback(warmup);
        }
        Ok(Box::new(trainer))
    }
}
