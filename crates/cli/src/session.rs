//! What all commands that run a model share: finding it, loading it, and how it generates.

use std::sync::Arc;

use anyhow::bail;
use oxiformers::hub::{Bars, FetchOptions, ModelFiles, Source, default_chat_model, resolve};
use oxiformers::models::registry::Kind;
use oxiformers::nn::LoadOptions;
use oxiformers::peft::{Adapter, Method};
use oxiformers::quant::{MethodOptions, QuantizationConfig};
use oxiformers::{
    AutoConfig, CacheConfig, CausalLM, GenerationConfig, Generator, LanguageModel, Seq2SeqModel, Tokenizer,
    device, with_base,
};
use serde_json::{Map, Value};

use crate::args::{CacheArgs, Dtype, KvCache, RunArgs, SamplingArgs};

/// Where models come from, with progress bars.
pub fn fetch_options() -> FetchOptions {
    FetchOptions::from_env().with_progress(Bars::new())
}

/// The files of a model; SmolLM2-135M-Instruct when none is named.
pub fn files(model: Option<&str>) -> anyhow::Result<ModelFiles> {
    let options = fetch_options();
    Ok(match model {
        Some(model) => resolve(&model.parse::<Source>()?, &options)?,
        None => default_chat_model(&options, &mut |line| eprintln!("{line}"))?,
    })
}

/// The files of a model and how it is to be loaded; of what is only an adapter, those of its base model, with it.
pub fn model(model: Option<&str>, run: &RunArgs) -> anyhow::Result<(ModelFiles, LoadOptions)> {
    let mut options = options(run)?;
    let (files, own) = with_base::<anyhow::Error>(files(model)?, |name| files(Some(name)))?;
    options
        .adapters
        .splice(0..0, own.into_iter().map(|adapter| adapter as _));
    Ok((files, options))
}

/// An adapter, and its weight: `PATH` or `PATH=WEIGHT`.
pub fn adapter(given: &str) -> anyhow::Result<Adapter> {
    let weighted = given
        .rsplit_once('=')
        .and_then(|(place, weight)| Some((place, weight.parse::<f32>().ok()?)));
    let (place, weight) = weighted.unwrap_or((given, 1.0));
    let adapter = Adapter::from_files(&files(Some(place))?, place)?;
    if weight != 1.0 {
        if !matches!(adapter.config().method, Method::Lora(_) | Method::Vera(_)) {
            bail!(
                "{given}: {} adapters have no weight",
                adapter.config().peft_type()
            );
        }
        adapter.switch().set_weight(weight);
    }
    Ok(adapter)
}

/// Loads a language model.
pub fn load(name: Option<&str>, run: &RunArgs) -> anyhow::Result<LanguageModel> {
    let (files, options) = model(name, run)?;
    Ok(LanguageModel::from_files(&files, &options)?)
}

/// A model that answers a text with a text: by continuing it, or by an encoder that reads and a decoder that writes.
pub enum TextModel {
    Language(Box<LanguageModel>),
    Seq2Seq(Box<Seq2SeqModel>),
}

impl TextModel {
    /// Loads a model of either kind.
    pub fn load(name: &str, run: &RunArgs) -> anyhow::Result<Self> {
        let (files, options) = model(Some(name), run)?;
        let kind = match files.gguf() {
            Some(_) => Kind::Decoder,
            None => AutoConfig::from_files(&files)?.architecture.kind(),
        };
        Ok(match kind {
            Kind::EncoderDecoder => Self::Seq2Seq(Box::new(Seq2SeqModel::from_files(&files, &options)?)),
            _ => Self::Language(Box::new(LanguageModel::from_files(&files, &options)?)),
        })
    }

    /// The model for texts in one language and answers in another.
    pub fn with_languages(self, source: Option<&str>, target: Option<&str>) -> anyhow::Result<Self> {
        if source.is_none() && target.is_none() {
            return Ok(self);
        }
        match self {
            Self::Seq2Seq(model) => Ok(Self::Seq2Seq(Box::new(model.with_languages(source, target)?))),
            Self::Language(model) => bail!(
                "--src-lang, --tgt-lang: {} is a language model; say in the prompt what to translate",
                model.name
            ),
        }
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        match self {
            Self::Language(model) => &model.tokenizer,
            Self::Seq2Seq(model) => &model.tokenizer,
        }
    }

    pub fn generation_config(&self) -> &GenerationConfig {
        match self {
            Self::Language(model) => &model.generation_config,
            Self::Seq2Seq(model) => &model.generation_config,
        }
    }

    pub fn network(&self) -> &dyn CausalLM {
        match self {
            Self::Language(model) => &model.model,
            Self::Seq2Seq(model) => &model.model,
        }
    }

    pub fn generator(&self, config: GenerationConfig) -> Generator<'_> {
        Generator::new(self.network(), config).with_tokenizer(self.tokenizer())
    }
}

/// How a model is to be loaded.
pub fn options(run: &RunArgs) -> anyhow::Result<LoadOptions> {
    if let Some(threads) = run.threads {
        device::set_threads(threads.into());
    }
    let dtype = match run.dtype {
        Dtype::Auto => None,
        Dtype::F32 => Some(oxiformers::FloatDType::F32),
        Dtype::F16 => Some(oxiformers::FloatDType::F16),
        Dtype::Bf16 => Some(oxiformers::FloatDType::BF16),
    };
    let quantization = match run.quantize.as_deref() {
        Some(name) => {
            let config = QuantizationConfig::named(name, &MethodOptions::default())?;
            if config.is_calibrated() {
                bail!(
                    "{name} looks at a text first: `oxiformers quantize MODEL --method {name} --calibration FILE` writes a model that is then loaded as it is"
                );
            }
            Some(Arc::new(config.into()))
        }
        None => None,
    };
    let adapters = run.adapter.iter().map(|given| Ok(Arc::new(adapter(given)?) as _));
    Ok(LoadOptions {
        device: device::parse(&run.device)?,
        dtype,
        quantization,
        quantize_output: run.quantize_output,
        adapters: adapters.collect::<anyhow::Result<_>>()?,
        ..LoadOptions::default()
    })
}

impl CacheArgs {
    /// The settings with the cache that the command line names, if it names one.
    pub fn apply(self, mut config: GenerationConfig) -> GenerationConfig {
        let nbits = match self.kv_cache {
            None => return config,
            Some(KvCache::F32) => 32,
            Some(KvCache::F16) => 16,
            Some(KvCache::Int8) => 8,
            Some(KvCache::Int4) => 4,
            Some(KvCache::Int2) => 2,
        };
        config.cache_implementation = Some("quantized".to_string());
        config.cache_config = Some(CacheConfig {
            nbits,
            ..config.cache_config.unwrap_or_default()
        });
        config
    }
}

impl SamplingArgs {
    /// The model's settings, changed as the command line says.
    pub fn apply(&self, mut config: GenerationConfig) -> anyhow::Result<GenerationConfig> {
        if self.max_new_tokens.is_some() {
            config.max_new_tokens = self.max_new_tokens;
        }
        let draws = self.temperature.is_some()
            || self.top_k.is_some()
            || self.top_p.is_some()
            || self.min_p.is_some();
        config.do_sample = !self.greedy && (config.do_sample || draws);
        config.temperature = self.temperature.unwrap_or(config.temperature);
        config.top_k = self.top_k.unwrap_or(config.top_k);
        config.top_p = self.top_p.unwrap_or(config.top_p);
        config.min_p = self.min_p.or(config.min_p);
        config.repetition_penalty = self.repetition_penalty.unwrap_or(config.repetition_penalty);
        config.num_beams = self.num_beams.unwrap_or(config.num_beams);
        config.stop_strings.extend(self.stop.iter().cloned());
        config.seed = self.seed.or(config.seed);
        config = self.cache.apply(config);
        for setting in &self.set {
            config = set(&config, setting)?;
        }
        config.validate()?;
        Ok(config)
    }
}

/// All settings by their names.
pub fn settings(config: &GenerationConfig) -> anyhow::Result<Map<String, Value>> {
    match serde_json::to_value(config)? {
        Value::Object(fields) => Ok(fields),
        _ => Ok(Map::new()),
    }
}

/// Settings that say how to draw, and so turn drawing on.
const DRAWING: [&str; 8] = [
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
];

/// Reads `name=value`, the value in JSON or a plain text.
pub fn setting(text: &str) -> anyhow::Result<(&str, Value)> {
    let Some((name, value)) = text.split_once('=') else {
        bail!("`{text}`: write it as name=value, such as temperature=0.2");
    };
    let value = value.trim();
    Ok((
        name.trim(),
        serde_json::from_str(value).unwrap_or_else(|_| value.into()),
    ))
}

/// Changes a setting by `name=value`, the value in JSON or a plain text.
pub fn set(config: &GenerationConfig, setting: &str) -> anyhow::Result<GenerationConfig> {
    let (name, value) = self::setting(setting)?;
    let mut fields = settings(config)?;
    if !fields.contains_key(name) {
        let names = fields.keys().map(String::as_str).collect::<Vec<_>>();
        bail!("there is no setting `{name}`; it is one of {}", names.join(", "));
    }
    fields.insert(name.to_string(), value);
    if DRAWING.contains(&name) {
        fields.insert("do_sample".into(), true.into());
    }
    Ok(GenerationConfig::from_json(fields, setting)?)
}
