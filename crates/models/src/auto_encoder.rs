//! Encoders with and without heads, whatever their architecture.

use std::borrow::Cow;
use std::marker::PhantomData;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::Checkpoint;
use oxiformers_nn::{Backbone, EncoderInputs, Head, LoadOptions, Weights};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::registry::{AnyConfig, AnyEncoder};
use crate::tapas::{TableAnswer, TableHead};
use crate::tasks::{
    DocumentQuestionAnswering, Labels, MaskedLM, MultipleChoice, NextSentencePrediction, PreTraining,
    QuestionAnswering, SequenceClassification, Task, TaskType, TokenClassification,
};
use crate::{AutoConfig, auto};

/// What an encoder makes of a batch.
#[derive(Debug, Clone)]
pub struct BaseModelOutput {
    /// `[batch, seq, hidden_size]`; rows of padding tokens mean nothing.
    pub last_hidden_state: Tensor<3>,
    /// What the pooler makes of each sequence, where the model has one: `[batch, hidden_size]`.
    pub pooler_output: Option<Tensor<2>>,
    /// The embeddings and what each layer made of them, where it was asked for.
    pub hidden_states: Vec<Tensor<3>>,
}

/// What a model with a head makes of a batch.
#[derive(Debug, Clone)]
pub struct ModelOutput<L> {
    /// The answer.
    pub logits: L,
    /// `[batch, seq, hidden_size]`; rows of padding tokens mean nothing.
    pub last_hidden_state: Tensor<3>,
    /// The embeddings and what each layer made of them, where it was asked for.
    pub hidden_states: Vec<Tensor<3>>,
}

/// An encoder of any architecture, without a head.
#[derive(Debug)]
pub struct AutoModel {
    /// Its configuration.
    pub config: AutoConfig,
    /// The model itself.
    pub encoder: AnyEncoder,
    /// The pooler, where the checkpoint has one.
    pub pooler: Option<Head>,
    device: Device,
}

/// The same: Transformers' name for the encoder of a text.
pub type AutoModelForTextEncoding = AutoModel;

impl AutoModel {
    /// Loads a model from its files. Heads that the checkpoint holds are left out.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor.
    pub fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let (config, weights) = open(files, options)?;
        Self::load(config, &weights, options, files.name())
    }

    /// A model with fresh parameters, by the seed of `options`.
    ///
    /// # Errors
    /// Where fields of the configuration contradict each other.
    pub fn from_config(config: AutoConfig, options: &LoadOptions) -> Result<Self> {
        let weights = auto::fresh(&config, options);
        Self::load(config, &weights, options, "config")
    }

    fn load(config: AutoConfig, weights: &Weights, options: &LoadOptions, model: &str) -> Result<Self> {
        let (encoder, pooler) = load(&config, weights, Task::Base, model, |c, w, encoder| {
            c.load_head(Task::Base, w, encoder, 0)
        })?;
        Ok(Self {
            config,
            encoder,
            pooler,
            device: options.device.clone(),
        })
    }

    /// Runs a batch.
    ///
    /// # Errors
    /// Where the inputs do not fit the model: an id outside of the vocabulary, a sequence that is too long.
    pub fn forward(&self, inputs: &EncoderInputs) -> Result<BaseModelOutput> {
        let inputs = prepare(&self.config, Task::Base, inputs)?;
        let output = self.encoder.forward(&inputs, &self.device)?;
        let pool = |head: &Head| {
            let pooled = head.forward(output.last_hidden_state.clone(), &inputs);
            pooled.squeeze_dim(1)
        };
        Ok(BaseModelOutput {
            pooler_output: self.pooler.as_ref().map(pool),
            last_hidden_state: output.last_hidden_state,
            hidden_states: output.hidden_states,
        })
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// An encoder of any architecture with a head for the task `T`.
#[derive(Module, Debug)]
pub struct AutoModelFor<T: TaskType> {
    /// Its configuration.
    #[module(skip)]
    pub config: AutoConfig,
    /// What its classes are called.
    #[module(skip)]
    pub labels: Labels,
    /// The encoder.
    pub encoder: AnyEncoder,
    /// What makes logits of its hidden states.
    pub head: Head,
    #[module(skip)]
    device: Device,
    #[module(skip)]
    task: PhantomData<T>,
}

/// Fills in masked tokens.
pub type AutoModelForMaskedLM = AutoModelFor<MaskedLM>;
/// Classifies texts.
pub type AutoModelForSequenceClassification = AutoModelFor<SequenceClassification>;
/// Classifies tokens.
pub type AutoModelForTokenClassification = AutoModelFor<TokenClassification>;
/// Finds the answer to a question in a text.
pub type AutoModelForQuestionAnswering = AutoModelFor<QuestionAnswering>;
/// Finds the answer to a question in a document.
pub type AutoModelForDocumentQuestionAnswering = AutoModelFor<DocumentQuestionAnswering>;
/// Chooses between continuations of a text.
pub type AutoModelForMultipleChoice = AutoModelFor<MultipleChoice>;
/// Says whether a text follows another.
pub type AutoModelForNextSentencePrediction = AutoModelFor<NextSentencePrediction>;
/// Does what its architecture was trained on, where that is none of the others: ELECTRA's discriminator.
pub type AutoModelForPreTraining = AutoModelFor<PreTraining>;

impl<T: TaskType> AutoModelFor<T> {
    /// The same model, of which no gradients are computed: the fast form for evaluation.
    #[must_use]
    pub fn without_autodiff(&self) -> Self {
        let mut model = self.valid();
        model.device = model.device.without_autodiff();
        model
    }

    /// Loads a model from its files. Heads for other tasks are left out.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor; a missing head too.
    pub fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let (config, weights) = open(files, options)?;
        Self::load(config, &weights, options, files.name())
    }

    /// A model with fresh parameters, by the seed of `options`.
    ///
    /// # Errors
    /// Where fields of the configuration contradict each other.
    pub fn from_config(config: AutoConfig, options: &LoadOptions) -> Result<Self> {
        let weights = auto::fresh(&config, options);
        Self::load(config, &weights, options, "config")
    }

    fn load(config: AutoConfig, weights: &Weights, options: &LoadOptions, model: &str) -> Result<Self> {
        let labels = Labels::from_json(&config.json).map_err(Error::of(model))?;
        let labels = with_adapters(labels, &config, options);
        let (encoder, head) = load(&config, weights, T::TASK, model, |c, w, encoder| {
            c.load_head(T::TASK, w, encoder, labels.len())
        })?;
        let head = head.ok_or_else(|| no_task(model, &config, T::TASK))?;
        Ok(Self {
            config,
            labels,
            encoder,
            head,
            device: options.device.clone(),
            task: PhantomData,
        })
    }

    /// Runs a batch.
    ///
    /// # Errors
    /// Where the inputs do not fit the model: an id outside of the vocabulary, a sequence that is too long.
    pub fn forward(&self, inputs: &EncoderInputs) -> Result<ModelOutput<T::Logits>> {
        let inputs = prepare(&self.config, T::TASK, inputs)?;
        let output = self.encoder.forward(&inputs, &self.device)?;
        let logits = self.head.forward(output.last_hidden_state.clone(), &inputs);
        Ok(ModelOutput {
            logits: T::logits(logits, &inputs)?,
            last_hidden_state: output.last_hidden_state,
            hidden_states: output.hidden_states,
        })
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// As many labels as the head has that an adapter brings, where the model itself knows of none.
fn with_adapters(labels: Labels, config: &AutoConfig, options: &LoadOptions) -> Labels {
    const HEADS: [&str; 4] = [
        "classifier",
        "classifier.out_proj",
        "score",
        "classification_head.out_proj",
    ];
    let known = ["id2label", "num_labels"]
        .iter()
        .any(|field| config.json.get(*field).is_some());
    let brought = HEADS.iter().find_map(|head| {
        let name = format!("{head}.weight");
        options
            .adapters
            .iter()
            .find_map(|adapter| adapter.shape_of(&name)?.first().copied())
    });
    match brought {
        Some(count) if !known => labels.resized(count),
        _ => labels,
    }
}

/// The batch as the task wants it.
fn prepare<'a>(config: &AutoConfig, task: Task, inputs: &'a EncoderInputs) -> Result<Cow<'a, EncoderInputs>> {
    let changed = config.architecture.prepare(task, inputs)?;
    Ok(changed.map_or(Cow::Borrowed(inputs), Cow::Owned))
}

/// Answers questions about tables by choosing cells.
#[derive(Debug)]
pub struct AutoModelForTableQuestionAnswering {
    /// Its configuration.
    pub config: AutoConfig,
    /// The encoder.
    pub encoder: AnyEncoder,
    /// What makes an answer of its hidden states.
    pub head: TableHead,
    device: Device,
}

/// What such a model makes of a batch.
#[derive(Debug, Clone)]
pub struct TableQuestionAnsweringOutput {
    /// `[batch, seq]`: the logits of the cells that the tokens are of; -10000 outside of the likeliest column.
    pub logits: Tensor<2>,
    /// `[batch, num_aggregation_labels]`: what to do with the cells, where the model was trained to.
    pub logits_aggregation: Option<Tensor<2>>,
    /// `[batch, seq, hidden_size]`; rows of padding tokens mean nothing.
    pub last_hidden_state: Tensor<3>,
    /// The embeddings and what each layer made of them, where it was asked for.
    pub hidden_states: Vec<Tensor<3>>,
}

impl AutoModelForTableQuestionAnswering {
    /// Loads a model from its files.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor; a missing head too.
    pub fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        const TASK: Task = Task::TableQuestionAnswering;
        let (config, weights) = open(files, options)?;
        let (encoder, head) = load(&config, &weights, TASK, files.name(), |c, w, _| match c {
            AnyConfig::Tapas(config) => config.table_head(w).map(Some),
            _ => Ok(None),
        })?;
        let head = head.ok_or_else(|| no_task(files.name(), &config, TASK))?;
        Ok(Self {
            config,
            encoder,
            head,
            device: options.device.clone(),
        })
    }

    /// Runs a batch.
    ///
    /// # Errors
    /// Where the inputs do not fit the model: an id outside of the vocabulary, a sequence that is too long.
    pub fn forward(&self, inputs: &EncoderInputs) -> Result<TableQuestionAnsweringOutput> {
        let output = self.encoder.forward(inputs, &self.device)?;
        let TableAnswer {
            logits,
            logits_aggregation,
        } = self
            .head
            .forward(output.last_hidden_state.clone(), inputs, &self.device);
        Ok(TableQuestionAnsweringOutput {
            logits,
            logits_aggregation,
            last_hidden_state: output.last_hidden_state,
            hidden_states: output.hidden_states,
        })
    }

    /// How many values each of a token's types has; those of
    /// [`table_ids`](oxiformers_nn::EncoderInputs::table_ids) must be below.
    pub fn type_vocab_sizes(&self) -> &[usize] {
        match &self.config.architecture {
            AnyConfig::Tapas(config) => &config.own.type_vocab_sizes,
            _ => &[],
        }
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// The task whose class a checkpoint was saved from, as its configuration says.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn task_of(config: &AutoConfig) -> Task {
    let class = config.json.pointer("/architectures/0").and_then(Value::as_str);
    class.map_or(Task::Base, Task::of_class)
}

/// Loads a model that judges texts with the head that it was saved with, only to see what it is made of.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn load_as_saved(files: &ModelFiles, options: &LoadOptions) -> Result<()> {
    let (config, weights) = open(files, options)?;
    let task = task_of(&config);
    if task == Task::TableQuestionAnswering {
        return AutoModelForTableQuestionAnswering::from_files(files, options).map(drop);
    }
    let labels = Labels::from_json(&config.json).map_err(Error::of(files.name()))?;
    load(&config, &weights, task, files.name(), |c, w, encoder| {
        c.load_head(task, w, encoder, labels.len())
    })
    .map(drop)
}

fn no_task(model: &str, config: &AutoConfig, task: Task) -> Error {
    Error::NoTask {
        model: model.to_string(),
        model_type: config.model_type.clone(),
        task,
    }
}

fn open(files: &ModelFiles, options: &LoadOptions) -> Result<(AutoConfig, Weights)> {
    let config = AutoConfig::from_files(files)?;
    let weights = auto::stored(&config, Checkpoint::open(files)?, options);
    Ok((config, weights))
}

/// The encoder and the head for a task; none where the architecture knows no such task.
fn load<H>(
    config: &AutoConfig,
    weights: &Weights,
    task: Task,
    model: &str,
    head: impl FnOnce(&AnyConfig, &Weights, &AnyEncoder) -> oxiformers_nn::Result<Option<H>>,
) -> Result<(AnyEncoder, Option<H>)> {
    let (encoder, head) = auto::build(config, weights, model, |architecture, weights| {
        let encoder = architecture.load_encoder(task, weights)?;
        let head = head(architecture, weights, &encoder);
        // Heads for other tasks stand beside the base model.
        let base = format!("{}.", architecture.base());
        if weights.names().iter().any(|name| name.starts_with(&base)) {
            weights.ignore(|name| !name.starts_with(&base));
        }
        Ok((encoder, head))
    })?;
    let head = head.map_err(|source| match source {
        oxiformers_nn::Error::MissingTensor { name, .. } => Error::NoHead {
            model: model.to_string(),
            task,
            tensor: name,
            saved_as: (config.json.get("architectures").and_then(Value::as_array))
                .and_then(|names| names.first()?.as_str())
                .unwrap_or("another kind of model")
                .to_string(),
        },
        source => Error::of(model)(source),
    })?;
    Ok((encoder, head))
}
