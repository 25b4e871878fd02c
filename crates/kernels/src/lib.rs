//! Fused operators: a reference for every device, fast versions where they pay.
//!
//! Upper rooms call these functions on [`burn::tensor::Tensor`]s and never look at the device: an
//! operator chooses its version itself.

mod flex;
pub mod ggml;
pub mod int8;
pub mod packed;
pub mod threads;

pub use packed::{PackedMatrix, packed_linear, packed_linears, packed_rows};
