//! Packed weights times activations that are quantized to bytes.
//!
//! Weights keep their few bits in memory and are only regrouped: tiles of 16 rows, in each tile blocks of 32
//! columns, and in a block the codes of the same four columns of all 16 rows side by side, so that one
//! instruction multiplies four columns of 16 rows with four bytes of an activation and no sum runs across
//! lanes. All instruction sets take the same tiles.
//!
//! Activations are quantized in blocks of 32 to 15 bits with a scale each, held as two signed bytes: with one, as
//! llama.cpp has it, a small model's answers come out differently now and then. Reading the weights takes longer
//! than the second product. Products are exact in 32-bit integers.

use std::cell::Cell;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use oxiformers_hub::checkpoint::gguf::GgmlType;

use crate::ggml::{Format, Groups, Visitor, with_format};
use crate::output::Output;
use crate::threads::{for_each, pieces};

mod kernel;
mod level;
mod simd;
mod wide;

use kernel::Few;
use level::{Kernels, Level};
use simd::Split;
use wide::{MANY, Unpacked, Wide};

/// Rows of a tile.
const TILE: usize = 16;
/// Columns of a block.
const BLOCK: usize = 32;

/// A matrix `[rows, cols]` regrouped for the integer kernels.
pub struct Int8Matrix {
    rows: usize,
    cols: usize,
    kernels: Kernels,
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
    /// is not needed any more.
    pub fn pack(ty: GgmlType, rows: usize, cols: usize, bytes: &[u8], done: &(dyn Fn(&[u8]) + Sync)) -> Self {
        struct Pack<'a> {
            rows: usize,
            cols: usize,
            bytes: &'a [u8],
            done: &'a (dyn Fn(&[u8]) + Sync),
        }
        impl Visitor for Pack<'_> {
            type Output = Int8Matrix;

            fn visit<F: Format<B, N>, const B: usize, const N: usize>(self) -> Int8Matrix {
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
                    kernels: Level::best().kernels::<F, B, N>(),
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
                matrix
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

/// Rows of activations, quantized for the kernels for few rows.
struct Activations {
    rows: usize,
    cols: usize,
    /// [Batch](batches) for batch of `m` rows: `[cols / 4, 2, m, 4]`, the parts of [`Split`].
    codes: Vec<i8>,
    /// `[rows, cols / 32]`.
    scales: Vec<f32>,
    /// Sums of codes in halves of blocks: `[rows, cols / 16]`.
    sums: Vec<i32>,
}

impl Activations {
    /// Quantizes `x` `[rows, cols]`, `cols` a multiple of 32: in each block of 32 the largest value becomes
    /// 127 · 128.
    fn quantize(x: &[f32], cols: usize, few: Few) -> Self {
        let rows = x.len() / cols.max(1);
        let mut all = Self {
            rows,
            cols,
            codes: vec![0; 2 * x.len()],
            scales: vec![0.0; x.len() / BLOCK],
            sums: vec![0; x.len() / (BLOCK / 2)],
        };
        let mut from = 0;
        for (first, len) in batches(rows, few.most) {
            let (codes, scales, sums) = (
                &mut all.codes[2 * from..],
                &mut all.scales[from / BLOCK..],
                &mut all.sums[2 * from / BLOCK..],
            );
            let x = &x[first * cols..(first + len) * cols];
            pulp::Arch::new().dispatch(|| quantize_few(x, cols, few.split, codes, scales, sums));
            from += len * cols;
        }
        all
    }
}

/// Rows of activations, quantized for the kernels for many rows.
struct ManyActivations {
    rows: usize,
    cols: usize,
    /// Number of batches, of sizes that differ by one at most.
    batches: usize,
    /// Batch for batch of `m` rows: `[cols / 4, 2, m, 4]`, the parts of [`Split`].
    codes: Vec<i8>,
    /// Batch for batch: `[cols / 32, m]`.
    scales: Vec<f32>,
    /// Sums of values in blocks, and in their first and second halves; batch for batch: `[cols / 32, 3, m]`.
    sums: Vec<f32>,
}

/// A batch of [`ManyActivations`].
#[derive(Clone, Copy)]
struct Quantized<'a> {
    codes: &'a [i8],
    scales: &'a [f32],
    sums: &'a [f32],
}

impl ManyActivations {
    /// Quantizes `x` `[rows, cols]` as [`Activations::quantize`] does.
    fn quantize(x: &[f32], cols: usize, wide: Wide) -> Self {
        let (rows, most) = (x.len() / cols.max(1), wide.multiply.len());
        let mut all = Self {
            rows,
            cols,
            batches: rows.div_ceil(most),
            codes: vec![0; 2 * x.len()],
            scales: vec![0.0; x.len() / BLOCK],
            sums: vec![0.0; 3 * x.len() / BLOCK],
        };
        let (codes, scales, sums) = (
            Shared(all.codes.as_mut_ptr()),
            Shared(all.scales.as_mut_ptr()),
            Shared(all.sums.as_mut_ptr()),
        );
        // Below some thousand values, handing over costs more than the work.
        let (count, size) = pieces(all.batches, 16 * 1024 / (most * cols).max(1));
        for_each(count, |piece| {
            for batch in piece * size..all.batches.min((piece + 1) * size) {
                let rows = all.rows_of(batch);
                let (from, len) = (rows.start * cols, rows.len() * cols);
                // SAFETY: batches are disjoint ranges of rows.
                let (codes, scales, sums) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(codes.at(2 * from), 2 * len),
                        std::slice::from_raw_parts_mut(scales.at(from / BLOCK), len / BLOCK),
                        std::slice::from_raw_parts_mut(sums.at(3 * from / BLOCK), 3 * len / BLOCK),
                    )
                };
                let x = &x[from..from + len];
                pulp::Arch::new().dispatch(|| quantize_many(x, cols, wide.split, codes, scales, sums));
            }
        });
        all
    }

    fn rows_of(&self, batch: usize) -> Range<usize> {
        batch * self.rows / self.batches..(batch + 1) * self.rows / self.batches
    }

    fn batch(&self, rows: &Range<usize>) -> Quantized<'_> {
        let values = rows.start * self.cols..rows.end * self.cols;
        Quantized {
            codes: &self.codes[2 * values.start..2 * values.end],
            scales: &self.scales[values.start / BLOCK..values.end / BLOCK],
            sums: &self.sums[3 * values.start / BLOCK..3 * values.end / BLOCK],
        }
    }
}

/// The rows that a kernel takes at a time, as pairs of the first and their number: eight, or `most`, and at the end
/// four, two and one.
fn batches(rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let fits = |size: &usize| *size <= most && first + size <= rows;
        let size = [8, 4, 2, 1].into_iter().find(fits)?;
        first += size;
        Some((first - size, size))
    })
}

/// Quantizes a block: whole numbers of 15 bits, and their scale.
#[inline(always)]
fn quantize_block(x: &[f32; BLOCK]) -> ([i32; BLOCK], f32) {
    // As integers the bits of absolute values are ordered as the values are, infinity and NaN last.
    let largest = x.iter().map(|x| x.to_bits() & 0x7FFF_FFFF).fold(0, u32::max);
    let largest = f32::from_bits(largest);
    let mut whole = [0i32; BLOCK];
    if !largest.is_finite() {
        return (whole, f32::NAN);
    }
    let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
    // Adding this rounds to whole numbers, which then stand in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // A plain loop: what a closure is given to would not be compiled for this processor.
    for (whole, x) in whole.iter_mut().zip(x) {
        *whole = ((x * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    }
    (whole, largest / LARGEST)
}

/// The sums of both halves of a block.
#[inline(always)]
fn half_sums(whole: &[i32; BLOCK]) -> [i32; 2] {
    let mut sums = [0i32; 2];
    for (sum, whole) in sums.iter_mut().zip(whole.as_chunks::<16>().0) {
        *sum = whole.iter().fold(0, |sum, whole| sum.wrapping_add(*whole));
    }
    sums
}

/// Puts the codes of a block in their places; `to` is where those of the first row go.
#[inline(always)]
fn place(split: Split, whole: &[i32; BLOCK], row: usize, rows: usize, to: &mut [i8]) {
    let to = to.as_chunks_mut::<4>().0.chunks_exact_mut(2 * rows);
    match split {
        Split::Bytes => {
            let (mut high, mut low) = ([0i8; BLOCK], [0i8; BLOCK]);
            for ((high, low), whole) in high.iter_mut().zip(&mut low).zip(whole) {
                let top = whole.wrapping_add(64) >> 7;
                (*high, *low) = (top as i8, whole.wrapping_sub(top << 7) as i8);
            }
            let from = high.as_chunks::<4>().0.iter().zip(low.as_chunks::<4>().0);
            for ((high, low), to) in from.zip(to) {
                (to[row], to[rows + row]) = (*high, *low);
            }
        }
        Split::Words => {
            for (four, to) in whole.as_chunks::<4>().0.iter().zip(to) {
                for (part, at) in [row, rows + row].into_iter().enumerate() {
                    let words = [four[part] as i16, four[part + 2] as i16];
                    to[at] = bytemuck::cast(words);
                }
            }
        }
    }
}

/// Quantizes a batch of [`Activations`].
#[inline(always)]
fn quantize_few(
    x: &[f32],
    cols: usize,
    split: Split,
    codes: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i32],
) {
    let (rows, blocks) = (x.len() / cols, cols / BLOCK);
    let all = x
        .as_chunks::<BLOCK>()
        .0
        .iter()
        .zip(scales)
        .zip(sums.as_chunks_mut::<2>().0);
    for (index, ((x, scale), sums)) in all.enumerate() {
        let (row, block) = (index / blocks, index % blocks);
        let whole;
        (whole, *scale) = quantize_block(x);
        *sums = half_sums(&whole);
        place(
            split,
            &whole,
            row,
            rows,
            &mut codes[2 * rows * BLOCK * block..][..2 * rows * BLOCK],
        );
    }
}

/// Quantizes a batch of [`ManyActivations`].
#[inline(always)]
fn quantize_many(
    x: &[f32],
    cols: usize,
    split: Split,
    codes: &mut [i8],
    scales: &mut [f32],
    sums: &mut [f32],
) {
    let (rows, blocks) = (x.len() / cols, cols / BLOCK);
    for (index, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
        let (row, block) = (index / blocks, index % blocks);
        let (whole, scale) = quantize_block(x);
        scales[block * rows + row] = scale;
        let [first, second] = half_sums(&whole);
        for (part, sum) in [first.wrapping_add(second), first, second]
            .into_iter()
            .enumerate()
        {
            sums[(3 * block + part) * rows + row] = scale * sum as f32;
        }
        place(
            split,
            &whole,
            row,
            rows,
            &mut codes[2 * rows * BLOCK * block..][..2 * rows * BLOCK],
        );
    }
}

/// For each matrix, which has the `cols` columns of `x`, `out[r, o] = Σ x[r, k] · W[o, k]`.
///
/// # Panics
/// Where sizes do not fit.
pub fn matmul(x: &[f32], cols: usize, weights: &[&Int8Matrix]) -> Vec<Vec<f32>> {
    let fit = weights.iter().all(|weight| weight.cols == cols);
    assert!(fit, "columns of activations and weights");
    let rows = x.len() / cols.max(1);
    let tiles = Tiles::new(weights, rows);
    // All matrices have kernels of the same instruction set.
    if let Some(Kernels { few, wide }) = weights.first().map(|weight| weight.kernels) {
        if rows < MANY {
            few_rows(&Activations::quantize(x, cols, few), &tiles);
        } else {
            many_rows(&ManyActivations::quantize(x, cols, wide), &tiles);
        }
    }
    // SAFETY: the kernels have multiplied all tiles with all rows.
    tiles
        .parts
        .into_iter()
        .map(|part| unsafe { part.1.done() })
        .collect()
}

/// A tile of several matrices, and where its results go.
struct Tile<'a> {
    weight: &'a Int8Matrix,
    codes: &'a [u8],
    factors: &'a [f32],
    /// The first value.
    out: *mut f32,
    /// Rows of weights in it.
    columns: usize,
}

/// The tiles of several matrices in a row.
struct Tiles<'a> {
    /// A matrix, its result, and its first tile.
    parts: Vec<(&'a Int8Matrix, Output, usize)>,
    count: usize,
}

impl<'a> Tiles<'a> {
    /// The tiles of `weights`, and room for their products with so many rows of activations.
    fn new(weights: &[&'a Int8Matrix], rows: usize) -> Self {
        let mut count = 0;
        let mut parts = Vec::with_capacity(weights.len());
        for weight in weights {
            parts.push((*weight, Output::new(rows * weight.rows), count));
            count += weight.rows.div_ceil(TILE);
        }
        Self { parts, count }
    }

    fn get(&self, tile: usize) -> Option<Tile<'a>> {
        let (weight, out, first) = self.parts.iter().rev().find(|part| part.2 <= tile)?;
        let tile = tile - first;
        let tile_bytes = weight.cols / BLOCK * weight.block_bytes;
        Some(Tile {
            weight,
            codes: &weight.data[weight.start + tile * tile_bytes..][..tile_bytes],
            factors: &weight.factors[tile * TILE..][..TILE],
            out: out.at(tile * TILE),
            columns: (weight.rows - tile * TILE).min(TILE),
        })
    }
}

fn few_rows(x: &Activations, tiles: &Tiles) {
    // A few kilobytes of weights at least, which take about a microsecond to read.
    let tile_bytes = tiles
        .parts
        .first()
        .map_or(1, |(w, ..)| w.block_bytes * (w.cols / BLOCK).max(1));
    let least = 16 * 1024 / (tile_bytes * x.rows.max(1)).max(1);
    let (count, size) = pieces(tiles.count, least.max(1));
    for_each(count, |piece| {
        for tile in piece * size..tiles.count.min((piece + 1) * size) {
            let Some(tile) = tiles.get(tile) else { continue };
            let (codes, factors) = (tile.codes.as_ptr(), tile.factors.as_ptr());
            // SAFETY: the kernel was chosen for this processor; the tile has all its blocks, sizes were checked by
            // `matmul`, and no other task writes these columns.
            unsafe {
                (tile.weight.kernels.few.multiply)(
                    codes,
                    factors,
                    x,
                    tile.out,
                    tile.weight.rows,
                    tile.columns,
                )
            };
        }
    });
}

thread_local! {
    static UNPACKED: Cell<Unpacked> = Cell::default();
}

/// Bytes of activations that go with one tile after the other: half of a larger cache.
const BLOCK_BYTES: usize = 1 << 20;

fn many_rows(x: &ManyActivations, tiles: &Tiles) {
    let (count, size) = pieces(tiles.count, 1);
    let batch_bytes = 2 * x.cols * x.rows.div_ceil(x.batches.max(1));
    let batches = (BLOCK_BYTES / batch_bytes.max(1)).clamp(1, x.batches.max(1));
    let blocks = x.batches.div_ceil(batches);
    for_each(blocks * count, |task| {
        let (block, piece) = (task / count, task % count);
        let mut unpacked = UNPACKED.take();
        for tile in piece * size..tiles.count.min((piece + 1) * size) {
            let Some(tile) = tiles.get(tile) else { continue };
            let wide = tile.weight.kernels.wide;
            // SAFETY: as for few rows.
            unsafe { (wide.unpack)(tile.codes.as_ptr(), x.cols / BLOCK, &mut unpacked) };
            for batch in block * batches..x.batches.min((block + 1) * batches) {
                let rows = x.rows_of(batch);
                let (batch, stride) = (x.batch(&rows), tile.weight.rows);
                let out = tile.out.wrapping_add(rows.start * stride);
                let multiply = wide.multiply[rows.len() - 1];
                // SAFETY: as for few rows.
                unsafe { multiply(&unpacked, tile.factors.as_ptr(), batch, out, stride, tile.columns) };
            }
        }
        UNPACKED.set(unpacked);
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

#[cfg(test)]
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

    struct At(Level, Int8Matrix);

    impl Visitor for At {
        type Output = Int8Matrix;

        fn visit<F: Format<B, N>, const B: usize, const N: usize>(mut self) -> Int8Matrix {
            self.1.kernels = self.0.kernels::<F, B, N>();
            self.1
        }
    }

    /// Every format, all instruction sets, whole and cut tiles, all numbers of activations that kernels treat
    /// apart: the product of what was quantized is exact but for the rounding of f32.
    #[test]
    fn products_equal_the_reference() {
        let cols = 512;
        for ty in GgmlType::ALL {
            for rows in [1, 16, 37] {
                let bytes = random_blocks(*ty, rows * cols / ty.block_size());
                let mut weights = vec![0.0; rows * cols];
                dequantize(*ty, &bytes, &mut weights).unwrap();
                let matrices: Vec<_> = Level::here()
                    .map(|level| At(level, Int8Matrix::pack(*ty, rows, cols, &bytes, &|_| ())))
                    .map(|at| (at.0, with_format(*ty, at)))
                    .collect();
                for batch in (1..20).chain([24, 29]) {
                    let x: Vec<f32> = noise(7)
                        .map(|n| (n >> 8) as f32 / 8e6 - 1.0)
                        .take(batch * cols)
                        .collect();
                    let quantized: Vec<_> = x.as_chunks().0.iter().map(quantize_block).collect();
                    let code = |index: usize| {
                        let (codes, scale) = &quantized[index / BLOCK];
                        f64::from(codes[index % BLOCK]) * f64::from(*scale)
                    };
                    for (index, x) in x.iter().enumerate() {
                        let error = f64::from(*x) - code(index);
                        assert!(error.abs() <= 0.501 * f64::from(quantized[index / BLOCK].1));
                    }
                    let expected: Vec<_> = (0..batch * rows)
                        .map(|index| {
                            let (r, o) = (index / rows, index % rows);
                            let products =
                                (0..cols).map(|k| code(r * cols + k) * f64::from(weights[o * cols + k]));
                            products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()))
                        })
                        .collect();
                    for (level, matrix) in &matrices {
                        let outs = matmul(&x, cols, &[matrix, matrix]);
                        assert_eq!(outs[0], outs[1]);
                        for (index, (ours, (sum, size))) in outs[0].iter().zip(&expected).enumerate() {
                            // K-quants' scales are products that a half float rounds.
                            let limit = if ty.block_size() == 256 { 3e-4 } else { 1e-6 };
                            assert!(
                                (f64::from(*ours) - sum).abs() <= limit * size + 1e-30,
                                "{} {level:?}, {rows} rows, batch {batch}, {index}: {ours} instead of {sum}",
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
        let matrix = Int8Matrix::pack(GgmlType::Q4_0, 8, 64, &bytes, &|_| ());
        for bad in [f32::NAN, f32::INFINITY] {
            for rows in [2, 40] {
                let mut x = vec![1.0; 64 * rows];
                x[70] = bad;
                let outs = matmul(&x, 64, &[&matrix]);
                for (index, y) in outs[0].iter().enumerate() {
                    assert_eq!(y.is_nan(), index / 8 == 1);
                }
            }
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
