//! Absolute positions that are added to embeddings.

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};

use crate::{Context, Embedding, Error, Result, Weights};

/// Where the vectors of positions come from.
#[derive(Module, Debug)]
pub enum Positions {
    /// A learned table.
    Learned(LearnedPositions),
    /// Computed.
    Sinusoidal(Sinusoids),
}

/// A learned table.
#[derive(Module, Debug)]
pub struct LearnedPositions {
    table: Embedding,
    offset: usize,
}

/// Sines of a position over half as many wavelengths as there are dimensions, then their cosines (Vaswani et al.,
/// 2017).
#[derive(Module, Debug)]
pub struct Sinusoids {
    width: usize,
    offset: usize,
    /// Number of equal factors between the first wavelength, 2π, and 10000 · 2π.
    factors: usize,
}

impl Positions {
    /// Loads `weight`, a table of `count` positions with `offset` rows before them.
    ///
    /// # Errors
    /// Where it is missing or misshapen.
    pub fn learned(w: &Weights, count: usize, width: usize, offset: usize) -> Result<Self> {
        let table = Embedding::load(w, count + offset, width)?;
        Ok(Self::Learned(LearnedPositions { table, offset }))
    }

    /// Sines and cosines of positions that are counted from `offset`. The longest wavelength is 10000 · 2π where
    /// `inclusive`, else the one after it would be.
    ///
    /// # Errors
    /// Where the width is not an even number.
    pub fn sinusoidal(width: usize, offset: usize, inclusive: bool) -> Result<Self> {
        if width == 0 || !width.is_multiple_of(2) {
            let message = format!("is {width}, which cannot be half sines, half cosines");
            return Err(Error::config("d_model", message));
        }
        let half = width / 2;
        Ok(Self::Sinusoidal(Sinusoids {
            width,
            offset,
            factors: if inclusive { half.max(2) - 1 } else { half },
        }))
    }

    /// The positions of a pass: `[batch or 1, seq, width]`.
    pub fn forward(&self, cx: &Context) -> Tensor<3> {
        match self {
            Self::Learned(LearnedPositions { table, offset }) => table.forward(cx.position_ids(*offset)),
            Self::Sinusoidal(sinusoids) => {
                let rows = cx.positions();
                let shape = [rows.len(), cx.seq(), sinusoids.width];
                let values: Vec<f32> = rows
                    .iter()
                    .flatten()
                    .flat_map(|position| sinusoids.vector(*position))
                    .collect();
                Tensor::from_data(TensorData::new(values, shape), cx.device())
            }
        }
    }
}

impl Sinusoids {
    fn vector(&self, position: usize) -> impl Iterator<Item = f32> {
        let position = (position + self.offset) as f64;
        let factors = self.factors as f64;
        let angles = (0..self.width / 2).map(move |i| position * 10_000f64.powf(-(i as f64) / factors));
        let (sines, cosines) = (angles.clone().map(f64::sin), angles.map(f64::cos));
        sines.chain(cosines).map(|value| value as f32)
    }
}
