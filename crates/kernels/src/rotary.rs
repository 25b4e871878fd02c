//! Rotary position embedding (Su et al., 2021).

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::Tensor;

use crate::flash::View;
use crate::threads::{for_each, pieces};
use crate::{backward, flex};

/// Rotates pairs of the first `2 * half` of the last dimension of `x` `[batch, heads, seq, dim]` by the angles
/// whose cosine and sine are `[batch or 1, 1, seq, half]`. A pair is two neighbours if `interleaved`, otherwise
/// a dimension and the one `half` further.
pub fn rotary(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>, interleaved: bool) -> Tensor<4> {
    match flex::plain([x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch()]) {
        Ok([x, cos, sin]) => flex::wrap(rotate(
            x,
            flex::dense_rows(cos),
            flex::dense_rows(sin),
            interleaved,
        )),
        Err(tensors) => {
            let [x, cos, sin] = tensors.map(Tensor::from_dispatch);
            match backward::rotary(x, cos, sin, interleaved) {
                Ok(y) => y,
                Err([x, cos, sin]) => reference(x, cos, sin, interleaved),
            }
        }
    }
}

fn reference(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>, interleaved: bool) -> Tensor<4> {
    let [batch, heads, seq, head_dim] = x.dims();
    let half = cos.dims()[3];
    let dim = 2 * half;
    let (cos, sin) = (cos.cast(x.dtype()), sin.cast(x.dtype()));
    let (first, second) = if interleaved {
        let pairs = x.clone().narrow(3, 0, dim).reshape([batch, heads, seq * half, 2]);
        let part = |i| pairs.clone().narrow(3, i, 1).reshape([batch, heads, seq, half]);
        (part(0), part(1))
    } else {
        (x.clone().narrow(3, 0, half), x.clone().narrow(3, half, half))
    };
    let rotated_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    let rotated_second = second * cos + first * sin;
    let rotated = if interleaved {
        let column = |t: Tensor<4>| t.reshape([batch, heads, seq * half, 1]);
        Tensor::cat(vec![column(rotated_first), column(rotated_second)], 3).reshape([batch, heads, seq, dim])
    } else {
        Tensor::cat(vec![rotated_first, rotated_second], 3)
    };
    if dim == head_dim {
        return rotated;
    }
    Tensor::cat(vec![rotated, x.narrow(3, dim, head_dim - dim)], 3)
}

/// In place where nobody else holds the values and no two rows share any.
fn rotate(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, interleaved: bool) -> FlexTensor {
    let mut x = if x.is_unique() && rows_apart(x.layout()) {
        x
    } else {
        // A copy, even where `x` is contiguous.
        let shape = x.layout().shape().clone();
        let x = flex::contiguous(x);
        FlexTensor::from_data(burn::tensor::TensorData::new(flex::values(&x).to_vec(), shape))
    };
    let layout = x.layout();
    let (start, strides) = (layout.start_offset(), layout.strides());
    let [a, b, c]: [usize; 3] = std::array::from_fn(|i| strides[i] as usize);
    let [batch, heads, seq, _]: [usize; 4] = std::array::from_fn(|i| layout.shape()[i]);
    let (cos, sin) = (flex::view(&cos), flex::view(&sin));
    // One table for all sequences, or one each.
    let table = |view: View<'_>, i: usize| i.min(view.dims[0] - 1);
    let dim = 2 * cos.dims[3];
    assert!(dim <= layout.shape()[3]);
    let values = Start(x.storage_mut::<f32>().as_mut_ptr());
    let rows = batch * seq;
    let (tasks, size) = pieces(rows, (1usize << 13).div_ceil((heads * dim).max(1)));
    for_each(tasks, |index| {
        for row in index * size..rows.min((index + 1) * size) {
            let (i, j) = (row / seq, row % seq);
            for head in 0..heads {
                let at = start + i * a + head * b + j * c;
                // SAFETY: the layout says that the row lies there, and that no two rows share any value.
                let x = unsafe { std::slice::from_raw_parts_mut(values.at(at), dim) };
                pulp::Arch::new().dispatch(Row {
                    x,
                    cos: cos.row(table(cos, i), 0, j),
                    sin: sin.row(table(sin, i), 0, j),
                    interleaved,
                });
            }
        }
    });
    x
}

/// Where values are that several tasks change, each its own.
struct Start(*mut f32);

// SAFETY: tasks only get addresses, and whoever writes to one vouches for it.
unsafe impl Sync for Start {}

impl Start {
    fn at(&self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }
}

/// Turns one row.
struct Row<'a> {
    x: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    interleaved: bool,
}

impl pulp::WithSimd for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self { x, cos, sin, .. } = self;
        if self.interleaved {
            for ((x, cos), sin) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                *x = [x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin];
            }
            return;
        }
        let (first, second) = x.split_at_mut(x.len() / 2);
        for (((x, y), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
        }
    }
}

/// Whether the last dimension is dense and every other steps over all that lies within it.
fn rows_apart(layout: &Layout) -> bool {
    let dims = layout.shape().iter().zip(layout.strides());
    let mut dims: Vec<(usize, isize)> = dims.map(|(dim, stride)| (*dim, *stride)).collect();
    let dense = dims.pop().is_some_and(|(dim, stride)| dim == 1 || stride == 1);
    let mut within = layout.shape().last().copied().unwrap_or(0) as isize;
    dims.retain(|(dim, _)| *dim > 1);
    dims.sort_by_key(|(_, stride)| *stride);
    dense
        && dims.into_iter().all(|(dim, stride)| {
            let apart = stride >= within;
            within = stride * dim as isize;
            apart
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, tracked, worst};

    #[test]
    fn like_the_reference() {
        for (dim, half) in [(64, 32), (80, 16), (6, 3), (2, 1)] {
            for seq in [1, 2, 7, 33] {
                for (batch, rows) in [(1, 1), (2, 1), (2, 2)] {
                    for interleaved in [false, true] {
                        let x = || noise(1, [batch, seq, 3, dim]);
                        let cos = noise(2, [rows, 1, seq, half]);
                        let sin = noise(3, [rows, 1, seq, half]);
                        let run = |x: Tensor<4>| rotary(x, cos.clone(), sin.clone(), interleaved);
                        let slow = rotary(
                            tracked(x().swap_dims(1, 2)),
                            tracked(cos.clone()),
                            tracked(sin.clone()),
                            interleaved,
                        );
                        let held = x();
                        // In place, from a buffer that is held elsewhere, from one that rows share.
                        assert!(worst(run(x().swap_dims(1, 2)), slow.clone()) < 1e-6);
                        assert!(worst(run(held.clone().swap_dims(1, 2)), slow) < 1e-6);
                        assert_eq!(worst(held, x()), 0.0);
                        let shared = || noise(4, [1, 1, seq, dim]);
                        let expanded = run(shared().expand([batch, 3, seq, dim]));
                        let repeated = run(shared().repeat(&[batch, 3, 1, 1]));
                        assert_eq!(worst(expanded, repeated), 0.0);
                    }
                }
            }
        }
    }
}
