//! Codes with a scale and a zero point for each group of columns.

use half::f16;

use super::Error;

/// How a group of values becomes codes: `value ≈ scale · (code − zero)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Affine {
    /// The step from one code to the next.
    pub scale: f32,
    /// The code of the value 0, a whole number.
    pub zero: f32,
}

impl Affine {
    /// The nearest code, as a number; `most` is the largest.
    pub fn code(self, value: f32, most: f32) -> f32 {
        ((value / self.scale).round_ties_even() + self.zero).clamp(0.0, most)
    }

    /// What a code stands for.
    pub fn value(self, code: f32) -> f32 {
        self.scale * (code - self.zero)
    }
}

/// How scales and zero points are chosen, as GPTQ does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AffineOptions {
    /// Bits of a code, 1 to 8.
    pub bits: u32,
    /// Whether the zero point is the middle of the codes, for every group.
    pub sym: bool,
    /// Where above 0, the range of a group is narrowed as far as that makes the sum of `|error|^mse` smaller.
    pub mse: f32,
}

/// Steps of the search for a narrower range, and how many of them are tried.
const GRID: usize = 100;
const TRIED: usize = 80;

impl AffineOptions {
    /// The largest code.
    pub fn most(&self) -> f32 {
        ((1u32 << self.bits.min(8)) - 1) as f32
    }

    /// Scale and zero point for `values`, whose range always includes 0.
    pub fn fit(&self, values: &[f32]) -> Affine {
        let (mut min, mut max) = values.iter().fold((0.0f32, 0.0f32), |(min, max), value| {
            (min.min(*value), max.max(*value))
        });
        if self.sym {
            max = max.max(-min);
            min = -max;
        }
        if min == 0.0 && max == 0.0 {
            (min, max) = (-1.0, 1.0);
        }
        let most = self.most();
        let over = |shrink: f32| {
            let (min, max) = (shrink * min, shrink * max);
            let scale = (max - min) / most;
            let zero = if self.sym {
                (most + 1.0) / 2.0
            } else {
                (-min / scale).round_ties_even()
            };
            Affine { scale, zero }
        };
        if self.mse <= 0.0 {
            return over(1.0);
        }
        let error = |affine: Affine| -> f32 {
            let each = values.iter().map(|value| {
                (affine.value(affine.code(*value, most)) - value)
                    .abs()
                    .powf(self.mse)
            });
            each.sum()
        };
        let tried = (0..TRIED).map(|step| over(1.0 - step as f32 / GRID as f32));
        let best = tried
            .map(|affine| (affine, error(affine)))
            .reduce(|best, other| if other.1 < best.1 { other } else { best });
        best.map_or_else(|| over(1.0), |(affine, _)| affine)
    }
}

/// A matrix of codes, with a scale and a zero point for each group of columns: what GPTQ and AWQ make of a weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Grouped {
    /// `[out_features, in_features]`.
    pub shape: [usize; 2],
    /// Bits of a code.
    pub bits: u32,
    /// Columns of a group; the last group may be shorter.
    pub group_size: usize,
    /// `[out_features, in_features]`.
    pub codes: Vec<u8>,
    /// `[out_features, groups]`; each is a half float.
    pub scales: Vec<f32>,
    /// `[out_features, groups]`.
    pub zeros: Vec<u8>,
    /// The group of each column, where they are not side by side.
    pub g_idx: Option<Vec<u32>>,
}

impl Grouped {
    /// Number of groups in a row.
    pub fn groups(&self) -> usize {
        self.shape[1].div_ceil(self.group_size.max(1))
    }

    /// The group of a column.
    pub fn group(&self, column: usize) -> usize {
        match &self.g_idx {
            Some(g_idx) => g_idx[column] as usize,
            None => column / self.group_size.max(1),
        }
    }

    /// Writes what the codes of a row stand for to `dst` `[in_features]`.
    pub fn dequantize_row(&self, row: usize, dst: &mut [f32]) {
        let (columns, groups) = (self.shape[1], self.groups());
        let codes = &self.codes[row * columns..][..columns];
        let (scales, zeros) = (&self.scales[row * groups..], &self.zeros[row * groups..]);
        for (column, (code, to)) in codes.iter().zip(dst).enumerate() {
            let group = self.group(column);
            *to = scales[group] * (f32::from(*code) - f32::from(zeros[group]));
        }
    }

    /// All values `[out_features, in_features]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let columns = self.shape[1].max(1);
        let mut values = vec![0.0; self.codes.len()];
        for (row, dst) in values.chunks_exact_mut(columns).enumerate() {
            self.dequantize_row(row, dst);
        }
        values
    }
}

/// Rounds each weight to the nearest code of its group: what every other way is better than.
///
/// # Errors
/// As [`check`] and [`half()`].
pub fn round_to_nearest(
    weight: &[f32],
    [rows, columns]: [usize; 2],
    options: &AffineOptions,
    group_size: Option<usize>,
) -> Result<Grouped, Error> {
    check(weight, [rows, columns])?;
    let group_size = group_size.unwrap_or(columns).clamp(1, columns.max(1));
    let groups = columns.div_ceil(group_size);
    let (mut codes, mut scales, mut zeros) = (Vec::with_capacity(weight.len()), Vec::new(), Vec::new());
    for (at, group) in weight
        .chunks_exact(columns.max(1))
        .flat_map(|row| row.chunks(group_size))
        .enumerate()
    {
        let affine = options.fit(group);
        codes.extend(
            group
                .iter()
                .map(|value| affine.code(*value, options.most()) as u8),
        );
        scales.push(half(affine.scale, at / groups.max(1))?);
        zeros.push(affine.zero as u8);
    }
    Ok(Grouped {
        shape: [rows, columns],
        bits: options.bits,
        group_size,
        codes,
        scales,
        zeros,
        g_idx: None,
    })
}

/// A scale as checkpoints store it.
///
/// # Errors
/// Where it is too large for a half float.
pub fn half(scale: f32, row: usize) -> Result<f32, Error> {
    let rounded = f16::from_f32(scale).to_f32();
    if rounded.is_finite() {
        Ok(rounded)
    } else {
        Err(Error::Scale { row, scale })
    }
}

/// Checks that there are as many weights as the shape says, and that all are numbers.
///
/// # Errors
/// [`Error::Size`], [`Error::NotFinite`].
pub fn check(weight: &[f32], [rows, columns]: [usize; 2]) -> Result<(), Error> {
    if rows.checked_mul(columns) != Some(weight.len()) {
        return Err(Error::Size {
            shape: [rows, columns],
            values: weight.len(),
        });
    }
    match weight.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(Error::NotFinite {
            row: at / columns,
            column: at % columns,
            value: weight[at],
        }),
        None => Ok(()),
    }
}
