//! Normalization over the last dimension.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use oxiformers_kernels::{add_layer_norm, add_rms_norm, layer_norm, rms_norm};

use crate::parameters::Kind;
use crate::{Init, Result, Weights};

/// Root mean square norm (Zhang and Sennrich, 2019): `x / sqrt(mean(x²) + eps) · (weight + offset)`.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[size]`; none where the norm has no weight.
    pub weight: Option<Param<Tensor<1>>>,
    eps: f64,
    offset: f64,
}

impl RmsNorm {
    /// Loads `weight`.
    pub fn load(w: &Weights, size: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: Some(w.param("weight", [size], Init::Ones)?),
            eps,
            offset: 0.0,
        })
    }

    /// Loads `weight` of a norm that multiplies by `1 + weight`, as the Gemma family does.
    pub fn load_plus_one(w: &Weights, size: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: Some(w.param("weight", [size], Init::Zeros)?),
            eps,
            offset: 1.0,
        })
    }

    /// A norm without weight.
    pub fn unweighted(eps: f64) -> Self {
        Self {
            weight: None,
            eps,
            offset: 0.0,
        }
    }

    /// `[.., size]` to the same shape.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        rms_norm(x, self.weight.as_ref().map(Param::val), self.offset, self.eps)
    }

    /// The norm of `x + residual`, both `[.., size]`, and that sum.
    pub fn forward_sum<const D: usize>(&self, x: Tensor<D>, residual: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
        let weight = self.weight.as_ref().map(Param::val);
        add_rms_norm(x, residual, weight, self.offset, self.eps)
    }
}

/// Layer norm (Ba et al., 2016): `(x − mean) / sqrt(var + eps) · weight + bias`.
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// `[size]`; none where the norm has no weight.
    pub weight: Option<Param<Tensor<1>>>,
    /// `[size]`; none where the norm has no bias.
    pub bias: Option<Param<Tensor<1>>>,
    eps: f64,
}

impl LayerNorm {
    /// Loads `weight` (or `gamma`) and, if `bias`, `bias` (or `beta`).
    pub fn load(w: &Weights, size: usize, eps: f64, bias: bool) -> Result<Self> {
        // The names that TensorFlow gave them stand in the first checkpoints.
        let old = w.is_stored("gamma");
        let [weight_name, bias_name] = if old {
            ["gamma", "beta"]
        } else {
            ["weight", "bias"]
        };
        let w = w.with_kind(Kind::LayerNorm);
        let weight = Some(w.param_as(weight_name, "weight", [size], Init::Ones)?);
        let bias = if bias {
            Some(w.param_as(bias_name, "bias", [size], Init::Zeros)?)
        } else {
            None
        };
        Ok(Self { weight, bias, eps })
    }

    /// A norm without weight and bias.
    pub fn unweighted(eps: f64) -> Self {
        Self {
            weight: None,
            bias: None,
            eps,
        }
    }

    /// `[.., size]` to the same shape.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let [weight, bias] = [&self.weight, &self.bias].map(|x| x.as_ref().map(Param::val));
        layer_norm(x, weight, bias, self.eps)
    }

    /// The norm of `x + residual`, both `[.., size]`.
    pub fn forward_sum<const D: usize>(&self, x: Tensor<D>, residual: Tensor<D>) -> Tensor<D> {
        let [weight, bias] = [&self.weight, &self.bias].map(|x| x.as_ref().map(Param::val));
        add_layer_norm(x, residual, weight, bias, self.eps)
    }
}

/// Either norm, where the architecture leaves the choice to its layers.
#[derive(Module, Debug)]
pub enum Norm {
    /// Root mean square norm.
    Rms(RmsNorm),
    /// Layer norm.
    Layer(LayerNorm),
}

impl Norm {
    /// `[.., size]` to the same shape.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Rms(norm) => norm.forward(x),
            Self::Layer(norm) => norm.forward(x),
        }
    }
}

impl From<RmsNorm> for Norm {
    fn from(norm: RmsNorm) -> Self {
        Self::Rms(norm)
    }
}

impl From<LayerNorm> for Norm {
    fn from(norm: LayerNorm) -> Self {
        Self::Layer(norm)
    }
}
