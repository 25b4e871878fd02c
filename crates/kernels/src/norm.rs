//! Normalization over the last dimension.

use burn::tensor::Tensor;

use crate::output::Output;
use crate::{backward, flex, math};

/// Root mean square norm (Zhang and Sennrich, 2019): `x / sqrt(mean(x²) + eps) · (weight + offset)` for `x`
/// `[.., size]` and `weight` `[size]`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Option<Tensor<1>>, offset: f64, eps: f64) -> Tensor<D> {
    let norm = |x: Tensor<D>| {
        let variance = (x.clone() * x.clone()).mean_dim(D - 1);
        x * (variance + eps).sqrt().recip()
    };
    run(x, None, weight, None, [offset, eps], false, norm)
}

/// [`rms_norm`] of `x + residual`, two tensors of the same shape, and that sum: what comes before the second half of a
/// pre-norm layer.
pub fn add_rms_norm<const D: usize>(
    x: Tensor<D>,
    residual: Tensor<D>,
    weight: Option<Tensor<1>>,
    offset: f64,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    let dims = x.dims();
    let separately = |x: Tensor<D>, residual: Tensor<D>, weight| {
        let sum = if x.dims() == residual.dims() {
            sum(x, residual)
        } else {
            x + residual
        };
        (rms_norm(sum.clone(), weight, offset, eps), sum)
    };
    if dims != residual.dims() {
        return separately(x, residual, weight);
    }
    let weight = weight.map(Tensor::into_dispatch);
    let both = match weight.as_ref().is_none_or(flex::is_plain) {
        true => flex::plain([x, residual].map(Tensor::into_dispatch)),
        false => Err([x, residual].map(Tensor::into_dispatch)),
    };
    let (x, residual) = match both {
        Ok([x, residual]) => (x, flex::contiguous(residual)),
        Err(both) => {
            let [x, residual] = both.map(Tensor::from_dispatch);
            return separately(x, residual, weight.map(Tensor::from_dispatch));
        }
    };
    let weight = weight.map(flex::inner).map(flex::contiguous);
    let size = dims[D - 1];
    let normed = Output::new(x.layout().num_elements());
    let sum = flex::change(x, size, |start, x| {
        let to = normed.at(start);
        math::add(x, &flex::values(&residual)[start..]);
        // SAFETY: there is room for as many values as `x` has, and nobody else writes those of this chunk.
        let to = unsafe {
            to.copy_from_nonoverlapping(x.as_ptr(), x.len());
            std::slice::from_raw_parts_mut(to, x.len())
        };
        pulp::Arch::new().dispatch(Rows {
            x: to,
            residual: None,
            size,
            weight: weight.as_ref().map(flex::values),
            bias: None,
            offset: offset as f32,
            eps: eps as f32,
            centered: false,
        });
    });
    // SAFETY: the chunks were all values.
    let normed = unsafe { normed.done() };
    (flex::tensor(normed, dims), flex::wrap(sum))
}

/// Layer norm (Ba et al., 2016): `(x − mean) / sqrt(var + eps) · weight + bias` for `x` `[.., size]`, `weight`
/// and `bias` `[size]`.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: Option<Tensor<1>>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    centered(x, None, weight, bias, eps)
}

/// [`layer_norm`] of `x + residual`, two tensors of the same shape.
pub fn add_layer_norm<const D: usize>(
    x: Tensor<D>,
    residual: Tensor<D>,
    weight: Option<Tensor<1>>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    if x.dims() == residual.dims() {
        centered(x, Some(residual), weight, bias, eps)
    } else {
        layer_norm(x + residual, weight, bias, eps)
    }
}

fn centered<const D: usize>(
    x: Tensor<D>,
    residual: Option<Tensor<D>>,
    weight: Option<Tensor<1>>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    let norm = |x: Tensor<D>| {
        let x = x.clone() - x.mean_dim(D - 1);
        let variance = (x.clone() * x.clone()).mean_dim(D - 1);
        x * (variance + eps).sqrt().recip()
    };
    run(x, residual, weight, bias, [0.0, eps], true, norm)
}

/// `reference` is the norm without weight and bias.
fn run<const D: usize>(
    x: Tensor<D>,
    residual: Option<Tensor<D>>,
    weight: Option<Tensor<1>>,
    bias: Option<Tensor<1>>,
    [offset, eps]: [f64; 2],
    centered: bool,
    reference: impl Fn(Tensor<D>) -> Tensor<D>,
) -> Tensor<D> {
    let (x, residual) = (x.into_dispatch(), residual.map(Tensor::into_dispatch));
    let [weight, bias] = [weight, bias].map(|x| x.map(Tensor::into_dispatch));
    if ![Some(&x), residual.as_ref(), weight.as_ref(), bias.as_ref()]
        .into_iter()
        .flatten()
        .all(flex::is_plain)
    {
        let mut x = Tensor::from_dispatch(x);
        if let Some(residual) = residual {
            x = sum(x, Tensor::from_dispatch(residual));
        }
        let [weight, bias] = [weight, bias].map(|x| x.map(Tensor::from_dispatch));
        let norm = backward::Norm {
            weight,
            bias,
            offset,
            eps,
            centered,
        };
        let (x, [weight, bias]) = match backward::norm(x, norm) {
            Ok(y) => return y,
            Err(others) => others,
        };
        let mut y = reference(x);
        if let Some(weight) = weight {
            let weight = if offset == 0.0 { weight } else { weight + offset };
            y = y * weight.unsqueeze();
        }
        return match bias {
            Some(bias) => y + bias.unsqueeze(),
            None => y,
        };
    }
    let [residual, weight, bias] = [residual, weight, bias].map(|x| x.map(flex::inner).map(flex::contiguous));
    let x = flex::inner(x);
    let size = x.layout().shape().last().copied().unwrap_or(0);
    flex::wrap(flex::change(x, size, |start, x| {
        pulp::Arch::new().dispatch(Rows {
            residual: residual.as_ref().map(|x| &flex::values(x)[start..]),
            x,
            size,
            weight: weight.as_ref().map(flex::values),
            bias: bias.as_ref().map(flex::values),
            offset: offset as f32,
            eps: eps as f32,
            centered,
        });
    }))
}

/// `x + y`, of the same shape, where automatic differentiation may know them.
fn sum<const D: usize>(x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
    match backward::add(x, y) {
        Ok(sum) => sum,
        Err((x, y)) => x + y,
    }
}

struct Rows<'a> {
    /// `[rows, size]`.
    x: &'a mut [f32],
    /// What is added first: at least as many rows.
    residual: Option<&'a [f32]>,
    size: usize,
    weight: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    offset: f32,
    eps: f32,
    /// Whether the mean is taken off.
    centered: bool,
}

impl pulp::WithSimd for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let size = self.size.max(1);
        for (row, x) in self.x.chunks_exact_mut(size).enumerate() {
            if let Some(residual) = self.residual {
                for (x, residual) in x.iter_mut().zip(&residual[row * size..]) {
                    *x += residual;
                }
            }
            if self.centered {
                let mean = math::sum(x, |x| x) / size as f32;
                for x in x.iter_mut() {
                    *x -= mean;
                }
            }
            let scale = (math::sum(x, |x| x * x) / size as f32 + self.eps).sqrt().recip();
            match self.weight {
                Some(weight) => {
                    for (x, weight) in x.iter_mut().zip(weight) {
                        *x *= scale * (weight + self.offset);
                    }
                }
                None => {
                    for x in x.iter_mut() {
                        *x *= scale;
                    }
                }
            }
            if let Some(bias) = self.bias {
                for (x, bias) in x.iter_mut().zip(bias) {
                    *x += bias;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, tracked, worst};

    #[test]
    fn like_the_reference() {
        for size in [1, 3, 64, 80, 577] {
            for rows in [1, 2, 7, 300] {
                let x = noise(1, [2, rows, size]) * 3.0 + 0.5;
                let (weight, bias) = (noise(2, [size]), noise(3, [size]));
                for weight in [None, Some(weight)] {
                    let tracked_weight = weight.clone().map(tracked);
                    for offset in [0.0, 1.0] {
                        let fast = rms_norm(x.clone(), weight.clone(), offset, 1e-5);
                        let slow = rms_norm(tracked(x.clone()), tracked_weight.clone(), offset, 1e-5);
                        assert!(worst(fast, slow) < 1e-5);
                        let residual = noise(4, [2, rows, size]);
                        let (fast, fast_sum) =
                            add_rms_norm(x.clone(), residual.clone(), weight.clone(), offset, 1e-5);
                        let (slow, slow_sum) = add_rms_norm(
                            tracked(x.clone()),
                            tracked(residual.clone()),
                            tracked_weight.clone(),
                            offset,
                            1e-5,
                        );
                        assert!(worst(fast, slow) < 1e-5 && worst(fast_sum, slow_sum) < 1e-6);
                        let turned = |x: &Tensor<3>| x.clone().swap_dims(0, 1);
                        let (fast, fast_sum) =
                            add_rms_norm(turned(&x), turned(&residual), weight.clone(), offset, 1e-5);
                        let slow = rms_norm(turned(&x) + turned(&residual), weight.clone(), offset, 1e-5);
                        assert!(worst(fast, slow) < 1e-5);
                        assert!(worst(fast_sum, turned(&(x.clone() + residual))) < 1e-6);
                    }
                    for bias in [None, Some(bias.clone())] {
                        let fast = layer_norm(x.clone(), weight.clone(), bias.clone(), 1e-5);
                        let bias_of_reference = bias.clone().map(tracked);
                        let slow = layer_norm(
                            tracked(x.clone()),
                            tracked_weight.clone(),
                            bias_of_reference,
                            1e-5,
                        );
                        assert!(worst(fast, slow) < 1e-5);
                        let residual = noise(4, [2, rows, size]);
                        let fast =
                            add_layer_norm(x.clone(), residual.clone(), weight.clone(), bias.clone(), 1e-5);
                        let slow = layer_norm(x.clone() + residual, weight.clone(), bias, 1e-5);
                        assert!(worst(fast, slow) < 1e-5);
                    }
                }
                let turned = rms_norm(x.clone().swap_dims(0, 1), None, 0.0, 1e-5);
                assert!(worst(turned, rms_norm(x, None, 0.0, 1e-5).swap_dims(0, 1)) < 1e-6);
            }
        }
    }
}
