//! Blocks of 256 values in groups whose scales are themselves quantized.

use super::fit::{self, EPSILON, FINE, Grid, nearest};
use super::{Format, Groups, Importance, half, put_half};

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

    #[inline(always)]
    fn pack(x: &[f32; 256], importance: Option<Importance<256>>, block: &mut [u8; 84]) {
        let mut codes = [0; 256];
        let (mut scales, mut mins) = ([0.0; 16], [0.0; 16]);
        let (mut low, mut high) = ([0; 16], [0; 16]);
        let mut weights = [0.0; 16];
        let groups = x.as_chunks::<16>().0.iter().zip(codes.chunks_exact_mut(16));
        if let Some(importance) = importance {
            let mean_square = fit::square_sum(x) / 256.0;
            let mut sums = [0.0; 16];
            for (j, (x, codes)) in groups.enumerate() {
                fit::weigh(x, &importance.columns[16 * j..], mean_square, &mut weights);
                sums[j] = weights.iter().fold(0.0, |sum, weight| sum + weight);
                (scales[j], mins[j]) = fit::with_minimum(3, x, &weights, FINE, false, codes);
            }
            put_half(block, 80, fit::positive(15, &scales, &sums, &mut low));
            put_half(block, 82, fit::positive(15, &mins, &sums, &mut high));
        } else {
            const GRID: Grid = Grid {
                first: -0.5,
                step: 0.1,
                steps: 15,
            };
            for (j, (x, codes)) in groups.enumerate() {
                weights = x.map(f32::abs);
                (scales[j], mins[j]) = fit::with_minimum(3, x, &weights, GRID, true, codes);
            }
            put_half(block, 80, largest_as(15, &scales, &mut low));
            put_half(block, 82, largest_as(15, &mins, &mut high));
        }
        let (d, dmin) = (half(block, 80), half(block, 82));
        for j in 0..16 {
            block[j] = low[j] | high[j] << 4;
            let (scale, min) = (d * f32::from(low[j]), dmin * f32::from(high[j]));
            encode_above(&x[16 * j..16 * j + 16], scale, min, 3, &mut codes[16 * j..]);
        }
        put_pairs(&codes, &mut block[16..80]);
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

    #[inline(always)]
    fn pack(x: &[f32; 256], importance: Option<Importance<256>>, block: &mut [u8; 110]) {
        let mut codes = [0; 256];
        let mut scales = [0.0; 16];
        let mut stored = [0u8; 16];
        let groups = x.as_chunks::<16>().0.iter().zip(codes.chunks_exact_mut(16));
        let d = if let Some(importance) = importance {
            let mean_square = 2.0 * fit::square_sum(x) / 256.0;
            let (mut weights, mut sums) = ([0.0; 16], [0.0; 16]);
            for (j, (x, codes)) in groups.enumerate() {
                fit::weigh(x, &importance.columns[16 * j..], mean_square, &mut weights);
                sums[j] = weights.iter().fold(0.0, |sum, weight| sum + weight);
                scales[j] = fit::symmetric(4, x, Some(&weights), codes);
            }
            fit::symmetric(32, &scales, Some(&sums), &mut stored)
        } else {
            for (j, (x, codes)) in groups.enumerate() {
                scales[j] = fit::symmetric_by_descent(4, x, codes);
            }
            let largest = fit::extreme(&scales);
            if largest == 0.0 {
                0.0
            } else {
                let inverse = -32.0 / largest;
                for (stored, scale) in stored.iter_mut().zip(&scales) {
                    *stored = (nearest(inverse * scale).clamp(-32, 31) + 32) as u8;
                }
                1.0 / inverse
            }
        };
        put_half(block, 108, d);
        let d = half(block, 108);
        block[96..108].fill(0);
        for j in 0..16 {
            block[96 + j % 8] |= (stored[j] & 0xF) << (4 * (j / 8));
            block[104 + j % 4] |= (stored[j] >> 4) << (2 * (j / 4));
            let scale = d * (i32::from(stored[j]) - 32) as f32;
            encode_around(&x[16 * j..16 * j + 16], scale, 4, &mut codes[16 * j..]);
        }
        for m in 0..32 {
            block[m] = (0..8).fold(0, |bits, n| bits | (codes[32 * n + m] >> 2 & 1) << n);
        }
        put_pairs(&codes.map(|code| code & 3), &mut block[32..96]);
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

    #[inline(always)]
    fn pack(x: &[f32; 256], importance: Option<Importance<256>>, block: &mut [u8; 144]) {
        const GRID: Grid = Grid {
            first: -1.0,
            step: 0.1,
            steps: 20,
        };
        let codes = pack_with_minimums(15, x, importance, GRID, block);
        for j in 0..4 {
            for l in 0..32 {
                block[16 + 32 * j + l] = codes[64 * j + l] & 0xF | codes[64 * j + 32 + l] << 4;
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

    #[inline(always)]
    fn pack(x: &[f32; 256], importance: Option<Importance<256>>, block: &mut [u8; 176]) {
        const GRID: Grid = Grid {
            first: -0.5,
            step: 0.1,
            steps: 15,
        };
        let codes = pack_with_minimums(31, x, importance, GRID, block);
        for l in 0..32 {
            block[16 + l] = (0..8).fold(0, |bits, n| bits | (codes[32 * n + l] >> 4) << n);
        }
        for j in 0..4 {
            for l in 0..32 {
                block[48 + 32 * j + l] = codes[64 * j + l] & 0xF | codes[64 * j + 32 + l] << 4;
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

    #[inline(always)]
    fn pack(x: &[f32; 256], importance: Option<Importance<256>>, block: &mut [u8; 210]) {
        let mut codes = [0; 256];
        let mut scales = [0.0; 16];
        let groups = x.as_chunks::<16>().0.iter().zip(codes.chunks_exact_mut(16));
        for (j, (x, codes)) in groups.enumerate() {
            let weights = importance.map(|importance| &importance.columns[16 * j..16 * j + 16]);
            scales[j] = fit::symmetric(32, x, weights, codes);
        }
        let largest = fit::extreme(&scales);
        if largest.abs() < EPSILON {
            block.fill(0);
            return;
        }
        let inverse = -128.0 / largest;
        put_half(block, 208, 1.0 / inverse);
        let d = half(block, 208);
        for j in 0..16 {
            let scale = nearest(inverse * scales[j]).min(127) as i8;
            block[192 + j] = scale as u8;
            let scale = d * f32::from(scale);
            encode_around(&x[16 * j..16 * j + 16], scale, 32, &mut codes[16 * j..]);
        }
        for n in 0..2 {
            let codes = &codes[128 * n..];
            for l in 0..32 {
                let [a, b, c, d] = [0, 32, 64, 96].map(|part| codes[part + l]);
                block[64 * n + l] = a & 0xF | c << 4;
                block[64 * n + 32 + l] = b & 0xF | d << 4;
                block[128 + 32 * n + l] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6;
            }
        }
    }
}

/// The inverse of [`scales_and_mins`], of the stored numbers.
#[inline(always)]
fn put_scales_and_mins(scales: [u8; 8], mins: [u8; 8], packed: &mut [u8]) {
    for j in 0..4 {
        packed[j] = scales[j] | scales[j + 4] >> 4 << 6;
        packed[j + 4] = mins[j] | mins[j + 4] >> 4 << 6;
        packed[j + 8] = scales[j + 4] & 0xF | mins[j + 4] << 4;
    }
}

/// Codes from 0 to `most` of eight groups, whose scales and minimums go to the block's first 16 bytes.
#[inline(always)]
fn pack_with_minimums(
    most: i32,
    x: &[f32; 256],
    importance: Option<Importance<256>>,
    grid: Grid,
    block: &mut [u8],
) -> [u8; 256] {
    let mut codes = [0; 256];
    let (mut scales, mut mins) = ([0.0; 8], [0.0; 8]);
    let (mut low, mut high) = ([0; 8], [0; 8]);
    let mut weights = [0.0; 32];
    let groups = x.as_chunks::<32>().0.iter().zip(codes.chunks_exact_mut(32));
    if let Some(importance) = importance {
        let mean_square = 2.0 * fit::square_sum(x) / 256.0;
        let mut sums = [0.0; 8];
        for (j, (x, codes)) in groups.enumerate() {
            fit::weigh(x, &importance.columns[32 * j..], mean_square, &mut weights);
            sums[j] = weights.iter().fold(0.0, |sum, weight| sum + weight);
            (scales[j], mins[j]) = fit::with_minimum(most, x, &weights, FINE, false, codes);
        }
        put_half(block, 0, fit::positive(63, &scales, &sums, &mut low));
        put_half(block, 2, fit::positive(63, &mins, &sums, &mut high));
    } else {
        for (j, (x, codes)) in groups.enumerate() {
            let mean = (fit::square_sum(x) / 32.0).sqrt();
            weights = x.map(|x| mean + x.abs());
            (scales[j], mins[j]) = fit::with_minimum(most, x, &weights, grid, false, codes);
        }
        put_half(block, 0, largest_as(63, &scales, &mut low));
        put_half(block, 2, largest_as(63, &mins, &mut high));
    }
    let (low, high) = (low.map(|scale| scale.min(63)), high.map(|min| min.min(63)));
    put_scales_and_mins(low, high, &mut block[4..16]);
    let (d, dmin) = (half(block, 0), half(block, 2));
    for j in 0..8 {
        let (scale, min) = (d * f32::from(low[j]), dmin * f32::from(high[j]));
        encode_above(&x[32 * j..32 * j + 32], scale, min, most, &mut codes[32 * j..]);
    }
    codes
}

/// Stores numbers of groups as codes, the largest of which becomes `most`; returns the scale.
#[inline(always)]
fn largest_as(most: u8, x: &[f32], codes: &mut [u8]) -> f32 {
    let max = x.iter().fold(0.0f32, |max, x| if *x > max { *x } else { max });
    if max <= 0.0 {
        return 0.0;
    }
    let inverse = f32::from(most) / max;
    for (code, x) in codes.iter_mut().zip(x) {
        *code = nearest(inverse * x) as u8;
    }
    max / f32::from(most)
}

/// Codes for `x = scale · code − min`; where the scale is 0, they stay.
#[inline(always)]
fn encode_above(x: &[f32], scale: f32, min: f32, most: i32, codes: &mut [u8]) {
    if scale != 0.0 {
        for (code, x) in codes.iter_mut().zip(x) {
            *code = nearest((x + min) / scale).clamp(0, most) as u8;
        }
    }
}

/// Codes for `x = scale · (code − half)`; where the scale is 0, they stay.
#[inline(always)]
fn encode_around(x: &[f32], scale: f32, half: i32, codes: &mut [u8]) {
    if scale != 0.0 {
        for (code, x) in codes.iter_mut().zip(x) {
            *code = (nearest(x / scale).clamp(-half, half - 1) + half) as u8;
        }
    }
}

/// Codes of two bits: four runs of 32 share 32 bytes.
#[inline(always)]
fn put_pairs(codes: &[u8; 256], qs: &mut [u8]) {
    for n in 0..2 {
        for l in 0..32 {
            let code = |part: usize| codes[128 * n + 32 * part + l] << (2 * part);
            qs[32 * n + l] = code(0) | code(1) | code(2) | code(3);
        }
    }
}
