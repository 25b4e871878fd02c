//! Normalization over the last dimension.

use burn::tensor::Tensor;

use super::tensor;
use crate::autodiff::{Tape, open};
use crate::output::Output;
use crate::threads::for_each;
use crate::{flex, math};

/// Blocks of rows whose sums are put together at the end.
const BLOCKS: usize = 64;
/// Rows of a block at least.
const ROWS: usize = 16;

/// `x + y`, of two tensors of the same shape.
#[allow(clippy::type_complexity)]
pub(crate) fn add<const D: usize>(x: Tensor<D>, y: Tensor<D>) -> Result<Tensor<D>, (Tensor<D>, Tensor<D>)> {
    let back = |[x, y]: [_; 2]| (Tensor::from_dispatch(x), Tensor::from_dispatch(y));
    let ([x, y], tape) = open([x, y].map(Tensor::into_dispatch)).map_err(back)?;
    let y = flex::contiguous(y);
    let sum = flex::change(x, 1, |start, x| {
        math::add(x, &flex::values(&y)[start..start + x.len()]);
    });
    Ok(tape.record(sum, |g, [a, b]| [a.then(|| g.clone()), b.then_some(g)]))
}

/// What a norm is made of besides its input.
pub(crate) struct Norm {
    /// `[size]`.
    pub weight: Option<Tensor<1>>,
    /// `[size]`.
    pub bias: Option<Tensor<1>>,
    /// What is added to the weight.
    pub offset: f64,
    /// What is added to the variance.
    pub eps: f64,
    /// Whether the mean is taken off.
    pub centered: bool,
}

/// The norm of `x` `[.., size]`.
#[allow(clippy::type_complexity)]
pub(crate) fn norm<const D: usize>(
    x: Tensor<D>,
    norm: Norm,
) -> Result<Tensor<D>, (Tensor<D>, [Option<Tensor<1>>; 2])> {
    let Norm {
        weight,
        bias,
        offset,
        eps,
        centered,
    } = norm;
    let dims = x.dims();
    let [weight, bias] = [weight, bias].map(|x| x.map(Tensor::into_dispatch));
    let x = x.into_dispatch();
    let Some(mut tape) = Tape::over([&x].into_iter().chain(&weight).chain(&bias)) else {
        let rest = [weight, bias].map(|x| x.map(Tensor::from_dispatch));
        return Err((Tensor::from_dispatch(x), rest));
    };
    let x = flex::contiguous(tape.open(0, x));
    let weight = weight.map(|weight| flex::contiguous(tape.open(1, weight)));
    let bias = bias.map(|bias| tape.open(2, bias));
    let plain = |x: &Option<_>| x.clone().map(flex::wrap::<1>);
    let (input, scale) = (flex::wrap::<D>(x.clone()), plain(&weight));
    let y = match centered {
        true => crate::layer_norm(input, scale, bias.map(flex::wrap), eps),
        false => crate::rms_norm(input, scale, offset, eps),
    };
    Ok(tape.record(flex::inner(y.into_dispatch()), move |dy, wanted| {
        let dy = flex::contiguous(dy);
        let size = dims[D - 1];
        let gradients = Gradients {
            x: flex::values(&x),
            dy: flex::values(&dy),
            size,
            weight: weight.as_ref().map(flex::values),
            offset: offset as f32,
            eps: eps as f32,
            centered,
            wanted,
        };
        let [of_x, of_weight, of_bias] = gradients.run();
        [
            of_x.map(|values| tensor(values, &dims)),
            of_weight.map(|values| tensor(values, &[size])),
            of_bias.map(|values| tensor(values, &[size])),
        ]
    }))
}

struct Gradients<'a> {
    /// `[rows, size]`.
    x: &'a [f32],
    dy: &'a [f32],
    size: usize,
    weight: Option<&'a [f32]>,
    offset: f32,
    eps: f32,
    centered: bool,
    /// Whether the gradients of `x`, the weight and the bias are wanted.
    wanted: [bool; 3],
}

impl Gradients<'_> {
    fn run(&self) -> [Option<Vec<f32>>; 3] {
        let size = self.size.max(1);
        let rows = self.x.len() / size;
        let of_block = rows.div_ceil(BLOCKS).max(ROWS);
        let blocks = rows.div_ceil(of_block);
        let of_x = Output::new(self.x.len());
        let sums = Output::over(vec![0.0; blocks * 2 * size]);
        for_each(blocks, |block| {
            let rows = block * of_block..rows.min((block + 1) * of_block);
            // SAFETY: nobody else reads or writes these sums.
            let sums = unsafe { std::slice::from_raw_parts_mut(sums.at(block * 2 * size), 2 * size) };
            pulp::Arch::new().dispatch(Block {
                of: self,
                rows,
                of_x: &of_x,
                sums,
                scratch: &mut vec![0.0; 2 * size],
            });
        });
        // SAFETY: the tasks have written the gradients of all rows; the sums had values.
        let (of_x, sums) = unsafe { (of_x.done(), sums.done()) };
        let mut totals = [vec![0.0; size], vec![0.0; size]];
        for sums in sums.chunks_exact(2 * size) {
            for (total, sums) in totals.iter_mut().zip(sums.chunks_exact(size)) {
                for (total, sum) in total.iter_mut().zip(sums) {
                    *total += sum;
                }
            }
        }
        let [of_weight, of_bias] = totals;
        let [x, weight, bias] = self.wanted;
        [
            x.then_some(of_x),
            weight.then_some(of_weight),
            bias.then_some(of_bias),
        ]
    }
}

/// Some rows.
struct Block<'a> {
    of: &'a Gradients<'a>,
    rows: std::ops::Range<usize>,
    of_x: &'a Output,
    /// Of the gradients of the weight and the bias.
    sums: &'a mut [f32],
    /// Two rows.
    scratch: &'a mut [f32],
}

impl pulp::WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let f = self.of;
        let size = f.size.max(1);
        let (of_weight, of_bias) = self.sums.split_at_mut(size);
        let (normed, g) = self.scratch.split_at_mut(size);
        for row in self.rows {
            let x = &f.x[row * size..(row + 1) * size];
            let dy = &f.dy[row * size..(row + 1) * size];
            let mean = if f.centered {
                math::sum(x, |x| x) / size as f32
            } else {
                0.0
            };
            let variance = math::sum(x, |x| (x - mean) * (x - mean)) / size as f32;
            let scale = (variance + f.eps).sqrt().recip();
            for (normed, x) in normed.iter_mut().zip(x) {
                *normed = (x - mean) * scale;
            }
            for ((sum, dy), normed) in of_weight.iter_mut().zip(dy).zip(normed.iter()) {
                *sum += dy * normed;
            }
            if f.centered {
                for (sum, dy) in of_bias.iter_mut().zip(dy) {
                    *sum += dy;
                }
            }
            match f.weight {
                Some(weight) => {
                    for ((g, dy), weight) in g.iter_mut().zip(dy).zip(weight) {
                        *g = dy * (weight + f.offset);
                    }
                }
                None => g.copy_from_slice(dy),
            }
            let of_mean = if f.centered {
                math::sum(g, |g| g) / size as f32
            } else {
                0.0
            };
            let along = math::dot(g, normed) / size as f32;
            let to = self.of_x.at(row * size);
            for (i, (g, normed)) in g.iter().zip(normed.iter()).enumerate() {
                // SAFETY: nobody else writes the gradient of this row.
                unsafe { to.add(i).write(scale * (g - of_mean - normed * along)) };
            }
        }
    }
}
