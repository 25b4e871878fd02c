//! Relative positions as a bias of the scores.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};

use crate::{Error, Init, Result, Weights};

/// T5's relative positions (Raffel et al., 2020): a learned bias per head and bucket of distances. Small distances
/// have a bucket each, larger ones share buckets that grow with the logarithm.
#[derive(Module, Debug)]
pub struct RelativeBias {
    /// `[num_buckets, heads]`.
    weight: Param<Tensor<2>>,
    max_distance: usize,
    bidirectional: bool,
}

impl RelativeBias {
    /// Loads `weight` `[num_buckets, heads]`. Where attention is `bidirectional`, half of the buckets are for
    /// keys that follow the query; elsewhere these count as distance 0. Distances from `max_distance` on share a
    /// bucket.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, or buckets that cannot be cut so.
    pub fn load(
        w: &Weights,
        num_buckets: usize,
        max_distance: usize,
        heads: usize,
        bidirectional: bool,
    ) -> Result<Self> {
        let exact = Self::exact(num_buckets, bidirectional);
        if exact == 0 || max_distance <= exact {
            let message = format!(
                "{num_buckets} buckets for distances up to {max_distance}: there must be at least 4, and more distances"
            );
            return Err(Error::config("relative_attention_num_buckets", message));
        }
        Ok(Self {
            weight: w.param("weight", [num_buckets, heads], Init::Normal)?,
            max_distance,
            bidirectional,
        })
    }

    /// Number of distances, from 0 on, with a bucket each.
    fn exact(num_buckets: usize, bidirectional: bool) -> usize {
        num_buckets / if bidirectional { 4 } else { 2 }
    }

    /// The bucket of a key `distance` tokens after the query.
    fn bucket(&self, distance: isize, num_buckets: usize) -> usize {
        let (buckets, first) = match (self.bidirectional, distance > 0) {
            (true, true) => (num_buckets / 2, num_buckets / 2),
            (true, false) => (num_buckets / 2, 0),
            (false, _) => (num_buckets, 0),
        };
        let distance = if self.bidirectional {
            distance.unsigned_abs()
        } else {
            (-distance).max(0).unsigned_abs()
        };
        let exact = Self::exact(num_buckets, self.bidirectional);
        if distance < exact {
            return first + distance;
        }
        // In f32, as the original computes it: the borders of buckets depend on its rounding.
        let log = |distance: usize| (distance as f32 / exact as f32).ln();
        let share = log(distance) / log(self.max_distance);
        let further = (share * (buckets - exact) as f32) as usize;
        first + (exact + further).min(buckets - 1)
    }

    /// The bias `[1, heads, queries, keys]` of scores, for `queries` whose first is the `past`th token and `keys`
    /// from the first token on.
    pub fn forward(&self, past: usize, queries: usize, keys: usize) -> Tensor<4> {
        let weight = self.weight.val();
        let [num_buckets, heads] = weight.dims();
        let buckets: Vec<i32> = (past..past + queries)
            .flat_map(|query| (0..keys).map(move |key| key as isize - query as isize))
            .map(|distance| self.bucket(distance, num_buckets) as i32)
            .collect();
        let buckets = Tensor::from_data(TensorData::new(buckets, [queries * keys]), &weight.device());
        weight
            .select(0, buckets)
            .reshape([queries, keys, heads])
            .permute([2, 0, 1])
            .unsqueeze()
    }
}
