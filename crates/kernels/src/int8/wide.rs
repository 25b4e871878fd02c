//! A tile of weights times many rows of activations.
//!
//! The codes of the tile are widened to 16 bits once for all rows, and multiplied with activations of 16 bits: one
//! product where the kernels for few rows take two, or four, and nothing to unpack between them. Values of a table have 14
//! of them: the sums of half a block fit 32 bits.

use super::activations::{Batch, Quantized};
use super::codes::{Shape, ShiftKind, WIDE};
use super::kernel::step;
use super::simd::{Simd, Split};
use super::{BLOCK, TILE, Tile};
use crate::lines::{Line, make_room};

/// Rows of activations from which on unpacking pays.
pub(super) const MANY: usize = 24;

/// The kernels for many rows.
#[derive(Clone, Copy)]
pub(super) struct Wide {
    pub unpack: Unpack,
    /// For one row, for two, and so on.
    pub multiply: &'static [Multiply],
}

/// A tile with its codes widened.
#[derive(Default)]
pub(super) struct Unpacked {
    /// For each four columns, those of all rows as [`Simd::unpack`] writes them. Where codes have a high and a low
    /// [part](parts), block for block all high ones and then all low ones.
    pub codes: Vec<Line>,
    /// For each group of columns within a block, the f32 of all rows; for each part of the codes.
    pub scales: Vec<Line>,
    pub mins: Vec<Line>,
}

/// Widens a tile.
///
/// # Safety
/// The tile is of the function's kind; the processor has its instructions.
pub(super) type Unpack = unsafe fn(tile: &Tile, to: &mut Unpacked);

/// Writes the products of a tile with the rows of a batch, of which the first is numbered by the last argument.
///
/// # Safety
/// The tile is unpacked, of the kind that the function is for, and has 16 factors; its output has room for all rows;
/// the processor has the function's instructions.
pub(super) type Multiply = unsafe fn(from: &Unpacked, tile: &Tile, batch: Quantized<'_>, first: usize);

/// The kernels of an instruction set, for up to so many rows as the last number says.
macro_rules! kernels {
    ($name:ident, $simd:ty $(, $features:literal)?; $($m:literal)+) => {
        pub(super) mod $name {
            use super::*;

            pub(in crate::int8) fn wide<K: Shape>() -> Wide {
                Wide {
                    unpack: unpack::<K>,
                    multiply: match (groups::<$simd, K>(), parts::<$simd, K>(), has_mins::<K>()) {
                        (1, 1, false) => &[$(multiply::<1, 1, false, $m>),+],
                        (1, 1, true) => &[$(multiply::<1, 1, true, $m>),+],
                        (1, _, _) => &[$(multiply::<1, 2, false, $m>),+],
                        (_, 1, false) => &[$(multiply::<2, 1, false, $m>),+],
                        (_, 1, true) => &[$(multiply::<2, 1, true, $m>),+],
                        (_, _, _) => &[$(multiply::<2, 2, false, $m>),+],
                    },
                }
            }

            $(#[target_feature(enable = $features)])?
            pub(in crate::int8) unsafe fn quantize(batch: Batch) {
                let split = if <$simd>::UNPACKED == 1 { Split::Bytes } else { Split::Words };
                // SAFETY: the caller's; the features are enabled here.
                unsafe { batch.quantize::<$simd>(split) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn unpack<K: Shape>(tile: &Tile, to: &mut Unpacked) {
                // SAFETY: the caller's; the features are enabled here.
                unsafe { super::unpack::<$simd, K>(tile, to) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn multiply<const GROUPS: usize, const PARTS: usize, const MIN: bool, const M: usize>(
                from: &Unpacked,
                tile: &Tile,
                batch: Quantized<'_>,
                first: usize,
            ) {
                // SAFETY: the caller's; the features are enabled here.
                unsafe { super::multiply::<$simd, GROUPS, PARTS, MIN, M>(from, tile, batch, first) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernels!(avx512, crate::int8::simd::Avx512, "avx512f,avx512bw,avx512vnni"; 1 2 3 4 5 6 7 8 9 10 11 12);
#[cfg(target_arch = "x86_64")]
kernels!(avx2, crate::int8::simd::Avx2, "avx2,fma,f16c"; 1 2 3 4);
#[cfg(target_arch = "aarch64")]
kernels!(dot_prod, crate::int8::simd::DotProd, "neon,dotprod"; 1 2 3);
#[cfg(target_arch = "aarch64")]
kernels!(neon, crate::int8::simd::Neon, "neon"; 1 2 3 4);
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
kernels!(simd128, crate::int8::simd::Simd128, "simd128"; 1 2 3);
kernels!(scalar, crate::int8::simd::Scalar; 1 2);

/// Parts of widened codes: a word holds what two tables say, a byte does not.
const fn parts<S: Simd, K: Shape>() -> usize {
    if K::KIND.tables > 1 && S::UNPACKED == 1 {
        2
    } else {
        1
    }
}

/// Groups of a block whose products are summed up as integers.
const fn groups<S: Simd, K: Shape>() -> usize {
    if K::KIND.tables > 1 && S::UNPACKED == 2 {
        2
    } else {
        K::GROUPS
    }
}

/// Whether groups of an unpacked tile have minimums; zero points become such.
const fn has_mins<K: Shape>() -> bool {
    !matches!(K::KIND.shift, ShiftKind::Offset)
}

/// # Safety
/// See [`Unpack`].
#[inline(always)]
unsafe fn unpack<S: Simd, K: Shape>(tile: &Tile, to: &mut Unpacked) {
    let plan = &tile.weight.plan;
    let (blocks, parts, groups) = (plan.blocks, parts::<S, K>(), groups::<S, K>());
    let lines = BLOCK / 4 * S::UNPACKED;
    // Signed bytes have no room for the upper half of unsigned ones: minimums take what goes off.
    let bias = if S::UNPACKED == 1 && K::KIND.bits == 8 && has_mins::<K>() {
        128
    } else {
        0
    };
    make_room(&mut to.codes, blocks * parts * lines);
    make_room(&mut to.scales, blocks * parts * groups);
    make_room(&mut to.mins, if has_mins::<K>() { blocks * groups } else { 0 });
    // SAFETY: the caller's; there is room for all blocks.
    unsafe {
        let tables = plan.tables.each_ref();
        let (table, fine) = (S::table(tables[0]), S::table(tables[1]));
        let mut at = tile.codes.as_ptr();
        let mut codes = to.codes.as_mut_ptr();
        let mut scales: *mut f32 = to.scales.as_mut_ptr().cast();
        let mut mins: *mut f32 = to.mins.as_mut_ptr().cast();
        // Of a group of several blocks.
        let (mut wide_scale, mut wide_shift) = (S::zero(), S::zero());
        for block in 0..blocks {
            if K::KIND.group == WIDE && block.is_multiple_of(plan.group_blocks) {
                wide_scale = S::load_float(at.cast());
                if has_mins::<K>() {
                    wide_shift = S::load_float(at.cast::<f32>().add(TILE));
                }
                at = at.add(K::HEAD_BYTES);
            }
            macro_rules! steps {
                ($($step:literal)*) => {$(
                    let w = step::<S, $step>(at, K::KIND.bits);
                    let to = codes.add($step * S::UNPACKED);
                    match (K::KIND.tables, parts) {
                        (0, _) => S::unpack(w, plan.offset + bias, to.cast()),
                        (1, _) => S::unpack(S::look_up(table, w), plan.offset, to.cast()),
                        (_, 1) => unpack_both::<S>(S::look_up(table, w), S::look_up(fine, w), plan.offset, to.cast()),
                        _ => {
                            S::unpack(S::look_up(table, w), plan.offset, to.cast());
                            S::unpack(S::look_up(fine, w), 0, to.add(lines).cast());
                        }
                    }
                )*};
            }
            steps!(0 1 2 3 4 5 6 7);
            codes = codes.add(parts * lines);
            for group in 0..groups {
                let (mut scale, mut shift) = (wide_scale, wide_shift);
                if K::KIND.group != WIDE {
                    // Of one scale for the block there are two.
                    let half = at.add(K::CODE_BYTES + 2 * TILE * group.min(K::GROUPS - 1));
                    scale = S::load_half(half);
                    if has_mins::<K>() {
                        shift = S::load_half(half.add(2 * TILE * K::GROUPS));
                    }
                }
                if matches!(K::KIND.shift, ShiftKind::Zeros) {
                    shift = S::scale_add(S::mul(scale, shift), -1.0, S::zero());
                }
                if bias > 0 {
                    shift = S::scale_add(scale, bias as f32, shift);
                }
                if parts > 1 {
                    S::store(scale, scales.add(TILE * groups));
                    scale = S::scale_add(scale, 128.0, S::zero());
                }
                S::store(scale, scales);
                scales = scales.add(TILE);
                if has_mins::<K>() {
                    S::store(shift, mins);
                    mins = mins.add(TILE);
                }
            }
            scales = scales.add(TILE * groups * (parts - 1));
            at = at.add(K::BLOCK_BYTES);
        }
    }
}

/// [`Simd::unpack`] of `128 · high + low` less 128 times the offset, to words.
///
/// # Safety
/// See there.
#[inline(always)]
unsafe fn unpack_both<S: Simd>(high: S::Int, low: S::Int, offset: i32, to: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        let offset = S::splat((offset << 7) << 16 | offset << 7);
        let ((high, other_high), (low, other_low)) = (S::widen(high), S::widen(low));
        // Nothing goes beyond its word.
        S::store_int(S::sub_words(S::join_sums(high, low), offset), to);
        S::store_int(
            S::sub_words(S::join_sums(other_high, other_low), offset),
            to.add(64),
        );
    }
}

/// # Safety
/// See [`Multiply`]; the batch has `M` rows.
#[inline(always)]
unsafe fn multiply<S: Simd, const GROUPS: usize, const PARTS: usize, const MIN: bool, const M: usize>(
    from: &Unpacked,
    tile: &Tile,
    batch: Quantized<'_>,
    first: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut w = from.codes.as_ptr();
        let (mut scales, mut mins) = (from.scales.as_ptr().cast(), from.mins.as_ptr().cast());
        let mut codes = batch.codes.as_ptr();
        let (mut x_scales, mut x_sums) = (batch.scales.as_ptr(), batch.sums.as_ptr());
        let mut total = [S::zero(); M];
        for _ in 0..tile.weight.plan.blocks {
            let block = codes;
            for _ in 0..PARTS {
                codes = block;
                for group in 0..GROUPS {
                    let (mut high, mut low) = ([S::splat(0); M], [S::splat(0); M]);
                    for _ in 0..BLOCK / 4 / GROUPS {
                        S::dots_unpacked(&mut high, &mut low, w.cast(), codes);
                        w = w.add(S::UNPACKED);
                        codes = codes.add(8 * M);
                    }
                    let scale = S::load_float(scales);
                    scales = scales.add(TILE);
                    for m in 0..M {
                        // The scale of the weights is the same for all rows; that of the activation, for all lanes.
                        let scaled = S::mul(S::to_float(S::join_sums(high[m], low[m])), scale);
                        total[m] = S::scale_add(scaled, *x_scales.add(m), total[m]);
                    }
                    if MIN {
                        // Sums of a whole block come first, then those of its halves.
                        let from = x_sums.add(if GROUPS == 1 { 0 } else { (1 + group) * M });
                        let min = S::load_float(mins);
                        mins = mins.add(TILE);
                        for (m, total) in total.iter_mut().enumerate() {
                            *total = S::scale_add(min, *from.add(m), *total);
                        }
                    }
                }
            }
            (x_scales, x_sums) = (x_scales.add(M), x_sums.add(3 * M));
        }
        let factors = S::load_float(tile.factors.as_ptr());
        for (m, total) in total.into_iter().enumerate() {
            tile.store::<S>(S::mul(total, factors), first + m);
        }
    }
}
