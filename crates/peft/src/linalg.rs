//! The largest singular values of a matrix, and what belongs to them.

/// The `k` largest singular values of a matrix, with their vectors: `a ≈ u · diag(s) · vt`.
#[derive(Debug, Clone)]
pub(crate) struct Svd {
    /// `[rows, k]`.
    pub u: Vec<f64>,
    /// `[k]`, the largest first.
    pub s: Vec<f64>,
    /// `[k, cols]`.
    pub vt: Vec<f64>,
}

/// Of a matrix `[rows, cols]`; `k` is at most the smaller of the two.
pub(crate) fn svd(a: &[f32], [rows, cols]: [usize; 2], k: usize) -> Svd {
    let k = k.min(rows).min(cols);
    if rows < cols {
        // The decomposition below is complete once it has all columns.
        let turned: Vec<f32> = (0..rows * cols)
            .map(|at| a[at % rows * cols + at / rows])
            .collect();
        let found = svd(&turned, [cols, rows], k);
        return Svd {
            u: transposed(&found.vt, [k, rows]),
            s: found.s,
            vt: transposed(&found.u, [cols, k]),
        };
    }
    let a: Vec<f64> = a.iter().map(|x| f64::from(*x)).collect();
    let mut steps = (4 * k + 24).min(rows.min(cols));
    loop {
        let found = lanczos(&a, [rows, cols], steps, k);
        if steps == rows.min(cols) || found.1 {
            return found.0;
        }
        steps = (2 * steps).min(rows.min(cols));
    }
}

fn transposed(a: &[f64], [rows, cols]: [usize; 2]) -> Vec<f64> {
    (0..rows * cols)
        .map(|at| a[at % rows * cols + at / rows])
        .collect()
}

/// The first `k` columns of a matrix `[rows, cols]` made orthogonal to each other and of length 1: the first of a QR
/// decomposition's `Q`, but for their signs.
pub(crate) fn orthonormal(a: &[f32], [rows, cols]: [usize; 2], k: usize) -> Vec<Vec<f64>> {
    let mut noise = Noise(1);
    let mut columns: Vec<Vec<f64>> = Vec::with_capacity(k);
    for j in 0..k.min(rows).min(cols) {
        let column: Vec<f64> = (0..rows).map(|row| f64::from(a[row * cols + j])).collect();
        let size = norm(&column).max(f64::MIN_POSITIVE);
        let (column, _) = orthogonal(column, &columns, size, &mut noise);
        columns.push(column);
    }
    columns
}

/// Golub and Kahan's bidiagonalization with so many steps, all vectors kept orthogonal (Golub and Van Loan, 2013, 10.4);
/// also says whether the `k` largest values are exact.
fn lanczos(a: &[f64], [rows, cols]: [usize; 2], steps: usize, k: usize) -> (Svd, bool) {
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let (mut us, mut vs): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (Vec::new(), Vec::new());
    let (mut alphas, mut betas) = (Vec::<f64>::new(), Vec::<f64>::new());
    let size = norm(a).max(f64::MIN_POSITIVE);
    let (v, _) = orthogonal(vec![0.0; cols], &vs, size, &mut noise);
    vs.push(v);
    let mut rest = 0.0;
    for step in 0..steps {
        let v = &vs[step];
        let mut u: Vec<f64> = a.chunks_exact(cols).map(|row| dot(row, v)).collect();
        if let (Some(last), Some(beta)) = (us.last(), betas.last()) {
            add(&mut u, -*beta, last);
        }
        let (u, alpha) = orthogonal(u, &us, size, &mut noise);
        alphas.push(alpha);
        let mut next = vec![0.0; cols];
        for (row, x) in a.chunks_exact(cols).zip(&u) {
            add(&mut next, *x, row);
        }
        add(&mut next, -alpha, v);
        us.push(u);
        if vs.len() == cols {
            // There is no other direction.
            rest = 0.0;
            break;
        }
        let (next, beta) = orthogonal(next, &vs, size, &mut noise);
        rest = beta;
        if step + 1 < steps {
            betas.push(beta);
            vs.push(next);
        }
    }
    let n = us.len();
    let mut b = vec![0.0; n * n];
    for i in 0..n {
        b[i * n + i] = alphas[i];
        if i + 1 < n {
            b[i * n + i + 1] = betas[i];
        }
    }
    let small = jacobi(&b, n);
    let largest = small.s.first().copied().unwrap_or(0.0);
    // The last component of a left vector says how much of it lies outside.
    let exact =
        (0..k.min(n)).all(|i| rest * small.u[(n - 1) * n + i].abs() <= 1e-8 * largest.max(f64::MIN_POSITIVE));
    let combine = |vectors: &[Vec<f64>], weight: &dyn Fn(usize, usize) -> f64, i: usize| {
        let mut sum = vec![0.0; vectors.first().map_or(0, Vec::len)];
        for (j, vector) in vectors.iter().enumerate().take(n) {
            add(&mut sum, weight(j, i), vector);
        }
        sum
    };
    let mut out = Svd {
        u: vec![0.0; rows * k],
        s: small.s.iter().copied().take(k).collect(),
        vt: Vec::with_capacity(k * cols),
    };
    for i in 0..k {
        let u = combine(&us, &|j, i| small.u[j * n + i], i);
        u.iter().enumerate().for_each(|(row, x)| out.u[row * k + i] = *x);
        out.vt.extend(combine(&vs, &|j, i| small.vt[i * n + j], i));
    }
    (out, exact)
}

/// All singular values of a square matrix, by rotations of its columns (Hestenes, 1958).
fn jacobi(a: &[f64], n: usize) -> Svd {
    // Columns as rows.
    let mut columns: Vec<Vec<f64>> = (0..n).map(|j| (0..n).map(|i| a[i * n + j]).collect()).collect();
    let mut v: Vec<Vec<f64>> = (0..n)
        .map(|j| (0..n).map(|i| f64::from(i == j)).collect())
        .collect();
    for _ in 0..60 {
        let mut rotated = false;
        for p in 0..n {
            for q in p + 1..n {
                let (alpha, beta) = (dot(&columns[p], &columns[p]), dot(&columns[q], &columns[q]));
                let gamma = dot(&columns[p], &columns[q]);
                if gamma == 0.0 || gamma.abs() <= 1e-15 * (alpha * beta).sqrt() {
                    continue;
                }
                rotated = true;
                let zeta = (beta - alpha) / (2.0 * gamma);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let cos = 1.0 / (1.0 + t * t).sqrt();
                rotate(&mut columns, p, q, cos, cos * t);
                rotate(&mut v, p, q, cos, cos * t);
            }
        }
        if !rotated {
            break;
        }
    }
    let sizes: Vec<f64> = columns.iter().map(|column| norm(column)).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| sizes[*b].total_cmp(&sizes[*a]));
    let mut out = Svd {
        u: vec![0.0; n * n],
        s: order.iter().map(|at| sizes[*at]).collect(),
        vt: Vec::with_capacity(n * n),
    };
    for (i, at) in order.iter().enumerate() {
        let size = sizes[*at];
        for (row, x) in columns[*at].iter().enumerate() {
            out.u[row * n + i] = if size > 0.0 { x / size } else { 0.0 };
        }
        out.vt.extend(&v[*at]);
    }
    out
}

fn rotate(rows: &mut [Vec<f64>], p: usize, q: usize, cos: f64, sin: f64) {
    let (before, after) = rows.split_at_mut(q);
    for (x, y) in before[p].iter_mut().zip(&mut after[0]) {
        (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
    }
}

/// `x` without what lies in the directions of `others`, scaled to length 1, and the length that it had; another direction
/// and 0 where nothing is left.
fn orthogonal(mut x: Vec<f64>, others: &[Vec<f64>], size: f64, noise: &mut Noise) -> (Vec<f64>, f64) {
    let clean = |x: &mut Vec<f64>| {
        // Once is not enough.
        for _ in 0..2 {
            for other in others {
                let part = dot(x, other);
                add(x, -part, other);
            }
        }
        norm(x)
    };
    let mut length = clean(&mut x);
    let found = if length > 1e-13 * size { length } else { 0.0 };
    if found == 0.0 {
        // Nearly every other direction will do.
        for _ in 0..64 {
            x.iter_mut().for_each(|x| *x = noise.next());
            length = clean(&mut x);
            if length > 1e-3 {
                break;
            }
        }
    }
    x.iter_mut().for_each(|x| *x /= length);
    (x, found)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
}

/// Numbers between -1 and 1 that look random (Marsaglia's xorshift).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(a: &[f32], [rows, cols]: [usize; 2], k: usize, rank: usize) {
        let found = svd(a, [rows, cols], k);
        assert!(found.s.windows(2).all(|pair| pair[0] >= pair[1] - 1e-9));
        // a · v = s · u, and aᵀ · u = s · v.
        for i in 0..k {
            for row in 0..rows {
                let product: f64 = (0..cols)
                    .map(|j| f64::from(a[row * cols + j]) * found.vt[i * cols + j])
                    .sum();
                assert!(
                    (product - found.s[i] * found.u[row * k + i]).abs() < 1e-6,
                    "{i} {row}"
                );
            }
            for col in 0..cols {
                let product: f64 = (0..rows)
                    .map(|j| f64::from(a[j * cols + col]) * found.u[j * k + i])
                    .sum();
                assert!(
                    (product - found.s[i] * found.vt[i * cols + col]).abs() < 1e-6,
                    "{i} {col}"
                );
            }
        }
        if k >= rank {
            for (at, x) in a.iter().enumerate() {
                let (row, col) = (at / cols, at % cols);
                let sum: f64 = (0..k)
                    .map(|i| found.u[row * k + i] * found.s[i] * found.vt[i * cols + col])
                    .sum();
                assert!((sum - f64::from(*x)).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn singular_vectors() {
        let mut noise = Noise(7);
        let mut of = |len: usize| -> Vec<f32> { (0..len).map(|_| noise.next() as f32).collect() };
        for ([rows, cols], k) in [
            ([5, 9], 3),
            ([40, 30], 30),
            ([130, 90], 4),
            ([1, 6], 1),
            ([60, 200], 8),
        ] {
            check(&of(rows * cols), [rows, cols], k, rows.min(cols));
        }
        // Of rank 3, one value twice.
        let (u, v) = (svd(&of(20 * 20), [20, 20], 3), svd(&of(12 * 12), [12, 12], 3));
        let s = [2.0, 2.0, 0.5];
        let a: Vec<f32> = (0..240)
            .map(|at| {
                (0..3)
                    .map(|i| u.u[at / 12 * 3 + i] * s[i] * v.vt[i * 12 + at % 12])
                    .sum::<f64>() as f32
            })
            .collect();
        check(&a, [20, 12], 5, 3);
        assert_eq!(svd(&[0.0; 12], [3, 4], 2).s, [0.0, 0.0]);
    }
}
