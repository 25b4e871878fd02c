//! Products of f32 by matrix tiles.
//!
//! Tiles multiply bf16 and sum up f32. A finite f32 is the sum of three bf16, exactly; of the nine products of such
//! parts the six largest are summed up, the first apart from the small ones, so that as little is rounded off as where
//! f32 are multiplied. What is left out is below 2⁻²¹ of a product and without a sign of its own. Numbers of 16 bits
//! have fewer parts. Numbers below 2⁻¹²⁶, of parts and of products, count as zeros; those from 2¹²⁷ on, infinities and
//! NaN are left to other kernels.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::{load, multiply, store, zero};
use crate::lines::Line;

/// Rows and columns of a result's tile.
pub(crate) const TILE: usize = 16;
/// Columns that are multiplied at a time.
pub(crate) const CHUNK: usize = 32;
/// Parts of an f32.
pub(crate) const PARTS: usize = 3;

/// Lines of 16 rows, or columns, of so many values to be multiplied.
pub(crate) const fn lines(values: usize, parts: usize) -> usize {
    values.div_ceil(CHUNK) * parts * TILE
}

/// The parts of two vectors, side by side in each lane. `largest` becomes the largest size of a value, as bits, whose
/// order is that of the values.
///
/// The first part is cut off; the second is rounded, so that the third has either sign.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn split(a: __m512, b: __m512, largest: &mut __m512i) -> [__m512i; PARTS] {
    let upper = _mm512_set1_epi32(0xFFFF_0000u32 as i32);
    let cut = |x: __m512i| _mm512_and_si512(x, upper);
    let less = |x: __m512, part: __m512i| _mm512_sub_ps(x, _mm512_castsi512_ps(part));
    let parts = |x: __m512| {
        let first = cut(_mm512_castps_si512(x));
        let rest = less(x, first);
        let second = cut(_mm512_add_epi32(
            _mm512_castps_si512(rest),
            _mm512_set1_epi32(0x8000),
        ));
        [first, second, _mm512_castps_si512(less(rest, second))]
    };
    for x in [a, b] {
        let size = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MAX));
        *largest = _mm512_max_epu32(*largest, size);
    }
    let pair = |a: __m512i, b: __m512i| _mm512_or_si512(_mm512_srli_epi32::<16>(a), b);
    let ([a0, a1, a2], [b0, b1, b2]) = (parts(a), parts(b));
    [pair(a0, b0), pair(a1, b1), pair(a2, cut(b2))]
}

/// Whether sums of parts of such values cannot become infinite before their time.
#[inline]
#[target_feature(enable = "avx512f")]
fn is_fit(largest: __m512i) -> bool {
    _mm512_reduce_max_epu32(largest) < 2f32.powi(127).to_bits()
}

/// Lanes of the first `len` values of a vector.
fn lanes(len: usize) -> u16 {
    !(u32::MAX.checked_shl(len as u32).unwrap_or(0)) as u16
}

/// The first `columns` values of each of `rows` rows of `x`, `stride` apart, as the left side of a product:
/// `[rows / 16, columns / 32, parts, 16]` lines, of which each has the columns `i` and `16 + i` side by side. Returns
/// whether all values are fit for products.
///
/// # Safety
/// `x` points to such rows, and there is room for the lines.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn split_rows(
    x: *const f32,
    stride: usize,
    [rows, columns]: [usize; 2],
    to: *mut Line,
) -> bool {
    let mut largest = _mm512_setzero_si512();
    for row in 0..rows.next_multiple_of(TILE) {
        let mut to: *mut __m512i = to.cast();
        to = to.wrapping_add(row / TILE * lines(columns, PARTS) + row % TILE);
        let x = x.wrapping_add(row * stride);
        for first in (0..columns).step_by(CHUNK) {
            let left = if row < rows { columns - first } else { 0 };
            // SAFETY: only values of the row are read; the caller's.
            unsafe {
                let a = _mm512_maskz_loadu_ps(lanes(left), x.wrapping_add(first));
                let b = _mm512_maskz_loadu_ps(lanes(left.saturating_sub(16)), x.wrapping_add(first + 16));
                for (part, line) in split(a, b, &mut largest).into_iter().enumerate() {
                    _mm512_store_si512(to.add(part * TILE), line);
                }
                to = to.add(PARTS * TILE);
            }
        }
    }
    is_fit(largest)
}

/// As many vectors as `columns`, the values of a column each, as the right side of a product: `[columns / 32, parts,
/// 16]` lines, of which each has two columns side by side, `i` and `16 + i`. Returns whether all values are fit for
/// products.
///
/// # Safety
/// There is room for the lines.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn split_columns(
    column: impl Fn(usize) -> __m512,
    columns: usize,
    parts: usize,
    to: *mut Line,
) -> bool {
    let mut largest = _mm512_setzero_si512();
    let mut to: *mut __m512i = to.cast();
    for first in (0..columns).step_by(CHUNK) {
        for pair in 0..TILE {
            let at = |at: usize| {
                if at < columns {
                    column(at)
                } else {
                    _mm512_setzero_ps()
                }
            };
            let (a, b) = (at(first + pair), at(first + pair + TILE));
            for (part, line) in split(a, b, &mut largest).into_iter().take(parts).enumerate() {
                // SAFETY: the caller's.
                unsafe { _mm512_store_si512(to.add(part * TILE + pair), line) };
            }
        }
        to = to.wrapping_add(parts * TILE);
    }
    is_fit(largest)
}

/// [`split_columns`] of columns of up to 16 values that lie side by side, `stride` apart.
///
/// # Safety
/// `from` points to so many columns, and there is room for the lines.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn split_f32(
    from: *const f32,
    stride: usize,
    [values, columns]: [usize; 2],
    to: *mut Line,
) -> bool {
    let mask = lanes(values);
    // SAFETY: the caller's.
    unsafe {
        let column = |column: usize| _mm512_maskz_loadu_ps(mask, from.wrapping_add(column * stride));
        split_columns(column, columns, PARTS, to)
    }
}

/// The same of 16 f16, which have two parts, and no gaps between columns.
///
/// # Safety
/// That of [`split_f32`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn split_f16(from: *const u8, columns: usize, to: *mut Line) -> bool {
    // SAFETY: the caller's.
    unsafe {
        let column = |column: usize| {
            let halves = from.cast::<__m256i>().wrapping_add(column);
            _mm512_cvtph_ps(_mm256_loadu_si256(halves))
        };
        split_columns(column, columns, 2, to)
    }
}

/// The same of 16 bf16, which have one.
///
/// # Safety
/// That of [`split_f32`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn split_bf16(from: *const u8, columns: usize, to: *mut Line) -> bool {
    // SAFETY: the caller's.
    unsafe {
        let column = |column: usize| {
            let halves = _mm256_loadu_si256(from.cast::<__m256i>().wrapping_add(column));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        };
        split_columns(column, columns, 1, to)
    }
}

/// [`split_f32`] where the values of a row lie side by side, and rows are `stride` apart.
///
/// # Safety
/// That of [`split_f32`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn split_transposed(
    from: *const f32,
    stride: usize,
    [values, columns]: [usize; 2],
    to: *mut Line,
) -> bool {
    let (mut fit, mut to) = (true, to);
    for first in (0..columns).step_by(CHUNK) {
        let columns = (columns - first).min(CHUNK);
        let mut chunk = [_mm512_setzero_ps(); CHUNK];
        // SAFETY: only values of the rows are read; the caller's.
        unsafe {
            for half in 0..columns.div_ceil(TILE) {
                let mask = lanes(columns - half * TILE);
                let mut rows = [_mm512_setzero_ps(); TILE];
                for (row, to) in rows.iter_mut().enumerate().take(values) {
                    let at = from.wrapping_add(row * stride + first + half * TILE);
                    *to = _mm512_maskz_loadu_ps(mask, at);
                }
                chunk[half * TILE..][..TILE].copy_from_slice(&transposed(rows));
            }
            fit &= split_columns(|column| chunk[column], CHUNK, PARTS, to);
        }
        to = to.wrapping_add(PARTS * TILE);
    }
    fit
}

/// Columns of 16 rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512; TILE]) -> [__m512; TILE] {
    // Pairs of rows, then fours, within quarters of vectors; then quarters.
    let mut pairs = rows;
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    let pairs = pairs.map(|pair| _mm512_castps_pd(pair));
    let mut fours = rows;
    for i in 0..4 {
        for high in 0..2 {
            let (a, b) = (pairs[4 * i + high], pairs[4 * i + 2 + high]);
            fours[4 * i + 2 * high] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[4 * i + 2 * high + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    let mut columns = rows;
    for j in 0..4 {
        let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
        let even = [
            _mm512_shuffle_f32x4::<0x88>(a, b),
            _mm512_shuffle_f32x4::<0x88>(c, d),
        ];
        let odd = [
            _mm512_shuffle_f32x4::<0xDD>(a, b),
            _mm512_shuffle_f32x4::<0xDD>(c, d),
        ];
        columns[j] = _mm512_shuffle_f32x4::<0x88>(even[0], even[1]);
        columns[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]);
        columns[8 + j] = _mm512_shuffle_f32x4::<0xDD>(even[0], even[1]);
        columns[12 + j] = _mm512_shuffle_f32x4::<0xDD>(odd[0], odd[1]);
    }
    columns
}

/// Both sides of a product: rows, and up to 16 columns.
pub(crate) struct Sides {
    /// What [`split_rows`] made.
    pub left: *const Line,
    /// What the other functions made.
    pub right: *const Line,
    /// Values that are multiplied for each of the result.
    pub depth: usize,
    pub rows: usize,
    pub columns: usize,
}

/// Where a result goes.
pub(crate) struct To {
    pub values: *mut f32,
    /// From row to row.
    pub stride: usize,
    /// Whether it is added to what is there.
    pub add: bool,
}

/// The product, of a right side in `W` parts.
///
/// # Safety
/// The pointers are to what the fields say; nobody else uses the result; this thread has [`Tiles`](super::Tiles), which
/// are [whole](super::Shapes::WHOLE).
pub(crate) unsafe fn product<const W: usize>(sides: &Sides, to: &To) {
    for first in (0..sides.rows).step_by(2 * TILE) {
        let sides = Sides {
            left: sides.left.wrapping_add(first / TILE * lines(sides.depth, PARTS)),
            rows: (sides.rows - first).min(2 * TILE),
            ..*sides
        };
        let to = To {
            values: to.values.wrapping_add(first * to.stride),
            ..*to
        };
        // SAFETY: the caller's; whoever has tiles has AVX-512.
        unsafe {
            if sides.rows > TILE {
                block::<W, 2>(&sides, &to);
            } else {
                block::<W, 1>(&sides, &to);
            }
        }
    }
}

/// The tiles of a result on their way to it: sums of first parts of up to 32 rows, and of small ones.
#[repr(align(64))]
#[allow(dead_code)]
struct Sums([[f32; TILE * TILE]; 4]);

/// `M` times 16 rows.
///
/// # Safety
/// That of [`product`].
#[target_feature(enable = "avx512f")]
unsafe fn block<const W: usize, const M: usize>(sides: &Sides, to: &To) {
    let left_lines = lines(sides.depth, PARTS);
    let (mut left, mut right) = (sides.left, sides.right);
    // SAFETY: the caller's.
    unsafe {
        zero::<0>();
        zero::<1>();
        zero::<2>();
        zero::<3>();
        for _ in 0..sides.depth.div_ceil(CHUNK) {
            load::<6>(right.cast(), 64);
            for i in 0..PARTS {
                load::<4>(left.add(i * TILE).cast(), 64);
                if M > 1 {
                    load::<5>(left.add(left_lines + i * TILE).cast(), 64);
                }
                if i == 0 {
                    multiply::<0, 4, 6>();
                    if M > 1 {
                        multiply::<1, 5, 6>();
                    }
                } else {
                    multiply::<2, 4, 6>();
                    if M > 1 {
                        multiply::<3, 5, 6>();
                    }
                }
                for j in 1..W.min(PARTS - i) {
                    load::<7>(right.add(j * TILE).cast(), 64);
                    multiply::<2, 4, 7>();
                    if M > 1 {
                        multiply::<3, 5, 7>();
                    }
                }
            }
            (left, right) = (left.add(PARTS * TILE), right.add(W * TILE));
        }
        let mut sums = MaybeUninit::<Sums>::uninit();
        let sums: *mut f32 = sums.as_mut_ptr().cast();
        let small = sums.add(2 * TILE * TILE);
        store::<0>(sums.cast(), 64);
        store::<2>(small.cast(), 64);
        if M > 1 {
            store::<1>(sums.add(TILE * TILE).cast(), 64);
            store::<3>(small.add(TILE * TILE).cast(), 64);
        }
        let mask = lanes(sides.columns);
        for row in 0..sides.rows {
            let (sum, small) = (sums.add(row * TILE), small.add(row * TILE));
            let mut sum = _mm512_add_ps(_mm512_load_ps(sum), _mm512_load_ps(small));
            let to_row = to.values.add(row * to.stride);
            if to.add {
                sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to_row), sum);
            }
            _mm512_mask_storeu_ps(to_row, mask, sum);
        }
    }
}
