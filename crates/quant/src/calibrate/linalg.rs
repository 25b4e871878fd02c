//! Triangular factors of symmetric matrices, by blocks, so that nearly all of the work is products of our dense kernels.

use oxiformers_kernels::dense::{self, Weight};
use oxiformers_kernels::threads::for_each_chunk;

/// Columns of a block.
const BLOCK: usize = 128;

/// The lower triangular `V`, row-major `[n, n]`, with `A⁻¹ = V · Vᵀ` transposed the other way round than Cholesky's
/// own factor: `U = Vᵀ` is the upper factor of `A⁻¹ = Uᵀ · U` that GPTQ wants. `None` where `A` is not positive definite.
///
/// `A = R · Rᵀ` with an upper triangular `R` gives `U = R⁻¹`, so one factorization and one triangular inverse do; `R` is
/// Cholesky's factor of `A` read backwards, in rows and columns, and reading backwards is reversing the values.
pub fn inverse_factor(mut a: Vec<f32>, n: usize) -> Option<Vec<f32>> {
    a.reverse();
    cholesky(&mut a, n)?;
    let mut inverse = invert_lower(&a, n);
    inverse.reverse();
    Some(inverse)
}

/// Turns the lower triangle of a symmetric `a` `[n, n]` into `L` with `A = L · Lᵀ`; what is above the diagonal is not
/// read, and left as it is.
fn cholesky(a: &mut [f32], n: usize) -> Option<()> {
    for first in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - first);
        // What the columns on the left account for.
        if first > 0 {
            let left = copy(a, n, first..n, 0..first);
            let own = &left[..width * first];
            let products =
                dense::matmul(&left, first, &[(Weight::Plain(own, [width, first]), None)], None).concat();
            for_each_chunk(&mut a[first * n..], n, |row, to| {
                let own = products[row * width..].iter();
                to[first..first + width]
                    .iter_mut()
                    .zip(own)
                    .for_each(|(to, product)| *to -= product);
            });
        }
        let diagonal = factor(&copy(a, n, first..first + width, first..first + width), width)?;
        for_each_chunk(&mut a[first * n..], n, |row, to| {
            let to = &mut to[first..first + width];
            if row < width {
                for (to, value) in to.iter_mut().zip(&diagonal[row * width..]).take(row + 1) {
                    *to = *value as f32;
                }
                return;
            }
            let mut solved = [0.0f64; BLOCK];
            for column in 0..width {
                let known = &diagonal[column * width..];
                let sum: f64 = solved[..column].iter().zip(known).map(|(x, l)| x * l).sum();
                solved[column] = (f64::from(to[column]) - sum) / known[column];
                to[column] = solved[column] as f32;
            }
        });
    }
    Some(())
}

/// The factor of one block; the values above its diagonal mean nothing.
fn factor(block: &[f32], n: usize) -> Option<Vec<f64>> {
    let mut l: Vec<f64> = block.iter().map(|value| f64::from(*value)).collect();
    for row in 0..n {
        for column in 0..=row {
            let (above, own) = l.split_at_mut(row * n);
            let sum: f64 = if column == row {
                own[..column].iter().map(|x| x * x).sum()
            } else {
                own[..column]
                    .iter()
                    .zip(&above[column * n..])
                    .map(|(x, y)| x * y)
                    .sum()
            };
            let rest = own[column] - sum;
            own[column] = if column < row {
                rest / above[column * n + column]
            } else if rest > 0.0 && rest.is_finite() {
                rest.sqrt()
            } else {
                return None;
            };
        }
    }
    Some(l)
}

/// `(L⁻¹)ᵀ`, zeros below its diagonal, of a lower triangular `l` `[n, n]`, of which nothing above the diagonal is read.
fn invert_lower(l: &[f32], n: usize) -> Vec<f32> {
    let mut inverse = vec![0.0f32; n * n];
    for first in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - first);
        let own = invert_block(&copy(l, n, first..first + width, first..first + width), width);
        for (row, values) in own.chunks_exact(width).enumerate() {
            for (column, value) in values.iter().enumerate() {
                inverse[(first + column) * n + first + row] = *value as f32;
            }
        }
        if first == 0 {
            continue;
        }
        // M[block, ..first] = −M[block, block] · L[block, ..first] · M[..first, ..first], the last one as Mᵀ's rows.
        let left = copy(l, n, first..first + width, 0..first);
        let known = copy(&inverse, n, 0..first, 0..first);
        let products = dense::matmul(
            &left,
            first,
            &[(Weight::Plain(&known, [first, first]), None)],
            None,
        )
        .concat();
        for_each_chunk(&mut inverse[..first * n], n, |column, to| {
            for (row, to) in to[first..first + width].iter_mut().enumerate() {
                let factors = own[row * width..][..=row].iter();
                let sum: f64 = factors
                    .enumerate()
                    .map(|(at, factor)| factor * f64::from(products[at * first + column]))
                    .sum();
                *to = -sum as f32;
            }
        });
    }
    inverse
}

/// The inverse of a lower triangular block.
fn invert_block(block: &[f32], n: usize) -> Vec<f64> {
    let mut inverse = vec![0.0f64; n * n];
    for column in 0..n {
        for row in column..n {
            let l = &block[row * n..][..=row];
            let sum: f64 = (column..row)
                .map(|at| f64::from(l[at]) * inverse[at * n + column])
                .sum();
            let one = if row == column { 1.0 } else { 0.0 };
            inverse[row * n + column] = (one - sum) / f64::from(l[row]);
        }
    }
    inverse
}

/// A part of a matrix with rows of `n` values.
fn copy(a: &[f32], n: usize, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>) -> Vec<f32> {
    let mut part = Vec::with_capacity(rows.len() * columns.len());
    for row in rows {
        part.extend_from_slice(&a[row * n..][columns.clone()]);
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A random matrix times its transpose.
    pub fn definite(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let x: Vec<f32> = (0..n * (n + 8)).map(|_| next()).collect();
        let row = |at: usize| &x[at * (n + 8)..][..n + 8];
        let each = (0..n * n).map(|at| row(at / n).iter().zip(row(at % n)).map(|(a, b)| a * b).sum());
        let mut a: Vec<f32> = each.collect();
        (0..n).for_each(|at| a[at * n + at] += 0.1);
        a
    }

    #[test]
    fn the_factor_of_the_inverse() {
        for n in [1, 5, 128, 129, 300] {
            let a = definite(n, n as u64);
            let v = inverse_factor(a.clone(), n).unwrap();
            // U · A · Uᵀ is the identity, with U = Vᵀ.
            let u = |row: usize, column: usize| f64::from(v[column * n + row]);
            assert!((0..n).all(|row| (0..row).all(|column| u(row, column) == 0.0)));
            let mut ua = vec![0.0f64; n * n];
            for row in 0..n {
                for at in row..n {
                    let factor = u(row, at);
                    for column in 0..n {
                        ua[row * n + column] += factor * f64::from(a[at * n + column]);
                    }
                }
            }
            for row in 0..n {
                for column in 0..n {
                    let found: f64 = (column..n).map(|at| ua[row * n + at] * u(column, at)).sum();
                    let one = if row == column { 1.0 } else { 0.0 };
                    assert!((found - one).abs() < 2e-4, "{n}: {row} {column}: {found}");
                }
            }
        }
    }

    #[test]
    fn not_positive_definite() {
        let mut a = definite(200, 1);
        a[150 * 200 + 150] = -1.0;
        assert!(inverse_factor(a.clone(), 200).is_none());
        a[150 * 200 + 150] = f32::NAN;
        assert!(inverse_factor(a, 200).is_none());
    }
}
