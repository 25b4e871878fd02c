//! Sentence embeddings (Reimers and Gurevych, 2019): an encoder and the modules that make one vector of what it says
//! of each token, as `modules.json` of sentence-transformers lists them.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{Bool, Tensor, TensorData};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::Checkpoint;
use oxiformers_nn::{Activation, EncoderInputs, LayerNorm, Linear, LoadOptions, Weights};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::AutoModel;
use crate::error::{Error, Result};

/// How the hidden states of a sentence's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolingMode {
    /// The first token's.
    Cls,
    /// The largest of each dimension.
    Max,
    /// The mean.
    Mean,
    /// The sum, divided by the square root of the number of tokens.
    MeanSqrtLenTokens,
    /// The mean, the first token counted once, the second twice and so on.
    #[serde(rename = "weightedmean")]
    WeightedMean,
    /// The last token's.
    #[serde(rename = "lasttoken")]
    LastToken,
}

/// The fields of older configurations, in the order in which vectors are put side by side.
const SWITCHES: [(&str, PoolingMode); 6] = [
    ("pooling_mode_cls_token", PoolingMode::Cls),
    ("pooling_mode_max_tokens", PoolingMode::Max),
    ("pooling_mode_mean_tokens", PoolingMode::Mean),
    (
        "pooling_mode_mean_sqrt_len_tokens",
        PoolingMode::MeanSqrtLenTokens,
    ),
    ("pooling_mode_weightedmean_tokens", PoolingMode::WeightedMean),
    ("pooling_mode_lasttoken", PoolingMode::LastToken),
];

impl PoolingMode {
    /// `[batch, seq, hidden_size]` to `[batch, hidden_size]`. Of each sentence, the tokens after `skip` count.
    pub fn pool(self, x: Tensor<3>, sentences: &[Range<usize>], skip: usize) -> Tensor<2> {
        let [batch, seq, hidden] = x.dims();
        let device = x.device();
        let counted = |sentence: &Range<usize>| (sentence.start + skip).min(sentence.end)..sentence.end;
        if self == Self::Max {
            let hidden_tokens = |sentence: &Range<usize>| {
                let counted = counted(sentence);
                (0..seq).map(move |i| !counted.contains(&i))
            };
            let mask: Vec<bool> = sentences.iter().flat_map(hidden_tokens).collect();
            let mask = Tensor::<3, Bool>::from_data(TensorData::new(mask, [batch, seq, 1]), &device);
            let x = x.mask_fill(mask.expand([batch, seq, hidden]), f32::NEG_INFINITY);
            return x.max_dim(1).squeeze_dim(1);
        }
        // All others are sums with weights: one product.
        let weight_of = |sentence: &Range<usize>| {
            let counted = counted(sentence);
            let (first, last) = (counted.start, counted.end.saturating_sub(1));
            let start = sentence.start;
            let len = counted.len() as f32;
            // Positions count from the first token, whatever is skipped.
            let positions: f32 = counted.clone().map(|i| (i + 1 - start) as f32).sum();
            (0..seq).map(move |i| match self {
                _ if !counted.contains(&i) => 0.0,
                Self::Cls => f32::from(i == first),
                Self::LastToken => f32::from(i == last),
                Self::MeanSqrtLenTokens => len.sqrt().recip(),
                Self::WeightedMean => (i + 1 - start) as f32 / positions,
                Self::Mean | Self::Max => len.recip(),
            })
        };
        let weights: Vec<f32> = sentences.iter().flat_map(weight_of).collect();
        let weights = Tensor::<3>::from_data(TensorData::new(weights, [batch, 1, seq]), &device);
        weights.cast(x.dtype()).matmul(x).squeeze_dim(1)
    }
}

/// One step after the encoder.
#[derive(Debug)]
enum Module {
    Pooling {
        modes: Vec<PoolingMode>,
        /// Whether the tokens of a prompt count.
        include_prompt: bool,
    },
    Dense {
        linear: Linear,
        act: Option<Activation>,
        /// Whether the input is added, and through which layer where widths differ.
        residual: Option<Option<Linear>>,
    },
    LayerNorm(LayerNorm),
    Normalize,
}

#[derive(Deserialize)]
struct ModuleEntry {
    #[serde(default)]
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

/// `sentence_bert_config.json`.
#[derive(Deserialize, Default)]
#[serde(default)]
struct TransformerConfig {
    max_seq_length: Option<usize>,
    do_lower_case: bool,
}

/// `config_sentence_transformers.json`.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Prompts {
    prompts: BTreeMap<String, Option<String>>,
    default_prompt_name: Option<String>,
}

/// An encoder that makes one vector of a sentence.
#[derive(Debug)]
pub struct SentenceModel {
    /// The encoder.
    pub model: AutoModel,
    /// The longest sentence in tokens, if it is limited more than the encoder is.
    pub max_seq_length: Option<usize>,
    /// Whether sentences are turned to lower case first.
    pub do_lower_case: bool,
    /// Texts that are put before a sentence, by what they are for.
    pub prompts: BTreeMap<String, String>,
    /// Which of them stands before a sentence when none is named.
    pub default_prompt_name: Option<String>,
    /// The folder of the encoder and its tokenizer within the model's files; empty for these themselves.
    pub place: String,
    modules: Vec<Module>,
}

impl SentenceModel {
    /// Loads the model that `modules.json` describes; without that file, the mean over an encoder's hidden states.
    ///
    /// # Errors
    /// Whatever does not fit is named: the file, the field, the tensor.
    pub fn from_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let listed: Option<Vec<ModuleEntry>> = files.json("modules.json")?;
        let mut entries = listed.unwrap_or_default().into_iter();
        let first = entries.next();
        if let Some(first) = first.as_ref().filter(|first| kind(&first.kind) != "Transformer") {
            let message = format!("begins with `{}`, which is no Transformer", first.kind);
            return Err(bad(files, "modules.json", message));
        }
        let place = first.as_ref().map_or("", |first| first.path.as_str());
        let encoder = files.folder(place);
        // The tokenizer's limits stand in a file that is named after the architecture in the oldest models.
        let settings = encoder
            .names()
            .find(|name| name.starts_with("sentence_") && name.ends_with("_config.json"))
            .map(str::to_owned);
        let settings: TransformerConfig = match settings {
            Some(name) => encoder.json(&name)?.unwrap_or_default(),
            None => TransformerConfig::default(),
        };
        let prompts: Prompts = files
            .json("config_sentence_transformers.json")?
            .unwrap_or_default();
        let mut modules = entries
            .filter(|entry| kind(&entry.kind) != "Dropout")
            .map(|entry| module(files, &entry, options))
            .collect::<Result<Vec<_>>>()?;
        if first.is_none() {
            modules.push(Module::Pooling {
                modes: vec![PoolingMode::Mean],
                include_prompt: true,
            });
        }
        if !matches!(modules.first(), Some(Module::Pooling { .. })) {
            let message = "names no Pooling after the Transformer".to_string();
            return Err(bad(files, "modules.json", message));
        }
        if modules
            .iter()
            .skip(1)
            .any(|module| matches!(module, Module::Pooling { .. }))
        {
            return Err(bad(files, "modules.json", "names Pooling twice".to_string()));
        }
        Ok(Self {
            model: AutoModel::from_files(&encoder, options)?,
            max_seq_length: settings.max_seq_length,
            do_lower_case: settings.do_lower_case,
            prompts: (prompts.prompts.into_iter())
                .filter_map(|(name, prompt)| Some((name, prompt?)))
                .collect(),
            default_prompt_name: prompts.default_prompt_name,
            place: place.to_string(),
            modules,
        })
    }

    /// Embeddings `[batch, dimension]`. `prompt_tokens` is how many tokens of each sequence are a prompt, which some
    /// models leave out of the vector.
    ///
    /// # Errors
    /// Where the inputs do not fit the model: an id outside of the vocabulary, a sequence that is too long.
    pub fn forward(&self, inputs: &EncoderInputs, prompt_tokens: usize) -> Result<Tensor<2>> {
        let tokens = self.model.forward(inputs)?.last_hidden_state;
        let mut x = Tensor::zeros([0, 0], &tokens.device());
        for module in &self.modules {
            x = match module {
                Module::Pooling {
                    modes,
                    include_prompt,
                } => {
                    let skip = if *include_prompt { 0 } else { prompt_tokens };
                    let pool = |mode: &PoolingMode| mode.pool(tokens.clone(), &inputs.tokens, skip);
                    Tensor::cat(modes.iter().map(pool).collect(), 1)
                }
                Module::Dense {
                    linear,
                    act,
                    residual,
                } => {
                    let y = linear.forward(x.clone());
                    let y = act.map_or(y.clone(), |act| act.forward(y));
                    match residual {
                        None => y,
                        Some(None) => y + x,
                        Some(Some(residual)) => y + residual.forward(x),
                    }
                }
                Module::LayerNorm(norm) => norm.forward(x),
                Module::Normalize => {
                    let length = x.clone().square().sum_dim(1).sqrt().clamp_min(1e-12);
                    x / length
                }
            };
        }
        Ok(x)
    }
}

/// The last part of a Python class's name.
fn kind(class: &str) -> &str {
    class.rsplit('.').next().unwrap_or(class)
}

fn bad(files: &ModelFiles, file: &str, message: String) -> Error {
    Error::File {
        file: files.describe(file),
        message,
    }
}

/// The step that an entry of `modules.json` describes.
fn module(files: &ModelFiles, entry: &ModuleEntry, options: &LoadOptions) -> Result<Module> {
    let folder = files.folder(&entry.path);
    let file = "config.json";
    let config: Map<String, Value> = folder.json(file)?.unwrap_or_default();
    let fail = |message: String| bad(&folder, file, message);
    let flag = |name: &str| config.get(name).and_then(Value::as_bool);
    let size = |name: &str| {
        let size = config
            .get(name)
            .and_then(Value::as_u64)
            .filter(|size| *size < 1 << 24);
        size.map(|size| size as usize)
            .ok_or_else(|| fail(format!("`{name}` is missing, or no size")))
    };
    for name in ["module_input_name", "module_output_name"] {
        match config.get(name) {
            None | Some(Value::Null) => {}
            Some(Value::String(key)) if key == "sentence_embedding" => {}
            Some(other) => {
                return Err(fail(format!(
                    "`{name}` is {other}; only `sentence_embedding` is supported"
                )));
            }
        }
    }
    let weights = || Ok::<_, Error>(Weights::new(Checkpoint::open(&folder)?, "", options.clone()));
    match kind(&entry.kind) {
        "Pooling" => {
            let modes: Vec<PoolingMode> = match config.get("pooling_mode") {
                Some(list @ Value::Array(_)) => Deserialize::deserialize(list),
                Some(one) => Deserialize::deserialize(one).map(|one| vec![one]),
                None => Ok((SWITCHES.iter().filter(|(name, _)| flag(name) == Some(true)))
                    .map(|(_, mode)| *mode)
                    .collect()),
            }
            .map_err(|error| fail(format!("`pooling_mode`: {error}")))?;
            Ok(Module::Pooling {
                modes: if modes.is_empty() {
                    vec![PoolingMode::Mean]
                } else {
                    modes
                },
                include_prompt: flag("include_prompt").unwrap_or(true),
            })
        }
        "Dense" => {
            let act = match config
                .get("activation_function")
                .and_then(Value::as_str)
                .map(kind)
            {
                None | Some("Tanh") => Some(Activation::Tanh),
                Some("Identity") => None,
                Some("ReLU") => Some(Activation::Relu),
                Some("GELU") => Some(Activation::Gelu),
                Some("SiLU") => Some(Activation::Silu),
                Some("Sigmoid") => Some(Activation::Sigmoid),
                Some(other) => {
                    return Err(fail(format!("`activation_function`: `{other}` is not supported")));
                }
            };
            let (width, out, weights) = (size("in_features")?, size("out_features")?, weights()?);
            let load = || {
                let linear = Linear::load(&weights.pp("linear"), width, out, flag("bias").unwrap_or(true))?;
                let residual = match (flag("use_residual").unwrap_or(false), width == out) {
                    (false, _) => None,
                    (true, true) => Some(None),
                    (true, false) => Some(Some(Linear::load(&weights.pp("residual"), width, out, false)?)),
                };
                weights.finish()?;
                Ok(Module::Dense {
                    linear,
                    act,
                    residual,
                })
            };
            load().map_err(Error::of(folder.name()))
        }
        "LayerNorm" => {
            let (width, weights) = (size("dimension")?, weights()?);
            let load = || {
                let norm = LayerNorm::load(&weights.pp("norm"), width, 1e-5, true)?;
                weights.finish()?;
                Ok(Module::LayerNorm(norm))
            };
            load().map_err(Error::of(folder.name()))
        }
        "Normalize" => Ok(Module::Normalize),
        _ => {
            let message = format!(
                "`{}` is not supported; known are Pooling, Dense, LayerNorm, Normalize",
                entry.kind
            );
            Err(bad(files, "modules.json", message))
        }
    }
}
