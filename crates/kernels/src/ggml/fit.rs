//! The search for scales: which scale, and which minimum, lets the codes of a group come closest to its values.
//!
//! The order of the arithmetic is ggml's, operation by operation in f32, so that the same values give the same
//! bytes.

/// Below this a group counts as zero.
pub(super) const EPSILON: f32 = 1e-15;

/// The nearest whole number, ties to the even one.
#[inline(always)]
pub(super) fn nearest(value: f32) -> i32 {
    // Pushes the fraction out of the mantissa.
    let shifted = (value + 12_582_912.0).to_bits() as i32;
    (shifted & 0x007f_ffff) - 0x0040_0000
}

/// The value of the largest magnitude, with its sign; of several, the first.
#[inline(always)]
pub(super) fn extreme(x: &[f32]) -> f32 {
    let mut found = 0.0f32;
    for value in x {
        if value.abs() > found.abs() {
            found = *value;
        }
    }
    found
}

/// `Σ x²`.
#[inline(always)]
pub(super) fn square_sum(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, value| sum + value * value)
}

/// What errors at the values of a group weigh: their columns' importance, more where the values are large.
#[inline(always)]
pub(super) fn weigh(x: &[f32], importance: &[f32], mean_square: f32, weights: &mut [f32]) {
    for ((weight, x), importance) in weights.iter_mut().zip(x).zip(importance) {
        *weight = importance * (mean_square + x * x).sqrt();
    }
}

/// A scale for `x ≈ scale · (code − half)`, with codes from 0 to `2 · half − 1`: scales around the one that takes
/// the largest value to the end of the range are tried. Without weights, values weigh their squares.
#[inline(always)]
pub(super) fn symmetric(half: i32, x: &[f32], weights: Option<&[f32]>, codes: &mut [u8]) -> f32 {
    let largest = extreme(x);
    if largest.abs() < EPSILON {
        codes.fill(0);
        return 0.0;
    }
    let code = |inverse: f32, x: f32| nearest(inverse * x).clamp(-half, half - 1);
    let sums = |inverse: f32| {
        let (mut products, mut squares) = (0.0f32, 0.0f32);
        for (i, x) in x.iter().enumerate() {
            let code = code(inverse, *x) as f32;
            let weight = weights.map_or(x * x, |weights| weights[i]);
            products += weight * x * code;
            squares += weight * code * code;
        }
        (products, squares)
    };
    let mut chosen = -half as f32 / largest;
    let (products, squares) = sums(chosen);
    let mut scale = if squares != 0.0 { products / squares } else { 0.0 };
    let mut best = scale * products;
    for step in (-9..=9).filter(|step| *step != 0) {
        let inverse = -(half as f32 + 0.1 * step as f32) / largest;
        let (products, squares) = sums(inverse);
        if squares > 0.0 && products * products > best * squares {
            chosen = inverse;
            scale = products / squares;
            best = scale * products;
        }
    }
    for (stored, x) in codes.iter_mut().zip(x) {
        *stored = (half + code(chosen, *x)) as u8;
    }
    scale
}

/// As [`symmetric`] without weights, where single codes are moved as long as that helps.
#[inline(always)]
pub(super) fn symmetric_by_descent<const N: usize>(half: i32, x: &[f32; N], stored: &mut [u8]) -> f32 {
    let largest = extreme(x);
    if largest.abs() < EPSILON {
        stored.fill(0);
        return 0.0;
    }
    let inverse = -half as f32 / largest;
    let mut codes = [0; N];
    let (mut products, mut squares) = (0.0f32, 0.0f32);
    for (code, x) in codes.iter_mut().zip(x) {
        *code = nearest(inverse * x).clamp(-half, half - 1);
        let weight = x * x;
        products += weight * x * *code as f32;
        squares += weight * *code as f32 * *code as f32;
    }
    for _ in 0..5 {
        let mut moved = false;
        for (code, x) in codes.iter_mut().zip(x) {
            let (weight, old) = (x * x, *code as f32);
            let mut rest = products - weight * x * old;
            if rest <= 0.0 {
                continue;
            }
            let mut rest_squares = squares - weight * old * old;
            let new = nearest(x * rest_squares / rest).clamp(-half, half - 1);
            if new != *code {
                rest += weight * x * new as f32;
                rest_squares += weight * new as f32 * new as f32;
                if rest_squares > 0.0 && rest * rest * squares > products * products * rest_squares {
                    (*code, products, squares) = (new, rest, rest_squares);
                    moved = true;
                }
            }
        }
        if !moved {
            break;
        }
    }
    for (stored, code) in stored.iter_mut().zip(codes) {
        *stored = (code + half) as u8;
    }
    if squares > 0.0 { products / squares } else { 0.0 }
}

/// Which inverse scales [`with_minimum`] tries: `(first + step · n + most) / range`, for `n` from 0 to `steps`.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub(super) first: f32,
    pub(super) step: f32,
    pub(super) steps: i32,
}

/// The grid for values with an importance.
pub(super) const FINE: Grid = Grid {
    first: -0.9,
    step: 0.05,
    steps: 36,
};

/// A scale and a minimum for `x ≈ scale · code − minimum`, with codes from 0 to `most` and no minimum below 0. For
/// each scale of the grid, the codes that it gives are kept and both are solved for. Errors count as they are if
/// `absolute`, squared otherwise.
#[inline(always)]
pub(super) fn with_minimum<const N: usize>(
    most: i32,
    x: &[f32; N],
    weights: &[f32; N],
    grid: Grid,
    absolute: bool,
    codes: &mut [u8],
) -> (f32, f32) {
    let (mut min, mut max) = (x[0], x[0]);
    let mut sum_w = weights[0];
    let mut sum_x = sum_w * x[0];
    for (x, w) in x.iter().zip(weights).skip(1) {
        if *x < min {
            min = *x;
        }
        if *x > max {
            max = *x;
        }
        sum_w += w;
        sum_x += w * x;
    }
    if min > 0.0 {
        min = 0.0;
    }
    if max <= min {
        codes.fill(0);
        return (0.0, -min);
    }
    let encode = |inverse: f32, min: f32, codes: &mut [u8; N]| {
        for (code, x) in codes.iter_mut().zip(x) {
            *code = nearest(inverse * (x - min)).clamp(0, most) as u8;
        }
    };
    let error = |scale: f32, min: f32, codes: &[u8; N]| {
        let mut sum = 0.0f32;
        for ((code, x), w) in codes.iter().zip(x).zip(weights) {
            let difference = scale * f32::from(*code) + min - x;
            sum += w * if absolute {
                difference.abs()
            } else {
                difference * difference
            };
        }
        sum
    };
    let inverse = most as f32 / (max - min);
    let mut scale = 1.0 / inverse;
    let (mut chosen, mut tried) = ([0; N], [0; N]);
    encode(inverse, min, &mut chosen);
    let mut best = error(scale, min, &chosen);
    for n in 0..=grid.steps {
        let inverse = (grid.first + grid.step * n as f32 + most as f32) / (max - min);
        encode(inverse, min, &mut tried);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
        for ((code, x), w) in tried.iter().zip(x).zip(weights) {
            let code = f32::from(*code);
            sum_l += w * code;
            sum_l2 += w * code * code;
            sum_xl += w * code * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut this_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if this_min > 0.0 {
                this_min = 0.0;
                this_scale = sum_xl / sum_l2;
            }
            let found = error(this_scale, this_min, &tried);
            if found < best {
                (chosen, best, scale, min) = (tried, found, this_scale, this_min);
            }
        }
    }
    codes.copy_from_slice(&chosen);
    (scale, -min)
}

/// A scale for `x ≈ scale · code` with codes from 0 to `most`, for values that are not negative, as scales and
/// minimums of groups are: the best of a few, then single codes are moved as long as that helps.
#[inline(always)]
pub(super) fn positive<const N: usize>(
    most: i32,
    x: &[f32; N],
    weights: &[f32; N],
    codes: &mut [u8; N],
) -> f32 {
    let max = x.iter().fold(0.0f32, |max, x| if max > *x { max } else { *x });
    if max < EPSILON {
        codes.fill(0);
        return 0.0;
    }
    let error = |inverse: f32, most: i32| {
        let scale = 1.0 / inverse;
        let mut sum = 0.0f32;
        for (x, w) in x.iter().zip(weights) {
            let difference = x - scale * nearest(inverse * x).min(most) as f32;
            sum += w * difference * difference;
        }
        sum
    };
    let mut chosen = most as f32 / max;
    let mut best = error(chosen, i32::MAX);
    for step in (-4..=4).filter(|step| *step != 0) {
        let inverse = (0.1 * step as f32 + most as f32) / max;
        let found = error(inverse, most);
        if found < best {
            (best, chosen) = (found, inverse);
        }
    }
    let (mut products, mut squares) = (0.0f32, 0.0f32);
    for ((code, x), w) in codes.iter_mut().zip(x).zip(weights) {
        let new = nearest(chosen * x).min(most);
        *code = new as u8;
        products += w * x * new as f32;
        squares += w * new as f32 * new as f32;
    }
    for _ in 0..5 {
        let mut moved = false;
        for ((code, x), w) in codes.iter_mut().zip(x).zip(weights) {
            let old = f32::from(*code);
            let mut rest = products - w * x * old;
            let mut rest_squares = squares - w * old * old;
            if rest <= 0.0 || rest_squares <= 0.0 {
                continue;
            }
            let new = nearest(x * rest_squares / rest).min(most);
            if new != i32::from(*code) {
                rest += w * x * new as f32;
                rest_squares += w * new as f32 * new as f32;
                if rest * rest * squares > products * products * rest_squares {
                    (*code, products, squares) = (new as u8, rest, rest_squares);
                    moved = true;
                }
            }
        }
        if !moved {
            break;
        }
    }
    if squares > 0.0 { products / squares } else { 0.0 }
}
