//! Lookup tables.

use burn::module::Module;
use burn::tensor::{Int, Tensor};

use crate::linear::{Linear, Matrix};
use crate::weights::Role;
use crate::{Result, Weights};

/// A table `[num_embeddings, embedding_dim]`.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[num_embeddings, embedding_dim]`.
    pub weight: Matrix,
}

impl Embedding {
    /// Loads `weight`.
    pub fn load(w: &Weights, num_embeddings: usize, embedding_dim: usize) -> Result<Self> {
        Ok(Self {
            weight: w
                .with_role(Role::Kept)
                .matrix("weight", [num_embeddings, embedding_dim])?,
        })
    }

    /// `[batch, seq]` ids to `[batch, seq, embedding_dim]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, seq] = ids.dims();
        self.weight
            .rows(ids.reshape([batch * seq]))
            .reshape([batch as isize, seq as isize, -1])
    }

    /// The output layer that shares this table.
    pub fn tied_output(&self) -> Linear {
        Linear::from_matrix(self.weight.clone())
    }
}
