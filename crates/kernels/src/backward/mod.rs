//! Backward passes of the fused operators, on the CPU.
//!
//! Each function takes the tensors of its operator, and gives them back where automatic differentiation on the CPU knows
//! none of them. Sums over rows are cut by the shapes alone: results do not depend on the number of threads.

mod activation;
mod attention;
mod linear;
mod norm;
mod rotary;
mod rows;
mod split;
#[cfg(test)]
mod tests;

pub(crate) use activation::{activation, gated};
pub(crate) use attention::attention;
pub(crate) use linear::{feed_forward, gated_feed_forward, linear, several};
pub(crate) use norm::{Norm, add, norm};
pub(crate) use rotary::rotary;
pub use rows::rows;
pub use split::split;

use burn::backend::flex::FlexTensor;
use burn::tensor::{Shape, TensorData};

use crate::output::Output;
use crate::threads::{for_each, for_each_chunk};

/// A tensor of the CPU with these values.
fn tensor(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, Shape::from(shape.to_vec())))
}

/// The values of a contiguous tensor, to be changed: in place where nobody else holds them.
fn values_mut(x: &mut FlexTensor) -> &mut [f32] {
    let (start, len) = (x.layout().start_offset(), x.layout().num_elements());
    &mut x.storage_mut::<f32>()[start..start + len]
}

/// Calls `task` with chunks of two slices of one length, and where they begin.
fn for_each_pair(
    a: &mut [f32],
    b: &mut [f32],
    size: usize,
    task: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    struct Start(*mut f32);
    // SAFETY: see below.
    unsafe impl Sync for Start {}
    impl Start {
        fn at(&self, index: usize) -> *mut f32 {
            self.0.wrapping_add(index)
        }
    }
    assert_eq!(a.len(), b.len());
    let b = Start(b.as_mut_ptr());
    for_each_chunk(a, size, |index, a| {
        // SAFETY: as long as `a`, and no other task has any of it.
        let b = unsafe { std::slice::from_raw_parts_mut(b.at(index * size), a.len()) };
        task(index * size, a, b);
    });
}

/// Columns that are summed up at a time.
const COLUMNS: usize = 64;
/// Rows that are summed up before they meet the sum of the others.
const ROWS: usize = 128;

/// The sums over the rows of `x` `[rows, columns]`.
fn column_sums(x: &[f32], columns: usize) -> Vec<f32> {
    struct Sums<'a> {
        x: &'a [f32],
        columns: usize,
        first: usize,
        to: &'a mut [f32],
    }

    impl pulp::WithSimd for Sums<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) {
            self.to.fill(0.0);
            for rows in self.x.chunks(ROWS * self.columns) {
                let mut sums = [0.0f32; COLUMNS];
                let sums = &mut sums[..self.to.len()];
                for row in rows.chunks_exact(self.columns) {
                    for (sum, x) in sums.iter_mut().zip(&row[self.first..]) {
                        *sum += x;
                    }
                }
                for (to, sum) in self.to.iter_mut().zip(sums) {
                    *to += *sum;
                }
            }
        }
    }

    let out = Output::new(columns);
    for_each(columns.div_ceil(COLUMNS), |index| {
        let first = index * COLUMNS;
        let len = COLUMNS.min(columns - first);
        // SAFETY: nobody else writes these columns.
        let to = unsafe {
            out.at(first).write_bytes(0, len);
            std::slice::from_raw_parts_mut(out.at(first), len)
        };
        pulp::Arch::new().dispatch(Sums {
            x,
            columns,
            first,
            to,
        });
    });
    // SAFETY: the tasks have written all columns.
    unsafe { out.done() }
}
