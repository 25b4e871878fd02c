//! Packed weights: one trait ([`PackedMatrix`], defined by the operator that multiplies with it), one
//! file per scheme; and how models are written with them.

use std::sync::Arc;

use oxiformers_hub::checkpoint::{DType, TensorView};
pub use oxiformers_kernels::PackedMatrix;

pub mod codes;
pub mod float;
pub mod ggml;
pub mod gguf;

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
