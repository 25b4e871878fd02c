//! Activation functions by the names that configurations use.

use burn::tensor::{Tensor, activation};
use serde::{Deserialize, Serialize};

use crate::{backward, flex, math};

/// An activation function, named as in `hidden_act` of `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `max(x, 0)`.
    #[serde(rename = "relu")]
    Relu,
    /// `max(x, 0)²`.
    #[serde(rename = "relu2")]
    Relu2,
    /// `x · Φ(x)` with the error function.
    #[serde(rename = "gelu", alias = "gelu_python")]
    Gelu,
    /// GELU by its tanh approximation (Hendrycks and Gimpel, 2016).
    #[serde(
        rename = "gelu_new",
        alias = "gelu_pytorch_tanh",
        alias = "gelu_fast",
        alias = "gelu_python_tanh"
    )]
    GeluTanh,
    /// `x · σ(1.702 x)`.
    #[serde(rename = "quick_gelu")]
    QuickGelu,
    /// `x · σ(x)`, also called swish.
    #[serde(rename = "silu", alias = "swish")]
    Silu,
    /// Hyperbolic tangent.
    #[serde(rename = "tanh")]
    Tanh,
    /// Logistic function.
    #[serde(rename = "sigmoid")]
    Sigmoid,
}

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;

impl Activation {
    /// Applies the function to every element.
    pub fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match flex::plain([x.into_dispatch()]) {
            Ok([x]) => flex::wrap(flex::change(x, 1, |_, x| {
                self.apply(x);
            })),
            Err([x]) => match backward::activation(self, Tensor::from_dispatch(x)) {
                Ok(y) => y,
                Err(x) => self.reference(x),
            },
        }
    }

    /// Applies the function to every value.
    pub(crate) fn apply(self, x: &mut [f32]) {
        let up = None;
        pulp::Arch::new().dispatch(Apply { act: self, x, up });
    }

    /// `act(gate) · up`, both of one shape (Shazeer, 2020).
    pub fn gated<const D: usize>(self, gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
        if gate.dims() != up.dims() {
            return self.forward(gate) * up;
        }
        match flex::plain([gate.into_dispatch(), up.into_dispatch()]) {
            Ok([gate, up]) => {
                let up = flex::contiguous(up);
                let up = flex::values(&up);
                flex::wrap(flex::change(gate, 1, |start, x| {
                    let up = Some(&up[start..start + x.len()]);
                    pulp::Arch::new().dispatch(Apply { act: self, x, up });
                }))
            }
            Err(both) => {
                let [gate, up] = both.map(Tensor::from_dispatch);
                match backward::gated(self, gate, up) {
                    Ok(y) => y,
                    Err((gate, up)) => self.reference(gate) * up,
                }
            }
        }
    }

    fn reference<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Relu => activation::relu(x),
            Self::Relu2 => {
                let x = activation::relu(x);
                x.clone() * x
            }
            Self::Gelu => activation::gelu(x),
            Self::GeluTanh => {
                let cubic = x.clone() * x.clone() * x.clone() * 0.044715 + x.clone();
                x * 0.5 * ((cubic * SQRT_2_OVER_PI).tanh() + 1.0)
            }
            Self::QuickGelu => x.clone() * activation::sigmoid(x * 1.702),
            Self::Silu => activation::silu(x),
            Self::Tanh => x.tanh(),
            Self::Sigmoid => activation::sigmoid(x),
        }
    }
}

/// `x = act(x) · up`.
pub(crate) struct Apply<'a> {
    pub act: Activation,
    pub x: &'a mut [f32],
    pub up: Option<&'a [f32]>,
}

impl pulp::WithSimd for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        // A loop for each function, in which it can become vector code.
        macro_rules! each {
            (|$x:ident| $y:expr) => {
                match self.up {
                    Some(up) => {
                        for (value, up) in self.x.iter_mut().zip(up) {
                            let $x = *value;
                            *value = $y * up;
                        }
                    }
                    None => {
                        for value in self.x {
                            let $x = *value;
                            *value = $y;
                        }
                    }
                }
            };
        }
        match self.act {
            Activation::Relu => each!(|x| x.max(0.0)),
            Activation::Relu2 => each!(|x| x.max(0.0) * x.max(0.0)),
            Activation::Gelu => {
                each!(|x| 0.5 * x * (1.0 + math::erf(x * std::f32::consts::FRAC_1_SQRT_2)))
            }
            // (1 + tanh(y)) / 2 = σ(2 y)
            Activation::GeluTanh => {
                each!(|x| x * math::sigmoid(2.0 * SQRT_2_OVER_PI as f32 * (x + 0.044_715 * x * x * x)))
            }
            Activation::QuickGelu => each!(|x| x * math::sigmoid(1.702 * x)),
            Activation::Silu => each!(|x| x * math::sigmoid(x)),
            Activation::Tanh => each!(|x| math::tanh(x)),
            Activation::Sigmoid => each!(|x| math::sigmoid(x)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, worst};

    #[test]
    fn like_the_reference() {
        use Activation::*;
        for act in [Relu, Relu2, Gelu, GeluTanh, QuickGelu, Silu, Tanh, Sigmoid] {
            for shape in [[1, 1, 3], [2, 7, 33], [5, 100, 80]] {
                let (x, up) = (noise(1, shape) * 8.0, noise(2, shape));
                let expected = act.reference(x.clone());
                assert!(worst(act.forward(x.clone()), expected.clone()) < 1e-5, "{act:?}");
                assert!(worst(act.gated(x.clone(), up.clone()), expected.clone() * up.clone()) < 1e-5);
                // Views, and a buffer that is nobody else's.
                let turned = act.gated(x.clone().swap_dims(0, 1) * 1.0, up.swap_dims(0, 1));
                let expected = expected.swap_dims(0, 1) * noise(2, shape).swap_dims(0, 1);
                assert!(worst(turned, expected) < 1e-5);
                let part = act.forward(x.clone().narrow(2, 1, shape[2] - 1));
                assert!(worst(part, act.reference(x.narrow(2, 1, shape[2] - 1))) < 1e-5);
            }
        }
    }
}
