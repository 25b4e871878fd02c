//! Codes of 2, 4 or 8 bits, on the CPU.
//!
//! A row is cut into segments, each of a whole number of 32-bit words. The values of a segment lie side by side in as
//! many parts as a byte has codes: byte `i` holds the `i`th code of each part, that of the first part lowest. So a
//! vector of bytes becomes vectors of neighbouring values by shifts alone.

use half::f16;
use pulp::Simd;

use super::{GroupAxis, RowFormat};

/// Two numbers for each value: a scale and a minimum.
pub(crate) trait Line: Copy {
    /// Those of `N` values from `first` on.
    fn at<const N: usize>(self, first: usize) -> [[f32; N]; 2];
}

/// The same for all values.
impl Line for [f32; 2] {
    #[inline(always)]
    fn at<const N: usize>(self, _: usize) -> [[f32; N]; 2] {
        [[self[0]; N], [self[1]; N]]
    }
}

/// Others for each.
impl Line for [&[f32]; 2] {
    #[inline(always)]
    fn at<const N: usize>(self, first: usize) -> [[f32; N]; 2] {
        let mut line = [[0.0; N]; 2];
        line[0].copy_from_slice(&self[0][first..first + N]);
        line[1].copy_from_slice(&self[1][first..first + N]);
        line
    }
}

/// `out[i] = code[i] · scale[i] + minimum[i]` for the codes of a segment.
#[inline(always)]
pub(crate) fn decode<S: Simd, const BITS: usize, L: Line>(simd: S, codes: &[u8], line: L, out: &mut [f32]) {
    for part in 0..8 / BITS {
        let first = part * codes.len();
        let end = out.len().min(first + codes.len());
        if first >= end {
            break;
        }
        decode_part::<S, BITS, L>(simd, codes, part, line, first, &mut out[first..end]);
    }
}

/// Those of one part, whose values begin at `first`.
#[inline(always)]
fn decode_part<S: Simd, const BITS: usize, L: Line>(
    simd: S,
    codes: &[u8],
    part: usize,
    line: L,
    first: usize,
    out: &mut [f32],
) {
    let (shift, mask) = (part * BITS, (1 << BITS) - 1);
    let mut at = 0;
    let codes = &codes[..out.len()];
    // The compiler has vectors of its own for such loops, and they are slow where rows are short.
    #[cfg(target_arch = "x86_64")]
    while at + x86::width(simd) <= out.len() {
        // SAFETY: the processor has what `simd` stands for, and so many codes and values follow.
        at += unsafe {
            x86::decode(
                simd,
                codes.as_ptr().add(at),
                [shift as i32, mask],
                line,
                first + at,
                out.as_mut_ptr().add(at),
            )
        };
    }
    let _ = simd;
    while at < out.len() {
        let [[scale], [minimum]] = line.at::<1>(first + at);
        let code = (i32::from(codes[at]) >> shift) & mask;
        out[at] = code as f32 * scale + minimum;
        at += 1;
    }
}

/// The codes in as many bytes as a vector has values, or in fewer; for each part of a segment a vector, filled up with
/// zeros.
#[inline(always)]
pub(crate) fn load_codes<S: Simd, const P: usize>(simd: S, bytes: &[u8]) -> [S::f32s; P] {
    let bits = 8 / P;
    let mask = ((1 << bits) - 1) as u8;
    let mut vectors = [simd.splat_f32s(0.0); P];
    #[cfg(target_arch = "x86_64")]
    if bytes.len() == x86::width(simd) {
        for (part, vector) in vectors.iter_mut().enumerate() {
            // SAFETY: the processor has what `simd` stands for, and so many codes follow.
            *vector = unsafe { x86::load_codes(simd, bytes.as_ptr(), [part * bits, mask.into()]) };
        }
        return vectors;
    }
    for (part, vector) in vectors.iter_mut().enumerate() {
        let mut values = [0.0; MOST];
        for (value, byte) in values.iter_mut().zip(bytes) {
            *value = f32::from(byte >> (part * bits) & mask);
        }
        *vector = S::as_simd_f32s(&values).0[0];
    }
    vectors
}

/// As many numbers in half precision as a vector has values, or fewer, filled up with zeros.
#[inline(always)]
pub(crate) fn load_halves<S: Simd>(simd: S, halves: &[u16]) -> S::f32s {
    let mut values = [0.0; MOST];
    widen_all(simd, halves, &mut values);
    S::as_simd_f32s(&values).0[0]
}

/// The sum over the lanes of each vector.
#[inline(always)]
pub(crate) fn sum_each<S: Simd>(simd: S, vectors: [S::f32s; 4]) -> [f32; 4] {
    #[cfg(target_arch = "x86_64")]
    if x86::width(simd) == S::F32_LANES {
        // SAFETY: the processor has what `simd` stands for.
        return unsafe { x86::sum_each(simd, vectors) };
    }
    vectors.map(|vector| simd.reduce_sum_f32s(vector))
}

/// Most values of a vector.
const MOST: usize = 16;

/// Bytes to vectors of values.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::any::TypeId;
    use std::arch::x86_64::*;
    use std::mem::transmute_copy;

    use pulp::Simd;
    use pulp::x86::{V3, V4};

    use super::Line;

    #[inline(always)]
    fn is<S: Simd, T: Simd>() -> bool {
        TypeId::of::<S>() == TypeId::of::<T>()
    }

    /// Values of a vector; more than there are of anything where there is none.
    #[inline(always)]
    pub fn width<S: Simd>(_: S) -> usize {
        if is::<S, V4>() {
            16
        } else if is::<S, V3>() {
            8
        } else {
            usize::MAX / 2
        }
    }

    /// Writes as many values as a vector has, and returns their number.
    ///
    /// # Safety
    /// `S` stands for a processor with vectors, this one; so many codes can be read and values written.
    #[inline(always)]
    pub unsafe fn decode<S: Simd, L: Line>(
        _: S,
        codes: *const u8,
        [shift, mask]: [i32; 2],
        line: L,
        first: usize,
        out: *mut f32,
    ) -> usize {
        // SAFETY: the caller's.
        unsafe {
            if is::<S, V4>() {
                let [scales, minimums] = line.at::<16>(first);
                let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()));
                let codes = _mm512_srl_epi32(codes, _mm_cvtsi32_si128(shift));
                let codes = _mm512_and_si512(codes, _mm512_set1_epi32(mask));
                let x = _mm512_mul_ps(_mm512_cvtepi32_ps(codes), _mm512_loadu_ps(scales.as_ptr()));
                _mm512_storeu_ps(out, _mm512_add_ps(x, _mm512_loadu_ps(minimums.as_ptr())));
                16
            } else {
                let [scales, minimums] = line.at::<8>(first);
                let codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.cast()));
                let codes = _mm256_srl_epi32(codes, _mm_cvtsi32_si128(shift));
                let codes = _mm256_and_si256(codes, _mm256_set1_epi32(mask));
                let x = _mm256_mul_ps(_mm256_cvtepi32_ps(codes), _mm256_loadu_ps(scales.as_ptr()));
                _mm256_storeu_ps(out, _mm256_add_ps(x, _mm256_loadu_ps(minimums.as_ptr())));
                8
            }
        }
    }

    /// As many bytes as a vector has values, shifted to the right and masked.
    ///
    /// # Safety
    /// `S` stands for a processor with vectors, this one; so many bytes can be read.
    #[inline(always)]
    pub unsafe fn load_codes<S: Simd>(_: S, bytes: *const u8, [shift, mask]: [usize; 2]) -> S::f32s {
        let (shift, mask) = (shift as u32, mask as i32);
        // SAFETY: the caller's; what is transmuted is the vector of `S`.
        unsafe {
            if is::<S, V4>() {
                let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.cast()));
                let codes = _mm512_srlv_epi32(codes, _mm512_set1_epi32(shift as i32));
                let codes = _mm512_and_si512(codes, _mm512_set1_epi32(mask));
                transmute_copy(&_mm512_cvtepi32_ps(codes))
            } else {
                let codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes.cast()));
                let codes = _mm256_srlv_epi32(codes, _mm256_set1_epi32(shift as i32));
                let codes = _mm256_and_si256(codes, _mm256_set1_epi32(mask));
                transmute_copy(&_mm256_cvtepi32_ps(codes))
            }
        }
    }

    /// The sum over the lanes of each vector.
    ///
    /// # Safety
    /// `S` stands for a processor with vectors, this one.
    #[inline(always)]
    pub unsafe fn sum_each<S: Simd>(_: S, vectors: [S::f32s; 4]) -> [f32; 4] {
        // SAFETY: the caller's; what is transmuted are vectors of `S`.
        unsafe {
            let halves = if is::<S, V4>() {
                let [a, b, c, d]: [__m512; 4] = transmute_copy(&vectors);
                // In each quarter the sums of pairs, then all four of them.
                let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                let low = _mm512_shuffle_ps(ab, cd, 0b01_00_01_00);
                let high = _mm512_shuffle_ps(ab, cd, 0b11_10_11_10);
                let sums = _mm512_castps_pd(_mm512_add_ps(low, high));
                let half = _mm512_extractf64x4_pd(sums, 1);
                _mm256_add_ps(
                    _mm256_castpd_ps(_mm512_castpd512_pd256(sums)),
                    _mm256_castpd_ps(half),
                )
            } else {
                let [a, b, c, d]: [__m256; 4] = transmute_copy(&vectors);
                _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d))
            };
            let quarter = _mm256_extractf128_ps(halves, 1);
            transmute_copy(&_mm_add_ps(_mm256_castps256_ps128(halves), quarter))
        }
    }

    /// Half precision to values, 16 at a time where the processor can; returns how many of them.
    #[inline(always)]
    pub fn widen<S: Simd>(_: S, halves: &[u16], out: &mut [f32]) -> usize {
        if !is::<S, V4>() {
            return 0;
        }
        let (chunks, _) = halves.as_chunks::<16>();
        let (to, _) = out.as_chunks_mut::<16>();
        for (chunk, to) in chunks.iter().zip(to) {
            // SAFETY: the processor has AVX-512, and both have 16 values.
            unsafe {
                let x = _mm512_cvtph_ps(_mm256_loadu_si256(chunk.as_ptr().cast()));
                _mm512_storeu_ps(to.as_mut_ptr(), x);
            }
        }
        16 * chunks.len()
    }
}

/// Adding 1.5 · 2²³ rounds to a whole number, which then stands in the low bits.
const ROUND: f32 = 12_582_912.0;

/// The inverse of [`decode`], with `1 / scale` in the place of scales.
#[inline(always)]
fn encode<const BITS: usize, L: Line>(x: &[f32], line: L, codes: &mut [u8]) {
    let most = ((1 << BITS) - 1) as f32;
    let width = codes.len();
    for (part, x) in x.chunks(width.max(1)).enumerate() {
        for (i, (x, code)) in x.iter().zip(codes.iter_mut()).enumerate() {
            let [[inverse], [minimum]] = line.at::<1>(part * width + i);
            let rounded = ((x - minimum) * inverse).max(0.0).min(most) + ROUND;
            *code |= (rounded.to_bits() as u8) << (part * BITS);
        }
    }
}

/// The value of a number in half precision.
#[inline(always)]
pub(crate) fn widen(half: u16) -> f32 {
    // Exponent and fraction in their places; the product corrects the bias of the exponent, subnormal numbers included.
    let magnitude = u32::from(half & 0x7fff) << 13;
    let x = f32::from_bits(magnitude) * f32::from_bits((112 + 127) << 23);
    let infinite = if magnitude >= 0x1f << 23 { 0xff << 23 } else { 0 };
    f32::from_bits(x.to_bits() | infinite | u32::from(half & 0x8000) << 16)
}

/// Those of a slice of them.
#[inline(always)]
pub(crate) fn widen_all<S: Simd>(simd: S, halves: &[u16], out: &mut [f32]) {
    let out = &mut out[..halves.len()];
    #[cfg(target_arch = "x86_64")]
    let done = x86::widen(simd, halves, out);
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    let _ = simd;
    for (half, to) in halves[done..].iter().zip(&mut out[done..]) {
        *to = widen(*half);
    }
}

/// Rows as codes, with a scale and a minimum for each group.
#[derive(Default)]
pub(crate) struct Encoded {
    /// Words of codes, rows one after the other.
    pub codes: Vec<i32>,
    pub scales: Vec<f16>,
    pub minimums: Vec<f16>,
}

/// Packs `x`, some sequences of `tokens` rows of `dim` values. Each block of `group` tokens has statistics of its own.
///
/// A group that holds a value that is no number, or infinite, has a minimum that is no number, and so are its values.
pub(crate) fn quantize(x: &[f32], [tokens, dim]: [usize; 2], format: RowFormat) -> Encoded {
    struct Quantize<'a>(&'a [f32], [usize; 2], RowFormat);

    impl pulp::WithSimd for Quantize<'_> {
        type Output = Encoded;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> Encoded {
            let Self(x, shape, format) = self;
            match format.bits as usize {
                2 => run::<2>(x, shape, format),
                4 => run::<4>(x, shape, format),
                _ => run::<8>(x, shape, format),
            }
        }
    }

    pulp::Arch::new().dispatch(Quantize(x, [tokens, dim], format))
}

#[inline(always)]
fn run<const BITS: usize>(x: &[f32], [tokens, dim]: [usize; 2], format: RowFormat) -> Encoded {
    let most = ((1 << BITS) - 1) as f32;
    let (segment, row) = (format.segment(dim), 4 * format.row_words(dim));
    let mut out = Encoded {
        codes: vec![0; x.len() / dim.max(1) * row / 4],
        ..Encoded::default()
    };
    let mut channels = Channels::new(dim);
    let codes: &mut [u8] = bytemuck::cast_slice_mut(&mut out.codes);
    let sequences = x.chunks(tokens * dim).zip(codes.chunks_mut(tokens * row));
    for (x, codes) in sequences {
        for (x, codes) in x
            .chunks(format.group * dim)
            .zip(codes.chunks_mut(format.group * row))
        {
            match format.axis {
                GroupAxis::Channel => {
                    channels.reach(x, most);
                    for _ in 0..format.rounds() {
                        channels.fit(x, most);
                    }
                    let line = channels.keep(&mut out.scales, &mut out.minimums);
                    for (x, codes) in x.chunks(dim).zip(codes.chunks_mut(row)) {
                        encode::<BITS, _>(x, line, codes);
                    }
                }
                GroupAxis::Token => {
                    let width = 4 * format.segment_words(dim);
                    for (x, codes) in x.chunks(dim).zip(codes.chunks_mut(row)) {
                        for (x, codes) in x.chunks(segment).zip(codes.chunks_mut(width)) {
                            let mut range = [f32::INFINITY, f32::NEG_INFINITY, 0.0];
                            for x in x {
                                range = [range[0].min(*x), range[1].max(*x), range[2] + x * 0.0];
                            }
                            let [least, largest, zeros] = range;
                            let line = [(largest - least) / most, least + zeros];
                            let line = keep(line, &mut out.scales, &mut out.minimums);
                            encode::<BITS, _>(x, line, codes);
                        }
                    }
                }
            }
        }
    }
    out
}

/// Scales and minimums of the channels of a block, whose values are each a group.
struct Channels {
    scales: Vec<f32>,
    minimums: Vec<f32>,
    inverses: Vec<f32>,
    /// Zero, or no number where a value of the channel is none, or infinite.
    zeros: Vec<f32>,
    sums: [Vec<f32>; 4],
}

impl Channels {
    fn new(dim: usize) -> Self {
        let zeros = || vec![0.0; dim];
        Self {
            scales: zeros(),
            minimums: zeros(),
            inverses: zeros(),
            zeros: zeros(),
            sums: [zeros(), zeros(), zeros(), zeros()],
        }
    }

    /// Those with which codes up to `most` reach from the least to the largest value of rows.
    #[inline(always)]
    fn reach(&mut self, x: &[f32], most: f32) {
        let dim = self.zeros.len();
        // The scales' place until they are known.
        let (least, largest) = (&mut self.minimums[..dim], &mut self.scales[..dim]);
        let zeros = &mut self.zeros[..dim];
        least.fill(f32::INFINITY);
        largest.fill(f32::NEG_INFINITY);
        zeros.fill(0.0);
        for x in x.chunks_exact(dim) {
            for (i, x) in x.iter().enumerate() {
                least[i] = least[i].min(*x);
                largest[i] = largest[i].max(*x);
                zeros[i] += x * 0.0;
            }
        }
        for (largest, least) in largest.iter_mut().zip(least) {
            *largest = (*largest - *least) / most;
        }
    }

    /// Those whose squared error is the least with the codes that they give now.
    #[inline(always)]
    fn fit(&mut self, x: &[f32], most: f32) {
        let dim = self.zeros.len();
        let count = (x.len() / dim) as f32;
        for (inverse, scale) in self.inverses.iter_mut().zip(&self.scales) {
            *inverse = inverse_of(*scale);
        }
        let (minimums, inverses) = (&mut self.minimums[..dim], &self.inverses[..dim]);
        let [values, codes, squares, products] = self.sums.each_mut().map(|sums| {
            sums.fill(0.0);
            &mut sums[..dim]
        });
        for x in x.chunks_exact(dim) {
            for (i, x) in x.iter().enumerate() {
                // From the minimum on, so that differences of sums stay exact.
                let x = x - minimums[i];
                let code = ((x * inverses[i]).max(0.0).min(most) + ROUND) - ROUND;
                values[i] += x;
                codes[i] += code;
                squares[i] += code * code;
                products[i] += code * x;
            }
        }
        for (i, scale) in self.scales.iter_mut().enumerate() {
            let spread = count * squares[i] - codes[i] * codes[i];
            let fitted = (count * products[i] - codes[i] * values[i]) / spread;
            // Not where all codes are the same, or values no numbers.
            if fitted > 0.0 && fitted < f32::INFINITY {
                *scale = fitted;
                minimums[i] += (values[i] - fitted * codes[i]) / count;
            }
        }
    }

    /// Keeps them; returns `1 / scale` and the minimum of each channel, as they are kept.
    #[inline(always)]
    fn keep(&mut self, scales: &mut Vec<f16>, minimums: &mut Vec<f16>) -> [&[f32]; 2] {
        for (i, scale) in self.scales.iter().enumerate() {
            let line = [*scale, self.minimums[i] + self.zeros[i]];
            [self.inverses[i], self.minimums[i]] = keep(line, scales, minimums);
        }
        [&self.inverses, &self.minimums]
    }
}

/// Keeps a scale and a minimum in half precision; returns `1 / scale` and the minimum, as they are kept.
#[inline(always)]
fn keep([scale, minimum]: [f32; 2], scales: &mut Vec<f16>, minimums: &mut Vec<f16>) -> [f32; 2] {
    let (scale, minimum) = (f16::from_f32(scale), f16::from_f32(minimum));
    scales.push(scale);
    minimums.push(minimum);
    [inverse_of(scale.to_f32()), minimum.to_f32()]
}

#[inline(always)]
fn inverse_of(scale: f32) -> f32 {
    if scale > 0.0 { scale.recip() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_widen_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, expected) = (widen(bits), f16::from_bits(bits).to_f32());
            assert!(
                ours.to_bits() == expected.to_bits() || (ours.is_nan() && expected.is_nan()),
                "{bits:x}: {ours} instead of {expected}"
            );
        }
    }
}
