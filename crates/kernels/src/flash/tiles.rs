//! The products of attention, by matrix tiles.

use std::cell::Cell;

use super::KEYS;
use crate::amx::parts::{self, PARTS, Sides, TILE, To};
use crate::amx::{Shapes, Tiles, available};
use crate::lines::{Line, make_room};

/// Rows from which on parts and tiles pay.
const MANY: usize = 32;

thread_local! {
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// `scores[row, j] = q[row] · k[j]`, with `q` `[rows, dim]`, the `keys` rows of `k` `stride` apart and those of `scores`
/// [`KEYS`]. False where there are no tiles or not enough rows, or values are too large, infit or no numbers: then nothing is to be made of
/// the scores.
pub(super) fn scores(
    q: &[f32],
    [rows, dim, keys]: [usize; 3],
    k: &[f32],
    stride: usize,
    scores: &mut [f32],
) -> bool {
    if rows < MANY || dim == 0 || !available() {
        return false;
    }
    assert!(q.len() >= rows * dim && scores.len() >= rows * KEYS && keys <= KEYS);
    assert!(k.len() >= (keys - 1) * stride + dim);
    // SAFETY: there are tiles, and the slices have all that is read and written.
    unsafe {
        product(
            [rows, dim, keys],
            q.as_ptr(),
            dim,
            scores.as_mut_ptr(),
            KEYS,
            false,
            |key, size, to| parts::split_transposed(k.as_ptr().add(key * stride), stride, size, to),
        )
    }
}

/// `sums[row] += Σⱼ weights[row, j] · v[j]`, with rows of `weights` [`KEYS`] apart, the `keys` rows of `v` `stride` apart
/// and `sums` `[rows, dim]`. The result is that of [`scores`], but a sum is changed only where it is true.
pub(super) fn sums(
    weights: &[f32],
    [rows, keys, dim]: [usize; 3],
    v: &[f32],
    stride: usize,
    sums: &mut [f32],
) -> bool {
    if rows < MANY || dim == 0 || !available() {
        return false;
    }
    assert!(weights.len() >= (rows - 1) * KEYS + keys && sums.len() >= rows * dim);
    assert!(v.len() >= (keys - 1) * stride + dim);
    // SAFETY: there are tiles, and the slices have all that is read and written.
    unsafe {
        product(
            [rows, keys, dim],
            weights.as_ptr(),
            KEYS,
            sums.as_mut_ptr(),
            dim,
            true,
            |column, size, to| parts::split_f32(v.as_ptr().add(column), stride, size, to),
        )
    }
}

/// A product of `rows` rows of `left` and as many columns, of which `split` takes 16 apart: from a number on, so many of
/// so many values. False, and nothing done, where a value is not fit for it.
///
/// # Safety
/// There are tiles; `left` and `out` have `rows` rows that are so far apart.
unsafe fn product(
    [rows, depth, columns]: [usize; 3],
    left: *const f32,
    left_stride: usize,
    out: *mut f32,
    out_stride: usize,
    add: bool,
    split: impl Fn(usize, [usize; 2], *mut Line) -> bool,
) -> bool {
    let own = parts::lines(depth, PARTS);
    let mut scratch = SCRATCH.take();
    make_room(&mut scratch, (rows.div_ceil(TILE) + columns.div_ceil(TILE)) * own);
    let (right, of_rows) = scratch.split_at_mut(columns.div_ceil(TILE) * own);
    // SAFETY: the caller's, and there is room for both sides.
    let fit = unsafe {
        let mut fit = parts::split_rows(left, left_stride, [rows, depth], of_rows.as_mut_ptr());
        for (first, to) in (0..columns).step_by(TILE).zip(right.chunks_exact_mut(own)) {
            fit &= split(first, [(columns - first).min(TILE), depth], to.as_mut_ptr());
        }
        if fit {
            let _tiles = Tiles::new(&Shapes::WHOLE);
            for first in (0..columns).step_by(TILE) {
                let sides = Sides {
                    left: of_rows.as_ptr(),
                    right: right[first / TILE * own..].as_ptr(),
                    depth,
                    rows,
                    columns: (columns - first).min(TILE),
                };
                let to = To {
                    values: out.add(first),
                    stride: out_stride,
                    add,
                };
                parts::product::<PARTS>(&sides, &to);
            }
        }
        fit
    };
    SCRATCH.set(scratch);
    fit
}
