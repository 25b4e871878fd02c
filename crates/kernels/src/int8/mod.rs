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

use std::borrow::Cow;
use std::cell::Cell;

use crate::memory::Bytes;
use crate::output::Output;
use crate::threads::{for_each, num_threads, pieces};

mod activations;
mod codes;
mod kernel;
mod level;
mod pack;
mod rows;
mod simd;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles;
mod whole;
mod wide;

use activations::{Activations, ManyActivations};
use codes::Plan;
pub use codes::{CodeLayout, CodeRows, Shift};
use level::{KINDS, Kernels, Level};
use pack::Scratch;
pub use rows::Regrouped;
use whole::WholeActivations;
use wide::{MANY, Unpacked};

/// Rows of a tile.
const TILE: usize = 16;
/// Columns of a block.
const BLOCK: usize = 32;

/// A matrix `[rows, cols]` regrouped for the integer kernels.
pub struct Int8Matrix {
    rows: usize,
    cols: usize,
    kernels: Kernels,
    plan: Plan,
    /// Tiles.
    data: Bytes,
    /// For each row, what its scales are to be multiplied with: a power of two keeps them within the half floats.
    factors: Vec<f32>,
    /// What each code is multiplied as where activations are floats: the sum of two bf16.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    words: [[u16; 64]; 2],
    /// The column of the activations for each column of a tile, or a number that is none, where that is not the same.
    gather: Option<Vec<u32>>,
}

impl std::fmt::Debug for Int8Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Int8Matrix({} x {})", self.rows, self.cols)
    }
}

impl Int8Matrix {
    /// Regroups codes of any scheme. No value is rounded, but for what [`CodeLayout::table`] says, and where groups have
    /// 16 or 32 columns, or a number that 32 does not divide: there scales, zero points and minimums become half floats
    /// (with a power of two for each row, so that their size does not matter). Scales of other groups stay f32.
    ///
    /// A scale or shift that is infinite or no number makes the products of its row so.
    ///
    /// # Panics
    /// Where codes have more than 8 bits, or 4 with a table.
    pub fn from_codes(rows: &dyn CodeRows) -> Self {
        Self::at(Level::best(), rows)
    }

    fn at(level: Level, from: &dyn CodeRows) -> Self {
        let ([rows, cols], layout) = (from.shape(), from.layout());
        let plan = Plan::new(layout, cols, KINDS).and_then(|plan| Some((level.kernels(plan.kind)?, plan)));
        let Some((kernels, plan)) = plan else {
            panic!("codes of {} bits", layout.bits);
        };
        let tile_bytes = plan.tile_bytes();
        let tiles = rows.div_ceil(TILE);
        let gather = (from.permutation().is_some() || !plan.is_in_order()).then(|| {
            let column = |column| {
                let stored = plan.stored(column)?;
                match from.permutation() {
                    Some(permutation) => permutation.get(stored).copied(),
                    None => u32::try_from(stored).ok(),
                }
            };
            let columns = 0..plan.blocks * BLOCK;
            columns.map(|at| column(at).unwrap_or(u32::MAX)).collect()
        });
        let mut matrix = Self {
            rows,
            cols,
            kernels,
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            words: plan.words(),
            plan,
            data: Bytes::zeroed(tiles * tile_bytes),
            factors: vec![0.0; tiles * TILE],
            gather,
        };
        let to = Shared(matrix.data.as_mut_ptr());
        let factors = Shared(matrix.factors.as_mut_ptr());
        let (count, size) = pieces(tiles, 4);
        for_each(count, |piece| {
            let mut scratch = Scratch::default();
            for tile in piece * size..tiles.min((piece + 1) * size) {
                // SAFETY: tiles are disjoint, and each task has its own.
                let (to, factors) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(to.at(tile * tile_bytes), tile_bytes),
                        std::slice::from_raw_parts_mut(factors.at(tile * TILE), TILE),
                    )
                };
                scratch.pack(from, tile, &matrix.plan, to, factors);
            }
            from.release(piece * size * TILE..rows.min((piece + 1) * size * TILE));
        });
        matrix
    }

    /// Bytes that a matrix of such codes will hold; 0 where there is none.
    pub fn bytes_of([rows, cols]: [usize; 2], layout: CodeLayout) -> usize {
        let tiles = rows.div_ceil(TILE);
        Plan::new(layout, cols, KINDS).map_or(0, |plan| tiles * (plan.tile_bytes() + 4 * TILE))
    }

    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Bytes held in memory.
    pub fn num_bytes(&self) -> usize {
        self.data.len() + 4 * self.factors.len() + 4 * self.gather.as_ref().map_or(0, Vec::len)
    }

    /// Rows of activations in the order of a tile's columns, with zeros where it has none of them.
    fn arrange<'a>(&self, x: &'a [f32]) -> Cow<'a, [f32]> {
        let columns = self.plan.blocks * BLOCK;
        let rows = x.chunks_exact(self.cols.max(1));
        match &self.gather {
            None if columns == self.cols => Cow::Borrowed(x),
            None => {
                let mut all = vec![0.0; rows.len() * columns];
                for (to, from) in all.chunks_exact_mut(columns.max(1)).zip(rows) {
                    to[..from.len()].copy_from_slice(from);
                }
                Cow::Owned(all)
            }
            Some(gather) => {
                let value = |from: &[f32], column: u32| from.get(column as usize).copied().unwrap_or(0.0);
                Cow::Owned(
                    rows.flat_map(|from| gather.iter().map(move |at| value(from, *at)))
                        .collect(),
                )
            }
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

/// Adding this rounds to whole numbers, which then stand in the low bits.
const ROUND: f32 = 12_582_912.0;

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

/// For each matrix, which has the `cols` columns of `x`, `out[r, o] = Σ x[r, k] · W[o, k]`.
///
/// # Panics
/// Where sizes do not fit.
pub fn matmul(x: &[f32], cols: usize, weights: &[&Int8Matrix]) -> Vec<Vec<f32>> {
    let fit = weights.iter().all(|weight| weight.cols == cols);
    assert!(fit, "columns of activations and weights");
    if weights.len() > 1 && weights.iter().any(|weight| weight.gather.is_some()) {
        // Each has an order of its own.
        return weights
            .iter()
            .flat_map(|weight| matmul(x, cols, &[weight]))
            .collect();
    }
    let rows = x.len() / cols.max(1);
    let x = &*weights
        .first()
        .map_or(Cow::Borrowed(x), |weight| weight.arrange(x));
    let cols = weights.first().map_or(0, |weight| weight.plan.blocks * BLOCK);
    let tiles = Tiles::new(weights, rows);
    // All matrices have kernels of the same instruction set.
    match weights.first().map(|weight| weight.kernels) {
        Some(kernels) if by_matrix_tiles(x, cols, kernels, &tiles) => (),
        Some(kernels) if rows < MANY => {
            let mut quantized = QUANTIZED.take();
            quantized.quantize(x, cols, kernels.quantize_few);
            few_rows(&quantized, &tiles);
            QUANTIZED.set(quantized);
        }
        Some(kernels) => {
            let most = kernels.wide.multiply.len();
            many_rows(
                &ManyActivations::quantize(x, cols, most, kernels.quantize_many),
                &tiles,
            );
        }
        None => (),
    }
    // SAFETY: the kernels have multiplied all tiles with all rows.
    tiles
        .parts
        .into_iter()
        .map(|part| unsafe { part.1.done() })
        .collect()
}

/// [`matmul`] with activations that become whole numbers from -128 to 127 times a scale for each row: a 127th of its
/// largest absolute value, which counts as 1e-5 at least (Ma et al., "The era of 1-bit LLMs", 2024).
///
/// Where rows of weights have one scale each, sums are exact.
///
/// # Panics
/// Where sizes do not fit.
pub fn matmul_whole(x: &[f32], cols: usize, weights: &[&Int8Matrix]) -> Vec<Vec<f32>> {
    let rows = x.len() / cols.max(1);
    let fit = weights.iter().all(|weight| weight.cols == cols);
    assert!(fit, "columns of activations and weights");
    let plain = |weight: &&Int8Matrix| weight.gather.is_none() && weight.plan.is_whole();
    let tiles = match weights.first() {
        Some(weight) if weights.iter().all(plain) && !has_matrix_tiles(weight.kernels, rows) => {
            let x = &*weight.arrange(x);
            let x = WholeActivations::quantize(x, weight.plan.blocks * BLOCK, weight.kernels.whole);
            let tiles = Tiles::new(weights, rows);
            // SAFETY: the kernel was chosen for this processor and the kind of codes, which is one that it takes; the
            // rest as for few rows.
            each_tile(&tiles, rows, |tile| unsafe {
                (tile.weight.kernels.whole.multiply)(&tile, &x);
            });
            tiles
        }
        _ => return matmul_of_whole(x, cols, weights),
    };
    // SAFETY: the kernels have multiplied all tiles with all rows.
    tiles
        .parts
        .into_iter()
        .map(|part| unsafe { part.1.done() })
        .collect()
}

/// [`matmul_whole`] by way of [`matmul`].
fn matmul_of_whole(x: &[f32], cols: usize, weights: &[&Int8Matrix]) -> Vec<Vec<f32>> {
    let (mut codes, mut scales) = (vec![0; cols], Vec::new());
    let mut whole = Vec::with_capacity(x.len());
    for x in x.chunks_exact(cols.max(1)) {
        let (_, scale) = whole::quantize_row(x, &mut codes);
        whole.extend(codes.iter().map(|code| f32::from(*code)));
        scales.push(scale);
    }
    let mut outs = matmul(&whole, cols, weights);
    for (out, weight) in outs.iter_mut().zip(weights) {
        for (out, scale) in out.chunks_exact_mut(weight.rows.max(1)).zip(&scales) {
            out.iter_mut().for_each(|value| *value *= scale);
        }
    }
    outs
}

/// A tile of several matrices, and where its results go.
struct Tile<'a> {
    weight: &'a Int8Matrix,
    codes: &'a [u8],
    factors: &'a [f32],
    /// The first value of the first row; rows are as long as the matrix has rows.
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
        let tile_bytes = weight.plan.tile_bytes();
        Some(Tile {
            weight,
            codes: &weight.data[tile * tile_bytes..][..tile_bytes],
            factors: &weight.factors[tile * TILE..][..TILE],
            out: out.at(tile * TILE),
            columns: (weight.rows - tile * TILE).min(TILE),
        })
    }
}

fn few_rows(x: &Activations, tiles: &Tiles) {
    // SAFETY: the kernel was chosen for this processor and the kind of codes; the tile has all its blocks, sizes were
    // checked by `matmul`, and no other task writes these columns.
    each_tile(tiles, x.rows, |tile| unsafe {
        (tile.weight.kernels.few.multiply)(&tile, x);
    });
}

/// Calls `multiply` for each tile once, on all threads, for products with so many rows.
fn each_tile(tiles: &Tiles, rows: usize, multiply: impl Fn(Tile) + Sync) {
    // A few kilobytes of weights at least, which take about a microsecond to read.
    let tile_bytes = tiles.parts.first().map_or(1, |(w, ..)| w.plan.tile_bytes());
    let least = 16 * 1024 / (tile_bytes * rows.max(1)).max(1);
    // So many that threads are done at about the same time.
    let size = tiles.count.div_ceil(16 * num_threads()).max(least).max(1);
    for_each(tiles.count.div_ceil(size), |piece| {
        for tile in piece * size..tiles.count.min((piece + 1) * size) {
            if let Some(tile) = tiles.get(tile) {
                multiply(tile);
            }
        }
    });
}

thread_local! {
    // Kept from call to call: a step of decoding would ask for them some hundred times.
    static QUANTIZED: Cell<Activations> = Cell::default();
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
            unsafe { (wide.unpack)(&tile, &mut unpacked) };
            for batch in block * batches..x.batches.min((block + 1) * batches) {
                let rows = x.rows_of(batch);
                let multiply = wide.multiply[rows.len() - 1];
                // SAFETY: as for few rows.
                unsafe { multiply(&unpacked, &tile, x.batch(&rows), rows.start) };
            }
        }
        UNPACKED.set(unpacked);
    });
}

/// Multiplies if there are matrix tiles, and rows enough for them.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn by_matrix_tiles(x: &[f32], cols: usize, kernels: Kernels, tiles: &Tiles) -> bool {
    use crate::amx::Shapes;
    use tiles::TiledActivations;

    if cols == 0 || !has_matrix_tiles(kernels, x.len() / cols) {
        return false;
    }
    let x = TiledActivations::split(x, cols);
    let (count, size) = pieces(tiles.count, 1);
    let most = (BLOCK_BYTES / x.block_bytes()).clamp(1, x.row_blocks());
    let blocks = x.row_blocks().div_ceil(most);
    let most = x.row_blocks().div_ceil(blocks);
    for_each(blocks * count, |task| {
        let (block, piece) = (task / count, task % count);
        let rows = block * most..x.row_blocks().min((block + 1) * most);
        let mut unpacked = UNPACKED.take();
        let mut own: Option<(&Shapes, crate::amx::Tiles)> = None;
        for tile in piece * size..tiles.count.min((piece + 1) * size) {
            let Some(tile) = tiles.get(tile) else { continue };
            let Some(tiled) = tile.weight.kernels.tiled else {
                continue;
            };
            // SAFETY: kernels of this kind were chosen where there are matrix tiles, and the thread has those of other
            // shapes no more; the rest as for few rows.
            unsafe {
                if own
                    .as_ref()
                    .is_none_or(|(shapes, _)| !std::ptr::eq(*shapes, tiled.shapes))
                {
                    drop(own.take());
                    own = Some((tiled.shapes, crate::amx::Tiles::new(tiled.shapes)));
                }
                (tiled.multiply)(&tile, &x, rows.start, rows.len(), &mut unpacked);
            }
        }
        UNPACKED.set(unpacked);
    });
    true
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn by_matrix_tiles(_: &[f32], _: usize, _: Kernels, _: &Tiles) -> bool {
    false
}

/// Whether there are matrix tiles, and rows enough for them.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn has_matrix_tiles(kernels: Kernels, rows: usize) -> bool {
    kernels.tiled.is_some() && rows >= tiles::MANY
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn has_matrix_tiles(_: Kernels, _: usize) -> bool {
    false
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
    use std::ops::Range;

    use oxiformers_hub::checkpoint::gguf::GgmlType;

    use super::activations::QuantizedBlock;
    use super::simd::Split;
    use super::*;
    use crate::ggml::{GgmlRows, dequantize};

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

    /// Whether activations are multiplied as they are, and not as codes.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn takes_values(level: Level, batch: usize) -> bool {
        level == Level::Amx && batch >= tiles::MANY
    }

    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    fn takes_values(_: Level, _: usize) -> bool {
        false
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
                let codes = GgmlRows::new(*ty, [rows, cols], &bytes);
                let matrices: Vec<_> = Level::here()
                    .map(|level| (level, Int8Matrix::at(level, &codes)))
                    .collect();
                for batch in (1..20).chain([24, 29, 49]) {
                    let x: Vec<f32> = noise(7)
                        .map(|n| (n >> 8) as f32 / 8e6 - 1.0)
                        .take(batch * cols)
                        .collect();
                    let quantize = |x| QuantizedBlock::new(x, Split::Bytes);
                    let quantized: Vec<_> = x.as_chunks().0.iter().map(quantize).collect();
                    let code = |index: usize| {
                        let block = &quantized[index / BLOCK];
                        let [high, low] = block
                            .parts
                            .map(|part| f64::from(part.as_flattened()[index % BLOCK]));
                        (128.0 * high + low) * f64::from(block.scale)
                    };
                    for (index, x) in x.iter().enumerate() {
                        let error = f64::from(*x) - code(index);
                        assert!(error.abs() <= 0.501 * f64::from(quantized[index / BLOCK].scale));
                    }
                    let expected = |value: &dyn Fn(usize) -> f64| -> Vec<(f64, f64)> {
                        let all = 0..batch * rows;
                        all.map(|index| {
                            let (r, o) = (index / rows, index % rows);
                            let products =
                                (0..cols).map(|k| value(r * cols + k) * f64::from(weights[o * cols + k]));
                            products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()))
                        })
                        .collect()
                    };
                    let [of_codes, of_values] =
                        [&code as &dyn Fn(usize) -> f64, &|at| f64::from(x[at])].map(expected);
                    for (level, matrix) in &matrices {
                        let outs = matmul(&x, cols, &[matrix, matrix]);
                        assert_eq!(outs[0], outs[1]);
                        // Matrix tiles take activations as two bf16.
                        let by_tiles = takes_values(*level, batch);
                        let expected = if by_tiles { &of_values } else { &of_codes };
                        for (index, (ours, (sum, size))) in outs[0].iter().zip(expected).enumerate() {
                            // K-quants' scales are products that a half float rounds.
                            let limit = match ty.block_size() {
                                256 => 3e-4,
                                _ if by_tiles => 1e-5,
                                _ => 1e-6,
                            };
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
        let matrix = Int8Matrix::from_codes(&GgmlRows::new(GgmlType::Q4_0, [8, 64], &bytes));
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

    /// Codes that look random.
    #[derive(Debug)]
    struct RandomCodes {
        shape: [usize; 2],
        layout: CodeLayout,
        permutation: Option<Vec<u32>>,
    }

    impl RandomCodes {
        /// As f64, in the order of the input.
        fn values(&self) -> Vec<f64> {
            let [rows, cols] = self.shape;
            let groups = self.layout.groups(cols);
            let mut codes = vec![0; rows * cols];
            let mut scales = vec![0.0; rows * groups];
            let mut shifts = vec![
                0.0;
                if self.layout.has_shifts() {
                    rows * groups
                } else {
                    0
                }
            ];
            self.unpack(0..rows, &mut codes, &mut scales, &mut shifts);
            let mut values = vec![0.0; rows * cols];
            for (at, code) in codes.iter().enumerate() {
                let (row, position) = (at / cols, at % cols);
                let group = row * groups + position / self.layout.group.min(cols);
                let (code, scale) = (f64::from(*code), f64::from(scales[group]));
                let column = self
                    .permutation
                    .as_ref()
                    .map_or(position, |all| all[position] as usize);
                values[row * cols + column] = match (self.layout.table, self.layout.shift) {
                    (Some(table), _) => scale * f64::from(table[code as usize]),
                    (None, Shift::Offset(offset)) => scale * (code - f64::from(offset)),
                    (None, Shift::Zeros) => scale * (code - f64::from(shifts[group])),
                    (None, Shift::Mins) => scale * code + f64::from(shifts[group]),
                };
            }
            values
        }
    }

    impl CodeRows for RandomCodes {
        fn shape(&self) -> [usize; 2] {
            self.shape
        }

        fn layout(&self) -> CodeLayout {
            self.layout
        }

        // Numbers that half floats can hold.
        fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], shifts: &mut [f32]) {
            let (cols, groups) = (self.shape[1], self.layout.groups(self.shape[1]));
            for (index, row) in rows.enumerate() {
                let mut noise = noise(row as u32 + 1);
                let mut next = |below: u32| noise.next().unwrap() / 3 % below;
                let codes = &mut codes[index * cols..(index + 1) * cols];
                codes
                    .iter_mut()
                    .for_each(|code| *code = next(1 << self.layout.bits) as u8);
                let scales = &mut scales[index * groups..(index + 1) * groups];
                scales
                    .iter_mut()
                    .for_each(|scale| *scale = (next(1000) as f32 + 24.0) / 1024.0);
                for shift in shifts.iter_mut().skip(index * groups).take(groups) {
                    *shift = next(1 << self.layout.bits) as f32 - if next(2) > 0 { 0.5 } else { 0.0 };
                }
            }
        }

        fn permutation(&self) -> Option<&[u32]> {
            self.permutation.as_deref()
        }
    }

    /// Codes of all schemes, rows and groups of any length, on all instruction sets.
    #[test]
    fn products_of_codes_equal_the_reference() {
        static NORMAL: [f32; 16] = [
            -1.0, -0.75, -0.525, -0.395, -0.25, -0.1875, -0.091, 0.0, 0.08, 0.161, 0.246, 0.338, 0.44, 0.563,
            0.723, 1.0,
        ];
        static WHOLE: [f32; 16] = [
            -6.0, -4.5, -3.0, -2.5, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.5, 4.5, 6.0,
        ];
        let tables = [&NORMAL, &WHOLE].map(|table| (4, Shift::Offset(0), Some(table)));
        let codes = [1, 2, 3, 4, 5, 6, 7, 8].into_iter().flat_map(|bits| {
            let shifts = [
                Shift::Offset(1 << (bits - 1)),
                Shift::Offset(0),
                Shift::Zeros,
                Shift::Mins,
            ];
            shifts.map(|shift| (bits, shift, None))
        });
        for (bits, shift, table) in codes.chain(tables) {
            for cols in [1, 31, 33, 40, 72, 288] {
                for group in [8, 16, 24, 32, 48, 64, 100, 128, usize::MAX] {
                    let rows = if group == 64 { 37 } else { 5 };
                    let layout = CodeLayout {
                        bits,
                        group,
                        shift,
                        table,
                    };
                    // 7 and the number of columns have no common divisor.
                    let turned = (0..cols as u32).map(|column| (7 * column + 3) % cols as u32);
                    let codes = RandomCodes {
                        shape: [rows, cols],
                        layout,
                        permutation: (group == 128).then(|| turned.collect()),
                    };
                    let values = codes.values();
                    let matrices: Vec<_> = Level::here()
                        .map(|level| (level, Int8Matrix::at(level, &codes)))
                        .collect();
                    for batch in [1, 2, 7, 8, 26, 34] {
                        let x: Vec<f32> = noise(7)
                            .map(|n| (n >> 8) as f32 / 8e6 - 1.0)
                            .take(batch * cols)
                            .collect();
                        for (level, matrix) in &matrices {
                            let out = matmul(&x, cols, &[matrix]).concat();
                            assert_eq!(out.len(), batch * rows);
                            for (index, found) in out.iter().enumerate() {
                                let (x, w) = (&x[index / rows * cols..], &values[index % rows * cols..]);
                                let products = x.iter().zip(w).take(cols).map(|(x, w)| f64::from(*x) * w);
                                let (sum, size) =
                                    products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                                // Activations have 15 bits; zero points are multiplied apart from the codes.
                                let limit = 1e-4 * size + 1e-6 * cols as f64 * f64::from(1 << bits);
                                assert!(
                                    (f64::from(*found) - sum).abs() <= limit,
                                    "{level:?} {layout:?}, {rows} x {cols}, batch {batch}: {found} instead of {sum}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    /// Products with whole numbers are exact but for the rounding of f32, on all instruction sets.
    #[test]
    fn products_of_whole_activations_equal_the_reference() {
        for (bits, offset) in [(2, 1), (4, 8), (8, 128), (3, 4)] {
            for cols in [32, 40, 288, 640] {
                let rows = 37;
                let layout = CodeLayout {
                    bits,
                    group: if bits == 3 { 32 } else { usize::MAX },
                    shift: Shift::Offset(offset),
                    table: None,
                };
                let codes = RandomCodes {
                    shape: [rows, cols],
                    layout,
                    permutation: None,
                };
                let values = codes.values();
                for batch in [1, 2, 3, 7, 8, 15, 33] {
                    let x: Vec<f32> = noise(9)
                        .map(|n| (n >> 8) as f32 / 8e6 - 1.0)
                        .take(batch * cols)
                        .collect();
                    let mut whole = Vec::new();
                    for x in x.chunks_exact(cols) {
                        let scale = 127.0 / x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                        whole.extend(
                            x.iter()
                                .map(|x| f64::from((x * scale).round_ties_even()) / f64::from(scale)),
                        );
                    }
                    for level in Level::here() {
                        let matrix = Int8Matrix::at(level, &codes);
                        let outs = matmul_whole(&x, cols, &[&matrix, &matrix]);
                        assert_eq!(outs[0], outs[1]);
                        for (index, found) in outs[0].iter().enumerate() {
                            let (x, w) = (&whole[index / rows * cols..], &values[index % rows * cols..]);
                            let products = x.iter().zip(w).take(cols).map(|(x, w)| x * w);
                            let (sum, size) =
                                products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                            // Scales of groups of one block are half floats, and their activations have 15 bits.
                            let limit = match (bits, cols) {
                                (3, _) => 1e-3,
                                (_, 32) => 1e-4,
                                _ => 1e-6,
                            };
                            assert!(
                                (f64::from(*found) - sum).abs() <= limit * size,
                                "{level:?} {layout:?}, {cols} columns, batch {batch}: {found} instead of {sum}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn whole_activations_that_are_no_numbers_stay_visible() {
        let layout = CodeLayout {
            bits: 2,
            group: usize::MAX,
            shift: Shift::Offset(1),
            table: None,
        };
        let codes = RandomCodes {
            shape: [8, 64],
            layout,
            permutation: None,
        };
        let matrix = Int8Matrix::from_codes(&codes);
        for bad in [f32::NAN, f32::INFINITY] {
            for rows in [2, 40] {
                let mut x = vec![1.0; 64 * rows];
                x[70] = bad;
                for (index, y) in matmul_whole(&x, 64, &[&matrix])[0].iter().enumerate() {
                    assert_eq!(y.is_nan(), index / 8 == 1);
                }
            }
        }
        assert!(
            matmul_whole(&[0.0; 64], 64, &[&matrix])[0]
                .iter()
                .all(|y| *y == 0.0)
        );
    }

    /// What was regrouped has the same codes, and scales as far as half floats have them.
    #[test]
    fn rows_come_back() {
        static TABLE: [f32; 16] = [
            -1.0, -0.75, -0.525, -0.395, -0.25, -0.1875, -0.091, 0.0, 0.08, 0.161, 0.246, 0.338, 0.44, 0.563,
            0.723, 1.0,
        ];
        let shifts = [Shift::Offset(3), Shift::Zeros, Shift::Mins];
        let kinds = (1..=8).flat_map(|bits| shifts.map(|shift| (bits, shift, None)));
        for (bits, shift, table) in kinds.chain([(4, Shift::Offset(0), Some(&TABLE))]) {
            for (cols, group) in [
                (288, 16),
                (288, 32),
                (288, 64),
                (300, 100),
                (72, usize::MAX),
                (288, 128),
            ] {
                let layout = CodeLayout {
                    bits,
                    group,
                    shift,
                    table,
                };
                let turned = (0..cols as u32).map(|column| (7 * column + 3) % cols as u32);
                let codes = RandomCodes {
                    shape: [37, cols],
                    layout,
                    permutation: (group == 128).then(|| turned.collect()),
                };
                let back = Regrouped::new(&codes);
                assert_eq!((back.shape(), back.layout()), (codes.shape(), codes.layout()));
                assert_eq!(back.permutation(), codes.permutation());
                let groups = layout.groups(cols);
                let read = |rows: &dyn CodeRows| {
                    let (mut codes, mut scales) = (vec![0; 9 * cols], vec![0.0; 9 * groups]);
                    let mut shifts = vec![0.0; if layout.has_shifts() { 9 * groups } else { 0 }];
                    rows.unpack(13..22, &mut codes, &mut scales, &mut shifts);
                    (codes, scales, shifts)
                };
                let (expected, found) = (read(&codes), read(&back));
                assert!(expected.0 == found.0, "{layout:?}");
                for (a, b) in [(&expected.1, &found.1), (&expected.2, &found.2)] {
                    assert_eq!(a.len(), b.len());
                    let wide = group % 32 == 0 && group != 32 || group == usize::MAX;
                    let limit = if wide { 0.0 } else { 1e-3 };
                    let close = a.iter().zip(b).all(|(a, b)| (a - b).abs() <= limit * a.abs());
                    assert!(close, "{layout:?} {a:?} {b:?}");
                }
                let held = Int8Matrix::bytes_of(codes.shape(), layout);
                assert!(
                    back.int8().num_bytes().abs_diff(held) < 64 + 4 * 2 * cols,
                    "{layout:?}"
                );
            }
        }
    }

    #[test]
    fn matrices_in_different_orders() {
        let layout = CodeLayout {
            bits: 4,
            group: 64,
            shift: Shift::Zeros,
            table: None,
        };
        let codes = |permutation| RandomCodes {
            shape: [20, 96],
            layout,
            permutation,
        };
        let (plain, turned) = (codes(None), codes(Some((0..96).rev().collect())));
        let [plain, turned] = [&plain, &turned].map(|codes| Int8Matrix::from_codes(codes));
        let x: Vec<f32> = noise(3)
            .map(|n| (n >> 8) as f32 / 8e6 - 1.0)
            .take(3 * 96)
            .collect();
        let outs = matmul(&x, 96, &[&plain, &turned]);
        assert_eq!(outs[0], matmul(&x, 96, &[&plain])[0]);
        let reversed: Vec<f32> = x
            .chunks_exact(96)
            .flat_map(|row| row.iter().rev().copied())
            .collect();
        assert_eq!(outs[1], matmul(&reversed, 96, &[&plain])[0]);
    }

    #[test]
    fn scales_that_are_no_numbers_stay_visible() {
        #[derive(Debug)]
        struct Bad(f32, usize);
        impl CodeRows for Bad {
            fn shape(&self) -> [usize; 2] {
                [3, 128]
            }
            fn layout(&self) -> CodeLayout {
                CodeLayout {
                    bits: 4,
                    group: self.1,
                    shift: Shift::Zeros,
                    table: None,
                }
            }
            fn unpack(&self, _: Range<usize>, codes: &mut [u8], scales: &mut [f32], shifts: &mut [f32]) {
                codes.fill(3);
                scales.fill(1.0);
                shifts.fill(2.0);
                scales[128 / self.1] = self.0;
            }
        }
        for bad in [f32::NAN, f32::INFINITY] {
            for group in [32, 64] {
                let out = matmul(&[1.0; 128], 128, &[&Int8Matrix::from_codes(&Bad(bad, group))]).concat();
                assert!(
                    out[0] == 128.0 && !out[1].is_finite() && out[2] == 128.0,
                    "{out:?}"
                );
            }
        }
    }
}
