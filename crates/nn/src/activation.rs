//! Activation functions by the names that configurations use.

use burn::tensor::{Tensor, activation};
use serde::{Deserialize, Serialize};

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

impl Activation {
    /// Applies the function to every element.
    pub fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Relu => activation::relu(x),
            Self::Relu2 => {
                let x = activation::relu(x);
                x.clone() * x
            }
            Self::Gelu => activation::gelu(x),
            Self::GeluTanh => {
                const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
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
