//! Many rows times dense weights, by matrix tiles.

use std::cell::Cell;
use std::ops::Range;

use super::{COLUMNS, Float, PANEL, Task, Weight, kernels};
use crate::amx::parts::{self, CHUNK, PARTS, Sides, To};
use crate::amx::{Shapes, Tiles};
use crate::lines::{Line, make_room};

pub(super) use crate::amx::available;

/// Rows of `x` from which on parts and tiles pay.
pub(super) const MANY: usize = 20;
/// Rows of `x` that a task takes: weights are taken apart once for all of them.
pub(super) const ROWS: usize = 256;

thread_local! {
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

impl Task<'_> {
    /// Writes the sums, but where a value of `x` or of the weights is too large, infit or no number: then some may be
    /// wrong, and the result is false.
    ///
    /// # Safety
    /// Tiles are [`available`].
    pub(super) unsafe fn by_tiles(&self, rows: usize, outputs: Range<usize>) -> bool {
        let [out_features, in_features] = self.product.weight.shape();
        let mut dense = Vec::new();
        let (values, row_stride) = match self.x.strides {
            [stride, 1] => (self.x.values, stride),
            _ => {
                dense.resize(rows * in_features, 0.0);
                self.x.copy(0..in_features, in_features, &mut dense);
                (&dense[..], in_features)
            }
        };
        let pieces = in_features.div_ceil(COLUMNS).max(1);
        let width = in_features.div_ceil(pieces).next_multiple_of(CHUNK).max(CHUNK);
        let block_lines = parts::lines(width, PARTS);
        let mut scratch = SCRATCH.take();
        make_room(&mut scratch, (rows.div_ceil(parts::TILE) + 1) * block_lines);
        let (right, left) = scratch.split_at_mut(block_lines);
        // SAFETY: the caller's; both sides have the room that they need, and this task alone writes the outputs of its
        // rows.
        let fit = unsafe {
            let _tiles = Tiles::new(&Shapes::WHOLE);
            (0..in_features).step_by(width).all(|first| {
                let columns = first..in_features.min(first + width);
                let x = values.as_ptr().add(first);
                let size = [rows, columns.len()];
                let mut fit = parts::split_rows(x, row_stride, size, left.as_mut_ptr());
                for first_output in outputs.clone().step_by(PANEL) {
                    let outputs = first_output..outputs.end.min(first_output + PANEL);
                    let (of_panel, parts) = self.split_weights(&outputs, &columns, right.as_mut_ptr());
                    fit &= of_panel;
                    let sides = Sides {
                        left: left.as_ptr(),
                        right: right.as_ptr(),
                        depth: columns.len(),
                        rows,
                        columns: outputs.len(),
                    };
                    let to = To {
                        values: self.product.out.at(self.first_row * out_features + outputs.start),
                        stride: out_features,
                        add: first > 0,
                    };
                    match parts {
                        1 => parts::product::<1>(&sides, &to),
                        2 => parts::product::<2>(&sides, &to),
                        _ => parts::product::<3>(&sides, &to),
                    }
                }
                fit
            })
        };
        SCRATCH.set(scratch);
        fit
    }

    /// Some columns of a panel; returns whether all values are fit for products, and how many parts they have.
    ///
    /// # Safety
    /// Tiles are [`available`], and there is room.
    unsafe fn split_weights(
        &self,
        outputs: &Range<usize>,
        columns: &Range<usize>,
        to: *mut Line,
    ) -> (bool, usize) {
        let size = [outputs.len(), columns.len()];
        // SAFETY: the caller's; the columns lie within the panel, or the rows.
        unsafe {
            match self.product.weight {
                Weight::Packed(matrix) => {
                    let from = matrix.panel(outputs.start / PANEL, columns.start);
                    match matrix.float {
                        Float::F32 => (parts::split_f32(from.cast(), PANEL, size, to), PARTS),
                        Float::F16 => (parts::split_f16(from, columns.len(), to), 2),
                        Float::Bf16 => (parts::split_bf16(from, columns.len(), to), 1),
                        Float::F8E4M3 => {
                            let mut values = vec![0.0; columns.len() * PANEL];
                            let panel = outputs.start / PANEL;
                            matrix.widen(kernels(), panel, columns.clone(), values.as_mut_ptr());
                            (parts::split_f32(values.as_ptr(), PANEL, size, to), PARTS)
                        }
                    }
                }
                Weight::Plain(values, [_, in_features]) => {
                    let from = values[outputs.start * in_features + columns.start..].as_ptr();
                    (parts::split_transposed(from, in_features, size, to), PARTS)
                }
                Weight::Turned(values, [out_features, _]) => {
                    let from = values[columns.start * out_features + outputs.start..].as_ptr();
                    (parts::split_f32(from, out_features, size, to), PARTS)
                }
            }
        }
    }
}
