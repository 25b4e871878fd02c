//! How much memory a model takes, known before it is loaded.

use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::Checkpoint;
use oxiformers_nn::SurveyedMatrix;
use serde_json::Value;

use crate::AutoConfig;
use crate::error::Result;
use crate::registry::Kind;

/// Tokens of a prompt that run at a time.
const PREFILL: usize = 512;

/// What a model takes on a CPU, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Memory {
    /// Weights, in the form that is multiplied.
    pub weights: usize,
    /// Keys and values of each layer.
    layers: Vec<LayerCache>,
    /// Between layers and within one, for each token that runs.
    activations_per_token: usize,
    /// Logits of a token.
    logits: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct LayerCache {
    per_token: usize,
    /// Tokens that are seen, if not all are.
    window: Option<usize>,
}

impl Memory {
    /// Of a model whose matrices were [surveyed](crate::quantize::survey_as).
    ///
    /// # Errors
    /// Where the files cannot be read.
    pub fn of(files: &ModelFiles, config: &AutoConfig, matrices: &[SurveyedMatrix]) -> Result<Self> {
        let checkpoint = Checkpoint::open(files)?;
        let endings: Vec<String> = config
            .quantization
            .iter()
            .flat_map(|recipe| recipe.stored(""))
            .flat_map(|scheme| {
                scheme
                    .endings()
                    .iter()
                    .map(|ending| ending.to_string())
                    .collect::<Vec<_>>()
            })
            .filter(|ending| ending != ".weight")
            .collect();
        // Norms and biases become f32.
        let small = checkpoint.tensors().filter(|info| {
            info.shape.len() < 2 && !endings.iter().any(|ending| info.name.ends_with(ending.as_str()))
        });
        let small: usize = small.map(|info| 4 * info.shape.iter().product::<usize>()).sum();
        let json = &config.json;
        let width = Widths::of(json);
        Ok(Self {
            weights: small + matrices.iter().map(|matrix| matrix.held_bytes).sum::<usize>(),
            layers: width.as_ref().map_or(Vec::new(), |width| {
                let kind = config.architecture.kind();
                // An encoder's answer is seen by every layer of the decoder.
                let times = match kind {
                    Kind::Encoder => return Vec::new(),
                    Kind::EncoderDecoder => 2,
                    Kind::Decoder => 1,
                };
                let window = |layer| match kind {
                    Kind::Decoder => window(json, &config.model_type, layer),
                    _ => None,
                };
                // Half precision beside weights of fewer than 32 bits; what an encoder has read is f32.
                let is_narrow =
                    |matrix: &SurveyedMatrix| matrix.num_bytes < 4 * matrix.shape[0] * matrix.shape[1];
                let bytes = if matrices.iter().any(is_narrow) { 2 } else { 4 };
                let layers = (0..width.layers).map(|layer| LayerCache {
                    per_token: (bytes + 4 * (times - 1)) * width.keys_and_values,
                    window: window(layer),
                });
                layers.collect()
            }),
            activations_per_token: width.as_ref().map_or(0, |width| {
                4 * (4 * width.hidden + 2 * width.queries + width.keys_and_values + 3 * width.inner)
            }),
            logits: 4 * field(json, &["vocab_size"]).unwrap_or(0),
        })
    }

    /// Keys and values of so many sequences of so many tokens.
    pub fn cache(&self, context: usize, batch: usize) -> usize {
        let layer =
            |layer: &LayerCache| layer.per_token * layer.window.map_or(context, |window| window.min(context));
        batch * self.layers.iter().map(layer).sum::<usize>()
    }

    /// What is between weights while so many prompts of so many tokens run; an estimate.
    pub fn activations(&self, context: usize, batch: usize) -> usize {
        batch * (context.min(PREFILL) * self.activations_per_token + 2 * self.logits)
    }
}

/// Numbers of the configuration, by whatever names it has them.
struct Widths {
    layers: usize,
    hidden: usize,
    queries: usize,
    keys_and_values: usize,
    inner: usize,
}

fn field(config: &Value, names: &[&str]) -> Option<usize> {
    names
        .iter()
        .find_map(|name| usize::try_from(config.get(name)?.as_u64()?).ok())
}

impl Widths {
    fn of(config: &Value) -> Option<Self> {
        let layers = [
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
        ];
        let layers = field(config, &layers)?;
        let heads = field(
            config,
            &[
                "num_attention_heads",
                "n_head",
                "n_heads",
                "num_heads",
                "decoder_attention_heads",
            ],
        )?;
        let hidden = field(config, &["hidden_size", "n_embd", "d_model", "dim"])?;
        let kv_heads = match config.get("multi_query").and_then(Value::as_bool) {
            Some(true) => 1,
            _ => field(config, &["num_key_value_heads", "num_kv_heads"]).unwrap_or(heads),
        };
        let head_dim = field(config, &["head_dim", "d_kv"]).or_else(|| hidden.checked_div(heads))?;
        let inner = [
            "intermediate_size",
            "n_inner",
            "d_ff",
            "ffn_dim",
            "ffn_hidden_size",
            "decoder_ffn_dim",
            "hidden_dim",
        ];
        // Latent attention keeps what keys and values are made of.
        let latent = field(config, &["kv_lora_rank"])
            .map(|rank| rank + field(config, &["qk_rope_head_dim"]).unwrap_or(0));
        Some(Self {
            layers,
            hidden,
            queries: heads * head_dim,
            keys_and_values: latent.unwrap_or(2 * kv_heads * head_dim),
            inner: field(config, &inner).unwrap_or(4 * hidden),
        })
    }
}

/// How many tokens a layer of a decoder sees, where it does not see all.
fn window(config: &Value, model_type: &str, layer: usize) -> Option<usize> {
    let window = field(config, &["sliding_window"])?;
    if config.get("use_sliding_window").and_then(Value::as_bool) == Some(false) {
        return None;
    }
    let types = config.get("layer_types").and_then(Value::as_array);
    let slides = match (types, model_type) {
        (Some(types), _) => types.get(layer).and_then(Value::as_str) == Some("sliding_attention"),
        (None, "gemma2" | "gemma3_text" | "gpt_oss") => {
            let usual = if model_type == "gemma3_text" { 6 } else { 2 };
            let pattern = field(config, &["sliding_window_pattern"]).unwrap_or(usual);
            !(layer + 1).is_multiple_of(pattern.max(1))
        }
        (None, "qwen2" | "qwen3" | "qwen2_moe" | "qwen3_moe") => {
            let slides = config.get("use_sliding_window").and_then(Value::as_bool) == Some(true);
            slides && layer >= field(config, &["max_window_layers"]).unwrap_or(0)
        }
        (None, _) => true,
    };
    slides.then_some(window)
}
