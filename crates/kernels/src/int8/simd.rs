//! What the integer kernels need of a processor: sixteen lanes of four bytes each.

// All bodies are plain arithmetic, and loads of as many bytes as the trait says; who calls vouches for the
// processor and the pointers.
#![allow(clippy::undocumented_unsafe_blocks)]
// Not every implementation needs all of it.
#![allow(dead_code)]

use super::BLOCK;
use super::activations::QuantizedBlock;

/// Sixteen lanes, each with an `i32` or four bytes, or an `f32`.
///
/// # Safety
/// The methods may only be called on a processor that has the instructions of the implementation, inlined into
/// a function that is compiled for them.
pub(super) trait Simd: Copy {
    /// 64 bytes, or 16 `i32`.
    type Int: Copy;
    /// 16 `f32`.
    type Float: Copy;

    /// Rows of activations whose sums the registers have room for while codes are unpacked: 1, 2, 4 or 8.
    const MOST: usize;
    /// How [`dots`](Self::dots) takes activations.
    const SPLIT: Split = Split::Words;
    /// What [`dots`](Self::dots) takes from each of the weights' bytes if they are `full`.
    const BIAS: i32 = 0;
    /// Vectors that [`unpack`](Self::unpack) makes of one: 2 for [words](Split::Words), 1 for [bytes](Split::Bytes).
    const UNPACKED: usize = 2;

    /// Quantizes a block as [`QuantizedBlock::new`] does.
    #[inline(always)]
    unsafe fn quantize(x: &[f32; BLOCK], split: Split) -> QuantizedBlock {
        QuantizedBlock::new(x, split)
    }
    unsafe fn load(from: *const u8) -> Self::Int;
    /// Asks for `len` bytes, wherever they lie.
    #[inline(always)]
    unsafe fn prefetch(_from: *const u8, _len: usize) {}
    unsafe fn splat(value: i32) -> Self::Int;
    /// A table of 16 bytes for [`look_up`](Self::look_up).
    unsafe fn table(table: &[u8; 16]) -> Self::Int;
    unsafe fn look_up(table: Self::Int, indices: Self::Int) -> Self::Int;
    /// Bytes shifted right by `RIGHT` bits and masked: what is wanted of a byte must end below its top.
    unsafe fn bits<const RIGHT: u32>(v: Self::Int, mask: u8) -> Self::Int;
    /// `low | high << LEFT`, bytewise; nothing is shifted out.
    unsafe fn join<const LEFT: u32>(low: Self::Int, high: Self::Int) -> Self::Int;
    /// Adds to each lane of `low[m]`, or of `high[m]` what counts 128-fold, the dot product of its four unsigned
    /// bytes `w` with the four codes of row `m` of `from`. Unsigned bytes above 127 are only allowed with `full`.
    #[inline(always)]
    unsafe fn dots<const M: usize>(
        _high: &mut [Self::Int; M],
        low: &mut [Self::Int; M],
        w: Self::Int,
        from: *const i8,
        _full: bool,
    ) {
        unsafe { dots_of_words::<Self, M>(low, w, from) }
    }
    /// [`dots`](Self::dots) with codes of 8 bits: of bytes there are four and not two times four. Four bytes after them may
    /// be read, too.
    #[inline(always)]
    unsafe fn dots_whole<const M: usize>(
        sums: &mut [Self::Int; M],
        w: Self::Int,
        from: *const i8,
        _full: bool,
    ) {
        unsafe { dots_of_words::<Self, M>(sums, w, from) }
    }
    /// Writes unsigned bytes less `offset`, as [`dots_unpacked`](Self::dots_unpacked) reads them.
    #[inline(always)]
    unsafe fn unpack(w: Self::Int, offset: i32, to: *mut u8) {
        unsafe { unpack_words::<Self>(w, offset, to) }
    }
    /// [`dots`](Self::dots) with unpacked `w`.
    #[inline(always)]
    unsafe fn dots_unpacked<const M: usize>(
        _high: &mut [Self::Int; M],
        low: &mut [Self::Int; M],
        w: *const u8,
        from: *const i8,
    ) {
        unsafe { dots_of_unpacked::<Self, M>(low, w, from) }
    }
    /// The bytes 0 and 2 of each lane, and 1 and 3, as unsigned 16-bit numbers, in an order that
    /// [`dot_words`](Self::dot_words) knows.
    unsafe fn widen(v: Self::Int) -> (Self::Int, Self::Int);
    /// `a − b` of 16-bit numbers.
    unsafe fn sub_words(a: Self::Int, b: Self::Int) -> Self::Int;
    /// Adds to each lane of `sums[m]` the dot product of its two signed 16-bit numbers `w` with the two numbered `m`
    /// of `from`.
    unsafe fn dot_words<const M: usize>(sums: &mut [Self::Int; M], w: Self::Int, from: *const i16);
    unsafe fn store_int(v: Self::Int, to: *mut u8);
    /// `128 · high + low`, lane by lane.
    unsafe fn join_sums(high: Self::Int, low: Self::Int) -> Self::Int;
    /// `a + b`, lane by lane.
    unsafe fn add_sums(a: Self::Int, b: Self::Int) -> Self::Int;

    unsafe fn zero() -> Self::Float;
    unsafe fn to_float(v: Self::Int) -> Self::Float;
    unsafe fn load_half(from: *const u8) -> Self::Float;
    unsafe fn load_float(from: *const f32) -> Self::Float;
    unsafe fn store(v: Self::Float, to: *mut f32);
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a · x + b`.
    unsafe fn scale_add(a: Self::Float, x: f32, b: Self::Float) -> Self::Float;
}

/// How four codes of an activation, numbers of 15 bits, are split into two times four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Split {
    /// High and low bytes, `128 · high + low`.
    Bytes,
    /// Two words each: the columns 0 and 2, and 1 and 3.
    Words,
}

/// [`Simd::dots`] of [words](Split::Words).
///
/// # Safety
/// See there.
#[inline(always)]
unsafe fn dots_of_words<S: Simd, const M: usize>(low: &mut [S::Int; M], w: S::Int, from: *const i8) {
    unsafe {
        let (even, odd) = S::widen(w);
        S::dot_words(low, even, from.cast());
        S::dot_words(low, odd, from.add(4 * M).cast());
    }
}

/// [`Simd::unpack`] to words.
///
/// # Safety
/// See there.
#[inline(always)]
unsafe fn unpack_words<S: Simd>(w: S::Int, offset: i32, to: *mut u8) {
    unsafe {
        let (even, odd) = S::widen(w);
        let offset = S::splat(offset << 16 | offset);
        S::store_int(S::sub_words(even, offset), to);
        S::store_int(S::sub_words(odd, offset), to.add(64));
    }
}

/// [`Simd::dots_unpacked`] of words.
///
/// # Safety
/// See there.
#[inline(always)]
unsafe fn dots_of_unpacked<S: Simd, const M: usize>(low: &mut [S::Int; M], w: *const u8, from: *const i8) {
    unsafe {
        S::dot_words(low, S::load(w), from.cast());
        S::dot_words(low, S::load(w.add(64)), from.add(4 * M).cast());
    }
}

/// The bits of a half float as a subnormal or small f32, times this, are its value.
const HALF_FACTOR: f32 = f32::from_bits((127 + 112) << 23);

/// The same for all four quarters; all that is done to them is intrinsics.
#[allow(unused_macros)]
macro_rules! quarters {
    (|$i:ident| $body:expr) => {
        unsafe {
            [
                quarters!($i = 0, $body),
                quarters!($i = 1, $body),
                quarters!($i = 2, $body),
                quarters!($i = 3, $body),
            ]
        }
    };
    ($i:ident = $number:literal, $body:expr) => {{
        let $i = $number;
        $body
    }};
}

#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod wasm;

#[cfg(target_arch = "aarch64")]
pub(super) use neon::{DotProd, Neon};
pub(super) use scalar::Scalar;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
pub(super) use wasm::Simd128;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, QuantizedBlock, Simd, Split};
    use crate::int8::activations::scales;

    /// AVX-512 with VNNI (Ice Lake, Zen 4).
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    impl Simd for Avx512 {
        type Int = __m512i;
        type Float = __m512;

        const MOST: usize = 8;
        const SPLIT: Split = Split::Bytes;

        #[inline(always)]
        unsafe fn quantize(x: &[f32; BLOCK], split: Split) -> QuantizedBlock {
            if split != Split::Bytes {
                return QuantizedBlock::new(x, split);
            }
            unsafe {
                let (a, b) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[16..].as_ptr()));
                let sizes = (
                    _mm512_castps_si512(_mm512_abs_ps(a)),
                    _mm512_castps_si512(_mm512_abs_ps(b)),
                );
                let largest = _mm512_reduce_max_epu32(_mm512_max_epu32(sizes.0, sizes.1));
                let Some([inverse, scale]) = scales(f32::from_bits(largest)) else {
                    return QuantizedBlock::NO_NUMBERS;
                };
                let mut parts = [[_mm_setzero_si128(); 2]; 2];
                let mut sums = [0; 2];
                for (half, x) in [a, b].into_iter().enumerate() {
                    let whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
                    let top = _mm512_srai_epi32::<7>(_mm512_add_epi32(whole, _mm512_set1_epi32(64)));
                    let low = _mm512_sub_epi32(whole, _mm512_slli_epi32::<7>(top));
                    parts[0][half] = _mm512_cvtepi32_epi8(top);
                    parts[1][half] = _mm512_cvtepi32_epi8(low);
                    sums[half] = _mm512_reduce_add_epi32(whole);
                }
                QuantizedBlock {
                    parts: bytemuck::cast(parts),
                    sums,
                    scale,
                }
            }
        }
        #[inline(always)]
        unsafe fn prefetch(from: *const u8, len: usize) {
            for at in (0..len).step_by(64) {
                unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(at).cast()) }
            }
        }
        #[inline(always)]
        unsafe fn load(from: *const u8) -> __m512i {
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(value: i32) -> __m512i {
            unsafe { _mm512_set1_epi32(value) }
        }
        #[inline(always)]
        unsafe fn table(table: &[u8; 16]) -> __m512i {
            unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())) }
        }
        #[inline(always)]
        unsafe fn look_up(table: __m512i, indices: __m512i) -> __m512i {
            unsafe { _mm512_shuffle_epi8(table, indices) }
        }
        #[inline(always)]
        unsafe fn bits<const RIGHT: u32>(v: __m512i, mask: u8) -> __m512i {
            unsafe { _mm512_and_si512(_mm512_srli_epi16::<RIGHT>(v), _mm512_set1_epi8(mask as i8)) }
        }
        #[inline(always)]
        unsafe fn join<const LEFT: u32>(low: __m512i, high: __m512i) -> __m512i {
            unsafe { _mm512_or_si512(low, _mm512_slli_epi16::<LEFT>(high)) }
        }
        #[inline(always)]
        unsafe fn dots<const M: usize>(
            high: &mut [__m512i; M],
            low: &mut [__m512i; M],
            w: __m512i,
            from: *const i8,
            _full: bool,
        ) {
            for m in 0..M {
                unsafe {
                    high[m] = dot(high[m], w, from.add(4 * m));
                    low[m] = dot(low[m], w, from.add(4 * (M + m)));
                }
            }
        }
        #[inline(always)]
        unsafe fn dots_whole<const M: usize>(
            sums: &mut [__m512i; M],
            w: __m512i,
            from: *const i8,
            _full: bool,
        ) {
            for (m, sum) in sums.iter_mut().enumerate() {
                *sum = unsafe { dot(*sum, w, from.add(4 * m)) };
            }
        }
        #[inline(always)]
        unsafe fn widen(v: __m512i) -> (__m512i, __m512i) {
            unsafe {
                let even = _mm512_and_si512(v, _mm512_set1_epi16(0xFF));
                (even, _mm512_srli_epi16::<8>(v))
            }
        }
        #[inline(always)]
        unsafe fn sub_words(a: __m512i, b: __m512i) -> __m512i {
            unsafe { _mm512_sub_epi16(a, b) }
        }
        #[inline(always)]
        unsafe fn dot_words<const M: usize>(sums: &mut [__m512i; M], w: __m512i, from: *const i16) {
            for (m, sum) in sums.iter_mut().enumerate() {
                *sum = unsafe { dot_pairs(*sum, w, from.add(2 * m)) };
            }
        }
        #[inline(always)]
        unsafe fn store_int(v: __m512i, to: *mut u8) {
            unsafe { _mm512_storeu_si512(to.cast(), v) }
        }
        #[inline(always)]
        unsafe fn join_sums(high: __m512i, low: __m512i) -> __m512i {
            unsafe { _mm512_add_epi32(_mm512_slli_epi32::<7>(high), low) }
        }
        #[inline(always)]
        unsafe fn add_sums(a: __m512i, b: __m512i) -> __m512i {
            unsafe { _mm512_add_epi32(a, b) }
        }
        #[inline(always)]
        unsafe fn zero() -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn to_float(v: __m512i) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(v) }
        }
        #[inline(always)]
        unsafe fn load_half(from: *const u8) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_float(from: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(v: __m512, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, v) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn scale_add(a: __m512, x: f32, b: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, _mm512_set1_ps(x), b) }
        }
    }

    /// In assembly, because the compiler would gather the broadcasts of a whole block before it multiplies, and
    /// has no registers for them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn dot(mut acc: __m512i, w: __m512i, four: *const i8) -> __m512i {
        unsafe {
            std::arch::asm!(
                "vpdpbusd {acc}, {w}, dword ptr [{four}]{{1to16}}",
                acc = inout(zmm_reg) acc,
                w = in(zmm_reg) w,
                four = in(reg) four,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        acc
    }

    /// See [`dot`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn dot_pairs(mut acc: __m512i, w: __m512i, two: *const i16) -> __m512i {
        unsafe {
            std::arch::asm!(
                "vpdpwssd {acc}, {w}, dword ptr [{two}]{{1to16}}",
                acc = inout(zmm_reg) acc,
                w = in(zmm_reg) w,
                two = in(reg) two,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        acc
    }

    /// AVX2 with FMA and F16C (Haswell, Zen).
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    /// The same for both halves.
    macro_rules! both {
        (|$($v:ident),+| $body:expr) => {
            [{ $(let $v = $v[0];)+ $body }, { $(let $v = $v[1];)+ $body }]
        };
    }

    impl Simd for Avx2 {
        type Int = [__m256i; 2];
        type Float = [__m256; 2];

        const MOST: usize = 8;
        const SPLIT: Split = Split::Bytes;

        #[inline(always)]
        unsafe fn load(from: *const u8) -> [__m256i; 2] {
            unsafe {
                [
                    _mm256_loadu_si256(from.cast()),
                    _mm256_loadu_si256(from.add(32).cast()),
                ]
            }
        }
        #[inline(always)]
        unsafe fn splat(value: i32) -> [__m256i; 2] {
            unsafe { [_mm256_set1_epi32(value); 2] }
        }
        #[inline(always)]
        unsafe fn table(table: &[u8; 16]) -> [__m256i; 2] {
            unsafe { [_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())); 2] }
        }
        #[inline(always)]
        unsafe fn look_up(table: [__m256i; 2], indices: [__m256i; 2]) -> [__m256i; 2] {
            unsafe { both!(|table, indices| _mm256_shuffle_epi8(table, indices)) }
        }
        #[inline(always)]
        unsafe fn bits<const RIGHT: u32>(v: [__m256i; 2], mask: u8) -> [__m256i; 2] {
            unsafe {
                let (count, mask) = (_mm_cvtsi32_si128(RIGHT as i32), _mm256_set1_epi8(mask as i8));
                both!(|v| _mm256_and_si256(_mm256_srl_epi16(v, count), mask))
            }
        }
        #[inline(always)]
        unsafe fn join<const LEFT: u32>(low: [__m256i; 2], high: [__m256i; 2]) -> [__m256i; 2] {
            unsafe {
                let count = _mm_cvtsi32_si128(LEFT as i32);
                both!(|low, high| _mm256_or_si256(low, _mm256_sll_epi16(high, count)))
            }
        }
        #[inline(always)]
        unsafe fn dots<const M: usize>(
            high: &mut [[__m256i; 2]; M],
            low: &mut [[__m256i; 2]; M],
            w: [__m256i; 2],
            from: *const i8,
            full: bool,
        ) {
            unsafe {
                let dot = if full { dot_full } else { dot_half };
                for half in 0..2 {
                    for m in 0..M {
                        let four = |m: usize| from.add(4 * m).cast::<i32>().read_unaligned();
                        high[m][half] = dot(high[m][half], w[half], four(m));
                        low[m][half] = dot(low[m][half], w[half], four(M + m));
                    }
                }
            }
        }
        #[inline(always)]
        unsafe fn dots_whole<const M: usize>(
            sums: &mut [[__m256i; 2]; M],
            w: [__m256i; 2],
            from: *const i8,
            full: bool,
        ) {
            unsafe {
                let dot = if full { dot_full } else { dot_half };
                for (m, sum) in sums.iter_mut().enumerate() {
                    let four = from.add(4 * m).cast::<i32>().read_unaligned();
                    for (sum, w) in sum.iter_mut().zip(w) {
                        *sum = dot(*sum, w, four);
                    }
                }
            }
        }
        #[inline(always)]
        unsafe fn widen(v: [__m256i; 2]) -> ([__m256i; 2], [__m256i; 2]) {
            unsafe {
                let low = _mm256_set1_epi16(0xFF);
                (
                    both!(|v| _mm256_and_si256(v, low)),
                    both!(|v| _mm256_srli_epi16::<8>(v)),
                )
            }
        }
        #[inline(always)]
        unsafe fn sub_words(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
            unsafe { both!(|a, b| _mm256_sub_epi16(a, b)) }
        }
        #[inline(always)]
        unsafe fn dot_words<const M: usize>(sums: &mut [[__m256i; 2]; M], w: [__m256i; 2], from: *const i16) {
            for (m, sum) in sums.iter_mut().enumerate() {
                unsafe {
                    let x = _mm256_set1_epi32(from.add(2 * m).cast::<i32>().read_unaligned());
                    for (sum, w) in sum.iter_mut().zip(w) {
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(w, x));
                    }
                }
            }
        }
        #[inline(always)]
        unsafe fn store_int(v: [__m256i; 2], to: *mut u8) {
            unsafe {
                _mm256_storeu_si256(to.cast(), v[0]);
                _mm256_storeu_si256(to.add(32).cast(), v[1]);
            }
        }
        #[inline(always)]
        unsafe fn join_sums(high: [__m256i; 2], low: [__m256i; 2]) -> [__m256i; 2] {
            unsafe { both!(|high, low| _mm256_add_epi32(_mm256_slli_epi32::<7>(high), low)) }
        }
        #[inline(always)]
        unsafe fn add_sums(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
            unsafe { both!(|a, b| _mm256_add_epi32(a, b)) }
        }
        #[inline(always)]
        unsafe fn zero() -> [__m256; 2] {
            unsafe { [_mm256_setzero_ps(); 2] }
        }
        #[inline(always)]
        unsafe fn to_float(v: [__m256i; 2]) -> [__m256; 2] {
            unsafe { both!(|v| _mm256_cvtepi32_ps(v)) }
        }
        #[inline(always)]
        unsafe fn load_half(from: *const u8) -> [__m256; 2] {
            unsafe {
                [
                    _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast())),
                ]
            }
        }
        #[inline(always)]
        unsafe fn load_float(from: *const f32) -> [__m256; 2] {
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }
        #[inline(always)]
        unsafe fn store(v: [__m256; 2], to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, v[0]);
                _mm256_storeu_ps(to.add(8), v[1]);
            }
        }
        #[inline(always)]
        unsafe fn mul(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            unsafe { both!(|a, b| _mm256_mul_ps(a, b)) }
        }
        #[inline(always)]
        unsafe fn scale_add(a: [__m256; 2], x: f32, b: [__m256; 2]) -> [__m256; 2] {
            unsafe {
                let x = _mm256_set1_ps(x);
                both!(|a, b| _mm256_fmadd_ps(a, x, b))
            }
        }
    }

    /// Unsigned bytes up to 127: two products fit 16 bits.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dot_half(acc: __m256i, u: __m256i, four: i32) -> __m256i {
        let pairs = _mm256_maddubs_epi16(u, _mm256_set1_epi32(four));
        _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }

    /// Any unsigned bytes: their top bits go apart.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dot_full(acc: __m256i, u: __m256i, four: i32) -> __m256i {
        let s = _mm256_set1_epi32(four);
        let pairs = _mm256_maddubs_epi16(_mm256_and_si256(u, _mm256_set1_epi8(127)), s);
        let top = _mm256_and_si256(_mm256_srli_epi16::<7>(u), _mm256_set1_epi8(1));
        let tops = _mm256_maddubs_epi16(top, s);
        let acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        _mm256_add_epi32(acc, _mm256_madd_epi16(tops, _mm256_set1_epi16(128)))
    }
}
