//! Formats with a table of values, ternary formats, and microscaled floats.

use super::half;

const IQ4_VALUES: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

#[inline(always)]
pub(super) fn iq4_nl(block: &[u8; 18], y: &mut [f32; 32]) {
    let d = half(block, 0);
    for j in 0..16 {
        let q = usize::from(block[2 + j]);
        y[j] = d * IQ4_VALUES[q & 0xF];
        y[j + 16] = d * IQ4_VALUES[q >> 4];
    }
}

#[inline(always)]
pub(super) fn iq4_xs(block: &[u8; 136], y: &mut [f32; 256]) {
    let d = half(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    let (low, qs) = (&block[4..8], &block[8..136]);
    for group in 0..8 {
        let scale = u16::from(low[group / 2] >> (4 * (group % 2)) & 0xF) | (high >> (2 * group) & 3) << 4;
        let dl = d * (i32::from(scale) - 32) as f32;
        for j in 0..16 {
            let q = usize::from(qs[16 * group + j]);
            y[32 * group + j] = dl * IQ4_VALUES[q & 0xF];
            y[32 * group + 16 + j] = dl * IQ4_VALUES[q >> 4];
        }
    }
}

#[inline(always)]
pub(super) fn tq1_0(block: &[u8; 54], y: &mut [f32; 256]) {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let d = half(block, 52);
    // A byte holds five ternary digits as a fixed-point fraction: times 3^n, the next digit leads.
    let digit = |byte: u8, n: usize| {
        let q = byte.wrapping_mul(POWERS[n]);
        f32::from(((u16::from(q) * 3) >> 8) as i16 - 1) * d
    };
    for n in 0..5 {
        for m in 0..32 {
            y[32 * n + m] = digit(block[m], n);
        }
        for m in 0..16 {
            y[160 + 16 * n + m] = digit(block[32 + m], n);
        }
    }
    for n in 0..4 {
        for j in 0..4 {
            y[240 + 4 * n + j] = digit(block[48 + j], n);
        }
    }
}

#[inline(always)]
pub(super) fn tq2_0(block: &[u8; 66], y: &mut [f32; 256]) {
    let d = half(block, 64);
    for j in 0..2 {
        for l in 0..4 {
            for m in 0..32 {
                let q = block[32 * j + m] >> (2 * l) & 3;
                y[128 * j + 32 * l + m] = (i32::from(q) - 1) as f32 * d;
            }
        }
    }
}

/// Twice the values of FP4 (E2M1), which makes them whole.
const FP4_DOUBLED: [f32; 16] = [
    0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0,
];

#[inline(always)]
pub(super) fn mxfp4(block: &[u8; 17], y: &mut [f32; 32]) {
    // Half of 2^(e - 127), to undo the doubling; the two smallest exponents are subnormal.
    let exponent = u32::from(block[0]);
    let d = f32::from_bits(if exponent < 2 {
        0x0020_0000 << exponent
    } else {
        (exponent - 1) << 23
    });
    for j in 0..16 {
        let q = usize::from(block[1 + j]);
        y[j] = FP4_DOUBLED[q & 0xF] * d;
        y[j + 16] = FP4_DOUBLED[q >> 4] * d;
    }
}
