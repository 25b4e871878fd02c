//! Activation functions.

use std::f32::consts::FRAC_1_SQRT_2;

use burn::tensor::Tensor;

use super::{for_each_pair, values_mut};
use crate::activation::Activation;
use crate::autodiff::open;
use crate::threads::for_each_chunk;
use crate::{flex, math};

/// Values that a task takes.
const CHUNK: usize = 1 << 14;

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// `1 / √(2π)`.
const DENSITY: f32 = 0.398_942_3;

/// Makes the gradient `g` of `act(x)` that of `x`.
pub(super) fn derivative(act: Activation, x: &[f32], g: &mut [f32]) {
    for_each_chunk(g, CHUNK, |index, g| {
        let x = &x[index * CHUNK..][..g.len()];
        pulp::Arch::new().dispatch(Derivative { act, x, g });
    });
}

struct Derivative<'a> {
    act: Activation,
    x: &'a [f32],
    g: &'a mut [f32],
}

/// A loop for each function, in which it can become vector code: `$each!(|x| act(x), act'(x))`.
macro_rules! by_function {
    ($act:expr, $each:ident) => {
        match $act {
            Activation::Relu => $each!(|x| (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 })),
            Activation::Relu2 => $each!(|x| (x.max(0.0) * x.max(0.0), 2.0 * x.max(0.0))),
            Activation::Gelu => $each!(|x| {
                let share = 0.5 * (1.0 + math::erf(x * FRAC_1_SQRT_2));
                (x * share, share + x * DENSITY * math::exp(-0.5 * x * x))
            }),
            Activation::GeluTanh => $each!(|x| {
                let square = x * x;
                let share = math::sigmoid(2.0 * SQRT_2_OVER_PI * x * (1.0 + 0.044_715 * square));
                let slope = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044_715 * square);
                (x * share, share + x * share * (1.0 - share) * slope)
            }),
            Activation::QuickGelu => $each!(|x| {
                let share = math::sigmoid(1.702 * x);
                (x * share, share + 1.702 * x * share * (1.0 - share))
            }),
            Activation::Silu => $each!(|x| {
                let share = math::sigmoid(x);
                (x * share, share + x * share * (1.0 - share))
            }),
            Activation::Tanh => $each!(|x| {
                let y = math::tanh(x);
                (y, 1.0 - y * y)
            }),
            Activation::Sigmoid => $each!(|x| {
                let y = math::sigmoid(x);
                (y, y * (1.0 - y))
            }),
        }
    };
}

impl pulp::WithSimd for Derivative<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        macro_rules! each {
            (|$x:ident| $both:expr) => {
                for (g, x) in self.g.iter_mut().zip(self.x) {
                    let $x = *x;
                    let (_, slope): (f32, f32) = $both;
                    *g *= slope;
                }
            };
        }
        by_function!(self.act, each);
    }
}

/// Makes the gradients of `act(gate) · up`.
struct Gated<'a> {
    act: Activation,
    /// The gate, then its gradient.
    gate: &'a mut [f32],
    up: &'a [f32],
    /// The gradient of the result, then that of `up`.
    g: &'a mut [f32],
}

impl pulp::WithSimd for Gated<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let all = self.g.iter_mut().zip(self.gate).zip(self.up);
        macro_rules! each {
            (|$x:ident| $both:expr) => {
                for ((g, gate), up) in all {
                    let $x = *gate;
                    let (y, slope): (f32, f32) = $both;
                    *gate = *g * up * slope;
                    *g *= y;
                }
            };
        }
        by_function!(self.act, each);
    }
}

/// [`Activation::forward`].
pub(crate) fn activation<const D: usize>(act: Activation, x: Tensor<D>) -> Result<Tensor<D>, Tensor<D>> {
    let ([x], tape) = open([x.into_dispatch()]).map_err(|[x]| Tensor::from_dispatch(x))?;
    let x = flex::contiguous(x);
    let y = flex::inner(act.forward(flex::wrap::<D>(x.clone())).into_dispatch());
    Ok(tape.record(y, move |dy, _| {
        let dx = flex::change(dy, 1, |start, g| {
            let x = &flex::values(&x)[start..start + g.len()];
            pulp::Arch::new().dispatch(Derivative { act, x, g });
        });
        [Some(dx)]
    }))
}

/// [`Activation::gated`], of two tensors of the same shape.
#[allow(clippy::type_complexity)]
pub(crate) fn gated<const D: usize>(
    act: Activation,
    gate: Tensor<D>,
    up: Tensor<D>,
) -> Result<Tensor<D>, (Tensor<D>, Tensor<D>)> {
    let back = |[gate, up]: [_; 2]| (Tensor::from_dispatch(gate), Tensor::from_dispatch(up));
    let (both, tape) = open([gate, up].map(Tensor::into_dispatch)).map_err(back)?;
    let [gate, up] = both.map(flex::contiguous);
    let [a, b] = [&gate, &up].map(|x| flex::wrap::<D>(x.clone()));
    let y = flex::inner(act.gated(a, b).into_dispatch());
    Ok(tape.record(y, move |dy, _| {
        let (mut gate, mut dy) = (gate, flex::contiguous(dy));
        gated_gradients(act, values_mut(&mut gate), flex::values(&up), values_mut(&mut dy));
        [Some(gate), Some(dy)]
    }))
}

/// Makes the gradients of `gate` and `up` where `gate` and the gradient of the result lie.
pub(super) fn gated_gradients(act: Activation, gate: &mut [f32], up: &[f32], g: &mut [f32]) {
    for_each_pair(gate, g, CHUNK, |start, gate, g| {
        let up = &up[start..start + g.len()];
        pulp::Arch::new().dispatch(Gated { act, gate, up, g });
    });
}
