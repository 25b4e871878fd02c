//! Blocks of 32 values with one scale, and in the `_1` formats one minimum.

use super::{Format, Groups, half};

pub(super) struct Q4_0;

impl Format<18, 32> for Q4_0 {
    const BITS: usize = 4;
    const OFFSET: i32 = 8;

    #[inline(always)]
    fn unpack(block: &[u8; 18], codes: &mut [u8; 32], groups: &mut Groups) {
        groups.scales[0] = half(block, 0);
        nibbles(&block[2..], codes);
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
