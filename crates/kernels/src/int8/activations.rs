//! Activations that become whole numbers of 15 bits with a scale for each block.

use std::ops::Range;

use super::simd::{Simd, Split};
use super::{BLOCK, ROUND, Shared, batches};
use crate::lines::make_room;
use crate::threads::{for_each, pieces};

/// The largest code of an activation.
const LARGEST: f32 = 127.0 * 128.0;

/// Rows of activations, quantized for the kernels for few rows; vectors may be longer than is said.
#[derive(Default)]
pub(super) struct Activations {
    pub rows: usize,
    pub cols: usize,
    /// [Batch](batches) for batch of `m` rows: `[cols / 4, 2, m, 4]`, the parts of [`Split`].
    pub codes: Vec<i8>,
    /// `[rows, cols / 32]`.
    pub scales: Vec<f32>,
    /// Sums of codes in halves of blocks: `[rows, cols / 16]`.
    pub sums: Vec<i32>,
    /// Sums of values in blocks, and in their first and second halves: `[rows, cols / 32, 3]`.
    pub values: Vec<f32>,
}

impl Activations {
    /// Quantizes `x` `[rows, cols]`, `cols` a multiple of 32: in each block of 32 the largest value becomes
    /// 127 · 128.
    pub fn quantize(&mut self, x: &[f32], cols: usize, quantize: QuantizeFew) {
        let (rows, blocks) = (x.len() / cols.max(1), cols / BLOCK);
        (self.rows, self.cols) = (rows, cols);
        make_room(&mut self.codes, 2 * x.len());
        make_room(&mut self.scales, x.len() / BLOCK);
        make_room(&mut self.sums, x.len() / (BLOCK / 2));
        make_room(&mut self.values, 3 * x.len() / BLOCK);
        let to = Fields {
            codes: Shared(self.codes.as_mut_ptr()),
            scales: Shared(self.scales.as_mut_ptr()),
            sums: Shared(self.sums.as_mut_ptr()),
            values: Shared(self.values.as_mut_ptr()),
        };
        // Below some thousand values, handing over costs more than the work.
        let (count, size) = pieces(blocks, 4096 / (BLOCK * rows).max(1));
        for_each(count, |piece| {
            let blocks = Blocks {
                x,
                cols,
                blocks: piece * size..blocks.min((piece + 1) * size),
                to,
            };
            // SAFETY: there is room for all; tasks have other blocks of columns.
            unsafe { quantize(blocks) };
        });
    }
}

/// Blocks of columns of all rows of [`Activations`].
pub(super) struct Blocks<'a> {
    x: &'a [f32],
    cols: usize,
    blocks: Range<usize>,
    to: Fields,
}

/// Quantizes blocks.
///
/// # Safety
/// There is room for all of them, and nobody else touches what is theirs; the processor has the function's instructions.
pub(super) type QuantizeFew = unsafe fn(Blocks);

impl Blocks<'_> {
    /// # Safety
    /// See [`QuantizeFew`]; inlined into a function that is compiled for the instructions of `S`.
    #[inline(always)]
    pub unsafe fn quantize<S: Simd>(self) {
        let (cols, to, all) = (self.cols, self.to, self.cols / BLOCK);
        for (first, len) in batches(self.x.len() / cols, S::MOST) {
            let size = 2 * len * BLOCK;
            // SAFETY: the caller's.
            let codes = unsafe {
                let at = 2 * first * cols + size * self.blocks.start;
                std::slice::from_raw_parts_mut(to.codes.at(at), size * self.blocks.len())
            };
            // Row by row, as `x` lies in memory.
            for row in 0..len {
                for (block, codes) in self.blocks.clone().zip(codes.chunks_exact_mut(size)) {
                    let at = (first + row) * all + block;
                    // SAFETY: the caller's.
                    unsafe {
                        let quantized = S::quantize(&self.x.as_chunks().0[at], S::SPLIT);
                        to.scales.at(at).write(quantized.scale);
                        to.sums.at(2 * at).cast::<[i32; 2]>().write(quantized.sums);
                        to.values.at(3 * at).cast::<[f32; 3]>().write(quantized.values());
                        quantized.place(row, len, codes);
                    }
                }
            }
        }
    }
}

/// Where the fields of [`Activations`] are.
#[derive(Clone, Copy)]
struct Fields {
    codes: Shared<i8>,
    scales: Shared<f32>,
    sums: Shared<i32>,
    values: Shared<f32>,
}

/// Rows of activations, quantized for the kernels for many rows.
pub(super) struct ManyActivations {
    pub rows: usize,
    pub cols: usize,
    /// Number of batches, of sizes that differ by one at most.
    pub batches: usize,
    /// Batch for batch of `m` rows: `[cols / 4, 2, m, 4]`, the parts of [`Split`].
    pub codes: Vec<i8>,
    /// Batch for batch: `[cols / 32, m]`.
    pub scales: Vec<f32>,
    /// Sums of values in blocks, and in their first and second halves; batch for batch: `[cols / 32, 3, m]`.
    pub sums: Vec<f32>,
}

/// A batch of [`ManyActivations`].
#[derive(Clone, Copy)]
pub(super) struct Quantized<'a> {
    pub codes: &'a [i8],
    pub scales: &'a [f32],
    pub sums: &'a [f32],
}

impl ManyActivations {
    /// Quantizes `x` `[rows, cols]` as [`Activations::quantize`] does, in batches of up to `most` rows.
    pub fn quantize(x: &[f32], cols: usize, most: usize, quantize: QuantizeMany) -> Self {
        let rows = x.len() / cols.max(1);
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
                let batch = Batch {
                    x: &x[from..from + len],
                    cols,
                    codes,
                    scales,
                    sums,
                };
                // SAFETY: the function was chosen for this processor.
                unsafe { quantize(batch) };
            }
        });
        all
    }

    pub fn rows_of(&self, batch: usize) -> Range<usize> {
        batch * self.rows / self.batches..(batch + 1) * self.rows / self.batches
    }

    pub fn batch(&self, rows: &Range<usize>) -> Quantized<'_> {
        let values = rows.start * self.cols..rows.end * self.cols;
        Quantized {
            codes: &self.codes[2 * values.start..2 * values.end],
            scales: &self.scales[values.start / BLOCK..values.end / BLOCK],
            sums: &self.sums[3 * values.start / BLOCK..3 * values.end / BLOCK],
        }
    }
}

/// A batch of [`ManyActivations`] that is to be quantized.
pub(super) struct Batch<'a> {
    x: &'a [f32],
    cols: usize,
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
}

/// Quantizes a batch.
///
/// # Safety
/// The processor has the function's instructions.
pub(super) type QuantizeMany = unsafe fn(Batch);

impl Batch<'_> {
    /// # Safety
    /// See [`QuantizeMany`]; inlined into a function that is compiled for the instructions of `S`.
    #[inline(always)]
    pub unsafe fn quantize<S: Simd>(self, split: Split) {
        let rows = self.x.len() / self.cols;
        let size = 2 * rows * BLOCK;
        for (row, x) in self.x.chunks_exact(self.cols).enumerate() {
            for (block, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
                // SAFETY: the caller's.
                let quantized = unsafe { S::quantize(x, split) };
                self.scales[block * rows + row] = quantized.scale;
                for (part, sum) in quantized.values().into_iter().enumerate() {
                    self.sums[(3 * block + part) * rows + row] = sum;
                }
                quantized.place(row, rows, &mut self.codes[size * block..][..size]);
            }
        }
    }
}

/// A block of a row: whole numbers of 15 bits times a scale.
pub(super) struct QuantizedBlock {
    /// The two parts of each four codes, as [`Split`] says.
    pub parts: [[[i8; 4]; BLOCK / 4]; 2],
    /// Sums of the codes of both halves.
    pub sums: [i32; 2],
    pub scale: f32,
}

impl QuantizedBlock {
    /// Of a block with infinities or what is no number.
    pub const NO_NUMBERS: Self = Self {
        parts: [[[0; 4]; BLOCK / 4]; 2],
        sums: [0; 2],
        scale: f32::NAN,
    };

    /// Quantizes a block.
    #[inline(always)]
    pub fn new(x: &[f32; BLOCK], split: Split) -> Self {
        // As integers the bits of absolute values are ordered as the values are, infinity and NaN last.
        let largest = x.iter().map(|x| x.to_bits() & 0x7FFF_FFFF).fold(0, u32::max);
        let Some([inverse, scale]) = scales(f32::from_bits(largest)) else {
            return Self::NO_NUMBERS;
        };
        let mut whole = [0i32; BLOCK];
        // A plain loop: what a closure is given to would not be compiled for this processor.
        for (whole, x) in whole.iter_mut().zip(x) {
            *whole = ((x * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        }
        let mut sums = [0i32; 2];
        for (sum, whole) in sums.iter_mut().zip(whole.as_chunks::<16>().0) {
            *sum = whole.iter().fold(0, |sum, whole| sum.wrapping_add(*whole));
        }
        let parts = match split {
            Split::Bytes => {
                let (mut high, mut low) = ([0i8; BLOCK], [0i8; BLOCK]);
                for ((high, low), whole) in high.iter_mut().zip(&mut low).zip(whole) {
                    let top = whole.wrapping_add(64) >> 7;
                    (*high, *low) = (top as i8, whole.wrapping_sub(top << 7) as i8);
                }
                [bytemuck::cast(high), bytemuck::cast(low)]
            }
            Split::Words => {
                let mut parts = [[[0; 4]; BLOCK / 4]; 2];
                for (step, four) in whole.as_chunks::<4>().0.iter().enumerate() {
                    for (part, to) in parts.iter_mut().enumerate() {
                        to[step] = bytemuck::cast([four[part] as i16, four[part + 2] as i16]);
                    }
                }
                parts
            }
        };
        Self { parts, sums, scale }
    }

    /// The sum of the values, and those of both halves.
    #[inline(always)]
    fn values(&self) -> [f32; 3] {
        let [first, second] = self.sums;
        [first.wrapping_add(second), first, second].map(|sum| self.scale * sum as f32)
    }

    /// Puts the codes in their places in a block of so many rows.
    #[inline(always)]
    fn place(&self, row: usize, rows: usize, to: &mut [i8]) {
        let to = to.as_chunks_mut::<4>().0.chunks_exact_mut(2 * rows);
        for (step, to) in to.enumerate() {
            (to[row], to[rows + row]) = (self.parts[0][step], self.parts[1][step]);
        }
    }
}

/// What the values of a block are multiplied with to become codes, and codes to become values, by the largest absolute
/// value; none where that is no number.
#[inline(always)]
pub(super) fn scales(largest: f32) -> Option<[f32; 2]> {
    let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
    largest.is_finite().then_some([inverse, largest / LARGEST])
}
