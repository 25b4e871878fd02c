//! AWQ (Lin et al., 2023): columns that are multiplied with large inputs are scaled up before rounding, and what comes
//! before is scaled down; then ranges are clipped where that helps.

use oxiformers_kernels::dense::{self, Weight};
use oxiformers_kernels::threads::for_each_chunk;

use super::affine::{AffineOptions, check, round_to_nearest};
use super::{Error, Hessian};

/// Scales that are tried: powers of the inputs' magnitudes.
const SCALES: usize = 20;
/// Narrower ranges that are tried, and by how much each is narrower.
const CLIPS: usize = 10;
const CLIP_STEP: f32 = 1.0 / 20.0;

/// The weights of a linear layer, `[out_features, in_features]`.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// Row-major values.
    pub weight: &'a [f32],
    /// Number of rows.
    pub out_features: usize,
}

/// The factors `s` `[in_features]` with which the columns of `layers`, which all read the inputs that `hessian` saw, are
/// best multiplied: those with the least squared error of the outputs for weights `round(w · s) / s`.
///
/// # Errors
/// Weights or inputs that are not finite.
pub fn scales(
    layers: &[Layer],
    hessian: &Hessian,
    options: &AffineOptions,
    group_size: Option<usize>,
) -> Result<Vec<f32>, Error> {
    let n = hessian.in_features();
    for layer in layers {
        check(layer.weight, [layer.out_features, n])?;
    }
    let h = hessian.matrix();
    if !h.iter().step_by(n + 1).all(|value| value.is_finite()) {
        return Err(Error::Inputs);
    }
    let (inputs, weights) = (hessian.mean_magnitudes(), mean_weights(layers, n, group_size));
    let mut best = (f64::INFINITY, vec![1.0; n]);
    for step in 0..SCALES {
        let ratio = step as f32 / SCALES as f32;
        let each = inputs.iter().zip(&weights);
        let mut scales: Vec<f32> = each
            .map(|(x, w)| (x.powf(ratio) / (w.powf(1.0 - ratio) + 1e-4)).max(1e-4))
            .collect();
        let (least, most) = scales.iter().fold((f32::INFINITY, 0.0f32), |(least, most), s| {
            (least.min(*s), most.max(*s))
        });
        let middle = (least * most).sqrt();
        scales.iter_mut().for_each(|s| {
            *s = if (*s / middle).is_finite() {
                *s / middle
            } else {
                1.0
            }
        });
        let mut error = 0.0;
        for layer in layers {
            error += rounding_error(layer, &scales, &h, options, group_size)?;
        }
        if error < best.0 {
            best = (error, scales);
        }
    }
    Ok(best.1)
}

/// The mean over all rows of `|w|`, as a part of the largest in its group.
fn mean_weights(layers: &[Layer], n: usize, group_size: Option<usize>) -> Vec<f32> {
    let mut sums = vec![0.0f64; n];
    let group_size = group_size.unwrap_or(n).max(1);
    for row in layers
        .iter()
        .flat_map(|layer| layer.weight.chunks_exact(n.max(1)))
    {
        for (group, sums) in row.chunks(group_size).zip(sums.chunks_mut(group_size)) {
            let most = group.iter().fold(0.0f32, |most, w| most.max(w.abs())) + 1e-6;
            group
                .iter()
                .zip(sums)
                .for_each(|(w, sum)| *sum += f64::from(w.abs() / most));
        }
    }
    let rows: usize = layers.iter().map(|layer| layer.out_features).sum();
    sums.iter().map(|sum| (sum / rows.max(1) as f64) as f32).collect()
}

/// The error of the outputs with weights that are rounded after they were scaled.
fn rounding_error(
    layer: &Layer,
    scales: &[f32],
    h: &[f32],
    options: &AffineOptions,
    group_size: Option<usize>,
) -> Result<f64, Error> {
    let n = scales.len();
    let scaled = scale_columns(layer.weight, scales);
    let rounded = round_to_nearest(&scaled, [layer.out_features, n], options, group_size)?;
    let mut missed = rounded.dequantize();
    for_each_chunk(&mut missed, n.max(1), |row, missed| {
        let weights = &layer.weight[row * n..];
        for ((missed, scale), weight) in missed.iter_mut().zip(scales).zip(weights) {
            *missed = *missed / scale - weight;
        }
    });
    Ok(quadratic(&missed, h, n).iter().sum())
}

/// Each row of `weight` times `scales`.
pub fn scale_columns(weight: &[f32], scales: &[f32]) -> Vec<f32> {
    let mut scaled = weight.to_vec();
    for row in scaled.chunks_exact_mut(scales.len().max(1)) {
        row.iter_mut()
            .zip(scales)
            .for_each(|(weight, scale)| *weight *= scale);
    }
    scaled
}

/// `δᵀ · H · δ` for each row `δ` of `n` values.
fn quadratic(rows: &[f32], h: &[f32], n: usize) -> Vec<f64> {
    let products = dense::matmul(rows, n, &[(Weight::Plain(h, [n, n]), None)], None).concat();
    let each = rows.chunks_exact(n.max(1)).zip(products.chunks_exact(n.max(1)));
    each.map(|(row, product)| {
        row.iter()
            .zip(product)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    })
    .collect()
}

/// Clips the weights of each group `[out_features, in_features]` to the range that makes the error of the group's part of
/// the outputs least.
///
/// # Errors
/// Weights that are not finite.
pub fn clip(
    weight: &mut [f32],
    hessian: &Hessian,
    options: &AffineOptions,
    group_size: Option<usize>,
) -> Result<(), Error> {
    let n = hessian.in_features();
    let rows = weight.len() / n.max(1);
    check(weight, [rows, n])?;
    let h = hessian.matrix();
    let group_size = group_size.unwrap_or(n).clamp(1, n.max(1));
    for first in (0..n).step_by(group_size) {
        let width = group_size.min(n - first);
        let group = |row: usize| row * n + first..row * n + first + width;
        let own: Vec<f32> = (0..width)
            .flat_map(|row| h[(first + row) * n + first..][..width].iter().copied())
            .collect();
        let mut missed = vec![0.0; rows * CLIPS * width];
        for_each_chunk(&mut missed, CLIPS * width, |row, missed| {
            let weights = &weight[group(row)];
            let mut clipped = vec![0.0; width];
            for (step, missed) in missed.chunks_exact_mut(width).enumerate() {
                let most = bound(weights, step);
                clipped
                    .iter_mut()
                    .zip(weights)
                    .for_each(|(to, weight)| *to = weight.clamp(-most, most));
                let affine = options.fit(&clipped);
                for ((missed, clipped), weight) in missed.iter_mut().zip(&clipped).zip(weights) {
                    *missed = affine.value(affine.code(*clipped, options.most())) - weight;
                }
            }
        });
        let errors = quadratic(&missed, &own, width);
        for (row, errors) in errors.chunks_exact(CLIPS).enumerate() {
            let better = |best: usize, step: usize| if errors[step] < errors[best] { step } else { best };
            let step = (1..CLIPS).fold(0, better);
            let most = bound(&weight[group(row)], step);
            weight[group(row)]
                .iter_mut()
                .for_each(|weight| *weight = weight.clamp(-most, most));
        }
    }
    Ok(())
}

/// The range of the `step`-th try.
fn bound(weights: &[f32], step: usize) -> f32 {
    let most = weights.iter().fold(0.0f32, |most, weight| most.max(weight.abs()));
    most * (1.0 - step as f32 * CLIP_STEP)
}
