//! WebAssembly.

// Here intrinsics of registers are safe to call.
#![allow(unused_unsafe)]

use std::arch::wasm32::*;

use super::{HALF_FACTOR, Simd};

/// SIMD128.
#[derive(Clone, Copy)]
pub(crate) struct Simd128;

impl Simd for Simd128 {
    type Int = [v128; 4];
    type Float = [v128; 4];

    const MOST: usize = 2;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [v128; 4] {
        quarters!(|i| v128_load(from.add(16 * i).cast()))
    }
    #[inline(always)]
    unsafe fn splat(value: i32) -> [v128; 4] {
        [i32x4_splat(value); 4]
    }
    #[inline(always)]
    unsafe fn table(table: &[u8; 16]) -> [v128; 4] {
        [unsafe { v128_load(table.as_ptr().cast()) }; 4]
    }
    #[inline(always)]
    unsafe fn look_up(table: [v128; 4], indices: [v128; 4]) -> [v128; 4] {
        quarters!(|i| i8x16_swizzle(table[i], indices[i]))
    }
    #[inline(always)]
    unsafe fn bits<const RIGHT: u32>(v: [v128; 4], mask: u8) -> [v128; 4] {
        quarters!(|i| v128_and(u16x8_shr(v[i], RIGHT), u8x16_splat(mask)))
    }
    #[inline(always)]
    unsafe fn join<const LEFT: u32>(low: [v128; 4], high: [v128; 4]) -> [v128; 4] {
        quarters!(|i| v128_or(low[i], i16x8_shl(high[i], LEFT)))
    }
    #[inline(always)]
    unsafe fn widen(v: [v128; 4]) -> ([v128; 4], [v128; 4]) {
        (
            quarters!(|i| v128_and(v[i], u16x8_splat(0xFF))),
            quarters!(|i| u16x8_shr(v[i], 8)),
        )
    }
    #[inline(always)]
    unsafe fn sub_words(a: [v128; 4], b: [v128; 4]) -> [v128; 4] {
        quarters!(|i| i16x8_sub(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn dot_words<const M: usize>(sums: &mut [[v128; 4]; M], w: [v128; 4], from: *const i16) {
        for (m, sums) in sums.iter_mut().enumerate() {
            let x = unsafe { v128_load32_splat(from.add(2 * m).cast()) };
            *sums = quarters!(|i| i32x4_add(sums[i], i32x4_dot_i16x8(w[i], x)));
        }
    }
    #[inline(always)]
    unsafe fn store_int(v: [v128; 4], to: *mut u8) {
        quarters!(|i| v128_store(to.add(16 * i).cast(), v[i]));
    }
    #[inline(always)]
    unsafe fn join_sums(high: [v128; 4], low: [v128; 4]) -> [v128; 4] {
        quarters!(|i| i32x4_add(i32x4_shl(high[i], 7), low[i]))
    }
    #[inline(always)]
    unsafe fn zero() -> [v128; 4] {
        [f32x4_splat(0.0); 4]
    }
    #[inline(always)]
    unsafe fn to_float(v: [v128; 4]) -> [v128; 4] {
        quarters!(|i| f32x4_convert_i32x4(v[i]))
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> [v128; 4] {
        quarters!(|i| {
            let bits = u32x4_load_extend_u16x4(from.add(8 * i).cast());
            let size = v128_and(bits, u32x4_splat(0x7FFF));
            // Infinities and what is no number keep the largest exponent.
            let special = v128_and(i32x4_gt(size, i32x4_splat(0x7BFF)), u32x4_splat(0x7F80_0000));
            let sign = u32x4_shl(v128_andnot(bits, u32x4_splat(0x7FFF)), 16);
            let size = f32x4_mul(u32x4_shl(size, 13), f32x4_splat(HALF_FACTOR));
            v128_or(size, v128_or(special, sign))
        })
    }
    #[inline(always)]
    unsafe fn load_float(from: *const f32) -> [v128; 4] {
        quarters!(|i| v128_load(from.add(4 * i).cast()))
    }
    #[inline(always)]
    unsafe fn store(v: [v128; 4], to: *mut f32) {
        quarters!(|i| v128_store(to.add(4 * i).cast(), v[i]));
    }
    #[inline(always)]
    unsafe fn mul(a: [v128; 4], b: [v128; 4]) -> [v128; 4] {
        quarters!(|i| f32x4_mul(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn scale_add(a: [v128; 4], x: f32, b: [v128; 4]) -> [v128; 4] {
        quarters!(|i| f32x4_add(f32x4_mul(a[i], f32x4_splat(x)), b[i]))
    }
}
