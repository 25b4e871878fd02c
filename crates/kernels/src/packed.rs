//! Weights that stay packed in memory.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Int, Shape, Tensor, TensorData};

use crate::dense::DenseMatrix;
use crate::int8::Int8Matrix;

/// A weight matrix `[out_features, in_features]` kept in its storage format.
///
/// One implementation per scheme; see the `oxiformers-quant` crate. The matrix is immutable and
/// shared, so clones of a model share its weights.
pub trait PackedMatrix: Debug + Send + Sync {
    /// `[out_features, in_features]`.
    fn shape(&self) -> [usize; 2];

    /// Name of the scheme as its own world spells it, for example `Q4_1` or `BF16`.
    fn scheme(&self) -> &str;

    /// Bytes held in memory.
    fn num_bytes(&self) -> usize;

    /// Writes the rows as f32 to `dst`, which holds `rows.len() * in_features` values.
    fn dequantize_rows(&self, rows: Range<usize>, dst: &mut [f32]);

    /// What kernels multiply with.
    fn form(&self) -> Form<'_>;
}

/// A matrix as kernels take it.
#[derive(Debug, Clone, Copy)]
pub enum Form<'a> {
    /// Multiplied with activations that are quantized.
    Int8(&'a Int8Matrix),
    /// Multiplied as floats.
    Float(&'a DenseMatrix),
}

/// The rows `ids` `[n]` of a packed matrix, widened: `[n, in_features]`. An id outside of the matrix gives zeros.
pub fn packed_rows(ids: Tensor<1, Int>, weight: &Arc<dyn PackedMatrix>) -> Tensor<2> {
    let device = ids.device();
    let [rows, in_features] = weight.shape();
    // Packed weights live on the CPU only, where reading back does not wait.
    let ids: Vec<i64> = ids.into_data().iter::<i64>().collect();
    let mut values = vec![0.0f32; ids.len() * in_features];
    for (id, dst) in ids.iter().zip(values.chunks_exact_mut(in_features.max(1))) {
        if let Some(row) = usize::try_from(*id).ok().filter(|row| *row < rows) {
            weight.dequantize_rows(row..row + 1, dst);
        }
    }
    Tensor::from_data(
        TensorData::new(values, Shape::from([ids.len(), in_features])),
        &device,
    )
}
