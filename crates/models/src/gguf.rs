//! GGUF files as Hugging Face checkpoints: the configuration from the metadata, and each tensor under the
//! name that the architecture's file asks for.
//!
//! Weights stay packed: all that is done to them is to reorder or cut whole rows, which blocks never span.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};
use oxiformers_hub::checkpoint::gguf::Metadata;
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorView};
use oxiformers_nn::TensorSource;
use oxiformers_nn::weights::to_f32;
use serde_json::{Map, Value, json};

use crate::auto::AutoConfig;
use crate::error::{Error, Result};

/// What a conversion to GGUF did to a tensor, and loading undoes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Change {
    /// Nothing.
    None,
    /// Rows of each head reordered from halves to neighbouring pairs, for so many heads.
    HalvesToPairs(usize),
    /// One added to every value.
    PlusOne,
}

/// Names of one tensor: in GGUF, and in the Hugging Face checkpoint.
type Name = (&'static str, &'static str);

const LLAMA_OUTER: &[Name] = &[
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
];

const LLAMA_BLOCK: &[Name] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The `config.json` that a GGUF's metadata amount to.
///
/// # Errors
/// A key that is missing, or an architecture that is unknown.
pub fn config(metadata: &Metadata, checkpoint: &Checkpoint, model: &str) -> Result<Value> {
    let keys = Keys { metadata, model };
    let architecture = keys.text("general.architecture")?;
    let arch = |key: &str| format!("{architecture}.{key}");
    let mut config = Map::new();
    let mut set = |field: &str, value: Option<Value>| {
        if let Some(value) = value {
            config.insert(field.to_string(), value);
        }
    };
    let heads = keys.need(&arch("attention.head_count"))?;
    let hidden = keys.need(&arch("embedding_length"))?;
    let vocab = checkpoint
        .info("token_embd.weight")
        .and_then(|info| info.shape.first().copied());
    set("model_type", Some(json!(model_type(&architecture))));
    set(
        "vocab_size",
        vocab.map(|v| json!(v)).or_else(|| keys.int(&arch("vocab_size"))),
    );
    set("hidden_size", Some(json!(hidden)));
    set("num_hidden_layers", Some(json!(keys.need(&arch("block_count"))?)));
    set("num_attention_heads", Some(json!(heads)));
    set("num_key_value_heads", keys.int(&arch("attention.head_count_kv")));
    set("intermediate_size", keys.int(&arch("feed_forward_length")));
    set("max_position_embeddings", keys.int(&arch("context_length")));
    set(
        "head_dim",
        keys.int(&arch("attention.key_length"))
            .or(Some(json!(hidden / heads.max(1)))),
    );
    set(
        "rms_norm_eps",
        keys.float(&arch("attention.layer_norm_rms_epsilon")),
    );
    set(
        "layer_norm_eps",
        keys.float(&arch("attention.layer_norm_epsilon")),
    );
    set("rope_theta", keys.float(&arch("rope.freq_base")));
    set("rope_scaling", rope_scaling(&keys, &architecture, checkpoint)?);
    set("sliding_window", keys.int(&arch("attention.sliding_window")));
    set(
        "tie_word_embeddings",
        Some(json!(checkpoint.info("output.weight").is_none())),
    );
    set("bos_token_id", keys.int("tokenizer.ggml.bos_token_id"));
    set("eos_token_id", keys.int("tokenizer.ggml.eos_token_id"));
    Ok(Value::Object(config))
}

fn model_type(architecture: &str) -> &str {
    architecture
}

fn rope_scaling(keys: &Keys, architecture: &str, checkpoint: &Checkpoint) -> Result<Option<Value>> {
    if checkpoint.info("rope_freqs.weight").is_some() {
        // Divisors of the frequencies, whatever rule they came from.
        let view = checkpoint.tensor("rope_freqs.weight")?;
        let factors = to_f32(&view).map_err(|reason| Error::Config {
            model: keys.model.to_string(),
            message: reason,
        })?;
        return Ok(Some(json!({
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
        })));
    }
    let key = |key: &str| format!("{architecture}.rope.scaling.{key}");
    Ok(match keys.metadata.get_str(&key("type")) {
        Some("linear") => Some(json!({"rope_type": "linear", "factor": keys.float(&key("factor"))})),
        Some("yarn") => Some(json!({
            "rope_type": "yarn",
            "factor": keys.float(&key("factor")),
            "original_max_position_embeddings": keys.int(&key("original_context_length")),
        })),
        _ => None,
    })
}

/// The metadata with errors that name the key.
struct Keys<'a> {
    metadata: &'a Metadata,
    model: &'a str,
}

impl Keys<'_> {
    fn missing(&self, key: &str) -> Error {
        Error::Config {
            model: self.model.to_string(),
            message: format!("the GGUF metadata lack `{key}`, or it has another type"),
        }
    }

    fn text(&self, key: &str) -> Result<String> {
        self.metadata
            .get_str(key)
            .map(str::to_string)
            .ok_or_else(|| self.missing(key))
    }

    fn need(&self, key: &str) -> Result<u64> {
        self.metadata.get_u64(key).ok_or_else(|| self.missing(key))
    }

    fn int(&self, key: &str) -> Option<Value> {
        self.metadata.get_u64(key).map(|v| json!(v))
    }

    fn float(&self, key: &str) -> Option<Value> {
        self.metadata.get_f64(key).map(|v| json!(v))
    }
}

/// The tensors of a GGUF under Hugging Face names.
pub struct Source {
    checkpoint: Checkpoint,
    /// Hugging Face name to GGUF name and change.
    names: HashMap<String, (String, Change)>,
}

impl Source {
    /// Maps the names of a checkpoint of the given configuration.
    ///
    /// # Errors
    /// None so far; kept for architectures whose tensors must be checked first.
    pub fn new(checkpoint: Checkpoint, config: &AutoConfig, _model: &str) -> Result<Self> {
        let number = |field: &str| config.json.get(field).and_then(Value::as_u64).unwrap_or(0) as usize;
        let heads = number("num_attention_heads");
        let kv_heads = match number("num_key_value_heads") {
            0 => heads,
            kv_heads => kv_heads,
        };
        let names = checkpoint
            .tensors()
            .filter(|info| info.name != "rope_freqs.weight")
            .map(|info| {
                let (stem, suffix) = info.name.rsplit_once('.').unwrap_or((&info.name, ""));
                let name = match stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
                    Some((index, part)) => {
                        find(LLAMA_BLOCK, part).map(|hf| format!("model.layers.{index}.{hf}.{suffix}"))
                    }
                    None => find(LLAMA_OUTER, stem).map(|hf| format!("{hf}.{suffix}")),
                };
                let change = match (
                    config.model_type.as_str(),
                    stem.rsplit('.').next().unwrap_or_default(),
                ) {
                    ("llama", "attn_q") => Change::HalvesToPairs(heads),
                    ("llama", "attn_k") => Change::HalvesToPairs(kv_heads),
                    _ => Change::None,
                };
                // A tensor that the table does not know keeps its name, and is reported as left over.
                (
                    name.unwrap_or_else(|| info.name.clone()),
                    (info.name.clone(), change),
                )
            })
            .collect();
        Ok(Self { checkpoint, names })
    }
}

fn find(table: &[Name], part: &str) -> Option<&'static str> {
    table.iter().find(|(gguf, _)| *gguf == part).map(|(_, hf)| *hf)
}

impl TensorSource for Source {
    fn origin(&self) -> String {
        self.checkpoint.name().to_string()
    }

    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    fn tensor(&self, name: &str) -> oxiformers_hub::Result<TensorView> {
        let (stored, change) = match self.names.get(name) {
            Some((stored, change)) => (stored.as_str(), *change),
            None => (name, Change::None),
        };
        let view = self.checkpoint.tensor(stored)?;
        Ok(match change {
            Change::None => view,
            Change::HalvesToPairs(heads) => pairs_to_halves(view, heads),
            Change::PlusOne => minus_one(view),
        })
    }
}

/// Undoes [`Change::HalvesToPairs`]: row `2i + j` of a head goes back to row `j · half + i`.
fn pairs_to_halves(view: TensorView, heads: usize) -> TensorView {
    let rows = view.shape.first().copied().unwrap_or(0);
    if heads == 0 || rows == 0 || rows % (2 * heads) != 0 {
        return view;
    }
    let row_bytes = view.data.len() / rows;
    let head_dim = rows / heads;
    let mut data = BytesMut::with_capacity(view.data.len());
    for head in 0..heads {
        for half in 0..2 {
            for i in 0..head_dim / 2 {
                let row = head * head_dim + 2 * i + half;
                data.extend_from_slice(&view.data[row * row_bytes..(row + 1) * row_bytes]);
            }
        }
    }
    TensorView {
        data: data.freeze(),
        ..view
    }
}

/// Undoes [`Change::PlusOne`]; such tensors are norms, which GGUF stores as f32.
fn minus_one(view: TensorView) -> TensorView {
    match to_f32(&view) {
        Ok(values) => {
            let bytes: Vec<u8> = values.iter().flat_map(|v| (v - 1.0).to_le_bytes()).collect();
            TensorView {
                dtype: DType::F32,
                shape: view.shape,
                data: Bytes::from(bytes),
            }
        }
        Err(_) => view,
    }
}
