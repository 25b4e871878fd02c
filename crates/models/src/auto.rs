//! From a model's files to the model, whatever its architecture.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::Checkpoint;
use oxiformers_nn::init::Normal;
use oxiformers_nn::quant::Recipe;
use oxiformers_nn::{Cache, CacheKind, CachePrecision, LoadOptions, LogitsFor, Weights};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::registry::{AnyConfig, AnyDecoder, AnySeq2Seq, MODEL_TYPES};
use crate::{CausalLM, Seq2SeqLM, gguf, mt5, umt5};

/// A model's configuration.
#[derive(Debug, Clone)]
pub struct AutoConfig {
    /// Name of the architecture.
    pub model_type: String,
    /// The whole `config.json`, or what a GGUF's metadata amount to.
    pub json: Value,
    /// The typed configuration.
    pub architecture: AnyConfig,
    /// How the checkpoint is quantized, if it is.
    pub quantization: Option<Recipe>,
}

impl AutoConfig {
    /// Reads `config.json`, or derives it from a GGUF's metadata.
    ///
    /// # Errors
    /// Where there is neither, or the architecture is unknown, or a field does not fit.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        if files.gguf().is_some() {
            return Self::from_checkpoint(&Checkpoint::open(files)?, files.name());
        }
        match files.json::<Value>("config.json")? {
            Some(json) => Self::from_json(json, files.name()),
            None => Err(Error::NoConfig {
                model: files.name().to_string(),
            }),
        }
    }

    fn from_checkpoint(checkpoint: &Checkpoint, model: &str) -> Result<Self> {
        match checkpoint.gguf() {
            Some(metadata) => Self::from_json(gguf::config(metadata, checkpoint, model)?, model),
            None => Err(Error::NoConfig {
                model: model.to_string(),
            }),
        }
    }

    /// Reads the contents of a `config.json`; `model` is the name used in messages.
    ///
    /// # Errors
    /// Where the architecture is unknown or a field does not fit.
    pub fn from_json(json: Value, model: &str) -> Result<Self> {
        let bad = |message: String| Error::Config {
            model: model.to_string(),
            message,
        };
        let model_type = json
            .get("model_type")
            .and_then(Value::as_str)
            .ok_or_else(|| bad("`model_type` is missing".to_string()))?
            .to_string();
        if let Some((field, number)) = out_of_range(&json, "") {
            return Err(bad(format!(
                "`{field}` is {number}, more than anything in a model can be"
            )));
        }
        let quantization =
            Recipe::of_model(&json).map_err(|error| bad(format!("`quantization_config`: {error}")))?;
        // Fields written as null mean their default.
        let mut fields = json.clone();
        if let Value::Object(map) = &mut fields {
            map.retain(|_, value| !value.is_null());
        }
        match AnyConfig::from_json(&model_type, fields) {
            Some(Ok(architecture)) => Ok(Self {
                model_type,
                json,
                architecture,
                quantization,
            }),
            Some(Err(error)) => Err(bad(error.to_string())),
            None => Err(Error::Unsupported {
                model: model.to_string(),
                model_type,
                supported: MODEL_TYPES.to_vec(),
            }),
        }
    }
}

/// The first whole number that no size or count can be, so that sizes can be multiplied without a second thought.
fn out_of_range(json: &Value, place: &str) -> Option<(String, u64)> {
    const LIMIT: u64 = i32::MAX as u64;
    match json {
        Value::Number(number) => {
            let number = number.as_u64().filter(|number| *number > LIMIT)?;
            Some((place.to_string(), number))
        }
        Value::Object(map) => (map.iter())
            // The base of rotary frequencies is a float that may be written as a whole number.
            .filter(|(key, _)| !key.contains("theta"))
            .find_map(|(key, value)| out_of_range(value, if place.is_empty() { key } else { place })),
        Value::Array(list) => list.iter().find_map(|value| out_of_range(value, place)),
        _ => None,
    }
}

/// A causal language model of any architecture.
#[derive(Module, Debug)]
pub struct AutoModelForCausalLM {
    /// Its configuration.
    #[module(skip)]
    pub config: AutoConfig,
    /// The model itself.
    pub decoder: AnyDecoder,
    #[module(skip)]
    device: Device,
    #[module(skip)]
    cache_precision: CachePrecision,
}

impl AutoModelForCausalLM {
    /// The same model, of which no gradients are computed: the fast form for evaluation.
    #[must_use]
    pub fn without_autodiff(&self) -> Self {
        let mut model = self.valid();
        model.device = model.device.without_autodiff();
        model
    }

    /// Loads a model from its files.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor.
    pub fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let checkpoint = Checkpoint::open(files)?;
        let name = files.name();
        match checkpoint.gguf() {
            Some(_) => {
                let config = AutoConfig::from_checkpoint(&checkpoint, name)?;
                let source = gguf::Source::new(checkpoint, &config, name)?;
                let weights = Weights::new(source, "", options.clone()).padded_with(padding_idx(&config));
                Self::load(config, weights, options, name)
            }
            None => {
                let config = AutoConfig::from_files(files)?;
                let weights = stored(&config, checkpoint, options);
                Self::load(config, weights, options, name)
            }
        }
    }

    /// A model with fresh parameters, by the seed of `options`.
    ///
    /// # Errors
    /// Where fields of the configuration contradict each other.
    pub fn from_config(config: AutoConfig, options: &LoadOptions) -> Result<Self> {
        let weights = fresh(&config, options);
        Self::load(config, weights, options, "config")
    }

    fn load(config: AutoConfig, weights: Weights, options: &LoadOptions, model: &str) -> Result<Self> {
        Ok(Self {
            decoder: build(&config, &weights, model, AnyConfig::load)?,
            config,
            device: options.device.clone(),
            cache_precision: weights.cache_precision(),
        })
    }
}

/// The parameters of a checkpoint.
pub(crate) fn stored(config: &AutoConfig, checkpoint: Checkpoint, options: &LoadOptions) -> Weights {
    let weights = Weights::new(checkpoint, config.architecture.base(), options.clone());
    initialized(weights, config).stored_as(config.quantization.as_ref())
}

/// The same, whose new parameters begin as the architecture has it.
fn initialized(weights: Weights, config: &AutoConfig) -> Weights {
    let weights = weights
        .initialized_with(initializer_range(config))
        .padded_with(padding_idx(config));
    match &config.architecture {
        AnyConfig::T5(t5) | AnyConfig::Mt5(mt5::Config(t5)) | AnyConfig::Umt5(umt5::Config(t5)) => {
            let t5 = t5.clone();
            weights.distributed(move |name| t5.distribution(name))
        }
        AnyConfig::ModernBert(modernbert) => {
            let modernbert = modernbert.clone();
            weights.distributed(move |name| modernbert.distribution(name))
        }
        AnyConfig::GptOss(_) => {
            let router = Normal::new(initializer_range(config));
            weights.distributed(move |name| name.ends_with(".mlp.router.bias").then_some(router))
        }
        _ => weights,
    }
}

/// Standard deviation of what is initialized.
fn initializer_range(config: &AutoConfig) -> f64 {
    let range = ["initializer_range", "init_std"]
        .iter()
        .find_map(|name| config.json.get(*name)?.as_f64());
    range.unwrap_or(0.02)
}

/// Fresh parameters.
pub(crate) fn fresh(config: &AutoConfig, options: &LoadOptions) -> Weights {
    initialized(Weights::init(options.clone(), 0.0), config)
}

/// The row of the table of tokens that stands for padding, which learns nothing and is initialized with zeros; none where
/// the architecture makes no difference between tokens.
fn padding_idx(config: &AutoConfig) -> Option<usize> {
    let default = match config.model_type.as_str() {
        "bloom" | "falcon" | "gpt2" | "gpt_neox" | "gptj" | "mpt" | "mt5" | "t5" | "umt5" => return None,
        "mpnet" => return Some(1),
        "albert" | "bert" | "big_bird" | "cohere" | "deberta-v2" | "distilbert" | "electra" | "gemma"
        | "gemma2" | "gemma3_text" | "layoutlm" | "nomic_bert" | "pegasus" | "tapas" => Some(0),
        "bart" | "camembert" | "longformer" | "m2m_100" | "mbart" | "olmo2" | "opt" | "plbart"
        | "roberta" | "xlm-roberta" => Some(1),
        "marian" => Some(58_100),
        "modernbert" => Some(50_283),
        "phi3" => Some(32_000),
        "smollm3" => Some(128_004),
        _ => None,
    };
    match config.json.get("pad_token_id").map(Value::as_i64) {
        None => default,
        Some(given) => given.and_then(|id| match id < 0 {
            // Counted from the end.
            true => usize::try_from(config.json.get("vocab_size")?.as_i64()? + id).ok(),
            false => usize::try_from(id).ok(),
        }),
    }
}

/// Builds a model, and checks that nothing is left over.
pub(crate) fn build<M>(
    config: &AutoConfig,
    weights: &Weights,
    model: &str,
    load: impl FnOnce(&AnyConfig, &Weights) -> oxiformers_nn::Result<M>,
) -> Result<M> {
    let built = load(&config.architecture, weights).map_err(Error::of(model))?;
    let ignored = config.architecture.ignored();
    weights.ignore(|name| ignored.iter().any(|suffix| name.ends_with(suffix)));
    weights.finish().map_err(Error::of(model))?;
    weights.prepare();
    Ok(built)
}

impl CausalLM for AutoModelForCausalLM {
    fn vocab_size(&self) -> usize {
        self.decoder.vocab_size()
    }

    fn device(&self) -> Device {
        self.device.clone()
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        self.config.architecture.max_position_embeddings()
    }

    fn new_cache(&self, kind: CacheKind, padding: Vec<usize>) -> Cache {
        self.decoder.new_cache(kind, padding)
    }

    fn cache_precision(&self) -> CachePrecision {
        self.cache_precision
    }

    fn forward(&self, input_ids: Tensor<2, Int>, cache: &mut Cache, logits_for: LogitsFor) -> Tensor<3> {
        self.decoder.forward(input_ids, cache, logits_for)
    }
}

/// An encoder-decoder of any architecture: text in, text out.
#[derive(Module, Debug)]
pub struct AutoModelForSeq2SeqLM {
    /// Its configuration.
    #[module(skip)]
    pub config: AutoConfig,
    /// The model itself.
    pub model: AnySeq2Seq,
    #[module(skip)]
    device: Device,
    #[module(skip)]
    cache_precision: CachePrecision,
}

impl AutoModelForSeq2SeqLM {
    /// The same model, of which no gradients are computed: the fast form for evaluation.
    #[must_use]
    pub fn without_autodiff(&self) -> Self {
        let mut model = self.valid();
        model.device = model.device.without_autodiff();
        model
    }

    /// Loads a model from its files.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor.
    pub fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let config = AutoConfig::from_files(files)?;
        let checkpoint = Checkpoint::open(files)?;
        let weights = stored(&config, checkpoint, options);
        Self::load(config, weights, options, files.name())
    }

    /// A model with fresh parameters, by the seed of `options`.
    ///
    /// # Errors
    /// Where fields of the configuration contradict each other.
    pub fn from_config(config: AutoConfig, options: &LoadOptions) -> Result<Self> {
        let weights = fresh(&config, options);
        Self::load(config, weights, options, "config")
    }

    fn load(config: AutoConfig, weights: Weights, options: &LoadOptions, model: &str) -> Result<Self> {
        Ok(Self {
            model: build(&config, &weights, model, AnyConfig::load_seq2seq)?,
            config,
            device: options.device.clone(),
            cache_precision: weights.cache_precision(),
        })
    }
}

impl CausalLM for AutoModelForSeq2SeqLM {
    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn device(&self) -> Device {
        self.device.clone()
    }

    fn max_position_embeddings(&self) -> Option<usize> {
        self.config.architecture.max_position_embeddings()
    }

    fn new_cache(&self, kind: CacheKind, padding: Vec<usize>) -> Cache {
        self.model.new_cache(kind, padding)
    }

    fn cache_precision(&self) -> CachePrecision {
        self.cache_precision
    }

    fn forward(&self, input_ids: Tensor<2, Int>, cache: &mut Cache, logits_for: LogitsFor) -> Tensor<3> {
        self.model.forward(input_ids, cache, logits_for)
    }

    fn as_seq2seq(&self) -> Option<&dyn Seq2SeqLM> {
        Some(self)
    }
}

impl Seq2SeqLM for AutoModelForSeq2SeqLM {
    fn source_vocab_size(&self) -> usize {
        self.model.source_vocab_size()
    }

    fn encode(&self, input_ids: Tensor<2, Int>, tokens: Vec<Range<usize>>, cache: &mut Cache) {
        self.model.attend_to(&self.model.encode(input_ids, tokens), cache);
    }
}
