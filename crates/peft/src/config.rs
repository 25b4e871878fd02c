//! `adapter_config.json`, with PEFT's names and defaults.

use std::collections::BTreeMap;

use oxiformers_hub::ModelFiles;
use oxiformers_nn::TargetKind;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::pattern;

/// Name of the file.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// An adapter's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct AdapterConfig {
    #[serde(default)]
    pub task_type: Option<String>,
    #[serde(default)]
    pub auto_mapping: Option<Value>,
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    #[serde(default)]
    pub revision: Option<String>,
    #[serde(default)]
    pub inference_mode: bool,
    #[serde(default)]
    pub peft_version: Option<String>,
    #[serde(flatten)]
    pub method: Method,
}

/// What kind of adapter it is: `peft_type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "peft_type")]
pub enum Method {
    /// LoRA, with rsLoRA, DoRA and PiSSA.
    #[serde(rename = "LORA")]
    Lora(LoraConfig),
    /// (IA)³.
    #[serde(rename = "IA3")]
    Ia3(Ia3Config),
    /// VeRA.
    #[serde(rename = "VERA")]
    Vera(VeraConfig),
    /// Embeddings before the text's.
    #[serde(rename = "PROMPT_TUNING")]
    PromptTuning(PromptConfig),
    /// Embeddings before the text's, that a small network makes while they are trained.
    #[serde(rename = "P_TUNING")]
    PTuning(PromptConfig),
    /// Keys and values before the text's, in every layer.
    #[serde(rename = "PREFIX_TUNING")]
    PrefixTuning(PromptConfig),
}

/// A list of names, or a pattern.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Names {
    /// Names of modules, or what these end with.
    List(Vec<String>),
    /// A pattern of whole names, or `all-linear`.
    Pattern(String),
}

impl Names {
    fn contains(&self, name: &str) -> std::result::Result<bool, String> {
        match self {
            Self::List(list) => Ok(list.iter().any(|part| pattern::ends_with(name, part))),
            Self::Pattern(pattern) => pattern::full_match(pattern, name),
        }
    }
}

/// One, or a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T: Clone> OneOrMany<T> {
    fn to_vec(&self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one.clone()],
            Self::Many(many) => many.clone(),
        }
    }
}

/// Which modules are adapted, and which are trained as they are: the fields that methods share.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Targets {
    pub target_modules: Option<Names>,
    pub exclude_modules: Option<Names>,
    pub layers_to_transform: Option<OneOrMany<usize>>,
    pub layers_pattern: Option<OneOrMany<String>>,
    pub modules_to_save: Option<Vec<String>>,
}

impl Targets {
    /// Whether a module is adapted.
    ///
    /// # Errors
    /// A pattern that is none.
    pub fn contains(
        &self,
        name: &str,
        kind: TargetKind,
        task_type: Option<&str>,
    ) -> std::result::Result<bool, String> {
        if let Some(exclude) = &self.exclude_modules
            && exclude.contains(name)?
        {
            return Ok(false);
        }
        if self.saves(name) {
            return Ok(false);
        }
        let list = match &self.target_modules {
            None => return Ok(false),
            Some(Names::Pattern(all)) if all.eq_ignore_ascii_case("all-linear") => {
                // What makes logits is left out, and of a classifier its head.
                let head = task_type == Some("SEQ_CLS")
                    && ["score", "classifier"]
                        .iter()
                        .any(|head| name.split('.').next() == Some(head));
                return Ok(!head && !matches!(kind, TargetKind::Embedding | TargetKind::Output));
            }
            Some(Names::Pattern(pattern)) => return pattern::full_match(pattern, name),
            Some(Names::List(list)) => list,
        };
        if list.iter().any(|target| target == name) {
            return Ok(true);
        }
        if !list.iter().any(|target| pattern::ends_with(name, target)) {
            return Ok(false);
        }
        let layers = self
            .layers_to_transform
            .as_ref()
            .map(OneOrMany::to_vec)
            .unwrap_or_default();
        if layers.is_empty() {
            return Ok(true);
        }
        let lists = self
            .layers_pattern
            .as_ref()
            .map(OneOrMany::to_vec)
            .unwrap_or_default();
        Ok(pattern::layer_index(name, &lists).is_some_and(|index| layers.contains(&index)))
    }

    /// Whether a module is trained as it is, and saved with the adapter.
    pub fn saves(&self, name: &str) -> bool {
        let saved = self.modules_to_save.iter().flatten();
        saved.into_iter().any(|module| pattern::is_within(name, module))
    }
}

/// The modules that LoRA adapts in models of this type where `target_modules` names none; `None` for types of which PEFT
/// knows none.
pub fn default_targets(model_type: &str) -> Option<&'static [&'static str]> {
    Some(match model_type {
        "t5" | "mt5" => &["q", "v"],
        "gpt2" => &["c_attn"],
        "bloom" | "gpt_neox" | "falcon" => &["query_key_value"],
        "bert" | "roberta" | "xlm-roberta" | "electra" | "layoutlm" => &["query", "value"],
        "deberta-v2" => &["query_proj", "value_proj"],
        "mpt" => &["Wqkv"],
        "phi" => &["q_proj", "v_proj", "fc1", "fc2"],
        "bart" | "opt" | "gptj" | "llama" | "mistral" | "mixtral" | "stablelm" | "gemma" | "gemma2"
        | "gemma3_text" | "qwen2" | "qwen3" => &["q_proj", "v_proj"],
        _ => return None,
    })
}

/// Which biases are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// All of the model.
    All,
    /// Those of modules that are adapted.
    #[serde(alias = "vera_only")]
    LoraOnly,
}

/// How LoRA's matrices begin: true, false, or a name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum InitLora {
    /// The default, where the adapter begins by changing nothing; or random, so that it does.
    Default(bool),
    /// `gaussian`, `pissa`, `pissa_niter_16`, `olora`, …
    Named(String),
}

/// LoRA (Hu et al., 2021).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct LoraConfig {
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub fan_in_fan_out: bool,
    pub bias: Bias,
    pub use_rslora: bool,
    pub init_lora_weights: InitLora,
    pub rank_pattern: BTreeMap<String, usize>,
    pub alpha_pattern: BTreeMap<String, f64>,
    pub use_dora: bool,
    pub lora_bias: bool,
    #[serde(flatten)]
    pub targets: Targets,
    /// Fields that are not known here, or whose default is all that is.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            fan_in_fan_out: false,
            bias: Bias::None,
            use_rslora: false,
            init_lora_weights: InitLora::Default(true),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            use_dora: false,
            lora_bias: false,
            targets: Targets::default(),
            other: Map::new(),
        }
    }
}

impl LoraConfig {
    /// The rank of a module.
    ///
    /// # Errors
    /// A pattern that is none.
    pub fn rank(&self, name: &str) -> std::result::Result<usize, String> {
        Ok(find(&self.rank_pattern, name)?.unwrap_or(self.r))
    }

    /// What a product of this rank is multiplied by in a module.
    ///
    /// # Errors
    /// A pattern that is none.
    pub fn scaling(&self, name: &str, rank: usize) -> std::result::Result<f64, String> {
        let alpha = find(&self.alpha_pattern, name)?.unwrap_or(self.lora_alpha);
        let rank = rank.max(1) as f64;
        Ok(alpha / if self.use_rslora { rank.sqrt() } else { rank })
    }

    /// Fields that change what is computed, and that are not known here.
    fn unsupported(&self) -> Option<&str> {
        const FIELDS: [&str; 11] = [
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "layer_replication",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_qalora",
            "velora_config",
            "ensure_weight_tying",
        ];
        FIELDS.into_iter().find(|field| match self.other.get(*field) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(_) => true,
        })
    }
}

/// The value of the first key that a name ends with.
fn find<T: Copy>(patterns: &BTreeMap<String, T>, name: &str) -> std::result::Result<Option<T>, String> {
    for (key, value) in patterns {
        if pattern::ends_with_pattern(key, name)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// (IA)³ (Liu et al., 2022).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Ia3Config {
    pub feedforward_modules: Option<Names>,
    pub fan_in_fan_out: bool,
    pub init_ia3_weights: bool,
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for Ia3Config {
    fn default() -> Self {
        Self {
            feedforward_modules: None,
            fan_in_fan_out: false,
            init_ia3_weights: true,
            targets: Targets::default(),
        }
    }
}

impl Ia3Config {
    /// Whether a module's inputs are scaled, not its outputs.
    ///
    /// # Errors
    /// A pattern that is none.
    pub fn is_feedforward(&self, name: &str) -> std::result::Result<bool, String> {
        match &self.feedforward_modules {
            None => Ok(false),
            // Here, names need not begin after a point.
            Some(Names::List(list)) => Ok(list.iter().any(|part| name.ends_with(part.as_str()))),
            Some(Names::Pattern(pattern)) => pattern::full_match(pattern, name),
        }
    }
}

/// VeRA (Kopiczko et al., 2024).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct VeraConfig {
    pub r: usize,
    pub projection_prng_key: u64,
    pub save_projection: bool,
    pub vera_dropout: f64,
    pub d_initial: f64,
    pub fan_in_fan_out: bool,
    pub bias: Bias,
    pub init_weights: bool,
    #[serde(flatten)]
    pub targets: Targets,
}

impl Default for VeraConfig {
    fn default() -> Self {
        Self {
            r: 256,
            projection_prng_key: 0,
            save_projection: true,
            vera_dropout: 0.0,
            d_initial: 0.1,
            fan_in_fan_out: false,
            bias: Bias::None,
            init_weights: true,
            targets: Targets::default(),
        }
    }
}

/// Virtual tokens, of all kinds.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct PromptConfig {
    pub num_virtual_tokens: usize,
    pub token_dim: Option<usize>,
    pub num_transformer_submodules: Option<usize>,
    pub num_attention_heads: Option<usize>,
    pub num_layers: Option<usize>,
    pub modules_to_save: Option<Vec<String>>,
    /// Fields that only matter while the prompt is trained, and those not known here.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl AdapterConfig {
    /// An adapter of this kind.
    pub fn new(method: Method) -> Self {
        Self {
            task_type: None,
            auto_mapping: None,
            base_model_name_or_path: None,
            revision: None,
            inference_mode: false,
            peft_version: None,
            method,
        }
    }

    /// Reads `adapter_config.json`.
    ///
    /// # Errors
    /// Where there is none, a field does not fit, or one asks for what is not known here.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        let json = files.json::<Value>(CONFIG_FILE)?.ok_or_else(|| Error::NoConfig {
            place: files.name().to_string(),
        })?;
        Self::from_json(json, files.name())
    }

    /// Reads the contents of an `adapter_config.json`; `place` is what messages call it.
    ///
    /// # Errors
    /// As [`from_files`](Self::from_files).
    pub fn from_json(json: Value, place: &str) -> Result<Self> {
        let wrong = |message: String| Error::Config {
            place: place.to_string(),
            message,
        };
        const KINDS: [&str; 6] = [
            "LORA",
            "IA3",
            "VERA",
            "PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
        ];
        match json.get("peft_type").and_then(Value::as_str) {
            Some(kind) if KINDS.contains(&kind) => {}
            Some(kind) => {
                return Err(wrong(format!(
                    "`peft_type` is {kind}; known are {}",
                    KINDS.join(", ")
                )));
            }
            None => return Err(wrong("`peft_type` is missing".to_string())),
        }
        let mut fields = json;
        if let Value::Object(map) = &mut fields {
            // Fields written as null mean their default.
            map.retain(|_, value| !value.is_null());
        }
        let config: Self = serde_json::from_value(fields).map_err(|error| wrong(error.to_string()))?;
        if let Method::Lora(lora) = &config.method
            && let Some(field) = lora.unsupported()
        {
            return Err(wrong(format!("`{field}` is not supported")));
        }
        Ok(config)
    }

    /// Which modules are adapted; none for virtual tokens.
    pub fn targets(&self) -> Option<&Targets> {
        match &self.method {
            Method::Lora(config) => Some(&config.targets),
            Method::Ia3(config) => Some(&config.targets),
            Method::Vera(config) => Some(&config.targets),
            Method::PromptTuning(_) | Method::PTuning(_) | Method::PrefixTuning(_) => None,
        }
    }

    /// What PEFT calls the kind.
    pub fn peft_type(&self) -> &'static str {
        match &self.method {
            Method::Lora(_) => "LORA",
            Method::Ia3(_) => "IA3",
            Method::Vera(_) => "VERA",
            Method::PromptTuning(_) => "PROMPT_TUNING",
            Method::PTuning(_) => "P_TUNING",
            Method::PrefixTuning(_) => "PREFIX_TUNING",
        }
    }
}
