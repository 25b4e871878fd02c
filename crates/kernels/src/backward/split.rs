//! Parts of the last dimension.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Tensor;

use super::tensor;
use crate::autodiff::open;
use crate::flex;

/// The parts of `x` `[.., size]` that are so many columns wide, one after the other.
///
/// Their gradients are put together in one tensor, instead of a sum of tensors that are zero elsewhere.
pub fn split<const D: usize, const N: usize>(x: Tensor<D>, widths: [usize; N]) -> [Tensor<D>; N] {
    let mut first = 0;
    let starts = widths.map(|width| {
        first += width;
        first - width
    });
    let dims = x.dims();
    let size = dims[D - 1];
    let (x, tape) = match open([x.into_dispatch()]) {
        Ok(([x], tape)) => (x, tape),
        Err([x]) => {
            let x = Tensor::<D>::from_dispatch(x);
            return std::array::from_fn(|i| x.clone().narrow(D - 1, starts[i], widths[i]));
        }
    };
    let sum = Arc::new(Mutex::new(Vec::new()));
    let own = sum.clone();
    let whole: Tensor<D> = tape.record(x.clone(), move |_, _| {
        let values = std::mem::take(&mut *own.lock().unwrap_or_else(PoisonError::into_inner));
        [Some(tensor(values, &dims))]
    });
    std::array::from_fn(|i| {
        let (start, width, sum) = (starts[i], widths[i], sum.clone());
        let Ok((_, tape)) = open([whole.clone().into_dispatch()]) else {
            return whole.clone().narrow(D - 1, start, width);
        };
        tape.record(x.narrow(D - 1, start, width), move |g, _| {
            let g = flex::contiguous(g);
            let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
            if sum.is_empty() {
                *sum = vec![0.0; dims.iter().product()];
            }
            let rows = sum.chunks_exact_mut(size.max(1));
            for (to, g) in rows.zip(flex::values(&g).chunks_exact(width.max(1))) {
                to[start..start + width].copy_from_slice(g);
            }
            // Only says that there is one.
            [Some(tensor(vec![0.0], &[1]))]
        })
    })
}
