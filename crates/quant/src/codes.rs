//! Matrices of codes, of any scheme that can say what its codes stand for.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use oxiformers_kernels::int8::{CodeRows, Int8Matrix, Shift};
use oxiformers_kernels::{Form, PackedMatrix};

/// A matrix whose rows are codes as a scheme stores them.
///
/// Values are exact f32 arithmetic: `scale · (code − zero)`, `scale · code + min` or `scale · table[code]`, each operation
/// rounded once. What products do about numbers is said at [`Int8Matrix::from_codes`].
#[derive(Debug, Clone)]
pub struct CodeMatrix<R> {
    rows: R,
    scheme: &'static str,
    num_bytes: usize,
    /// Made when the first product needs it: tables of embeddings are only looked up.
    int8: Arc<OnceLock<Int8Matrix>>,
}

impl<R: CodeRows> CodeMatrix<R> {
    /// `scheme` is the [name](PackedMatrix::scheme) of the scheme, `num_bytes` what `rows` holds in memory.
    pub fn new(rows: R, scheme: &'static str, num_bytes: usize) -> Self {
        Self {
            rows,
            scheme,
            num_bytes,
            int8: Arc::default(),
        }
    }

    /// The codes.
    pub fn rows(&self) -> &R {
        &self.rows
    }
}

impl<R: CodeRows> PackedMatrix for CodeMatrix<R> {
    fn shape(&self) -> [usize; 2] {
        self.rows.shape()
    }

    fn scheme(&self) -> &str {
        self.scheme
    }

    fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    fn dequantize_rows(&self, rows: Range<usize>, dst: &mut [f32]) {
        let (layout, [_, cols]) = (self.rows.layout(), self.rows.shape());
        let groups = layout.groups(cols);
        let mut codes = vec![0; cols];
        let mut scales = vec![0.0; groups];
        let mut shifts = vec![0.0; if layout.has_shifts() { groups } else { 0 }];
        // In the order of the codes, where that is not the order of columns.
        let mut sorted = vec![
            0.0;
            if self.rows.permutation().is_some() {
                cols
            } else {
                0
            }
        ];
        for (row, dst) in rows.zip(dst.chunks_exact_mut(cols.max(1))) {
            self.rows
                .unpack(row..row + 1, &mut codes, &mut scales, &mut shifts);
            let values = if sorted.is_empty() { &mut *dst } else { &mut sorted };
            let group = layout.group.clamp(1, cols.max(1));
            let each = codes.chunks(group).zip(values.chunks_mut(group)).zip(&scales);
            for (index, ((codes, values), scale)) in each.enumerate() {
                let shift = shifts.get(index).copied().unwrap_or_default();
                let all = codes.iter().zip(values);
                match (layout.table, layout.shift) {
                    (Some(table), _) => {
                        all.for_each(|(code, to)| *to = scale * table[usize::from(*code & 15)])
                    }
                    (None, Shift::Offset(offset)) => {
                        all.for_each(|(code, to)| *to = scale * (i32::from(*code) - offset) as f32);
                    }
                    (None, Shift::Zeros) => {
                        all.for_each(|(code, to)| *to = scale * (f32::from(*code) - shift))
                    }
                    (None, Shift::Mins) => all.for_each(|(code, to)| *to = scale * f32::from(*code) + shift),
                }
            }
            for (column, value) in self.rows.permutation().unwrap_or_default().iter().zip(&sorted) {
                if let Some(to) = dst.get_mut(*column as usize) {
                    *to = *value;
                }
            }
        }
    }

    fn form(&self) -> Form<'_> {
        // From then on a few rows are looked up at most.
        Form::Int8(self.int8.get_or_init(|| Int8Matrix::from_codes(&self.rows)))
    }
}

#[cfg(test)]
mod tests {
    use oxiformers_kernels::int8::{CodeLayout, matmul};

    use super::*;

    #[derive(Debug)]
    struct Rows(CodeLayout, Vec<u32>);

    impl CodeRows for Rows {
        fn shape(&self) -> [usize; 2] {
            [2, 5]
        }

        fn layout(&self) -> CodeLayout {
            self.0
        }

        fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], shifts: &mut [f32]) {
            for (index, row) in rows.enumerate() {
                let first = row as u8;
                codes[5 * index..][..5].copy_from_slice(&[first, 1, 2, 3, 4]);
                scales[3 * index..][..3].copy_from_slice(&[1.0, 2.0, 0.5]);
                if let Some(shifts) = shifts.get_mut(3 * index..3 * (index + 1)) {
                    shifts.copy_from_slice(&[1.0, 0.0, -2.0]);
                }
            }
        }

        fn permutation(&self) -> Option<&[u32]> {
            (!self.1.is_empty()).then_some(&self.1)
        }
    }

    /// Groups of two columns, the last one shorter; in order and in another one.
    #[test]
    fn values_and_products() {
        static SQUARES: [f32; 16] = [
            0.0, 1.0, 4.0, 9.0, 16.0, 25.0, 36.0, 49.0, 64.0, 81.0, 100.0, 121.0, 0.0, 0.0, 0.0, 0.0,
        ];
        let cases = [
            (Shift::Offset(2), None, [-1.0, -1.0, 0.0, 2.0, 1.0]),
            (Shift::Zeros, None, [0.0, 0.0, 4.0, 6.0, 3.0]),
            (Shift::Mins, None, [2.0, 2.0, 4.0, 6.0, 0.0]),
            (Shift::Offset(0), Some(&SQUARES), [1.0, 1.0, 8.0, 18.0, 8.0]),
        ];
        for (shift, table, second) in cases {
            let layout = CodeLayout {
                bits: 4,
                group: 2,
                shift,
                table,
            };
            let orders: [&[u32]; 2] = [&[], &[4, 2, 0, 1, 3]];
            for order in orders {
                let matrix = CodeMatrix::new(Rows(layout, order.to_vec()), "test", 10);
                let mut expected = second;
                for (at, value) in order.iter().zip(second) {
                    expected[*at as usize] = value;
                }
                let mut found = [0.0; 5];
                matrix.dequantize_rows(1..2, &mut found);
                assert_eq!(found, expected);
                let x = [1.0, -0.5, 0.25, 2.0, -1.0];
                let Form::Int8(int8) = matrix.form() else {
                    panic!("form")
                };
                let out = matmul(&x, 5, &[int8]).concat();
                let sum: f32 = x.iter().zip(expected).map(|(x, w)| x * w).sum();
                assert!((out[1] - sum).abs() < 2e-3, "{shift:?} {out:?} instead of {sum}");
            }
        }
    }
}
