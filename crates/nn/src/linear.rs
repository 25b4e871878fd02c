//! The linear layer over dense or packed weights.

use std::ops::Range;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use oxiformers_kernels::{PackedMatrix, packed_linear, packed_linears};

use crate::{Error, Init, Result, Weights};

/// A weight matrix `[out_features, in_features]`, dense or packed; nobody above can tell which.
#[derive(Module, Debug)]
pub struct Matrix {
    /// Dense values, the trainable form.
    dense: Option<Param<Tensor<2>>>,
    /// Values in their storage format.
    #[module(skip)]
    packed: Option<Arc<dyn PackedMatrix>>,
}

impl Matrix {
    /// A dense matrix.
    pub fn dense(values: Param<Tensor<2>>) -> Self {
        Self {
            dense: Some(values),
            packed: None,
        }
    }

    /// A matrix in its storage format.
    pub fn packed(matrix: Arc<dyn PackedMatrix>) -> Self {
        Self {
            dense: None,
            packed: Some(matrix),
        }
    }

    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        match (&self.packed, &self.dense) {
            (Some(packed), _) => packed.shape(),
            (None, Some(dense)) => dense.val().dims(),
            (None, None) => [0, 0],
        }
    }

    /// `x · Wᵀ`: `[.., in_features]` to `[.., out_features]`.
    pub fn linear<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match (&self.packed, &self.dense) {
            (Some(packed), _) => packed_linear(x, packed),
            (None, Some(dense)) => {
                let mut dims = x.dims();
                let [out_features, in_features] = dense.val().dims();
                let rows = dims.iter().product::<usize>() / in_features.max(1);
                let y = x.reshape([rows, in_features]).matmul(dense.val().transpose());
                dims[D - 1] = out_features;
                y.reshape(dims)
            }
            (None, None) => x,
        }
    }

    /// The rows `ids` as a dense tensor `[ids.len(), in_features]`.
    pub fn rows(&self, ids: burn::tensor::Tensor<1, burn::tensor::Int>) -> Tensor<2> {
        match (&self.packed, &self.dense) {
            (Some(packed), _) => oxiformers_kernels::packed_rows(ids, packed),
            (None, Some(dense)) => dense.val().select(0, ids),
            (None, None) => Tensor::zeros([0, 0], &ids.device()),
        }
    }
}

/// `y = x · Wᵀ + b`.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[out_features, in_features]`.
    pub weight: Matrix,
    /// `[out_features]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Loads `weight` `[out_features, in_features]`, and `bias` where there is one.
    pub fn load(w: &Weights, in_features: usize, out_features: usize, bias: bool) -> Result<Self> {
        let weight = w.matrix("weight", [out_features, in_features])?;
        let bias = if bias {
            Some(w.param("bias", [out_features], Init::Zeros)?)
        } else {
            None
        };
        Ok(Self { weight, bias })
    }

    /// Loads a layer whose checkpoint stores the weight as `[in_features, out_features]`, as the
    /// `Conv1D` layers of GPT-2 do.
    pub fn load_conv1d(w: &Weights, in_features: usize, out_features: usize) -> Result<Self> {
        let weight = w.matrix_transposed("weight", [out_features, in_features])?;
        let bias = Some(w.param("bias", [out_features], Init::Zeros)?);
        Ok(Self { weight, bias })
    }

    /// A layer that shares its weight, such as an output layer tied to the embedding.
    pub fn from_matrix(weight: Matrix) -> Self {
        Self { weight, bias: None }
    }

    /// `[.., in_features]` to `[.., out_features]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let y = self.weight.linear(x);
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }

    /// Several layers over the same input, at once where their weights allow it.
    pub fn forward_all<const D: usize, const N: usize>(layers: [&Self; N], x: Tensor<D>) -> [Tensor<D>; N] {
        let packed: Vec<_> = layers
            .iter()
            .filter_map(|layer| layer.weight.packed.as_ref())
            .collect();
        let Ok(packed) = <[_; N]>::try_from(packed) else {
            return layers.map(|layer| layer.forward(x.clone()));
        };
        let mut layers = layers.into_iter();
        packed_linears(x, packed).map(|y| match layers.next().and_then(|layer| layer.bias.as_ref()) {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        })
    }

    /// Number of output features.
    pub fn out_features(&self) -> usize {
        self.weight.shape()[0]
    }
}

/// Checks that `part` lies within `whole` rows; used where fused weights are cut.
pub fn check_rows(name: &str, part: &Range<usize>, whole: usize) -> Result<()> {
    if part.start <= part.end && part.end <= whole {
        return Ok(());
    }
    Err(Error::config(
        name,
        format!("rows {part:?} are outside of the {whole} rows stored"),
    ))
}
