//! Fused operators: a reference for every device, fast versions where they pay.
//!
//! Upper rooms call these functions on [`burn::tensor::Tensor`]s and never look at the device: an
//! operator chooses its version itself.

pub mod activation;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
pub mod attention;
pub mod autodiff;
mod backward;
pub mod cached;
pub mod cross_entropy;
pub mod dense;
pub mod dropout;
mod flash;
mod flex;
pub mod ggml;
pub mod int8;
pub mod linear;
mod lines;
mod math;
pub mod memory;
pub mod norm;
mod output;
pub mod packed;
pub mod rotary;
#[cfg(test)]
mod testing;
pub mod threads;

pub use activation::Activation;
pub use attention::{AttentionOptions, Mask, ScoreBias, Visible, attention};
pub use backward::{rows, split};
pub use cached::{CachedPart, CachedRows, CodeBits, GroupAxis, PackedRows, RowFormat, cached_attention};
pub use cross_entropy::{CrossEntropyOptions, LabelError, cross_entropy};
pub use dropout::Dropout;
pub use flex::zeros_like;
pub use linear::{Weight, feed_forward, gated_feed_forward, int8_activations, linear, linears};
pub use math::{argmax, softmax};
pub use norm::{add_layer_norm, add_rms_norm, layer_norm, rms_norm};
pub use packed::{Form, PackedMatrix, packed_rows};
pub use rotary::rotary;
