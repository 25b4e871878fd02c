//! Weights that stay packed in memory.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Int, Shape, Tensor, TensorData};

use crate::dense::DenseMatrix;
use crate::int8::Int8Matrix;
use crate::output::Output;
use crate::threads::{for_each, pieces};

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

    /// The form that integer kernels take, if the scheme and this processor have one.
    fn int8(&self) -> Option<&Int8Matrix> {
        None
    }

    /// The form that float kernels take, if the scheme is made of floats.
    fn dense(&self) -> Option<&DenseMatrix> {
        None
    }
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

/// Rows that one task widens at a time: with 4096 columns, 256 KiB of f32, about an L2 cache's half.
const TILE_ROWS: usize = 16;

/// `Σᵢ x[b, i] · W[o, i]`, `[batch, out_features]`, with `x` `[batch, in_features]`.
pub(crate) fn matmul_transposed(x: &[f32], weight: &dyn PackedMatrix) -> Vec<f32> {
    let [out_features, in_features] = weight.shape();
    let batch = x.len() / in_features.max(1);
    let out = Output::new(batch * out_features);
    if batch > 0 {
        for_each_tile(out_features, |rows, scratch| {
            scratch.resize(rows.len() * in_features, 0.0);
            weight.dequantize_rows(rows.clone(), scratch);
            // SAFETY: every task writes the columns `rows` of `out` only, and tasks never share rows.
            unsafe { tile(x, in_features, scratch, out.at(0), out_features, rows) };
        });
    }
    // SAFETY: the tiles are all columns.
    unsafe { out.done() }
}

/// One tile: all of `x` times the widened rows.
///
/// # Safety
/// `out` holds `x.len() / in_features * out_features` values, and nobody else touches its columns `rows`.
unsafe fn tile(
    x: &[f32],
    in_features: usize,
    weights: &[f32],
    out: *mut f32,
    out_features: usize,
    rows: Range<usize>,
) {
    let batch = x.len() / in_features;
    if batch == 1 {
        let dot = pulp::Arch::new();
        for (row, w) in rows.zip(weights.chunks_exact(in_features)) {
            // SAFETY: row < out_features, the length of `out`.
            unsafe { *out.add(row) = dot.dispatch(Dot { x, w }) };
        }
        return;
    }
    // SAFETY: the strides describe `out` [batch, rows] inside [batch, out_features], the weights
    // [rows, in_features] read transposed, and `x` [batch, in_features].
    unsafe {
        gemm::gemm(
            batch,
            rows.len(),
            in_features,
            out.add(rows.start),
            1,
            out_features as isize,
            false,
            x.as_ptr(),
            1,
            in_features as isize,
            weights.as_ptr(),
            in_features as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

struct Dot<'a> {
    x: &'a [f32],
    w: &'a [f32],
}

impl pulp::WithSimd for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> f32 {
        let (x, x_tail) = S::as_simd_f32s(self.x);
        let (w, w_tail) = S::as_simd_f32s(self.w);
        let mut sums = [simd.splat_f32s(0.0); 4];
        let (x4, x1) = pulp::as_arrays::<4, _>(x);
        let (w4, w1) = pulp::as_arrays::<4, _>(w);
        for (x, w) in x4.iter().zip(w4) {
            for i in 0..4 {
                sums[i] = simd.mul_add_f32s(x[i], w[i], sums[i]);
            }
        }
        for (x, w) in x1.iter().zip(w1) {
            sums[0] = simd.mul_add_f32s(*x, *w, sums[0]);
        }
        let low = simd.add_f32s(sums[0], sums[1]);
        let high = simd.add_f32s(sums[2], sums[3]);
        let sum = simd.reduce_sum_f32s(simd.add_f32s(low, high));
        sum + x_tail.iter().zip(w_tail).map(|(x, w)| x * w).sum::<f32>()
    }
}

/// Calls `task` for consecutive row ranges, in parallel, each with a scratch buffer.
fn for_each_tile(rows: usize, task: impl Fn(Range<usize>, &mut Vec<f32>) + Sync) {
    let tiles = rows.div_ceil(TILE_ROWS);
    let (count, size) = pieces(tiles, 1);
    for_each(count, |piece| {
        let mut scratch = Vec::new();
        for tile in piece * size..tiles.min((piece + 1) * size) {
            task(tile * TILE_ROWS..((tile + 1) * TILE_ROWS).min(rows), &mut scratch);
        }
    });
}
