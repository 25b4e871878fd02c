//! `quantization_config`: how a checkpoint says which scheme it is stored in.

use std::fmt::Debug;
use std::sync::Arc;

use regex::Regex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Scheme;
use crate::awq::AwqConfig;
use crate::bitnet::BitNetQuantConfig;
use crate::bitsandbytes::BitsAndBytesConfig;
use crate::compressed_tensors::CompressedTensorsConfig;
use crate::fp8::FineGrainedFP8Config;
use crate::gptq::GptqConfig;
use crate::hqq::HqqConfig;
use crate::mxfp4::Mxfp4Config;

/// What is wrong with a `quantization_config`, or with how a model is to be quantized.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// The settings of one method, with the fields and defaults that Transformers gives them.
pub trait Method: Debug + Clone + Serialize + DeserializeOwned {
    /// Checks what the types of the fields allow.
    ///
    /// # Errors
    /// Names the field, and what it can be.
    fn validate(&self) -> Result<(), String>;

    /// The schemes by which stored modules are recognized.
    fn stored(&self) -> Vec<Arc<dyn Scheme>>;

    /// The scheme that a module (`model.layers.0.mlp.up_proj`) becomes, where the modules to be left out do not matter.
    ///
    /// # Errors
    /// Why nothing can be quantized so.
    fn scheme(&self, module: &str) -> Result<Option<Arc<dyn Scheme>>, String>;

    /// Whether checkpoints hold floats that are quantized while they are loaded.
    fn on_load(&self) -> bool {
        false
    }

    /// The modules that are left as they are; `None` stands for the model's own choice, which is those that make logits.
    fn skipped(&self) -> Option<&[String]>;

    /// Sets the modules that are left as they are.
    fn skip(&mut self, modules: Vec<String>);

    /// Leaves output layers as they are, where the original library does so only if they are named: either because others
    /// are, or always.
    fn keep_outputs(&mut self, modules: Vec<String>) {
        if let Some(skipped) = self.skipped() {
            let mut all = skipped.to_vec();
            all.extend(modules.into_iter().filter(|module| !skipped.contains(module)));
            self.skip(all);
        }
    }

    /// Whether a module is one of [`skipped`](Self::skipped).
    ///
    /// # Errors
    /// Names a pattern that is no regular expression.
    fn skips(&self, module: &str) -> Result<bool, String> {
        let skipped = self.skipped().unwrap_or_default();
        skipped
            .iter()
            .try_fold(false, |found, pattern| Ok(found || matches(pattern, module)?))
    }
}

macro_rules! methods {
    ($($(#[$doc:meta])* $variant:ident($config:ty) = $name:literal;)+) => {
        /// The `quantization_config` of a `config.json`: `quant_method` and its settings.
        #[derive(Debug, Clone, Serialize, Deserialize)]
        #[serde(tag = "quant_method")]
        pub enum QuantizationConfig {
            $($(#[$doc])* #[serde(rename = $name)] $variant($config),)+
        }

        $(impl From<$config> for QuantizationConfig {
            fn from(config: $config) -> Self {
                Self::$variant(config)
            }
        })+

        impl QuantizationConfig {
            /// Every `quant_method` that can be read.
            pub const METHODS: &[&str] = &[$($name),+];

            /// The `quant_method`.
            pub fn method(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $name,)+
                }
            }

            fn validate(&self) -> Result<(), String> {
                match self {
                    $(Self::$variant(config) => config.validate(),)+
                }
            }

            /// See [`Method::stored`].
            pub fn stored(&self) -> Vec<Arc<dyn Scheme>> {
                match self {
                    $(Self::$variant(config) => config.stored(),)+
                }
            }

            /// The scheme that a module becomes. `makes_logits` says that it is what Transformers leaves as it is unless
            /// told otherwise: an output layer.
            ///
            /// # Errors
            /// Why nothing can be quantized so.
            pub fn scheme(
                &self,
                module: &str,
                makes_logits: bool,
            ) -> Result<Option<Arc<dyn Scheme>>, ConfigError> {
                match self {
                    $(Self::$variant(config) => {
                        let kept = match config.skipped() {
                            None => makes_logits,
                            Some(_) => config.skips(module).map_err(ConfigError)?,
                        };
                        if kept { Ok(None) } else { config.scheme(module).map_err(ConfigError) }
                    })+
                }
            }

            /// See [`Method::on_load`].
            pub fn on_load(&self) -> bool {
                match self {
                    $(Self::$variant(config) => config.on_load(),)+
                }
            }

            /// See [`Method::skipped`].
            pub fn skipped(&self) -> Option<&[String]> {
                match self {
                    $(Self::$variant(config) => config.skipped(),)+
                }
            }

            /// See [`Method::keep_outputs`].
            pub fn keep_outputs(&mut self, modules: Vec<String>) {
                match self {
                    $(Self::$variant(config) => config.keep_outputs(modules),)+
                }
            }

            /// See [`Method::skip`].
            pub fn skip(&mut self, modules: Vec<String>) {
                match self {
                    $(Self::$variant(config) => config.skip(modules),)+
                }
            }
        }
    };
}

methods! {
    /// LLM.int8(), NF4 and FP4.
    BitsAndBytes(BitsAndBytesConfig) = "bitsandbytes";
    /// Codes that calibration chose.
    Gptq(GptqConfig) = "gptq";
    /// Codes of weights that calibration scaled.
    Awq(AwqConfig) = "awq";
    /// Codes with zero points that need no calibration.
    Hqq(HqqConfig) = "hqq";
    /// -1, 0 and 1.
    BitNet(BitNetQuantConfig) = "bitnet";
    /// llm-compressor's.
    CompressedTensors(CompressedTensorsConfig) = "compressed-tensors";
    /// Floats of 8 bits.
    Fp8(FineGrainedFP8Config) = "fp8";
    /// Blocks of 32 floats of 4 bits, as gpt-oss stores its experts.
    Mxfp4(Mxfp4Config) = "mxfp4";
}

impl QuantizationConfig {
    /// Whether the method looks at what weights are multiplied with.
    pub fn is_calibrated(&self) -> bool {
        matches!(self, Self::Gptq(_) | Self::Awq(_))
    }

    /// Reads a `quantization_config`.
    ///
    /// # Errors
    /// A method that is unknown, or a field that does not fit.
    pub fn from_json(json: &Value) -> Result<Self, ConfigError> {
        let Value::Object(fields) = json else {
            return Err(ConfigError("is no object".to_string()));
        };
        let mut fields = fields.clone();
        if !fields.contains_key("quant_method") {
            // The oldest checkpoints of bitsandbytes do not say it.
            let set = |name: &str| fields.get(name).and_then(Value::as_bool).unwrap_or(false);
            if !set("load_in_4bit") && !set("load_in_8bit") {
                return Err(ConfigError(format!(
                    "`quant_method` is missing; it is one of {}",
                    Self::METHODS.join(", ")
                )));
            }
            fields.insert("quant_method".to_string(), "bitsandbytes".into());
        }
        let method = fields
            .get("quant_method")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if !Self::METHODS.contains(&method) {
            return Err(ConfigError(format!(
                "the `quant_method` {:?} is not supported; supported are {}",
                method,
                Self::METHODS.join(", ")
            )));
        }
        // Fields written as null mean their default.
        fields.retain(|name, value| !value.is_null() || name == "weight_block_size");
        let config: Self =
            serde_json::from_value(Value::Object(fields)).map_err(|error| ConfigError(error.to_string()))?;
        config.validate().map_err(ConfigError)?;
        Ok(config)
    }

    /// The `quantization_config` of a whole `config.json`, if it has one.
    ///
    /// # Errors
    /// As [`from_json`](Self::from_json).
    pub fn of_model(config: &Value) -> Result<Option<Self>, ConfigError> {
        let place = config.get("quantization_config").filter(|value| !value.is_null());
        place.map(Self::from_json).transpose()
    }

    /// The JSON to be written to a `config.json`.
    pub fn to_json(&self) -> Value {
        let Ok(Value::Object(fields)) = serde_json::to_value(self) else {
            return Value::Null;
        };
        // In the order in which Python writes them.
        let mut names: Vec<_> = fields.into_iter().collect();
        names.sort_by(|(a, _), (b, _)| a.cmp(b));
        Value::Object(Map::from_iter(names))
    }
}

/// Whether Transformers takes `pattern` for a name of `module`: as its beginning up to the end of a component, in plain
/// text or as a regular expression, or as its end.
///
/// # Errors
/// Where it is no regular expression.
pub fn matches(pattern: &str, module: &str) -> Result<bool, String> {
    if module.ends_with(pattern) {
        return Ok(true);
    }
    let regex = Regex::new(&format!("^(?:{pattern})$"))
        .map_err(|error| format!("`{pattern}` is no regular expression: {error}"))?;
    let dots = module.match_indices('.').flat_map(|(at, _)| [at, at + 1]);
    Ok(dots
        .chain([module.len()])
        .any(|end| regex.is_match(&module[..end])))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The cases that Transformers' `should_convert_module` documents, and some more.
    #[test]
    fn patterns() {
        for (pattern, module, expected) in [
            ("layer.1", "layer.1.attn", true),
            ("layer.1", "layer.11.attn", false),
            ("layer.*", "layer.11.attn", true),
            ("mlp.gate", "mlp.gate_proj", false),
            ("fc1", "model.decoder.layers.23.fc1", true),
            ("lm_head", "lm_head", true),
            ("lm_head", "model.lm_head.dense", false),
            (r"model\.layers\.\d+\.mlp\.", "model.layers.3.mlp.up_proj", true),
            ("a|b", "b.c", true),
        ] {
            assert_eq!(matches(pattern, module), Ok(expected), "{pattern} {module}");
        }
        assert!(matches("layer.(", "layer").is_err());
    }

    #[test]
    fn unknown_methods_are_named() {
        let error = QuantizationConfig::from_json(&json!({"quant_method": "aqlm"})).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("aqlm") && error.contains("bitsandbytes"),
            "{error}"
        );
        assert!(QuantizationConfig::from_json(&json!({})).is_err());
        assert!(QuantizationConfig::from_json(&json!([])).is_err());
        let old = QuantizationConfig::from_json(&json!({"load_in_8bit": true})).unwrap();
        assert_eq!(old.method(), "bitsandbytes");
    }

    #[test]
    fn written_as_read() {
        let json = json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": true,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": ["lm_head"],
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        });
        let config = QuantizationConfig::from_json(&json).unwrap();
        assert_eq!(config.to_json(), json);
        assert_eq!(config.skipped(), Some(&["lm_head".to_string()][..]));
        assert!(config.scheme("lm_head", true).unwrap().is_none());
        assert_eq!(
            config.scheme("model.layers.0.fc", false).unwrap().unwrap().name(),
            "nf4"
        );
    }
}
