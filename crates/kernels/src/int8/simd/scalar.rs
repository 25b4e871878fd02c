//! Without instructions of any one processor.

use std::array::from_fn;

use super::{HALF_FACTOR, Simd};

/// What runs everywhere.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl Simd for Scalar {
    type Int = [u32; 16];
    type Float = [f32; 16];

    const MOST: usize = 2;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [u32; 16] {
        from_fn(|lane| u32::from_le_bytes(unsafe { from.add(4 * lane).cast::<[u8; 4]>().read() }))
    }
    #[inline(always)]
    unsafe fn splat(value: i32) -> [u32; 16] {
        [value as u32; 16]
    }
    #[inline(always)]
    unsafe fn table(table: &[u8; 16]) -> [u32; 16] {
        from_fn(|lane| u32::from(table[lane]))
    }
    #[inline(always)]
    unsafe fn look_up(table: [u32; 16], indices: [u32; 16]) -> [u32; 16] {
        indices.map(|four| {
            let of = |byte: u8| table[usize::from(byte & 0xF)] as u8;
            u32::from_le_bytes(four.to_le_bytes().map(of))
        })
    }
    #[inline(always)]
    unsafe fn bits<const RIGHT: u32>(v: [u32; 16], mask: u8) -> [u32; 16] {
        v.map(|v| v >> RIGHT & u32::from_le_bytes([mask; 4]))
    }
    #[inline(always)]
    unsafe fn join<const LEFT: u32>(low: [u32; 16], high: [u32; 16]) -> [u32; 16] {
        from_fn(|lane| low[lane] | high[lane] << LEFT)
    }
    #[inline(always)]
    unsafe fn widen(v: [u32; 16]) -> ([u32; 16], [u32; 16]) {
        (v.map(|v| v & 0x00FF_00FF), v.map(|v| v >> 8 & 0x00FF_00FF))
    }
    #[inline(always)]
    unsafe fn sub_words(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        from_fn(|lane| {
            let high = (a[lane] >> 16).wrapping_sub(b[lane] >> 16);
            a[lane].wrapping_sub(b[lane]) & 0xFFFF | high << 16
        })
    }
    #[inline(always)]
    unsafe fn dot_words<const M: usize>(sums: &mut [[u32; 16]; M], w: [u32; 16], from: *const i16) {
        for (m, sums) in sums.iter_mut().enumerate() {
            let [first, second] = unsafe { from.add(2 * m).cast::<[i16; 2]>().read_unaligned() };
            for (sum, w) in sums.iter_mut().zip(w) {
                let low = i32::from(w as i16) * i32::from(first);
                let high = i32::from((w >> 16) as i16) * i32::from(second);
                *sum = sum.wrapping_add(low.wrapping_add(high) as u32);
            }
        }
    }
    #[inline(always)]
    unsafe fn store_int(v: [u32; 16], to: *mut u8) {
        unsafe {
            to.cast::<[[u8; 4]; 16]>()
                .write_unaligned(v.map(u32::to_le_bytes))
        }
    }
    #[inline(always)]
    unsafe fn join_sums(high: [u32; 16], low: [u32; 16]) -> [u32; 16] {
        from_fn(|lane| (high[lane] << 7).wrapping_add(low[lane]))
    }
    #[inline(always)]
    unsafe fn zero() -> [f32; 16] {
        [0.0; 16]
    }
    #[inline(always)]
    unsafe fn to_float(v: [u32; 16]) -> [f32; 16] {
        v.map(|v| v as i32 as f32)
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> [f32; 16] {
        from_fn(|lane| {
            let bits = unsafe { from.add(2 * lane).cast::<[u8; 2]>().read() };
            let bits = u32::from(u16::from_le_bytes(bits));
            let (sign, size) = ((bits & 0x8000) << 16, bits & 0x7FFF);
            // Infinities and what is no number keep the largest exponent.
            let special = if size >= 0x7C00 { 0x7F80_0000 } else { 0 };
            let size = f32::from_bits(size << 13) * HALF_FACTOR;
            f32::from_bits(size.to_bits() | special | sign)
        })
    }
    #[inline(always)]
    unsafe fn load_float(from: *const f32) -> [f32; 16] {
        unsafe { from.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(v: [f32; 16], to: *mut f32) {
        unsafe { to.cast::<[f32; 16]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|lane| a[lane] * b[lane])
    }
    #[inline(always)]
    unsafe fn scale_add(a: [f32; 16], x: f32, b: [f32; 16]) -> [f32; 16] {
        from_fn(|lane| a[lane] * x + b[lane])
    }
}
