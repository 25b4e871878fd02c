//! Lookup tables.

use burn::module::Module;
use burn::tensor::{Int, Tensor};

use crate::linear::{Linear, Matrix};
use crate::parameters::Kind;
use crate::weights::Role;
use crate::{Result, TargetKind, Weights};

/// A table `[num_embeddings, embedding_dim]`.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[num_embeddings, embedding_dim]`.
    pub weight: Matrix,
    /// The table as it was before adapters were merged into it: what an output layer shares.
    unmerged: Option<Matrix>,
}

impl Embedding {
    /// Loads `weight`.
    pub fn load(w: &Weights, num_embeddings: usize, embedding_dim: usize) -> Result<Self> {
        Self::load_alone(w, num_embeddings, embedding_dim)?.adapted(w)
    }

    /// Loads `weight`, whose rows are those of tokens: that of padding learns nothing, and is initialized with zeros.
    pub fn load_tokens(w: &Weights, num_embeddings: usize, embedding_dim: usize) -> Result<Self> {
        let padding = w.padding_idx();
        Self::load_padded(w, num_embeddings, embedding_dim, padding)?.adapted(w)
    }

    /// Loads `weight` without adapters.
    pub(crate) fn load_alone(w: &Weights, num_embeddings: usize, embedding_dim: usize) -> Result<Self> {
        Self::load_padded(w, num_embeddings, embedding_dim, None)
    }

    /// The same, where the row `padding` learns nothing, and is initialized with zeros.
    pub(crate) fn load_padded(
        w: &Weights,
        num_embeddings: usize,
        embedding_dim: usize,
        padding: Option<usize>,
    ) -> Result<Self> {
        let weight = w
            .with_role(Role::Kept)
            .with_kind(Kind::Embedding)
            .with_padding(padding)
            .matrix("weight", [num_embeddings, embedding_dim])?;
        Ok(Self {
            weight: weight.with_padding(padding),
            unmerged: None,
        })
    }

    /// The same table with what adapters have for the place `w`.
    pub(crate) fn adapted(&self, w: &Weights) -> Result<Self> {
        let (weight, _) = w.adapt(self.weight.clone(), None, TargetKind::Embedding)?;
        Ok(Self {
            weight,
            unmerged: w.merges_adapters().then(|| self.weight.clone()),
        })
    }

    /// `[batch, seq]` ids to `[batch, seq, embedding_dim]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, seq] = ids.dims();
        self.weight
            .rows(ids.reshape([batch * seq]))
            .reshape([batch as isize, seq as isize, -1])
    }

    /// The output layer at `w` that shares this table. Adapters of the table are none of the layer's, which may have some
    /// of its own.
    ///
    /// # Errors
    /// An adapter that does not fit.
    pub fn tied_output(&self, w: &Weights) -> Result<Linear> {
        let shared = self.unmerged.as_ref().unwrap_or(&self.weight);
        let weight = shared.clone().with_adapters(Vec::new());
        let (weight, bias) = w.adapt(weight, None, TargetKind::Output)?;
        Ok(Linear { weight, bias })
    }
}
