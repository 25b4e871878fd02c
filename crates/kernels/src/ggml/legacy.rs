//! Blocks of 32 values with one scale, and in the `_1` formats one minimum.

use super::half;

#[inline(always)]
pub(super) fn q4_0(block: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(block, 0);
    for j in 0..16 {
        let q = block[2 + j];
        y[j] = (i32::from(q & 0xF) - 8) as f32 * d;
        y[j + 16] = (i32::from(q >> 4) - 8) as f32 * d;
    }
}

#[inline(always)]
pub(super) fn q4_1(block: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for j in 0..16 {
        let q = block[4 + j];
        y[j] = f32::from(q & 0xF) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The fifth bits of a block's values, value `j` at bit `j`.
#[inline(always)]
fn fifth_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

#[inline(always)]
pub(super) fn q5_0(block: &[u8; 22], y: &mut [f32; 32]) {
    let d = half(block, 0);
    let high = fifth_bits(block, 2);
    for j in 0..16 {
        let q = u32::from(block[6 + j]);
        y[j] = ((q & 0xF | (high >> j & 1) << 4) as i32 - 16) as f32 * d;
        y[j + 16] = ((q >> 4 | (high >> (j + 16) & 1) << 4) as i32 - 16) as f32 * d;
    }
}

#[inline(always)]
pub(super) fn q5_1(block: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let high = fifth_bits(block, 4);
    for j in 0..16 {
        let q = u32::from(block[8 + j]);
        y[j] = (q & 0xF | (high >> j & 1) << 4) as f32 * d + m;
        y[j + 16] = (q >> 4 | (high >> (j + 16) & 1) << 4) as f32 * d + m;
    }
}

#[inline(always)]
pub(super) fn q8_0(block: &[u8; 34], y: &mut [f32; 32]) {
    let d = half(block, 0);
    for j in 0..32 {
        y[j] = f32::from(block[2 + j] as i8) * d;
    }
}
