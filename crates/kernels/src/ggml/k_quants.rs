//! Blocks of 256 values in groups whose scales are themselves quantized.

use super::{Format, Groups, half};

pub(super) struct Q2_K;

impl Format<84, 256> for Q2_K {
    const BITS: usize = 2;
    const GROUP: usize = 16;
    const MIN: bool = true;

    #[inline(always)]
    fn unpack(block: &[u8; 84], codes: &mut [u8; 256], groups: &mut Groups) {
        let (scales, qs) = (&block[..16], &block[16..80]);
        let (d, dmin) = (half(block, 80), half(block, 82));
        for part in 0..16 {
            // Groups of 16 values: two per pair of bits, four pairs of bits per 32 bytes.
            let (n, shift, side) = (part / 8, part % 8 / 2 * 2, part % 2);
            groups.scales[part] = d * f32::from(scales[part] & 0xF);
            groups.mins[part] = -(dmin * f32::from(scales[part] >> 4));
            for l in 0..16 {
                codes[16 * part + l] = qs[32 * n + 16 * side + l] >> shift & 3;
            }
        }
    }
}

pub(super) struct Q3_K;

impl Format<110, 256> for Q3_K {
    const BITS: usize = 3;
    const GROUP: usize = 16;
    const OFFSET: i32 = 4;

    #[inline(always)]
    fn unpack(block: &[u8; 110], codes: &mut [u8; 256], groups: &mut Groups) {
        let (hmask, qs, packed) = (&block[..32], &block[32..96], &block[96..108]);
        let d = half(block, 108);
        for part in 0..16 {
            let (n, j, side) = (part / 8, part % 8 / 2, part % 2);
            let low = packed[part % 8] >> (4 * (part / 8)) & 0xF;
            let high = packed[8 + part % 4] >> (2 * (part / 4)) & 3;
            groups.scales[part] = d * (i32::from(low | high << 4) - 32) as f32;
            for l in 0..16 {
                let low = qs[32 * n + 16 * side + l] >> (2 * j) & 3;
                let high = hmask[16 * side + l] >> (4 * n + j) & 1;
                codes[16 * part + l] = low | high << 2;
            }
        }
    }
}

/// Scales and minimums of eight groups, six bits each, in 12 bytes.
#[inline(always)]
fn scales_and_mins(block: &[u8], groups: &mut Groups) {
    let (d, dmin, packed) = (half(block, 0), half(block, 2), &block[4..16]);
    for j in 0..8 {
        let (scale, min) = if j < 4 {
            (packed[j] & 63, packed[j + 4] & 63)
        } else {
            (
                packed[j + 4] & 0xF | packed[j - 4] >> 6 << 4,
                packed[j + 4] >> 4 | packed[j] >> 6 << 4,
            )
        };
        groups.scales[j] = d * f32::from(scale);
        groups.mins[j] = -(dmin * f32::from(min));
    }
}

pub(super) struct Q4_K;

impl Format<144, 256> for Q4_K {
    const BITS: usize = 4;
    const MIN: bool = true;

    #[inline(always)]
    fn unpack(block: &[u8; 144], codes: &mut [u8; 256], groups: &mut Groups) {
        scales_and_mins(block, groups);
        let qs = &block[16..];
        for j in 0..4 {
            for l in 0..32 {
                codes[64 * j + l] = qs[32 * j + l] & 0xF;
                codes[64 * j + 32 + l] = qs[32 * j + l] >> 4;
            }
        }
    }
}

pub(super) struct Q5_K;

impl Format<176, 256> for Q5_K {
    const BITS: usize = 5;
    const MIN: bool = true;

    #[inline(always)]
    fn unpack(block: &[u8; 176], codes: &mut [u8; 256], groups: &mut Groups) {
        scales_and_mins(block, groups);
        let (qh, qs) = (&block[16..48], &block[48..]);
        for j in 0..4 {
            for l in 0..32 {
                let (q, high) = (qs[32 * j + l], qh[l] >> (2 * j));
                codes[64 * j + l] = q & 0xF | (high & 1) << 4;
                codes[64 * j + 32 + l] = q >> 4 | (high >> 1 & 1) << 4;
            }
        }
    }
}

pub(super) struct Q6_K;

impl Format<210, 256> for Q6_K {
    const BITS: usize = 6;
    const GROUP: usize = 16;
    const OFFSET: i32 = 32;

    #[inline(always)]
    fn unpack(block: &[u8; 210], codes: &mut [u8; 256], groups: &mut Groups) {
        let (ql, qh, scales) = (&block[..128], &block[128..192], &block[192..208]);
        let d = half(block, 208);
        for (group, scale) in groups.scales.iter_mut().zip(scales) {
            *group = d * f32::from(*scale as i8);
        }
        for n in 0..2 {
            for part in 0..4 {
                for l in 0..32 {
                    let low = ql[64 * n + 32 * (part % 2) + l] >> (4 * (part / 2)) & 0xF;
                    let high = qh[32 * n + l] >> (2 * part) & 3;
                    codes[128 * n + 32 * part + l] = low | high << 4;
                }
            }
        }
    }
}
