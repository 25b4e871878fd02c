//! A tile of weights times rows of activations.

use super::activations::{Activations, Blocks};
use super::codes::{Kind, Shape, ShiftKind, WIDE};
use super::simd::{Simd, Split};
use super::{BLOCK, TILE, Tile, batches, planes};
use crate::lines::AHEAD;

/// Rows of activations as kernels for few rows take them.
pub(super) trait Rows {
    /// Their number.
    fn rows(&self) -> usize;

    /// Whether there are kernels for a kind of codes.
    fn take(kind: Kind) -> bool;

    /// Writes the products of a tile with the `M` rows from `first` on.
    ///
    /// # Safety
    /// See [`Kernel`]; the rows are one of the [batches].
    unsafe fn batch<S: Simd, K: Shape, const M: usize>(&self, tile: &Tile, first: usize);
}

/// Writes the products of a tile with every row of activations.
///
/// # Safety
/// The tile is of the kernel's kind, which the rows [take](Rows::take), and has as many blocks as the activations, and 16
/// factors; its output has room for all rows; the processor has the kernel's instructions.
pub(super) type Kernel<X> = unsafe fn(tile: &Tile, x: &X);

/// The kernel for few rows.
pub(super) struct Few<X = Activations> {
    pub multiply: Kernel<X>,
    /// How it takes activations.
    pub split: Split,
    /// The largest of its [batches].
    pub most: usize,
}

impl<X> Clone for Few<X> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<X> Copy for Few<X> {}

macro_rules! kernel {
    ($name:ident, $simd:ty $(, $features:literal)?) => {
        pub(super) mod $name {
            use super::*;

            pub(in crate::int8) fn few<K: Shape, X: Rows>() -> Few<X> {
                Few {
                    multiply: multiply::<K, X>,
                    split: <$simd>::SPLIT,
                    most: <$simd>::MOST,
                }
            }

            $(#[target_feature(enable = $features)])?
            pub(in crate::int8) unsafe fn quantize(blocks: Blocks) {
                // SAFETY: the caller's; the features are enabled here.
                unsafe { blocks.quantize::<$simd>() }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn multiply<K: Shape, X: Rows>(tile: &Tile, x: &X) {
                // Of other kinds nothing is compiled.
                if X::take(K::KIND) {
                    // SAFETY: the caller's; the features are enabled here.
                    unsafe { all_rows::<$simd, K, X>(tile, x) }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernel!(avx512, crate::int8::simd::Avx512, "avx512f,avx512bw,avx512vnni");
#[cfg(target_arch = "x86_64")]
kernel!(avx2, crate::int8::simd::Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "aarch64")]
kernel!(dot_prod, crate::int8::simd::DotProd, "neon,dotprod");
#[cfg(target_arch = "aarch64")]
kernel!(neon, crate::int8::simd::Neon, "neon");
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
kernel!(simd128, crate::int8::simd::Simd128, "simd128");
kernel!(scalar, crate::int8::simd::Scalar);

/// # Safety
/// See [`Kernel`].
#[inline(always)]
unsafe fn all_rows<S: Simd, K: Shape, X: Rows>(tile: &Tile, x: &X) {
    // SAFETY: the caller's; the batches are those of `x`.
    unsafe {
        for (first, rows) in batches(x.rows(), S::MOST) {
            match rows {
                8 if S::MOST >= 8 => x.batch::<S, K, 8>(tile, first),
                4 if S::MOST >= 4 => x.batch::<S, K, 4>(tile, first),
                2 if S::MOST >= 2 => x.batch::<S, K, 2>(tile, first),
                _ => x.batch::<S, K, 1>(tile, first),
            }
        }
    }
}

impl Rows for Activations {
    fn rows(&self) -> usize {
        self.rows
    }

    fn take(_: Kind) -> bool {
        true
    }

    #[inline(always)]
    unsafe fn batch<S: Simd, K: Shape, const M: usize>(&self, tile: &Tile, first: usize) {
        // SAFETY: the caller's.
        unsafe { batch::<S, K, M>(tile, self, first) }
    }
}

/// # Safety
/// See [`Rows::batch`].
#[inline(always)]
unsafe fn batch<S: Simd, K: Shape, const M: usize>(tile: &Tile, x: &Activations, first: usize) {
    let plan = &tile.weight.plan;
    let blocks = plan.blocks;
    let scale_bytes = 2 * TILE * K::GROUPS;
    // SAFETY: all offsets stay within the tile and the rows `first..first + M`, see the sizes of `Shape`.
    unsafe {
        let codes = x.codes.as_ptr().add(first * 2 * x.cols);
        let scales: [*const f32; M] = std::array::from_fn(|m| x.scales.as_ptr().add((first + m) * blocks));
        let sums: [*const i32; M] = std::array::from_fn(|m| x.sums.as_ptr().add((first + m) * 2 * blocks));
        let x_values: [*const f32; M] =
            std::array::from_fn(|m| x.values.as_ptr().add((first + m) * 3 * blocks));
        // Codes become unsigned numbers from which something is taken.
        let tables = plan.tables.each_ref();
        let (table, fine) = (S::table(tables[0]), S::table(tables[1]));
        let full = K::KIND.bits == 8 || K::KIND.tables > 0;
        let offset = plan.offset - if full { S::BIAS } else { 0 };
        let shifted = matches!(K::KIND.shift, ShiftKind::Offset);
        let corrected = shifted || full && S::BIAS != 0;
        let mut at = tile.codes.as_ptr();
        let mut total = [S::zero(); M];
        // The dot products of a group of columns within a block.
        macro_rules! dots {
            ($block:expr, $part:literal: $($step:literal)*) => {{
                // No closure may hold vectors: it would not be compiled for this processor.
                let (mut high, mut low) = ([S::splat(0); M], [S::splat(0); M]);
                let mut lowest = [S::splat(0); M];
                if corrected {
                    for m in 0..M {
                        low[m] = S::splat(-offset * sum::<K>(sums[m].add(2 * $block), $part));
                    }
                }
                $(
                    let w = step::<S, $step>(at, K::KIND.bits);
                    let from = codes.add(($block * BLOCK + 4 * $step) * 2 * M);
                    match K::KIND.tables {
                        0 => S::dots::<M>(&mut high, &mut low, w, from, full),
                        1 => S::dots::<M>(&mut high, &mut low, S::look_up(table, w), from, full),
                        _ => {
                            S::dots::<M>(&mut high, &mut low, S::look_up(table, w), from, full);
                            S::dots::<M>(&mut low, &mut lowest, S::look_up(fine, w), from, false);
                        }
                    }
                )*
                let mut values = [S::zero(); M];
                for m in 0..M {
                    values[m] = S::to_float(S::join_sums(high[m], low[m]));
                    if K::KIND.tables > 1 {
                        values[m] = S::scale_add(values[m], 128.0, S::to_float(lowest[m]));
                    }
                }
                values
            }};
        }
        // Groups within blocks have half floats after the codes.
        macro_rules! group {
            ($block:expr, $part:literal: $($step:literal)*) => {{
                let mut values = dots!($block, $part: $($step)*);
                let scale = at.add(K::CODE_BYTES + 2 * TILE * $part);
                let shift = scale.add(scale_bytes);
                if matches!(K::KIND.shift, ShiftKind::Zeros) {
                    let zero = S::load_half(shift);
                    for m in 0..M {
                        values[m] = S::scale_add(zero, -sum::<K>(sums[m].add(2 * $block), $part) as f32, values[m]);
                    }
                }
                let scale = S::load_half(scale);
                for m in 0..M {
                    // The scale of the weights is the same for all rows; that of the activation, for all lanes.
                    let scaled = S::mul(values[m], scale);
                    total[m] = S::scale_add(scaled, *scales[m].add($block), total[m]);
                }
                if matches!(K::KIND.shift, ShiftKind::Mins) {
                    let min = S::load_half(shift);
                    let part = if K::GROUPS == 1 { 0 } else { 1 + $part };
                    for m in 0..M {
                        total[m] = S::scale_add(min, *x_values[m].add(3 * $block + part), total[m]);
                    }
                }
            }};
        }
        if K::KIND.group == WIDE {
            // Groups of several blocks have floats before the codes.
            let mut begin = 0;
            while begin < blocks {
                let scale = S::load_float(at.cast());
                let shift: *const f32 = at.add(4 * TILE).cast();
                at = at.add(K::HEAD_BYTES);
                let (mut values, mut x_sums) = ([S::zero(); M], [0.0f32; M]);
                let end = blocks.min(begin + plan.group_blocks);
                for block in begin..end {
                    if M > 1 {
                        S::prefetch(at.wrapping_add(AHEAD), K::BLOCK_BYTES);
                    }
                    let products = dots!(block, 0: 0 1 2 3 4 5 6 7);
                    for m in 0..M {
                        let scale = *scales[m].add(block);
                        values[m] = S::scale_add(products[m], scale, values[m]);
                        if !shifted {
                            x_sums[m] += *x_values[m].add(3 * block);
                        }
                    }
                    at = at.add(K::BLOCK_BYTES);
                }
                for m in 0..M {
                    if matches!(K::KIND.shift, ShiftKind::Zeros) {
                        values[m] = S::scale_add(S::load_float(shift), -x_sums[m], values[m]);
                    }
                    total[m] = S::scale_add(S::mul(values[m], scale), 1.0, total[m]);
                    if matches!(K::KIND.shift, ShiftKind::Mins) {
                        total[m] = S::scale_add(S::load_float(shift), x_sums[m], total[m]);
                    }
                }
                begin = end;
            }
        } else {
            for block in 0..blocks {
                if M > 1 {
                    S::prefetch(at.wrapping_add(AHEAD), K::BLOCK_BYTES);
                }
                if K::KIND.group == 16 {
                    group!(block, 0: 0 1 2 3);
                    group!(block, 1: 4 5 6 7);
                } else {
                    group!(block, 0: 0 1 2 3 4 5 6 7);
                }
                at = at.add(K::BLOCK_BYTES);
            }
        }
        let factors = S::load_float(tile.factors.as_ptr());
        for (m, total) in total.into_iter().enumerate() {
            tile.store::<S>(S::mul(total, factors), first + m);
        }
    }
}

impl Tile<'_> {
    /// Writes results of a row of activations.
    ///
    /// # Safety
    /// The output has room for the row; the processor has the instructions.
    #[inline(always)]
    pub(super) unsafe fn store<S: Simd>(&self, values: S::Float, row: usize) {
        // SAFETY: the caller's.
        unsafe {
            let out = self.out.add(row * self.weight.rows);
            if self.columns == TILE {
                S::store(values, out);
            } else {
                let mut all = [0.0; TILE];
                S::store(values, all.as_mut_ptr());
                out.copy_from_nonoverlapping(all.as_ptr(), self.columns);
            }
        }
    }
}

/// The sum of the codes of a group of activations within a block.
///
/// # Safety
/// `halves` points to the sums of both halves of a block.
#[inline(always)]
unsafe fn sum<K: Shape>(halves: *const i32, part: usize) -> i32 {
    // SAFETY: the caller's.
    unsafe {
        if K::GROUPS == 1 {
            *halves + *halves.add(1)
        } else {
            *halves.add(part)
        }
    }
}

/// The codes of the columns `4 STEP..4 STEP + 4` of all rows.
///
/// # Safety
/// `block` points to the code planes of a block.
#[inline(always)]
pub(super) unsafe fn step<S: Simd, const STEP: usize>(block: *const u8, bits: usize) -> S::Int {
    // SAFETY: the caller's.
    unsafe {
        let low = plane::<S, STEP>(block, planes(bits)[0]);
        let second = block.add(64 * planes(bits)[0]);
        match bits {
            3 => S::join::<2>(low, plane::<S, STEP>(second, 1)),
            5 => S::join::<4>(low, plane::<S, STEP>(second, 1)),
            6 => S::join::<4>(low, plane::<S, STEP>(second, 2)),
            _ => low,
        }
    }
}

/// See [`place_codes`](super::pack).
///
/// # Safety
/// `plane` points to a plane of `bits` bits.
#[inline(always)]
unsafe fn plane<S: Simd, const STEP: usize>(plane: *const u8, bits: usize) -> S::Int {
    let steps = 8 / bits;
    // SAFETY: the caller's.
    unsafe {
        let bytes = S::load(plane.add(64 * (STEP / steps)));
        let mask = ((1u32 << bits) - 1) as u8;
        match bits * (STEP % steps) {
            _ if bits == 8 => bytes,
            0 => S::bits::<0>(bytes, mask),
            1 => S::bits::<1>(bytes, mask),
            2 => S::bits::<2>(bytes, mask),
            3 => S::bits::<3>(bytes, mask),
            4 => S::bits::<4>(bytes, mask),
            5 => S::bits::<5>(bytes, mask),
            6 => S::bits::<6>(bytes, mask),
            _ => S::bits::<7>(bytes, mask),
        }
    }
}
