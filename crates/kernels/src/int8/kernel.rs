//! A tile of weights times rows of activations.

use super::simd::{Simd, Split};
use super::{Activations, BLOCK, TILE, batches, planes};
use crate::ggml::Format;

/// Writes, for every row of activations, `columns` values to `out`, whose rows are `stride` apart.
///
/// # Safety
/// The first argument points to as many blocks of the kernel's format as the activations have, the second to 16
/// factors; `out` has room for all rows; the processor has the kernel's instructions.
pub(super) type Kernel = unsafe fn(
    tile: *const u8,
    factors: *const f32,
    x: &Activations,
    out: *mut f32,
    stride: usize,
    columns: usize,
);

/// The kernel for few rows.
#[derive(Clone, Copy)]
pub(super) struct Few {
    pub multiply: Kernel,
    /// How it takes activations.
    pub split: Split,
    /// The largest of its [batches].
    pub most: usize,
}

macro_rules! kernel {
    ($name:ident, $simd:ty $(, $features:literal)?) => {
        pub(super) mod $name {
            use super::*;

            pub(in crate::int8) fn few<F: Format<B, N>, const B: usize, const N: usize>() -> Few {
                Few {
                    multiply: multiply::<F, B, N>,
                    split: <$simd>::SPLIT,
                    most: <$simd>::MOST,
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn multiply<F: Format<B, N>, const B: usize, const N: usize>(
                tile: *const u8,
                factors: *const f32,
                x: &Activations,
                out: *mut f32,
                stride: usize,
                columns: usize,
            ) {
                // SAFETY: the caller's; the features are enabled here.
                unsafe { all_rows::<$simd, F, B, N>(tile, factors, x, out, stride, columns) }
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
unsafe fn all_rows<S: Simd, F: Format<B, N>, const B: usize, const N: usize>(
    tile: *const u8,
    factors: *const f32,
    x: &Activations,
    out: *mut f32,
    stride: usize,
    columns: usize,
) {
    // SAFETY: the caller's; the batches are those of `x`.
    unsafe {
        for (first, rows) in batches(x.rows, S::MOST) {
            match rows {
                8 if S::MOST >= 8 => batch::<S, F, B, N, 8>(tile, factors, x, first, out, stride, columns),
                4 if S::MOST >= 4 => batch::<S, F, B, N, 4>(tile, factors, x, first, out, stride, columns),
                2 if S::MOST >= 2 => batch::<S, F, B, N, 2>(tile, factors, x, first, out, stride, columns),
                _ => batch::<S, F, B, N, 1>(tile, factors, x, first, out, stride, columns),
            }
        }
    }
}

/// # Safety
/// See [`Kernel`]; the `M` rows from `first` on are a batch of `x`.
#[inline(always)]
unsafe fn batch<S: Simd, F: Format<B, N>, const B: usize, const N: usize, const M: usize>(
    tile: *const u8,
    factors: *const f32,
    x: &Activations,
    first: usize,
    out: *mut f32,
    stride: usize,
    columns: usize,
) {
    let blocks = x.cols / BLOCK;
    let code_bytes = TILE * BLOCK * F::BITS / 8;
    let scale_bytes = 2 * TILE * (BLOCK / F::GROUP);
    let block_bytes = code_bytes + scale_bytes * if F::MIN { 2 } else { 1 };
    // SAFETY: all offsets stay within the tile and the rows `first..first + M`, see the sizes above.
    unsafe {
        let codes = x.codes.as_ptr().add(first * 2 * x.cols);
        let scales: [*const f32; M] = std::array::from_fn(|m| x.scales.as_ptr().add((first + m) * blocks));
        let sums: [*const i32; M] = std::array::from_fn(|m| x.sums.as_ptr().add((first + m) * 2 * blocks));
        // Codes become unsigned numbers from which something is taken: tables begin at -128.
        let (table, offset) = match F::TABLE {
            Some(table) => (S::table(&table.map(|value| (value as u8) ^ 0x80)), 128),
            None => (S::splat(0), F::OFFSET),
        };
        let full = F::BITS == 8 || F::TABLE.is_some();
        let offset = if full { offset - S::BIAS } else { offset };
        let mut total = [S::zero(); M];
        for block in 0..blocks {
            let at = tile.add(block * block_bytes);
            macro_rules! group {
                ($part:literal: $($step:literal)*) => {{
                    // No closure may hold vectors: it would not be compiled for this processor.
                    let (mut high, mut low) = ([S::splat(0); M], [S::splat(0); M]);
                    if offset != 0 {
                        for m in 0..M {
                            low[m] = S::splat(-offset * sum::<F, B, N>(sums[m].add(2 * block), $part));
                        }
                    }
                    $(
                        let mut w = step::<S, $step>(at, F::BITS);
                        if F::TABLE.is_some() {
                            w = S::look_up(table, w);
                        }
                        let from = codes.add((block * BLOCK + 4 * $step) * 2 * M);
                        S::dots::<M>(&mut high, &mut low, w, from, full);
                    )*
                    let scale = S::load_half(at.add(code_bytes + 2 * TILE * $part));
                    for m in 0..M {
                        // The scale of the weights is the same for all rows; that of the activation, for all lanes.
                        let scaled = S::mul(S::to_float(S::join_sums(high[m], low[m])), scale);
                        total[m] = S::scale_add(scaled, *scales[m].add(block), total[m]);
                    }
                    if F::MIN {
                        let min = S::load_half(at.add(code_bytes + scale_bytes + 2 * TILE * $part));
                        for m in 0..M {
                            let sum = sum::<F, B, N>(sums[m].add(2 * block), $part) as f32;
                            total[m] = S::scale_add(min, *scales[m].add(block) * sum, total[m]);
                        }
                    }
                }};
            }
            if F::GROUP == BLOCK {
                group!(0: 0 1 2 3 4 5 6 7);
            } else {
                group!(0: 0 1 2 3);
                group!(1: 4 5 6 7);
            }
        }
        let factors = S::load_float(factors);
        for (m, total) in total.into_iter().enumerate() {
            let values = S::mul(total, factors);
            let out = out.add((first + m) * stride);
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

/// The sum of the codes of a group of activations.
///
/// # Safety
/// `halves` points to the sums of both halves of a block.
#[inline(always)]
unsafe fn sum<F: Format<B, N>, const B: usize, const N: usize>(halves: *const i32, part: usize) -> i32 {
    // SAFETY: the caller's.
    unsafe {
        if F::GROUP == BLOCK {
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

/// See [`place_codes`](super::place_codes).
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
