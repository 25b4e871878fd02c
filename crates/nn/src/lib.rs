//! Layers: what architectures are written with.
//!
//! A layer is built from [`Weights`], a place in a checkpoint (or an initializer), and computes on
//! [`burn::tensor::Tensor`]s of whatever device the weights were loaded to. Attention layers share one
//! [`Context`] per forward pass: positions, masks, rotary tables and the [`Cache`].

pub mod adapter;
pub mod attention;
pub mod blocks;
pub mod cache;
pub mod checkpointing;
pub mod context;
pub mod cross_attention;
pub mod decoder;
pub mod embedding;
pub mod encoder;
pub mod error;
pub mod head;
pub mod init;
pub mod latent;
pub mod linear;
pub mod mlp;
pub mod moe;
pub mod norm;
pub mod parameters;
pub mod positions;
pub mod prompt;
mod quantized;
pub mod relative;
pub mod rope;
pub mod seq2seq;
pub mod stack;
pub mod survey;
pub mod ternary;
pub mod training;
pub mod weights;

pub use adapter::{Adapter, Switch, Target, TargetKind};
pub use attention::{Attention, AttentionConfig, Projection, QkNorm};
pub use blocks::BlockWindows;
pub use cache::{Cache, CacheKind, CachePrecision, QuantizedCacheConfig};
pub use checkpointing::with_gradient_checkpointing;
pub use context::Context;
pub use cross_attention::CrossAttention;
pub use decoder::{Decoder, DecoderConfig, DecoderLayer, LogitsFor};
pub use embedding::Embedding;
pub use encoder::{
    Backbone, Embeddings, EmbeddingsConfig, Encoder, EncoderInputs, EncoderLayer, EncoderOutput,
    PositionCount,
};
pub use error::{Error, Result};
pub use head::{Head, Reads};
pub use linear::{Linear, Observer};
pub use mlp::{GatedMlp, Mlp};
pub use norm::{LayerNorm, Norm, RmsNorm};
pub use oxiformers_kernels::attention::attention as attend;
pub use oxiformers_kernels::memory::set_large_pages;
pub use oxiformers_kernels::{
    Activation, AttentionOptions, CodeBits, CrossEntropyOptions, GroupAxis, LabelError, Mask, ScoreBias,
    Visible, cross_entropy,
};
pub use oxiformers_quant as quant;
pub use parameters::{Parameter, Parameters, Slot};
pub use positions::Positions;
pub use prompt::{Prompt, PromptEncoder, PromptKind, PromptValues};
pub use relative::RelativeBias;
pub use rope::{Rope, RopeParameters, RopeSettings};
pub use seq2seq::{EncoderDecoder, Seq2SeqDecoder, Seq2SeqLayer};
pub use stack::Stack;
pub use survey::{Survey, SurveyedMatrix};
pub use ternary::Lambda;
pub use weights::{Init, LoadOptions, Role, TensorSource, Weights};
