//! What calibration remembers of a layer's inputs.

use oxiformers_kernels::dense::{self, Weight};
use oxiformers_kernels::threads::for_each_chunk;

/// Rows of an input that are taken at a time, and of the sum that are computed at a time.
const ROWS: usize = 2048;
const BAND: usize = 512;

/// Sums over the inputs `x` of a linear layer: `Σ x · xᵀ` and `Σ |x|`.
///
/// The squared error of the layer's outputs is quadratic in that of its weights: `Σ ‖(Ŵ − W) · x‖² = Σᵣ δᵣᵀ · (Σ x · xᵀ)
/// · δᵣ` over the rows `δᵣ` of `Ŵ − W`; so this is all that GPTQ and AWQ ask of the inputs, and its diagonal is what
/// importance matrices hold.
#[derive(Debug, Clone)]
pub struct Hessian {
    in_features: usize,
    /// The lower triangle of `Σ x · xᵀ` `[in_features, in_features]`.
    sum: Vec<f32>,
    magnitudes: Vec<f64>,
    rows: usize,
}

impl Hessian {
    /// No inputs yet.
    pub fn new(in_features: usize) -> Self {
        Self {
            in_features,
            sum: vec![0.0; in_features * in_features],
            magnitudes: vec![0.0; in_features],
            rows: 0,
        }
    }

    /// Number of input features.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Inputs seen.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Adds inputs `x` `[rows, in_features]`.
    pub fn add(&mut self, x: &[f32]) {
        let n = self.in_features;
        for x in x.chunks(ROWS * n.max(1)) {
            let rows = x.len() / n.max(1);
            self.rows += rows;
            let mut columns = vec![0.0; n * rows];
            for_each_chunk(&mut columns, rows.max(1), |column, to| {
                to.iter_mut()
                    .zip(x.iter().skip(column).step_by(n))
                    .for_each(|(to, value)| *to = *value);
            });
            for (sum, column) in self.magnitudes.iter_mut().zip(columns.chunks_exact(rows.max(1))) {
                *sum += column.iter().map(|value| f64::from(value.abs())).sum::<f64>();
            }
            for first in (0..n).step_by(BAND) {
                let end = n.min(first + BAND);
                let weight = Weight::Plain(&columns[..end * rows], [end, rows]);
                let products =
                    dense::matmul(&columns[first * rows..end * rows], rows, &[(weight, None)], None).concat();
                for_each_chunk(&mut self.sum[first * n..end * n], n, |row, to| {
                    let own = products[row * end..].iter().take(first + row + 1);
                    to.iter_mut().zip(own).for_each(|(to, product)| *to += product);
                });
            }
        }
    }

    /// What would have been seen of inputs that are divided by `scales`, feature by feature.
    pub fn divide(&mut self, scales: &[f32]) {
        for_each_chunk(&mut self.sum, self.in_features.max(1), |row, sums| {
            sums.iter_mut()
                .zip(scales)
                .for_each(|(sum, scale)| *sum /= scale * scales[row]);
        });
        self.magnitudes
            .iter_mut()
            .zip(scales)
            .for_each(|(sum, scale)| *sum /= f64::from(scale.abs()));
    }

    /// The mean of `2 · x · xᵀ` `[in_features, in_features]`: the second derivative of the mean squared error.
    pub fn matrix(&self) -> Vec<f32> {
        let n = self.in_features;
        let scale = 2.0 / self.rows.max(1) as f32;
        let mut matrix = vec![0.0; n * n];
        for_each_chunk(&mut matrix, n.max(1), |row, to| {
            for (column, to) in to.iter_mut().enumerate() {
                *to = scale * self.sum[row.max(column) * n + row.min(column)];
            }
        });
        matrix
    }

    /// The mean of `x²`, feature by feature.
    pub fn mean_squares(&self) -> Vec<f32> {
        let scale = 1.0 / self.rows.max(1) as f32;
        let diagonal = self.sum.iter().step_by(self.in_features + 1);
        diagonal.map(|value| scale * value).collect()
    }

    /// The mean of `|x|`, feature by feature.
    pub fn mean_magnitudes(&self) -> Vec<f32> {
        let rows = self.rows.max(1) as f64;
        self.magnitudes.iter().map(|sum| (sum / rows) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_products() {
        let (n, rows) = (600, 70);
        let x: Vec<f32> = (0..n * rows)
            .map(|at| ((at * 7919 % 1000) as f32 - 500.0) / 300.0)
            .collect();
        let mut hessian = Hessian::new(n);
        hessian.add(&x[..30 * n]);
        hessian.add(&x[30 * n..]);
        assert_eq!(hessian.rows(), rows);
        let matrix = hessian.matrix();
        for (row, column) in [(0, 0), (3, 599), (599, 3), (512, 511), (511, 512), (599, 599)] {
            let each = x
                .chunks_exact(n)
                .map(|x| f64::from(x[row]) * f64::from(x[column]));
            let expected = 2.0 * each.sum::<f64>() / rows as f64;
            assert!((f64::from(matrix[row * n + column]) - expected).abs() < 1e-4);
        }
        assert!((hessian.mean_squares()[17] - matrix[17 * n + 17] / 2.0).abs() < 1e-6);
        let expected = x.chunks_exact(n).map(|x| x[5].abs()).sum::<f32>() / rows as f32;
        assert!((hessian.mean_magnitudes()[5] - expected).abs() < 1e-5);
    }
}
