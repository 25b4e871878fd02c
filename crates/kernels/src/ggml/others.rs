//! Formats with a table of values, ternary formats, and microscaled floats.

use super::legacy::nibbles;
use super::{Format, Groups, half};

const IQ4_VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

pub(super) struct IQ4_NL;

impl Format<18, 32> for IQ4_NL {
    const BITS: usize = 4;
    const TABLE: Option<[i8; 16]> = Some(IQ4_VALUES);

    #[inline(always)]
    fn unpack(block: &[u8; 18], codes: &mut [u8; 32], groups: &mut Groups) {
        groups.scales[0] = half(block, 0);
        nibbles(&block[2..], codes);
    }
}

pub(super) struct IQ4_XS;

impl Format<136, 256> for IQ4_XS {
    const BITS: usize = 4;
    const TABLE: Option<[i8; 16]> = Some(IQ4_VALUES);

    #[inline(always)]
    fn unpack(block: &[u8; 136], codes: &mut [u8; 256], groups: &mut Groups) {
        let d = half(block, 0);
        let high = u16::from_le_bytes([block[2], block[3]]);
        let (low, qs) = (&block[4..8], &block[8..]);
        for group in 0..8 {
            let scale = u16::from(low[group / 2] >> (4 * (group % 2)) & 0xF) | (high >> (2 * group) & 3) << 4;
            groups.scales[group] = d * (i32::from(scale) - 32) as f32;
            nibbles(&qs[16 * group..], &mut codes[32 * group..]);
        }
    }
}

pub(super) struct TQ1_0;

impl Format<54, 256> for TQ1_0 {
    const BITS: usize = 2;
    const OFFSET: i32 = 1;

    #[inline(always)]
    fn unpack(block: &[u8; 54], codes: &mut [u8; 256], groups: &mut Groups) {
        const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
        groups.scales = [half(block, 52); 16];
        // A byte holds five ternary digits as a fixed-point fraction: times 3^n, the next digit leads.
        let digit = |byte: u8, n: usize| ((u16::from(byte.wrapping_mul(POWERS[n])) * 3) >> 8) as u8;
        for n in 0..5 {
            for m in 0..32 {
                codes[32 * n + m] = digit(block[m], n);
            }
            for m in 0..16 {
                codes[160 + 16 * n + m] = digit(block[32 + m], n);
            }
        }
        for n in 0..4 {
            for j in 0..4 {
                codes[240 + 4 * n + j] = digit(block[48 + j], n);
            }
        }
    }
}

pub(super) struct TQ2_0;

impl Format<66, 256> for TQ2_0 {
    const BITS: usize = 2;
    const OFFSET: i32 = 1;

    #[inline(always)]
    fn unpack(block: &[u8; 66], codes: &mut [u8; 256], groups: &mut Groups) {
        groups.scales = [half(block, 64); 16];
        for j in 0..2 {
            for l in 0..4 {
                for m in 0..32 {
                    codes[128 * j + 32 * l + m] = block[32 * j + m] >> (2 * l) & 3;
                }
            }
        }
    }
}

/// Twice the values of FP4 (E2M1), which makes them whole.
const FP4_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

pub(super) struct MXFP4;

impl Format<17, 32> for MXFP4 {
    const BITS: usize = 4;
    const TABLE: Option<[i8; 16]> = Some(FP4_DOUBLED);

    #[inline(always)]
    fn unpack(block: &[u8; 17], codes: &mut [u8; 32], groups: &mut Groups) {
        // Half of 2^(e - 127), to undo the doubling; the two smallest exponents are subnormal.
        let exponent = u32::from(block[0]);
        groups.scales[0] = f32::from_bits(if exponent < 2 {
            0x0020_0000 << exponent
        } else {
            (exponent - 1) << 23
        });
        nibbles(&block[1..], codes);
    }
}
