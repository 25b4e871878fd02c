//! Packed weights times activations that are quantized to bytes.
//!
//! Weights keep their few bits in memory and are only regrouped: tiles of 16 rows, in each tile blocks of 32
//! columns, and in a block the codes of the same four columns of all 16 rows side by side, so that one
//! instruction multiplies four columns of 16 rows with four bytes of an activation and no sum runs across
//! lanes.
//!
//! Activations are quantized in blocks of 32 to 15 bits with a scale each, held as two signed bytes: with one, as
//! llama.cpp has it, a small model's answers come out differently now and then. Reading the weights takes longer
//! than the second product. Products are exact in 32-bit integers.

use half::slice::HalfFloatSliceExt;
use oxiformers_hub::checkpoint::gguf::GgmlType;

use crate::ggml::{Format, Groups, Visitor, with_format};
use crate::threads::{for_each, pieces};

mod kernel;
mod simd;

use kernel::{Kernel, kernel};

/// Rows of a tile.
const TILE: usize = 16;
/// Columns of a block.
const BLOCK: usize = 32;

/// A matrix `[rows, cols]` regrouped for the integer kernels.
pub struct Int8Matrix {
    rows: usize,
    cols: usize,
    kernel: Kernel,
    /// Bytes of a block of a tile: codes, then half-float scales and minimums of its 16 rows.
    block_bytes: usize,
    /// Starts at `start`, a multiple of 64 as an address.
    data: Vec<u8>,
    start: usize,
    /// A power of two for each row, which keeps its scales within the half floats.
    factors: Vec<f32>,
}

impl std::fmt::Debug for Int8Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Int8Matrix({} x {})", self.rows, self.cols)
    }
}

/// What the regrouped form of a format looks like.
#[derive(Clone, Copy)]
struct Layout {
    bits: usize,
    group: usize,
    min: bool,
}

impl Layout {
    fn code_bytes(self) -> usize {
        TILE * BLOCK * self.bits / 8
    }

    fn block_bytes(self) -> usize {
        let scales = TILE * BLOCK / self.group * if self.min { 2 } else { 1 };
        self.code_bytes() + 2 * scales
    }
}

impl Int8Matrix {
    /// Regroups rows of ggml blocks, whose number the caller has checked; `done` is told what has been read and
    /// is not needed any more. `None` where this processor has no kernel.
    pub fn pack(
        ty: GgmlType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        done: &(dyn Fn(&[u8]) + Sync),
    ) -> Option<Self> {
        struct Pack<'a> {
            rows: usize,
            cols: usize,
            bytes: &'a [u8],
            done: &'a (dyn Fn(&[u8]) + Sync),
        }
        impl Visitor for Pack<'_> {
            type Output = Option<Int8Matrix>;

            fn visit<F: Format<B, N>, const B: usize, const N: usize>(self) -> Option<Int8Matrix> {
                let kernel = kernel::<F, B, N>()?;
                let layout = Layout {
                    bits: F::BITS,
                    group: F::GROUP,
                    min: F::MIN,
                };
                let block_bytes = layout.block_bytes();
                let tiles = self.rows.div_ceil(TILE);
                let tile_bytes = self.cols / BLOCK * block_bytes;
                let data = vec![0u8; tiles * tile_bytes + 63];
                let start = data.as_ptr().align_offset(64).min(63);
                let mut matrix = Int8Matrix {
                    rows: self.rows,
                    cols: self.cols,
                    kernel,
                    block_bytes,
                    data,
                    start,
                    factors: vec![0.0; tiles * TILE],
                };
                let row_bytes = self.cols / N * B;
                let to = Shared(matrix.data[start..].as_mut_ptr());
                let factors = Shared(matrix.factors.as_mut_ptr());
                let (count, size) = pieces(tiles, 4);
                for_each(count, |piece| {
                    let mut scratch = Scratch::default();
                    for tile in piece * size..tiles.min((piece + 1) * size) {
                        let rows = tile * TILE..self.rows.min((tile + 1) * TILE);
                        let bytes = &self.bytes[rows.start * row_bytes..rows.end * row_bytes];
                        // SAFETY: tiles are disjoint, and each task has its own.
                        let (to, factors) = unsafe {
                            (
                                std::slice::from_raw_parts_mut(to.at(tile * tile_bytes), tile_bytes),
                                std::slice::from_raw_parts_mut(factors.at(tile * TILE), TILE),
                            )
                        };
                        let pack = || scratch.pack::<F, B, N>(bytes, row_bytes, layout, to, factors);
                        pulp::Arch::new().dispatch(pack);
                    }
                    let rows = piece * size * TILE..self.rows.min((piece + 1) * size * TILE);
                    (self.done)(&self.bytes[rows.start * row_bytes..rows.end * row_bytes]);
                });
                Some(matrix)
            }
        }
        let pack = Pack {
            rows,
            cols,
            bytes,
            done,
        };
        with_format(ty, pack)
    }

    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Bytes held in memory.
    pub fn num_bytes(&self) -> usize {
        self.data.len() + 4 * self.factors.len()
    }
}

/// Codes and scales of a tile, on their way from rows to groups of rows.
#[derive(Default)]
struct Scratch {
    codes: Vec<u8>,
    scales: Vec<f32>,
    mins: Vec<f32>,
}

impl Scratch {
    #[inline(always)]
    fn pack<F: Format<B, N>, const B: usize, const N: usize>(
        &mut self,
        bytes: &[u8],
        row_bytes: usize,
        layout: Layout,
        to: &mut [u8],
        factors: &mut [f32],
    ) {
        let cols = row_bytes / B * N;
        let groups = cols / F::GROUP;
        self.codes.clear();
        self.codes.resize(TILE * cols, 0);
        self.scales.clear();
        self.scales.resize(TILE * groups, 0.0);
        self.mins.clear();
        self.mins.resize(TILE * groups, 0.0);
        for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
            let mut unpacked = Groups::default();
            let codes = self.codes[row * cols..(row + 1) * cols].as_chunks_mut::<N>().0;
            let scales = self.scales[row * groups..].chunks_mut(N / F::GROUP);
            let mins = self.mins[row * groups..].chunks_mut(N / F::GROUP);
            for (((block, codes), scales), mins) in
                bytes.as_chunks::<B>().0.iter().zip(codes).zip(scales).zip(mins)
            {
                F::unpack(block, codes, &mut unpacked);
                let count = scales.len();
                scales.copy_from_slice(&unpacked.scales[..count]);
                if F::MIN {
                    mins.copy_from_slice(&unpacked.mins[..count]);
                }
            }
            let own = row * groups..(row + 1) * groups;
            factors[row] = factor(self.scales[own.clone()].iter().chain(&self.mins[own]));
        }
        let per_block = BLOCK / F::GROUP;
        for (block, to) in to.chunks_exact_mut(layout.block_bytes()).enumerate() {
            let (codes, halves) = to.split_at_mut(layout.code_bytes());
            let rows: [[u32; BLOCK / 4]; TILE] = std::array::from_fn(|row| {
                let from = self.codes[row * cols + block * BLOCK..][..BLOCK]
                    .as_chunks::<4>()
                    .0;
                std::array::from_fn(|step| u32::from_le_bytes(from[step]))
            });
            place_codes(&rows, F::BITS, codes);
            for (array, halves) in halves.chunks_exact_mut(2 * TILE).enumerate() {
                let values = if array < per_block {
                    &self.scales
                } else {
                    &self.mins
                };
                let column = block * per_block + array % per_block;
                let scaled: [f32; TILE] = std::array::from_fn(|row| {
                    values[row * groups + column] / factors[row].max(f32::MIN_POSITIVE)
                });
                // Sixteen at once: one by one, each would ask what the processor can do.
                let mut rounded = [half::f16::ZERO; TILE];
                rounded.convert_from_f32_slice(&scaled);
                for (half, rounded) in halves.as_chunks_mut::<2>().0.iter_mut().zip(rounded) {
                    *half = rounded.to_le_bytes();
                }
            }
        }
    }
}

/// The power of two by which the largest value comes close to the largest half float.
fn factor<'a>(values: impl Iterator<Item = &'a f32>) -> f32 {
    let largest = values.fold(0.0f32, |most, value| most.max(value.abs()));
    if largest == 0.0 || !largest.is_finite() {
        return 1.0;
    }
    // Between 2^14 and 2^15 after the division; the inverse stays a normal number.
    let exponent = (largest.log2().floor() as i32 - 14).clamp(-126, 126);
    2f32.powi(exponent)
}

/// Cuts the codes of a block into planes of 8, 4, 2 or 1 bits. `rows` has four codes in each word. In a plane of
/// `b` bits, the byte of row `r` and column `4 s + c` is byte `4 r + c` of the 64 bytes numbered `s / (8 / b)`,
/// from bit `b (s mod (8 / b))` on.
#[inline(always)]
fn place_codes(rows: &[[u32; BLOCK / 4]; TILE], bits: usize, to: &mut [u8]) {
    let (low, high) = to.split_at_mut(64 * planes(bits)[0]);
    match planes(bits) {
        [8, _] => plane::<8>(rows, 0, low),
        [4, 0] => plane::<4>(rows, 0, low),
        [4, 1] => (plane::<4>(rows, 0, low), plane::<1>(rows, 4, high)).1,
        [4, _] => (plane::<4>(rows, 0, low), plane::<2>(rows, 4, high)).1,
        [_, 0] => plane::<2>(rows, 0, low),
        _ => (plane::<2>(rows, 0, low), plane::<1>(rows, 2, high)).1,
    }
}

/// The plane of the bits from `shift` on.
#[inline(always)]
fn plane<const B: usize>(rows: &[[u32; BLOCK / 4]; TILE], shift: u32, to: &mut [u8]) {
    let mask = u32::from_le_bytes([((1u32 << B) - 1) as u8; 4]);
    for (vector, to) in to.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        for (row, to) in rows.iter().zip(to.as_chunks_mut::<4>().0) {
            let steps = &row[vector * (8 / B)..][..8 / B];
            // Four codes at once: what crosses from byte to byte is masked away.
            let parts = steps
                .iter()
                .enumerate()
                .map(|(step, four)| (four >> shift & mask) << (B * step));
            *to = parts.fold(0, |all, part| all | part).to_le_bytes();
        }
    }
}

/// Bits of the planes of a code of so many bits.
const fn planes(bits: usize) -> [usize; 2] {
    match bits {
        3 => [2, 1],
        5 => [4, 1],
        6 => [4, 2],
        bits => [bits, 0],
    }
}

/// The largest code of an activation.
const LARGEST: f32 = 127.0 * 128.0;

/// Rows of activations, quantized.
pub struct Activations {
    rows: usize,
    cols: usize,
    /// High and low bytes, `128 · high + low`. [Batch](batches) for batch of `m` rows:
    /// `[cols / 4, 2, m, 4]`, as the kernels read them.
    codes: Vec<i8>,
    /// `[rows, cols / 32]`.
    scales: Vec<f32>,
    /// Sums of codes in halves of blocks: `[rows, cols / 16]`.
    sums: Vec<i32>,
}

impl Activations {
    /// Quantizes `x` `[rows, cols]`, `cols` a multiple of 32: in each block of 32 the largest value becomes
    /// 127 · 128.
    pub fn quantize(x: &[f32], cols: usize) -> Self {
        let rows = x.len() / cols.max(1);
        let mut all = Self {
            rows,
            cols,
            codes: vec![0; 2 * x.len()],
            scales: vec![0.0; x.len() / BLOCK],
            sums: vec![0; x.len() / (BLOCK / 2)],
        };
        let batches: Vec<_> = batches(rows).collect();
        let (codes, scales, sums) = (
            Shared(all.codes.as_mut_ptr()),
            Shared(all.scales.as_mut_ptr()),
            Shared(all.sums.as_mut_ptr()),
        );
        // Below some thousand values, handing over costs more than the work.
        let (count, size) = pieces(batches.len(), 16 * 1024 / (8 * cols).max(1));
        for_each(count, |piece| {
            for (first, len) in &batches[piece * size..batches.len().min((piece + 1) * size)] {
                let (from, len) = (first * cols, len * cols);
                // SAFETY: batches are disjoint ranges of rows.
                let (codes, scales, sums) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(codes.at(2 * from), 2 * len),
                        std::slice::from_raw_parts_mut(scales.at(from / BLOCK), len / BLOCK),
                        std::slice::from_raw_parts_mut(sums.at(2 * from / BLOCK), 2 * len / BLOCK),
                    )
                };
                let x = &x[from..from + len];
                pulp::Arch::new().dispatch(|| quantize(x, cols, codes, scales, sums));
            }
        });
        all
    }
}

/// The rows that a kernel takes at a time, as pairs of the first and their number: eight, and at the end four,
/// two and one.
fn batches(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let size = [8, 4, 2, 1].into_iter().find(|size| first + size <= rows)?;
        first += size;
        Some((first - size, size))
    })
}

/// Quantizes a batch.
#[inline(always)]
fn quantize(x: &[f32], cols: usize, codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    let rows = x.len() / cols;
    let blocks = x
        .as_chunks::<BLOCK>()
        .0
        .iter()
        .zip(scales)
        .zip(sums.as_chunks_mut::<2>().0);
    for (index, ((x, scale), sums)) in blocks.enumerate() {
        // As integers the bits of absolute values are ordered as the values are, infinity and NaN last.
        let largest = x.iter().map(|x| x.to_bits() & 0x7FFF_FFFF).fold(0, u32::max);
        let largest = f32::from_bits(largest);
        if !largest.is_finite() {
            *scale = f32::NAN;
            continue;
        }
        *scale = largest / LARGEST;
        let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
        // Adding this rounds to whole numbers, which then stand in the low bits.
        const ROUND: f32 = 12_582_912.0;
        // Plain loops: what a closure is given to would not be compiled for this processor.
        let (mut whole, mut high, mut low) = ([0i32; BLOCK], [0i8; BLOCK], [0i8; BLOCK]);
        for (whole, x) in whole.iter_mut().zip(x) {
            *whole = ((x * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        }
        for ((high, low), whole) in high.iter_mut().zip(&mut low).zip(&whole) {
            let top = whole.wrapping_add(64) >> 7;
            (*high, *low) = (top as i8, whole.wrapping_sub(top << 7) as i8);
        }
        for (sum, whole) in sums.iter_mut().zip(whole.as_chunks::<16>().0) {
            *sum = whole.iter().fold(0, |sum, whole| sum.wrapping_add(*whole));
        }
        let (row, block) = (index / (cols / BLOCK), index % (cols / BLOCK));
        let from = high.as_chunks::<4>().0.iter().zip(low.as_chunks::<4>().0);
        let to = codes[2 * rows * BLOCK * block..].as_chunks_mut::<4>().0;
        for ((high, low), to) in from.zip(to.chunks_exact_mut(2 * rows)) {
            (to[row], to[rows + row]) = (*high, *low);
        }
    }
}

/// `out[i][r, o] = Σ x[r, k] · W_i[o, k]` for all matrices, which have the columns of `x`; each `out` is
/// `[rows, out_features]`.
pub fn matmul(x: &Activations, weights: &[&Int8Matrix], outs: &mut [Vec<f32>]) {
    struct Part<'a> {
        weight: &'a Int8Matrix,
        out: Shared<f32>,
        /// Of the first tile, counted over all matrices.
        first: usize,
    }
    let mut tiles = 0;
    let mut parts = Vec::with_capacity(weights.len());
    for (weight, out) in weights.iter().zip(outs) {
        assert_eq!(x.cols, weight.cols, "columns of activations and weights");
        assert_eq!(out.len(), x.rows * weight.rows, "room for the result");
        parts.push(Part {
            weight,
            out: Shared(out.as_mut_ptr()),
            first: tiles,
        });
        tiles += weight.rows.div_ceil(TILE);
    }
    // A few kilobytes of weights at least, which take about a microsecond to read.
    let tile_bytes = weights
        .first()
        .map_or(1, |w| w.block_bytes * (w.cols / BLOCK).max(1));
    let (count, size) = pieces(tiles, (16 * 1024 / (tile_bytes * x.rows.max(1)).max(1)).max(1));
    for_each(count, |piece| {
        for tile in piece * size..tiles.min((piece + 1) * size) {
            let part = parts.iter().rev().find(|part| part.first <= tile);
            let Some(Part { weight, out, first }) = part else {
                continue;
            };
            let tile = tile - first;
            let tile_bytes = weight.cols / BLOCK * weight.block_bytes;
            let codes = &weight.data[weight.start + tile * tile_bytes..][..tile_bytes];
            // SAFETY: the kernel was chosen for this processor; the tile has all its blocks, `x` and `out` were
            // checked above, and no other task writes these columns.
            unsafe {
                (weight.kernel)(
                    codes.as_ptr(),
                    weight.factors[tile * TILE..].as_ptr(),
                    x,
                    out.at(tile * TILE),
                    weight.rows,
                    (weight.rows - tile * TILE).min(TILE),
                );
            }
        }
    });
}

/// A pointer that tasks may share because they touch different elements.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

impl<T> Shared<T> {
    /// # Safety
    /// `offset` lies within what the pointer was made from.
    unsafe fn at(&self, offset: usize) -> *mut T {
        // SAFETY: the caller's.
        unsafe { self.0.add(offset) }
    }
}

// SAFETY: see the type; elements are plain numbers.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<T> {}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::ggml::dequantize;

    /// Numbers that look random and are the same every time.
    fn noise(seed: u32) -> impl Iterator<Item = u32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
        std::iter::repeat_with(move || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        })
    }

    /// Blocks with any codes, and scales of a sensible size where a format has half floats.
    fn random_blocks(ty: GgmlType, blocks: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = noise(ty.type_size() as u32)
            .map(|n| (n >> 11) as u8)
            .take(blocks * ty.type_size())
            .collect();
        let halves: &[usize] = match ty {
            GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
            GgmlType::Q2_K => &[80, 82],
            GgmlType::Q3_K => &[108],
            GgmlType::Q6_K => &[208],
            GgmlType::TQ1_0 => &[52],
            GgmlType::TQ2_0 => &[64],
            GgmlType::MXFP4 => &[],
            _ => &[0],
        };
        for block in bytes.chunks_exact_mut(ty.type_size()) {
            if ty == GgmlType::MXFP4 {
                block[0] = 110 + block[0] % 20;
            }
            for at in halves {
                let value = f32::from(block[*at]) / 128.0 - 1.0;
                block[*at..at + 2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
            }
        }
        bytes
    }

    struct WithAvx2(Int8Matrix);

    impl Visitor for WithAvx2 {
        type Output = Int8Matrix;

        fn visit<F: Format<B, N>, const B: usize, const N: usize>(mut self) -> Int8Matrix {
            self.0.kernel = kernel::avx2::<F, B, N>;
            self.0
        }
    }

    /// Every format, both instruction sets, whole and cut tiles, all numbers of activations that kernels treat
    /// apart: the product of what was quantized is exact but for the rounding of f32.
    #[test]
    fn products_equal_the_reference() {
        if !std::arch::is_x86_feature_detected!("avx2") {
            return;
        }
        let cols = 512;
        for ty in GgmlType::ALL {
            for rows in [1, 16, 37] {
                let bytes = random_blocks(*ty, rows * cols / ty.block_size());
                let mut weights = vec![0.0; rows * cols];
                dequantize(*ty, &bytes, &mut weights).unwrap();
                let pack = || Int8Matrix::pack(*ty, rows, cols, &bytes, &|_| ()).unwrap();
                let matrices = [pack(), with_format(*ty, WithAvx2(pack()))];
                for batch in [1, 2, 3, 7, 8, 19] {
                    let x: Vec<f32> = noise(7)
                        .map(|n| (n >> 8) as f32 / 8e6 - 1.0)
                        .take(batch * cols)
                        .collect();
                    let activations = Activations::quantize(&x, cols);
                    let code = |r: usize, k: usize| {
                        let (first, size) = batches(batch).find(|(first, size)| r < first + size).unwrap();
                        let at = 2 * first * cols + (k / 4 * 2 * size + r - first) * 4 + k % 4;
                        let (high, low) = (activations.codes[at], activations.codes[at + 4 * size]);
                        128.0 * f64::from(high) + f64::from(low)
                    };
                    for (index, x) in x.iter().enumerate() {
                        let scale = f64::from(activations.scales[index / BLOCK]);
                        let error = f64::from(*x) - code(index / cols, index % cols) * scale;
                        assert!(error.abs() <= 0.501 * scale);
                    }
                    for (level, matrix) in matrices.iter().enumerate() {
                        let mut outs = [vec![f32::NAN; batch * rows], vec![f32::NAN; batch * rows]];
                        matmul(&activations, &[matrix, matrix], &mut outs);
                        assert_eq!(outs[0], outs[1]);
                        for (index, ours) in outs[0].iter().enumerate() {
                            let (r, o) = (index / rows, index % rows);
                            let (mut sum, mut size) = (0.0, 0.0);
                            for k in 0..cols {
                                let scale = f64::from(activations.scales[(r * cols + k) / BLOCK]);
                                let product = code(r, k) * scale * f64::from(weights[o * cols + k]);
                                sum += product;
                                size += product.abs();
                            }
                            // K-quants' scales are products that a half float rounds.
                            let limit = if ty.block_size() == 256 { 3e-4 } else { 1e-6 };
                            assert!(
                                (f64::from(*ours) - sum).abs() <= limit * size + 1e-30,
                                "{} level {level}, {rows} rows, batch {batch}, {index}: {ours} instead of {sum}",
                                ty.name()
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn values_that_are_no_numbers_stay_visible() {
        let bytes = random_blocks(GgmlType::Q4_0, 16);
        let matrix = Int8Matrix::pack(GgmlType::Q4_0, 8, 64, &bytes, &|_| ()).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; 128];
            x[70] = bad;
            let mut outs = [vec![0.0; 16]];
            matmul(&Activations::quantize(&x, 64), &[&matrix], &mut outs);
            assert!(outs[0][..8].iter().all(|y| y.is_finite()));
            assert!(outs[0][8..].iter().all(|y| y.is_nan()));
        }
    }

    #[test]
    fn scales_of_any_size_fit() {
        for exponent in [-60, 0, 60] {
            let value = 2f32.powi(exponent);
            assert!((value / factor([value].iter())).log2() >= 13.9);
            assert!(value / factor([value].iter()) < 65504.0);
        }
        assert_eq!(factor([0.0].iter()), 1.0);
    }
}
