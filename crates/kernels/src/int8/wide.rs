//! A tile of weights times many rows of activations.
//!
//! The codes of the tile are widened to 16 bits once for all rows, and multiplied with activations of 16 bits: one
//! product where the kernels for few rows take two, and nothing to unpack between them.

use super::kernel::step;
use super::simd::{Simd, Split};
use super::{BLOCK, Quantized, TILE};
use crate::ggml::Format;

/// Rows of activations from which on unpacking pays.
pub(super) const MANY: usize = 24;

/// The kernels for many rows.
#[derive(Clone, Copy)]
pub(super) struct Wide {
    /// How activations are taken.
    pub split: Split,
    pub unpack: Unpack,
    /// For one row, for two, and so on.
    pub multiply: &'static [Multiply],
}

/// Sixteen lanes of four bytes, aligned as vectors like it.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(#[allow(dead_code)] [u8; 64]);

/// A tile with its codes widened.
#[derive(Default)]
pub(super) struct Unpacked {
    /// For each four columns, those of all rows as [`Simd::unpack`] writes them.
    codes: Vec<Line>,
    /// For each group of columns, the f32 of all rows.
    scales: Vec<Line>,
    mins: Vec<Line>,
}

/// Widens so many blocks of a tile.
///
/// # Safety
/// The pointer is to the blocks, in the format of the function; the processor has its instructions.
pub(super) type Unpack = unsafe fn(tile: *const u8, blocks: usize, to: &mut Unpacked);

/// Writes `columns` values to `out` for each row of a batch; rows of `out` are `stride` apart.
///
/// # Safety
/// The tile is unpacked, of the format that the function is for; `factors` are 16 values; `out` has room for all
/// rows; the processor has the function's instructions.
pub(super) type Multiply = unsafe fn(
    tile: &Unpacked,
    factors: *const f32,
    batch: Quantized<'_>,
    out: *mut f32,
    stride: usize,
    columns: usize,
);

/// The kernels of an instruction set, for up to so many rows as the last number says.
macro_rules! kernels {
    ($name:ident, $simd:ty $(, $features:literal)?; $($m:literal)+) => {
        pub(super) mod $name {
            use super::*;

            pub(in crate::int8) fn wide<F: Format<B, N>, const B: usize, const N: usize>() -> Wide {
                Wide {
                    split: if <$simd>::UNPACKED == 1 { Split::Bytes } else { Split::Words },
                    unpack: unpack::<F, B, N>,
                    multiply: match (F::GROUP, F::MIN) {
                        (BLOCK, false) => &[$(multiply::<1, false, $m>),+],
                        (BLOCK, true) => &[$(multiply::<1, true, $m>),+],
                        (_, false) => &[$(multiply::<2, false, $m>),+],
                        (_, true) => &[$(multiply::<2, true, $m>),+],
                    },
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn unpack<F: Format<B, N>, const B: usize, const N: usize>(
                tile: *const u8,
                blocks: usize,
                to: &mut Unpacked,
            ) {
                // SAFETY: the caller's; the features are enabled here.
                unsafe { super::unpack::<$simd, F, B, N>(tile, blocks, to) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn multiply<const GROUPS: usize, const MIN: bool, const M: usize>(
                tile: &Unpacked,
                factors: *const f32,
                batch: Quantized<'_>,
                out: *mut f32,
                stride: usize,
                columns: usize,
            ) {
                // SAFETY: the caller's; the features are enabled here.
                unsafe {
                    super::multiply::<$simd, GROUPS, MIN, M>(tile, factors, batch, out, stride, columns)
                }
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

/// # Safety
/// See [`Unpack`].
#[inline(always)]
unsafe fn unpack<S: Simd, F: Format<B, N>, const B: usize, const N: usize>(
    tile: *const u8,
    blocks: usize,
    to: &mut Unpacked,
) {
    let groups = BLOCK / F::GROUP;
    let code_bytes = TILE * BLOCK * F::BITS / 8;
    let scale_bytes = 2 * TILE * groups;
    let block_bytes = code_bytes + scale_bytes * if F::MIN { 2 } else { 1 };
    let make_room = |lines: &mut Vec<Line>, len| lines.resize(len, Line([0; 64]));
    make_room(&mut to.codes, blocks * BLOCK / 4 * S::UNPACKED);
    make_room(&mut to.scales, blocks * groups);
    make_room(&mut to.mins, if F::MIN { blocks * groups } else { 0 });
    // SAFETY: the caller's; there is room for all blocks.
    unsafe {
        let (table, offset) = match F::TABLE {
            Some(table) => (S::table(&table.map(|value| (value as u8) ^ 0x80)), 128),
            None => (S::splat(0), F::OFFSET),
        };
        for block in 0..blocks {
            let at = tile.add(block * block_bytes);
            let codes = to.codes.as_mut_ptr().add(block * BLOCK / 4 * S::UNPACKED);
            macro_rules! steps {
                ($($step:literal)*) => {$(
                    let mut w = step::<S, $step>(at, F::BITS);
                    if F::TABLE.is_some() {
                        w = S::look_up(table, w);
                    }
                    S::unpack(w, offset, codes.add($step * S::UNPACKED).cast());
                )*};
            }
            steps!(0 1 2 3 4 5 6 7);
            for group in 0..groups {
                let half = at.add(code_bytes + 2 * TILE * group);
                let index = block * groups + group;
                S::store(S::load_half(half), to.scales.as_mut_ptr().add(index).cast());
                if F::MIN {
                    let min = S::load_half(half.add(scale_bytes));
                    S::store(min, to.mins.as_mut_ptr().add(index).cast());
                }
            }
        }
    }
}

/// # Safety
/// See [`Multiply`]; the batch has `M` rows.
#[inline(always)]
unsafe fn multiply<S: Simd, const GROUPS: usize, const MIN: bool, const M: usize>(
    tile: &Unpacked,
    factors: *const f32,
    batch: Quantized<'_>,
    out: *mut f32,
    stride: usize,
    columns: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut w = tile.codes.as_ptr();
        let (mut scales, mut mins) = (tile.scales.as_ptr().cast(), tile.mins.as_ptr().cast());
        let mut codes = batch.codes.as_ptr();
        let (mut x_scales, mut x_sums) = (batch.scales.as_ptr(), batch.sums.as_ptr());
        let mut total = [S::zero(); M];
        for _ in 0..tile.codes.len() / (BLOCK / 4 * S::UNPACKED) {
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
            (x_scales, x_sums) = (x_scales.add(M), x_sums.add(3 * M));
        }
        let factors = S::load_float(factors);
        for (m, total) in total.into_iter().enumerate() {
            let values = S::mul(total, factors);
            let out = out.add(m * stride);
            if columns == TILE {
                S::store(values, out);
            } else {
                let mut all = [0.0; TILE];
                S::store(values, all.as_mut_ptr());
                out.copy_from_nonoverlapping(all.as_ptr(), columns);
            }
        }
    }
}
