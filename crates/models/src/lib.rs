//! One file per architecture.
//!
//! A file holds the [`Config`](llama::Config) (the fields of `config.json`, same names, same defaults), the
//! layer, and how a checkpoint becomes the model. Everything else is shared: layers come from
//! `oxiformers-nn`, loading and the registry from this crate. To add an architecture, read
//! [`llama`] and one neighbour, then add a line to `registry.rs`.

use oxiformers_nn::{Cache, CacheKind, Decoder, DecoderLayer, LogitsFor, Result, Weights};

use burn::tensor::{Device, Int, Tensor};

pub mod auto;
pub mod error;
pub mod gguf;
pub mod registry;

mod layer_types;

pub mod bloom;
pub mod cohere;
pub mod deepseek_v3;
pub mod falcon;
pub mod gemma;
pub mod gemma2;
pub mod gemma3_text;
pub mod gpt2;
pub mod gpt_neox;
pub mod gpt_oss;
pub mod gptj;
pub mod granite;
pub mod llama;
pub mod mistral;
pub mod mixtral;
pub mod mpt;
pub mod olmo2;
pub mod opt;
pub mod phi;
pub mod phi3;
pub mod qwen2;
pub mod qwen2_moe;
pub mod qwen3;
pub mod qwen3_moe;
pub mod smollm3;
pub mod stablelm;
pub mod starcoder2;

pub use auto::{AutoConfig, AutoModelForCausalLM};
pub use error::Error;
pub use oxiformers_nn as nn;

/// What an architecture's configuration knows: how its model is built.
pub trait Architecture {
    /// Its layer.
    type Layer: DecoderLayer;

    /// Where the base model stands within the language model's checkpoint, such as `model`.
    const BASE: &'static str;

    /// Tensors that checkpoints of this architecture may hold and the model does not need.
    const IGNORED: &'static [&'static str] = &["rotary_emb.inv_freq"];

    /// Builds the model from its parameters.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or a field of the configuration that contradicts another.
    fn load(&self, w: &Weights) -> Result<Decoder<Self::Layer>>;

    /// Longest sequence the model was made for, if it says so.
    fn max_position_embeddings(&self) -> Option<usize>;
}

/// A causal language model: what decoding needs to know of it.
pub trait CausalLM: Send + Sync {
    /// Size of the vocabulary.
    fn vocab_size(&self) -> usize;

    /// Where it runs.
    fn device(&self) -> Device;

    /// Longest sequence the model was made for, if it says so.
    fn max_position_embeddings(&self) -> Option<usize>;

    /// An empty cache for sequences whose left padding is given, one entry each.
    fn new_cache(&self, kind: CacheKind, padding: Vec<usize>) -> Cache;

    /// Logits `[batch, seq or 1, vocab_size]` after the tokens `input_ids` `[batch, seq]`, which are
    /// appended to `cache`.
    fn forward(&self, input_ids: Tensor<2, Int>, cache: &mut Cache, logits_for: LogitsFor) -> Tensor<3>;
}
