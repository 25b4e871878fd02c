//! 64-bit Arm.

use std::arch::aarch64::*;

use super::{Simd, Split, dots_of_unpacked, dots_of_words, unpack_words};

/// Armv8 with (Cortex-A76, Neoverse N1, Apple M1) or without dot products of bytes.
#[derive(Clone, Copy)]
pub(crate) struct Armv8<const DOTS: bool>;

/// With dot products of bytes.
pub(crate) type DotProd = Armv8<true>;
/// What every processor has.
pub(crate) type Neon = Armv8<false>;

impl<const DOTS: bool> Simd for Armv8<DOTS> {
    type Int = [uint8x16_t; 4];
    type Float = [float32x4_t; 4];

    const MOST: usize = if DOTS { 2 } else { 4 };
    const SPLIT: Split = if DOTS { Split::Bytes } else { Split::Words };
    const BIAS: i32 = if DOTS { 128 } else { 0 };
    const UNPACKED: usize = if DOTS { 1 } else { 2 };

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [uint8x16_t; 4] {
        quarters!(|i| vld1q_u8(from.add(16 * i)))
    }
    #[inline(always)]
    unsafe fn splat(value: i32) -> [uint8x16_t; 4] {
        [unsafe { vreinterpretq_u8_s32(vdupq_n_s32(value)) }; 4]
    }
    #[inline(always)]
    unsafe fn table(table: &[u8; 16]) -> [uint8x16_t; 4] {
        [unsafe { vld1q_u8(table.as_ptr()) }; 4]
    }
    #[inline(always)]
    unsafe fn look_up(table: [uint8x16_t; 4], indices: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        quarters!(|i| vqtbl1q_u8(table[i], indices[i]))
    }
    #[inline(always)]
    unsafe fn bits<const RIGHT: u32>(v: [uint8x16_t; 4], mask: u8) -> [uint8x16_t; 4] {
        quarters!(|i| {
            let shifted = match RIGHT {
                0 => v[i],
                1 => vshrq_n_u8::<1>(v[i]),
                2 => vshrq_n_u8::<2>(v[i]),
                3 => vshrq_n_u8::<3>(v[i]),
                4 => vshrq_n_u8::<4>(v[i]),
                5 => vshrq_n_u8::<5>(v[i]),
                6 => vshrq_n_u8::<6>(v[i]),
                _ => vshrq_n_u8::<7>(v[i]),
            };
            vandq_u8(shifted, vdupq_n_u8(mask))
        })
    }
    #[inline(always)]
    unsafe fn join<const LEFT: u32>(low: [uint8x16_t; 4], high: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        quarters!(|i| {
            let shifted = match LEFT {
                2 => vshlq_n_u8::<2>(high[i]),
                _ => vshlq_n_u8::<4>(high[i]),
            };
            vorrq_u8(low[i], shifted)
        })
    }
    #[inline(always)]
    unsafe fn dots<const M: usize>(
        high: &mut [[uint8x16_t; 4]; M],
        low: &mut [[uint8x16_t; 4]; M],
        w: [uint8x16_t; 4],
        from: *const i8,
        full: bool,
    ) {
        let signed = quarters!(|i| veorq_u8(w[i], vdupq_n_u8(0x80)));
        unsafe {
            if DOTS {
                dots_of_bytes(high, low, if full { signed } else { w }, from);
            } else {
                dots_of_words::<Self, M>(low, w, from);
            }
        }
    }
    #[inline(always)]
    unsafe fn unpack(w: [uint8x16_t; 4], offset: i32, to: *mut u8) {
        let signed = quarters!(|i| vsubq_u8(w[i], vdupq_n_u8(offset as u8)));
        unsafe {
            if DOTS {
                Self::store_int(signed, to);
            } else {
                unpack_words::<Self>(w, offset, to);
            }
        }
    }
    #[inline(always)]
    unsafe fn dots_unpacked<const M: usize>(
        high: &mut [[uint8x16_t; 4]; M],
        low: &mut [[uint8x16_t; 4]; M],
        w: *const u8,
        from: *const i8,
    ) {
        unsafe {
            if DOTS {
                dots_of_bytes(high, low, Self::load(w), from);
            } else {
                dots_of_unpacked::<Self, M>(low, w, from);
            }
        }
    }
    // In an order of its own: all bytes 0 (or 1), then all bytes 2 (or 3).
    #[inline(always)]
    unsafe fn widen(v: [uint8x16_t; 4]) -> ([uint8x16_t; 4], [uint8x16_t; 4]) {
        let even = quarters!(|i| vandq_u16(vreinterpretq_u16_u8(v[i]), vdupq_n_u16(0xFF)));
        let odd = quarters!(|i| vshrq_n_u16::<8>(vreinterpretq_u16_u8(v[i])));
        (sorted(even), sorted(odd))
    }
    #[inline(always)]
    unsafe fn sub_words(a: [uint8x16_t; 4], b: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        quarters!(|i| {
            let (a, b) = (vreinterpretq_u16_u8(a[i]), vreinterpretq_u16_u8(b[i]));
            vreinterpretq_u8_u16(vsubq_u16(a, b))
        })
    }
    #[inline(always)]
    unsafe fn dot_words<const M: usize>(
        sums: &mut [[uint8x16_t; 4]; M],
        w: [uint8x16_t; 4],
        from: *const i16,
    ) {
        let w = quarters!(|i| vreinterpretq_s16_u8(w[i]));
        for (m, sums) in sums.iter_mut().enumerate() {
            let mut all = quarters!(|i| vreinterpretq_s32_u8(sums[i]));
            unsafe {
                let x = from.add(2 * m).cast::<i32>().read_unaligned();
                let x = vreinterpret_s16_s32(vdup_n_s32(x));
                all[0] = vmlal_lane_s16::<0>(all[0], vget_low_s16(w[0]), x);
                all[1] = vmlal_high_lane_s16::<0>(all[1], w[0], x);
                all[2] = vmlal_lane_s16::<0>(all[2], vget_low_s16(w[1]), x);
                all[3] = vmlal_high_lane_s16::<0>(all[3], w[1], x);
                all[0] = vmlal_lane_s16::<1>(all[0], vget_low_s16(w[2]), x);
                all[1] = vmlal_high_lane_s16::<1>(all[1], w[2], x);
                all[2] = vmlal_lane_s16::<1>(all[2], vget_low_s16(w[3]), x);
                all[3] = vmlal_high_lane_s16::<1>(all[3], w[3], x);
            }
            *sums = quarters!(|i| vreinterpretq_u8_s32(all[i]));
        }
    }
    #[inline(always)]
    unsafe fn store_int(v: [uint8x16_t; 4], to: *mut u8) {
        quarters!(|i| vst1q_u8(to.add(16 * i), v[i]));
    }
    #[inline(always)]
    unsafe fn join_sums(high: [uint8x16_t; 4], low: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
        quarters!(|i| {
            let high = vshlq_n_s32::<7>(vreinterpretq_s32_u8(high[i]));
            vreinterpretq_u8_s32(vaddq_s32(high, vreinterpretq_s32_u8(low[i])))
        })
    }
    #[inline(always)]
    unsafe fn zero() -> [float32x4_t; 4] {
        [unsafe { vdupq_n_f32(0.0) }; 4]
    }
    #[inline(always)]
    unsafe fn to_float(v: [uint8x16_t; 4]) -> [float32x4_t; 4] {
        quarters!(|i| vcvtq_f32_s32(vreinterpretq_s32_u8(v[i])))
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u8) -> [float32x4_t; 4] {
        quarters!(|i| vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from.add(8 * i)))))
    }
    #[inline(always)]
    unsafe fn load_float(from: *const f32) -> [float32x4_t; 4] {
        quarters!(|i| vld1q_f32(from.add(4 * i)))
    }
    #[inline(always)]
    unsafe fn store(v: [float32x4_t; 4], to: *mut f32) {
        quarters!(|i| vst1q_f32(to.add(4 * i), v[i]));
    }
    #[inline(always)]
    unsafe fn mul(a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        quarters!(|i| vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn scale_add(a: [float32x4_t; 4], x: f32, b: [float32x4_t; 4]) -> [float32x4_t; 4] {
        quarters!(|i| vfmaq_n_f32(b[i], a[i], x))
    }
}

/// The first numbers of all pairs, then the second ones.
#[inline(always)]
fn sorted(v: [uint16x8_t; 4]) -> [uint8x16_t; 4] {
    let all = unsafe {
        [
            vuzp1q_u16(v[0], v[1]),
            vuzp1q_u16(v[2], v[3]),
            vuzp2q_u16(v[0], v[1]),
            vuzp2q_u16(v[2], v[3]),
        ]
    };
    quarters!(|i| vreinterpretq_u8_u16(all[i]))
}

/// `Simd::dots` of signed bytes.
///
/// # Safety
/// The processor has dot products; `from` has codes of `M` rows.
#[inline(always)]
unsafe fn dots_of_bytes<const M: usize>(
    high: &mut [[uint8x16_t; 4]; M],
    low: &mut [[uint8x16_t; 4]; M],
    w: [uint8x16_t; 4],
    from: *const i8,
) {
    // Fours of codes in pairs, of which the instruction takes one.
    for index in 0..2 * M {
        let sums = if index < M {
            &mut high[index]
        } else {
            &mut low[index - M]
        };
        unsafe {
            let pair = vld1_u8(from.cast::<u8>().add(index / 2 * 8));
            *sums = match index % 2 {
                0 => dot::<0>(*sums, w, pair),
                _ => dot::<1>(*sums, w, pair),
            };
        }
    }
}

/// Adds to each lane the dot product of its four signed bytes with the four numbered `LANE` of `x`. In assembly,
/// because Rust has no stable name for the instruction.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot<const LANE: u32>(mut sums: [uint8x16_t; 4], w: [uint8x16_t; 4], x: uint8x8_t) -> [uint8x16_t; 4] {
    for (sum, w) in sums.iter_mut().zip(w) {
        unsafe {
            std::arch::asm!(
                "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]",
                sum = inout(vreg) *sum,
                w = in(vreg) w,
                x = in(vreg) x,
                lane = const LANE,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
    }
    sums
}
