//! How text is generated: `generation_config.json`.

use oxiformers_hub::ModelFiles;
use oxiformers_models::AutoConfig;
use oxiformers_models::fields::one_or_more;
use oxiformers_nn::{CacheKind, CachePrecision, CodeBits, GroupAxis, QuantizedCacheConfig};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// The fields of Transformers' `GenerationConfig` that apply to decoding text, with its names and defaults, and
/// `presence_penalty`, `frequency_penalty` and `seed` beside them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// Longest sequence in tokens, the prompt included (not what an encoder reads, but the token that its decoder starts
    /// with); `max_new_tokens` goes before it.
    pub max_length: Option<usize>,
    /// Most new tokens. Without it and `max_length`: 20.
    pub max_new_tokens: Option<usize>,
    /// Shortest sequence in tokens, the prompt included.
    pub min_length: usize,
    /// Fewest new tokens; it goes before `min_length`.
    pub min_new_tokens: Option<usize>,
    /// When beam search stops.
    pub early_stopping: EarlyStopping,
    /// Most seconds to spend.
    pub max_time: Option<f64>,
    /// Texts that end the answer where they appear.
    #[serde(deserialize_with = "one_or_more")]
    pub stop_strings: Vec<String>,
    /// Draw tokens instead of taking the likeliest.
    pub do_sample: bool,
    /// Number of beams; 1 is no beam search.
    pub num_beams: usize,
    /// Sequences to return for each prompt.
    pub num_return_sequences: usize,
    /// `static` keeps room for the longest sequence from the start; otherwise the cache grows. `quantized` packs it, as
    /// `cache_config` says.
    pub cache_implementation: Option<String>,
    /// How a quantized cache is packed; the defaults where there is none.
    pub cache_config: Option<CacheConfig>,
    /// Tokens of the prompt to run at a time.
    pub prefill_chunk_size: Option<usize>,
    /// Divisor of the logits.
    pub temperature: f64,
    /// Draw among so many of the likeliest tokens; 0 is all.
    pub top_k: usize,
    /// Draw among the likeliest tokens that together have this probability.
    pub top_p: f64,
    /// Draw among tokens at least this fraction as likely as the likeliest.
    pub min_p: Option<f64>,
    /// Draw among the likeliest tokens that together have this fraction of the entropy.
    pub top_h: Option<f64>,
    /// Draw among the tokens nearest to the expected information that together have this probability.
    pub typical_p: f64,
    /// Draw among tokens at least this likely.
    pub epsilon_cutoff: f64,
    /// As `epsilon_cutoff`, lower where the distribution is flat.
    pub eta_cutoff: f64,
    /// Divides (multiplies, where negative) the logits of tokens that the sequence holds already.
    pub repetition_penalty: f64,
    /// The same upside down: above 1 it favours tokens of the prompt, or of what an encoder has read.
    pub encoder_repetition_penalty: f64,
    /// Taken from the logits of tokens that were generated already.
    pub presence_penalty: f64,
    /// Taken from the logits of generated tokens for each time that they were.
    pub frequency_penalty: f64,
    /// Exponent of the length by which beam scores are divided.
    pub length_penalty: f64,
    /// No n-gram of this length appears twice.
    pub no_repeat_ngram_size: usize,
    /// No n-gram of this length of the prompt, or of what an encoder has read, is generated.
    pub encoder_no_repeat_ngram_size: usize,
    /// Sequences of tokens that are never generated.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// What is added to the logit of the last token of a sequence, once the others stand before it.
    #[serde(deserialize_with = "sequence_bias")]
    pub sequence_bias: Vec<(Vec<u32>, f64)>,
    /// Give processed scores as normalized log-probabilities.
    pub renormalize_logits: bool,
    /// The token that must come first.
    pub forced_bos_token_id: Option<u32>,
    /// The tokens one of which must come when the length is used up.
    #[serde(deserialize_with = "one_or_more")]
    pub forced_eos_token_id: Vec<u32>,
    /// Replace NaN and infinite logits.
    pub remove_invalid_values: bool,
    /// After so many new tokens, the chance to end grows by this factor with each.
    pub exponential_decay_length_penalty: Option<(usize, f64)>,
    /// Tokens that are never generated.
    pub suppress_tokens: Vec<u32>,
    /// Tokens that are not generated first.
    pub begin_suppress_tokens: Vec<u32>,
    /// Keep the scores of every step, after all processors.
    pub output_scores: bool,
    /// Keep the logits of every step, before all processors.
    pub output_logits: bool,
    /// Token that fills shorter sequences.
    pub pad_token_id: Option<u32>,
    /// Token that begins sequences.
    pub bos_token_id: Option<u32>,
    /// Tokens that end sequences.
    #[serde(deserialize_with = "one_or_more")]
    pub eos_token_id: Vec<u32>,
    /// Token that the decoder of an encoder-decoder starts with; without it, `bos_token_id`.
    pub decoder_start_token_id: Option<u32>,
    /// Tokens to draft at a time.
    pub num_assistant_tokens: usize,
    /// `constant`, or `heuristic`: two more after all drafts were right, else one fewer.
    pub num_assistant_tokens_schedule: String,
    /// The draft ends with a token that the assistant gives less than this probability.
    pub assistant_confidence_threshold: f64,
    /// Draft by looking up so many of the last tokens earlier in the text.
    pub prompt_lookup_num_tokens: Option<usize>,
    /// Longest n-gram to look up.
    pub max_matching_ngram_size: Option<usize>,
    /// Makes draws reproducible.
    pub seed: Option<u64>,
}

/// How a quantized cache is packed, with the names and defaults of Transformers' `QuantizedCache`. Other fields have no
/// effect.
///
/// Up to `residual_length` of the latest tokens stay in more bits; where they would become more, the oldest `q_group_size`
/// of them are packed, each once. Layers with a sliding window and mixtures of layers are packed, too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CacheConfig {
    /// Whose numbers for axes are meant: `quanto` or `hqq`. What packs is the same.
    pub backend: String,
    /// Bits of a value: 2, 4 or 8; 16 keeps everything in half precision, and 32 as the model computes it.
    pub nbits: usize,
    /// Groups of keys: by token (`0` of quanto, `1` of hqq), or by channel (`-1` of quanto, `0` of hqq). Without it, by
    /// channel, which is better (Liu et al., 2024).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub axis_key: Option<i64>,
    /// Groups of values, in the same way. Without it, by token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub axis_value: Option<i64>,
    /// Values that share a scale and a minimum.
    pub q_group_size: usize,
    /// Most of the latest tokens that are not packed.
    pub residual_length: usize,
    /// Bits of these: 8, or 16 for half precision. Without it, 8, but 16 where `nbits` is 8. Transformers has no such
    /// field, and keeps them as the model computes them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual_nbits: Option<usize>,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            backend: "quanto".to_string(),
            nbits: 4,
            axis_key: None,
            axis_value: None,
            q_group_size: 64,
            residual_length: 128,
            residual_nbits: None,
        }
    }
}

impl CacheConfig {
    /// The precision that it describes.
    ///
    /// # Errors
    /// [`Error::Config`] with the field and what is possible.
    pub fn precision(&self) -> Result<CachePrecision> {
        let fail = |message: String| Err(Error::config("cache_config", message));
        let numbers = match self.backend.as_str() {
            "quanto" => [(0, GroupAxis::Token), (-1, GroupAxis::Channel)],
            "hqq" => [(1, GroupAxis::Token), (0, GroupAxis::Channel)],
            other => return fail(format!("has the backend \"{other}\"; use \"quanto\" or \"hqq\"")),
        };
        let axis = |name: &str, axis: Option<i64>, default: GroupAxis| match axis {
            None => Ok(default),
            Some(axis) => match numbers.iter().find(|(number, _)| *number == axis) {
                Some((_, axis)) => Ok(*axis),
                None => Err(Error::config(
                    "cache_config",
                    format!(
                        "has {name} {axis}; of {} it is {} (by token) or {} (by channel)",
                        self.backend, numbers[0].0, numbers[1].0
                    ),
                )),
            },
        };
        let bits = match self.nbits {
            2 => CodeBits::Two,
            4 => CodeBits::Four,
            8 => CodeBits::Eight,
            16 => return Ok(CachePrecision::F16),
            32 => return Ok(CachePrecision::Full),
            other => {
                return fail(format!(
                    "has nbits {other}; it is 2, 4 or 8, 16 for half precision, or 32"
                ));
            }
        };
        if self.q_group_size == 0 {
            return fail("has q_group_size 0, and a group has one value at least".to_string());
        }
        let defaults = QuantizedCacheConfig::new(bits);
        let residual_bits = match self.residual_nbits {
            None => defaults.residual_bits,
            Some(8) => Some(CodeBits::Eight),
            Some(16) => None,
            Some(other) => {
                return fail(format!(
                    "has residual_nbits {other}; it is 8, or 16 for half precision"
                ));
            }
        };
        Ok(CachePrecision::Quantized(QuantizedCacheConfig {
            bits,
            group_size: self.q_group_size,
            residual_length: self.residual_length,
            residual_bits,
            key_axis: axis("axis_key", self.axis_key, defaults.key_axis)?,
            value_axis: axis("axis_value", self.axis_value, defaults.value_axis)?,
        }))
    }
}

/// When beam search stops.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// When a better sequence is unlikely.
    #[default]
    Heuristic,
    /// As soon as there are as many finished sequences as beams.
    Always,
    /// When there cannot be a better sequence.
    Never,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_length: None,
            max_new_tokens: None,
            min_length: 0,
            min_new_tokens: None,
            early_stopping: EarlyStopping::Heuristic,
            max_time: None,
            stop_strings: Vec::new(),
            do_sample: false,
            num_beams: 1,
            num_return_sequences: 1,
            cache_implementation: None,
            cache_config: None,
            prefill_chunk_size: None,
            temperature: 1.0,
            top_k: 50,
            top_p: 1.0,
            min_p: None,
            top_h: None,
            typical_p: 1.0,
            epsilon_cutoff: 0.0,
            eta_cutoff: 0.0,
            repetition_penalty: 1.0,
            encoder_repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            length_penalty: 1.0,
            no_repeat_ngram_size: 0,
            encoder_no_repeat_ngram_size: 0,
            bad_words_ids: Vec::new(),
            sequence_bias: Vec::new(),
            renormalize_logits: false,
            forced_bos_token_id: None,
            forced_eos_token_id: Vec::new(),
            remove_invalid_values: false,
            exponential_decay_length_penalty: None,
            suppress_tokens: Vec::new(),
            begin_suppress_tokens: Vec::new(),
            output_scores: false,
            output_logits: false,
            pad_token_id: None,
            bos_token_id: None,
            eos_token_id: Vec::new(),
            decoder_start_token_id: None,
            num_assistant_tokens: 20,
            num_assistant_tokens_schedule: "constant".to_string(),
            assistant_confidence_threshold: 0.4,
            prompt_lookup_num_tokens: None,
            max_matching_ngram_size: None,
            seed: None,
        }
    }
}

/// Fields that change what is generated, that we do not follow, and the value that means nothing.
const UNSUPPORTED: [(&str, Value); 8] = [
    ("guidance_scale", Value::Null),
    ("watermarking_config", Value::Null),
    ("penalty_alpha", Value::Null),
    ("dola_layers", Value::Null),
    ("constraints", Value::Null),
    ("force_words_ids", Value::Null),
    ("token_healing", Value::Bool(false)),
    ("low_memory", Value::Null),
];

impl GenerationConfig {
    /// Reads `generation_config.json`, else the same fields of an old `config.json` and the defaults that its
    /// architecture has for them; the defaults where a model has neither.
    ///
    /// # Errors
    /// Where a file cannot be read, or a field does not fit.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        let read = |name| files.json::<Map<String, Value>>(name);
        if let Some(json) = read("generation_config.json")? {
            return Self::from_json(json, &files.describe("generation_config.json"));
        }
        let Some(mut json) = read("config.json")? else {
            return Ok(Self::default());
        };
        // A model that is not known here may still have settings.
        let config = AutoConfig::from_json(Value::Object(json.clone()), files.name()).ok();
        if let Some(Ok(Value::Object(all))) = config.map(|config| config.architecture.to_json()) {
            for (field, value) in all {
                json.entry(field).or_insert(value);
            }
        }
        Self::from_json(json, &files.describe("config.json"))
    }

    /// Reads the contents of a `generation_config.json`; `file` is its name in messages.
    ///
    /// # Errors
    /// Where a field does not fit.
    pub fn from_json(mut json: Map<String, Value>, file: &str) -> Result<Self> {
        // Fields written as null mean their default.
        json.retain(|_, value| !value.is_null());
        for (field, nothing) in UNSUPPORTED {
            if json.get(field).is_some_and(|value| *value != nothing) {
                tracing::warn!("{file}: `{field}` is not supported and has no effect");
            }
        }
        let config: Self =
            serde_json::from_value(Value::Object(json)).map_err(|source| oxiformers_hub::Error::Json {
                file: file.to_string(),
                source,
            })?;
        Ok(config)
    }

    /// Always the likeliest token.
    #[must_use]
    pub fn greedy(mut self) -> Self {
        self.do_sample = false;
        self
    }

    /// Checks that the fields make sense together.
    ///
    /// # Errors
    /// [`Error::Config`] with the field and what to do.
    pub fn validate(&self) -> Result<()> {
        let within = |field, value: f64, low: f64, high: f64| {
            if value >= low && value <= high {
                return Ok(());
            }
            Err(Error::config(
                field,
                format!("is {value}; it must be between {low} and {high}"),
            ))
        };
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            let message = format!(
                "is {}; it must be above 0: for greedy decoding turn `do_sample` off",
                self.temperature
            );
            return Err(Error::config("temperature", message));
        }
        within("top_p", self.top_p, 0.0, 1.0)?;
        within("min_p", self.min_p.unwrap_or(0.0), 0.0, 1.0)?;
        within("top_h", self.top_h.unwrap_or(1.0), f64::MIN_POSITIVE, 1.0)?;
        within("typical_p", self.typical_p, f64::MIN_POSITIVE, 1.0)?;
        within("epsilon_cutoff", self.epsilon_cutoff, 0.0, 1.0)?;
        within("eta_cutoff", self.eta_cutoff, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -100.0, 100.0)?;
        within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)?;
        for (field, penalty) in [
            ("repetition_penalty", self.repetition_penalty),
            ("encoder_repetition_penalty", self.encoder_repetition_penalty),
        ] {
            within(field, penalty, f64::MIN_POSITIVE, f64::MAX)?;
        }
        if self
            .max_time
            .is_some_and(|seconds| seconds.is_nan() || seconds < 0.0)
        {
            return Err(Error::config("max_time", "must be a number of seconds"));
        }
        if self.num_beams == 0 {
            return Err(Error::config("num_beams", "is 0; 1 is no beam search"));
        }
        if self.num_return_sequences == 0 {
            return Err(Error::config("num_return_sequences", "is 0"));
        }
        if self.num_beams > 1 && self.num_return_sequences > self.num_beams {
            return Err(Error::config(
                "num_return_sequences",
                "must not be above `num_beams`",
            ));
        }
        if self.num_beams == 1 && self.num_return_sequences > 1 && !self.do_sample {
            let message =
                "is above 1, and greedy decoding has one answer: turn `do_sample` on or use `num_beams`";
            return Err(Error::config("num_return_sequences", message));
        }
        if self.stop_strings.iter().any(String::is_empty) {
            return Err(Error::config(
                "stop_strings",
                "has an empty text, which is everywhere",
            ));
        }
        if self.bad_words_ids.iter().any(Vec::is_empty)
            || self.sequence_bias.iter().any(|(ids, _)| ids.is_empty())
        {
            let field = if self.bad_words_ids.iter().any(Vec::is_empty) {
                "bad_words_ids"
            } else {
                "sequence_bias"
            };
            return Err(Error::config(field, "has an empty sequence"));
        }
        self.cache_kind(0)?;
        self.cache_precision().map(|_| ())
    }

    /// Most new tokens after a prompt of `prompt_len` tokens, for a model that takes `max_positions`.
    pub fn new_token_limit(&self, prompt_len: usize, max_positions: Option<usize>) -> usize {
        let limit = match (self.max_new_tokens, self.max_length) {
            (Some(new), _) => new,
            (None, Some(all)) => all.saturating_sub(prompt_len),
            (None, None) => 20,
        };
        match max_positions {
            Some(positions) => limit.min(positions.saturating_sub(prompt_len)),
            None => limit,
        }
    }

    /// The cache for sequences of `max_len` tokens.
    ///
    /// # Errors
    /// For an implementation that does not exist here.
    pub fn cache_kind(&self, max_len: usize) -> Result<CacheKind> {
        match self.cache_implementation.as_deref() {
            None | Some("dynamic" | "hybrid" | "sliding_window" | "quantized") => Ok(CacheKind::Dynamic),
            Some("static") => Ok(CacheKind::Static { max_len }),
            Some(other) => Err(Error::config(
                "cache_implementation",
                format!("is \"{other}\"; use \"dynamic\", \"static\" or \"quantized\""),
            )),
        }
    }
}

impl GenerationConfig {
    /// What the cache keeps keys and values as; none where the
    /// [model](oxiformers_models::CausalLM::cache_precision) decides.
    ///
    /// # Errors
    /// For a `cache_config` that makes no sense.
    pub fn cache_precision(&self) -> Result<Option<CachePrecision>> {
        if self.cache_implementation.as_deref() != Some("quantized") {
            return Ok(None);
        }
        let config = self.cache_config.clone().unwrap_or_default();
        config.precision().map(Some)
    }
}

impl Serialize for EarlyStopping {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Heuristic => serializer.serialize_bool(false),
            Self::Always => serializer.serialize_bool(true),
            Self::Never => serializer.serialize_str("never"),
        }
    }
}

impl<'de> Deserialize<'de> for EarlyStopping {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Bool(false) => Ok(Self::Heuristic),
            Value::Bool(true) => Ok(Self::Always),
            Value::String(text) if text == "never" => Ok(Self::Never),
            other => Err(serde::de::Error::custom(format!(
                "early_stopping is {other}; use true, false or \"never\""
            ))),
        }
    }
}

/// `[[[ids…], bias], …]`; integers are fine as biases.
fn sequence_bias<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<Vec<(Vec<u32>, f64)>, D::Error> {
    Vec::<(Vec<u32>, f64)>::deserialize(d)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(json: Value) -> Result<GenerationConfig> {
        GenerationConfig::from_json(json.as_object().cloned().unwrap(), "generation_config.json")
    }

    #[test]
    fn fields_as_models_write_them() {
        let config = read(json!({
            "eos_token_id": [1, 2], "top_p": 0.9, "do_sample": true, "temperature": null, "early_stopping": "never",
            "stop_strings": "###", "sequence_bias": [[[5, 6], -2.0]], "transformers_version": "5.23.0",
            "exponential_decay_length_penalty": [3, 1.5],
        }))
        .unwrap();
        assert_eq!(config.eos_token_id, [1, 2]);
        assert_eq!((config.top_p, config.temperature, config.top_k), (0.9, 1.0, 50));
        assert_eq!(config.early_stopping, EarlyStopping::Never);
        assert_eq!(config.stop_strings, ["###"]);
        assert_eq!(config.sequence_bias, [(vec![5, 6], -2.0)]);
        assert_eq!(config.exponential_decay_length_penalty, Some((3, 1.5)));
        assert_eq!(read(json!({"eos_token_id": 7})).unwrap().eos_token_id, [7]);
        let written = serde_json::to_value(&config).unwrap();
        assert_eq!(read(written).unwrap(), config);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let fails = |json: Value, field: &str| {
            let error = read(json)
                .and_then(|config| config.validate())
                .unwrap_err()
                .to_string();
            assert!(error.contains(field), "{error}");
        };
        fails(json!({"temperature": 0.0}), "do_sample");
        fails(json!({"top_p": 1.5}), "top_p");
        fails(json!({"num_beams": 0}), "num_beams");
        fails(json!({"num_return_sequences": 2}), "num_return_sequences");
        fails(json!({"stop_strings": [""]}), "stop_strings");
        fails(json!({"bad_words_ids": [[]]}), "bad_words_ids");
        fails(json!({"cache_implementation": "quantum"}), "cache_implementation");
        let cache = |config: Value| json!({"cache_implementation": "quantized", "cache_config": config});
        fails(cache(json!({"nbits": 3})), "nbits 3");
        fails(cache(json!({"backend": "fp8"})), "backend \"fp8\"");
        fails(cache(json!({"q_group_size": 0})), "q_group_size");
        fails(cache(json!({"axis_key": 1})), "axis_key 1");
        fails(
            cache(json!({"backend": "hqq", "axis_value": -1})),
            "axis_value -1",
        );
        fails(cache(json!({"residual_length": -1})), "generation_config.json");
        fails(cache(json!({"residual_nbits": 4})), "residual_nbits 4");
        fails(json!({"repetition_penalty": 0.0}), "repetition_penalty");
        fails(json!({"eos_token_id": "x"}), "generation_config.json");
        GenerationConfig::default().validate().unwrap();
    }

    #[test]
    fn caches() {
        let precision = |json: Value| read(json).unwrap().cache_precision().unwrap();
        let packed = |config: Value| match precision(
            json!({"cache_implementation": "quantized", "cache_config": config}),
        ) {
            Some(CachePrecision::Quantized(config)) => config,
            other => panic!("{other:?}"),
        };
        let default = packed(json!(null));
        assert_eq!(default, QuantizedCacheConfig::new(CodeBits::Four));
        assert_eq!((default.group_size, default.residual_length), (64, 128));
        let quanto = packed(json!({"axis_key": 0, "axis_value": -1, "nbits": 2, "q_group_size": 32}));
        assert_eq!((quanto.bits, quanto.group_size), (CodeBits::Two, 32));
        let hqq = packed(json!({"backend": "hqq", "axis_key": 1, "axis_value": 0, "residual_length": 0}));
        for config in [quanto, hqq] {
            assert_eq!(
                (config.key_axis, config.value_axis),
                (GroupAxis::Token, GroupAxis::Channel)
            );
        }
        let residual = |json: Value| packed(json).residual_bits;
        assert_eq!(residual(json!({"residual_nbits": 16})), None);
        let eight = Some(CodeBits::Eight);
        assert_eq!(residual(json!({"nbits": 8, "residual_nbits": 8})), eight);
        assert_eq!(residual(json!({"nbits": 2})), eight);
        assert_eq!(residual(json!({"nbits": 8})), None);
        let half = json!({"cache_implementation": "quantized", "cache_config": {"nbits": 16}});
        assert_eq!(precision(half), Some(CachePrecision::F16));
        let full = json!({"cache_implementation": "quantized", "cache_config": {"nbits": 32}});
        assert_eq!(precision(full), Some(CachePrecision::Full));
        assert_eq!(precision(json!({"cache_config": {"nbits": 3}})), None);
    }

    #[test]
    fn lengths() {
        let config = GenerationConfig::default();
        assert_eq!(config.new_token_limit(5, None), 20);
        assert_eq!(config.new_token_limit(5, Some(12)), 7);
        let config = GenerationConfig {
            max_length: Some(30),
            ..config
        };
        assert_eq!(config.new_token_limit(5, None), 25);
        assert_eq!(config.new_token_limit(50, None), 0);
        let config = GenerationConfig {
            max_new_tokens: Some(3),
            ..config
        };
        assert_eq!(config.new_token_limit(50, None), 3);
    }
}
