//! Packed weights: one trait ([`PackedMatrix`], defined by the operator that multiplies with it), one
//! file per scheme; and how models are written with them.

use std::sync::Arc;

use oxiformers_hub::checkpoint::{DType, TensorView};
pub use oxiformers_kernels::PackedMatrix;

pub mod awq;
pub mod bitnet;
pub mod bitsandbytes;
pub mod bnb_4bit;
pub mod calibrate;
pub mod codes;
pub mod compressed_tensors;
pub mod config;
pub mod float;
pub mod fp8;
pub mod ggml;
pub mod gguf;
pub mod gptq;
pub mod hqq;
pub mod llm_int8;
pub mod mxfp4;
pub mod named;
pub mod recipe;
pub mod scheme;
mod sum;
pub mod values;

pub use config::QuantizationConfig;
pub use named::MethodOptions;
pub use recipe::Recipe;
pub use scheme::{Dense, Parts, Scheme};
pub use values::to_f32;

/// Keeps a stored matrix `[out_features, in_features]` in its storage format, or `None` where that is no format that
/// can be multiplied with.
pub fn pack(view: &TensorView) -> Option<Arc<dyn PackedMatrix>> {
    let [out_features, in_features] = <[usize; 2]>::try_from(view.shape.as_slice()).ok()?;
    match view.dtype {
        DType::Ggml(ty) => ggml::GgmlMatrix::new(ty, [out_features, in_features], view.data.clone())
            .map(|matrix| Arc::new(matrix) as _),
        dtype => float::FloatMatrix::new(dtype, [out_features, in_features], view.data.clone())
            .map(|matrix| Arc::new(matrix) as _),
    }
}
