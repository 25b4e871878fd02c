//! Blocks of 32 values with one scale, and in the `_1` formats one minimum.

use super::fit::{self, FINE};
use super::{Format, Groups, Importance, half, put_half};

pub(super) struct Q4_0;

impl Format<18, 32> for Q4_0 {
    const BITS: usize = 4;
    const OFFSET: i32 = 8;

    #[inline(always)]
    fn unpack(block: &[u8; 18], codes: &mut [u8; 32], groups: &mut Groups) {
        groups.scales[0] = half(block, 0);
        nibbles(&block[2..], codes);
    }

    #[inline(always)]
    fn pack(x: &[f32; 32], importance: Option<Importance<32>>, block: &mut [u8; 18]) {
        let (scale, codes) = symmetric(8, x, importance);
        put_half(block, 0, scale);
        put_nibbles(&codes, &mut block[2..]);
    }
}

pub(super) struct Q4_1;

impl Format<20, 32> for Q4_1 {
    const BITS: usize = 4;
    const MIN: bool = true;

    #[inline(always)]
    fn unpack(block: &[u8; 20], codes: &mut [u8; 32], groups: &mut Groups) {
        (groups.scales[0], groups.mins[0]) = (half(block, 0), half(block, 2));
        nibbles(&block[4..], codes);
    }

    #[inline(always)]
    fn pack(x: &[f32; 32], importance: Option<Importance<32>>, block: &mut [u8; 20]) {
        let (scale, min, codes) = with_minimum(15, x, importance);
        put_half(block, 0, scale);
        put_half(block, 2, min);
        put_nibbles(&codes, &mut block[4..]);
    }
}

pub(super) struct Q5_0;

impl Format<22, 32> for Q5_0 {
    const BITS: usize = 5;
    const OFFSET: i32 = 16;

    #[inline(always)]
    fn unpack(block: &[u8; 22], codes: &mut [u8; 32], groups: &mut Groups) {
        groups.scales[0] = half(block, 0);
        nibbles(&block[6..], codes);
        fifth_bits(&block[2..6], codes);
    }

    #[inline(always)]
    fn pack(x: &[f32; 32], importance: Option<Importance<32>>, block: &mut [u8; 22]) {
        let (scale, codes) = symmetric(16, x, importance);
        put_half(block, 0, scale);
        put_nibbles(&codes, &mut block[6..]);
        put_fifth_bits(&codes, &mut block[2..6]);
    }
}

pub(super) struct Q5_1;

impl Format<24, 32> for Q5_1 {
    const BITS: usize = 5;
    const MIN: bool = true;

    #[inline(always)]
    fn unpack(block: &[u8; 24], codes: &mut [u8; 32], groups: &mut Groups) {
        (groups.scales[0], groups.mins[0]) = (half(block, 0), half(block, 2));
        nibbles(&block[8..], codes);
        fifth_bits(&block[4..8], codes);
    }

    #[inline(always)]
    fn pack(x: &[f32; 32], importance: Option<Importance<32>>, block: &mut [u8; 24]) {
        let (scale, min, codes) = with_minimum(31, x, importance);
        put_half(block, 0, scale);
        put_half(block, 2, min);
        put_nibbles(&codes, &mut block[8..]);
        put_fifth_bits(&codes, &mut block[4..8]);
    }
}

pub(super) struct Q8_0;

impl Format<34, 32> for Q8_0 {
    const BITS: usize = 8;
    const OFFSET: i32 = 128;

    #[inline(always)]
    fn unpack(block: &[u8; 34], codes: &mut [u8; 32], groups: &mut Groups) {
        groups.scales[0] = half(block, 0);
        for (code, q) in codes.iter_mut().zip(&block[2..]) {
            *code = q ^ 0x80;
        }
    }

    #[inline(always)]
    fn pack(x: &[f32; 32], _: Option<Importance<32>>, block: &mut [u8; 34]) {
        let scale = fit::extreme(x).abs() / 127.0;
        let inverse = inverse(scale);
        put_half(block, 0, scale);
        for (q, x) in block[2..].iter_mut().zip(x) {
            *q = (x * inverse).round() as i8 as u8;
        }
    }
}

/// Low halves of 16 bytes, then high halves.
#[inline(always)]
pub(super) fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    for j in 0..16 {
        codes[j] = bytes[j] & 0xF;
        codes[j + 16] = bytes[j] >> 4;
    }
}

/// Adds the fifth bits of a block's values, value `j` at bit `j` of four bytes.
#[inline(always)]
fn fifth_bits(bytes: &[u8], codes: &mut [u8; 32]) {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (j, code) in codes.iter_mut().enumerate() {
        *code |= ((bits >> j & 1) << 4) as u8;
    }
}

/// The inverse of [`nibbles`], of the lower four bits of each code.
#[inline(always)]
pub(super) fn put_nibbles(codes: &[u8], bytes: &mut [u8]) {
    for j in 0..16 {
        bytes[j] = codes[j] & 0xF | codes[j + 16] << 4;
    }
}

/// The inverse of [`fifth_bits`].
#[inline(always)]
fn put_fifth_bits(codes: &[u8; 32], bytes: &mut [u8]) {
    let bit = |(j, code): (usize, &u8)| (u32::from(*code) >> 4 & 1) << j;
    let bits = codes.iter().enumerate().map(bit).fold(0, |all, bit| all | bit);
    bytes.copy_from_slice(&bits.to_le_bytes());
}

/// 0 for 0.
#[inline(always)]
pub(super) fn inverse(scale: f32) -> f32 {
    if scale != 0.0 { 1.0 / scale } else { 0.0 }
}

/// What errors weigh.
#[inline(always)]
fn weights(x: &[f32; 32], importance: Importance<32>) -> [f32; 32] {
    let mut weights = [0.0; 32];
    fit::weigh(x, importance.columns, importance.mean_square, &mut weights);
    weights
}

/// Scale and codes from 0 to `2 · half − 1`. Without importance, the largest value becomes the end of the range.
#[inline(always)]
fn symmetric(half: i32, x: &[f32; 32], importance: Option<Importance<32>>) -> (f32, [u8; 32]) {
    let mut codes = [0; 32];
    if let Some(importance) = importance {
        let scale = fit::symmetric(half, x, Some(&weights(x, importance)), &mut codes);
        return (scale, codes);
    }
    let scale = fit::extreme(x) / -half as f32;
    let inverse = inverse(scale);
    let most = (2 * half - 1) as u8;
    for (code, x) in codes.iter_mut().zip(x) {
        *code = ((x * inverse + (half as f32 + 0.5)) as u8).min(most);
    }
    (scale, codes)
}

/// Scale, minimum and codes from 0 to `most`. Without importance, the values' range becomes that of the codes.
#[inline(always)]
fn with_minimum(most: i32, x: &[f32; 32], importance: Option<Importance<32>>) -> (f32, f32, [u8; 32]) {
    let mut codes = [0; 32];
    if let Some(importance) = importance {
        let weights = weights(x, importance);
        let (scale, min) = fit::with_minimum(most, x, &weights, FINE, false, &mut codes);
        return (scale, -min, codes);
    }
    let (mut min, mut max) = (f32::MAX, f32::MIN);
    for x in x {
        if *x < min {
            min = *x;
        }
        if *x > max {
            max = *x;
        }
    }
    let scale = (max - min) / most as f32;
    let inverse = inverse(scale);
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (((x - min) * inverse + 0.5) as u8).min(most as u8);
    }
    (scale, min, codes)
}
