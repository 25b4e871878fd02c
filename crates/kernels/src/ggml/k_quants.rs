//! Blocks of 256 values in groups whose scales are themselves quantized.

use super::half;

#[inline(always)]
pub(super) fn q2_k(block: &[u8; 84], y: &mut [f32; 256]) {
    let (scales, qs) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half(block, 80), half(block, 82));
    for part in 0..16 {
        // Groups of 16 values: two per pair of bits, four pairs of bits per 32 bytes.
        let (n, shift, side) = (part / 8, part % 8 / 2 * 2, part % 2);
        let scale = scales[part];
        let (dl, ml) = (d * f32::from(scale & 0xF), dmin * f32::from(scale >> 4));
        for l in 0..16 {
            let q = qs[32 * n + 16 * side + l] >> shift & 3;
            y[16 * part + l] = dl * f32::from(q) - ml;
        }
    }
}

#[inline(always)]
pub(super) fn q3_k(block: &[u8; 110], y: &mut [f32; 256]) {
    let (hmask, qs, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half(block, 108);
    let scale = |i: usize| {
        let low = packed[i % 8] >> (4 * (i / 8)) & 0xF;
        let high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
        i32::from(low | high << 4) - 32
    };
    for part in 0..16 {
        let (n, j, side) = (part / 8, part % 8 / 2, part % 2);
        let dl = d * scale(part) as f32;
        for l in 0..16 {
            let low = i32::from(qs[32 * n + 16 * side + l] >> (2 * j) & 3);
            let high = i32::from(hmask[16 * side + l] >> (4 * n + j) & 1);
            y[16 * part + l] = dl * (low - 4 * (1 - high)) as f32;
        }
    }
}

/// Scale and minimum of group `j` of eight, six bits each, in 12 bytes.
#[inline(always)]
fn scale_min(j: usize, packed: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            packed[j + 4] & 0xF | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

#[inline(always)]
pub(super) fn q4_k(block: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let (scales, qs) = (&block[4..16], &block[16..144]);
    for j in 0..4 {
        let (s1, m1) = scale_min(2 * j, scales);
        let (s2, m2) = scale_min(2 * j + 1, scales);
        let (d1, m1, d2, m2) = (d * s1, dmin * m1, d * s2, dmin * m2);
        for l in 0..32 {
            let q = qs[32 * j + l];
            y[64 * j + l] = d1 * f32::from(q & 0xF) - m1;
            y[64 * j + 32 + l] = d2 * f32::from(q >> 4) - m2;
        }
    }
}

#[inline(always)]
pub(super) fn q5_k(block: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let (scales, qh, qs) = (&block[4..16], &block[16..48], &block[48..176]);
    for j in 0..4 {
        let (s1, m1) = scale_min(2 * j, scales);
        let (s2, m2) = scale_min(2 * j + 1, scales);
        let (d1, m1, d2, m2) = (d * s1, dmin * m1, d * s2, dmin * m2);
        for l in 0..32 {
            let (q, high) = (qs[32 * j + l], qh[l] >> (2 * j));
            y[64 * j + l] = d1 * f32::from(q & 0xF | (high & 1) << 4) - m1;
            y[64 * j + 32 + l] = d2 * f32::from(q >> 4 | (high >> 1 & 1) << 4) - m2;
        }
    }
}

#[inline(always)]
pub(super) fn q6_k(block: &[u8; 210], y: &mut [f32; 256]) {
    let (ql, qh, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half(block, 208);
    for n in 0..2 {
        for part in 0..4 {
            for l in 0..32 {
                let low = ql[64 * n + 32 * (part % 2) + l] >> (4 * (part / 2)) & 0xF;
                let high = qh[32 * n + l] >> (2 * part) & 3;
                let scale = f32::from(scales[8 * n + 2 * part + l / 16] as i8);
                y[128 * n + 32 * part + l] = d * scale * (i32::from(low | high << 4) - 32) as f32;
            }
        }
    }
}
