//! HQQ (Badri and Shaji, 2023): zero points that make a robust norm of the error small, without looking at any input.

use oxiformers_kernels::threads::{for_each_chunk, pieces};

use super::Error;
use super::affine::check;

/// The half-quadratic solver of hqq 0.2.8: exponent of the norm, weight of the quadratic part and its growth, steps.
const LP_NORM: f32 = 0.7;
const BETA: f32 = 10.0;
const KAPPA: f32 = 1.01;
const STEPS: usize = 20;
/// Bits for which the solver begins with whole zero points.
pub const ROUNDED_ZERO: u32 = 4;

/// Groups of consecutive values as codes: `value = (code − zero) · scale`.
#[derive(Debug, Clone, PartialEq)]
pub struct HqqCodes {
    /// `[groups, group_size]`.
    pub codes: Vec<u8>,
    /// `[groups]`.
    pub scales: Vec<f32>,
    /// `[groups]`; no whole numbers.
    pub zeros: Vec<f32>,
}

/// Groups that are worked on together, with an estimate of the error.
struct Group {
    /// What values are multiplied with; scales are stored inverted.
    inverse: f32,
    zero: f32,
    error: f64,
}

/// Quantizes the rows of `weight` `[out_features, in_features]`, `group_size` consecutive values (within and across
/// rows) at a time, to codes of `bits` bits: `axis` 1 of hqq.
///
/// # Errors
/// Weights that are not finite, and a `group_size` that does not divide their number.
pub fn hqq(weight: &[f32], shape: [usize; 2], bits: u32, group_size: usize) -> Result<HqqCodes, Error> {
    check(weight, shape)?;
    if !matches!(bits, 1..=8) {
        return Err(Error::Option {
            option: "nbits",
            message: "lies between 1 and 8".to_string(),
        });
    }
    if group_size == 0 || !weight.len().is_multiple_of(group_size) {
        let message = format!("{group_size} does not divide {} weights", weight.len());
        return Err(Error::Option {
            option: "group_size",
            message,
        });
    }
    let most = ((1u32 << bits) - 1) as f32;
    let code = |value: f32, group: &Group| {
        (value * group.inverse + group.zero)
            .round_ties_even()
            .clamp(0.0, most)
    };
    let each = |group: &[f32]| {
        let (min, max) = group
            .iter()
            .fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), value| {
                (min.min(*value), max.max(*value))
            });
        let range = max - min;
        let inverse = if range <= 1e-4 { 1.0 } else { most / range }.min(2e4);
        // hqq's own choice for 4 bits.
        let zero = -min * inverse;
        let zero = if bits == ROUNDED_ZERO {
            zero.round_ties_even()
        } else {
            zero
        };
        Group {
            inverse,
            zero,
            error: 0.0,
        }
    };
    let mut groups: Vec<Group> = weight.chunks_exact(group_size).map(each).collect();
    let (_, size) = pieces(groups.len(), 64);
    let (mut beta, mut best) = (BETA, f32::INFINITY);
    for _ in 0..STEPS {
        for_each_chunk(&mut groups, size, |piece, groups| {
            let weights = weight[piece * size * group_size..].chunks_exact(group_size);
            for (group, weights) in groups.iter_mut().zip(weights) {
                let (mut error, mut sum) = (0.0f64, 0.0f64);
                for weight in weights {
                    let code = code(*weight, group);
                    let missed = weight - (code - group.zero) / group.inverse;
                    error += f64::from(missed.abs());
                    // What of the error the norm lets stand.
                    let size = (missed.abs() - missed.abs().powf(LP_NORM - 1.0) / beta).max(0.0);
                    let kept = if missed == 0.0 { 0.0 } else { size.copysign(missed) };
                    sum += f64::from(code - (weight - kept) * group.inverse);
                }
                group.error = error;
                group.zero = (sum / group_size as f64) as f32;
            }
        });
        beta *= KAPPA;
        // With the precision of the original, which ends where it sees no change.
        let error: f64 = groups.iter().map(|group| group.error).sum();
        let error = (error / weight.len().max(1) as f64) as f32;
        if error >= best {
            break;
        }
        best = error;
    }
    let mut codes = vec![0u8; weight.len()];
    for_each_chunk(&mut codes, size * group_size, |piece, codes| {
        let start = piece * size * group_size;
        let weights = weight[start..].chunks_exact(group_size);
        let all = codes
            .chunks_exact_mut(group_size)
            .zip(weights)
            .zip(&groups[piece * size..]);
        for ((codes, weights), group) in all {
            codes
                .iter_mut()
                .zip(weights)
                .for_each(|(to, weight)| *to = code(*weight, group) as u8);
        }
    });
    let scales = groups.iter().map(|group| 1.0 / group.inverse).collect();
    let zeros = groups.iter().map(|group| group.zero).collect();
    Ok(HqqCodes { codes, scales, zeros })
}
