//! Formats with a table of values, ternary formats, and microscaled floats.

use super::fit::{self, EPSILON, nearest};
use super::legacy::{inverse, nibbles, put_nibbles};
use super::{Format, Groups, Importance, half, put_half};

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

    #[inline(always)]
    fn pack(x: &[f32; 32], importance: Option<Importance<32>>, block: &mut [u8; 18]) {
        let mean_square = fit::square_sum(x) * (2.0 / 32.0);
        let columns = importance.map(|importance| &importance.columns[..]);
        let scale = fit_table(x, columns, mean_square);
        put_half(block, 0, scale);
        let inverse = inverse(scale);
        put_nibbles(&x.map(|x| iq4_code(inverse * x)), &mut block[2..]);
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

    #[inline(always)]
    fn pack(x: &[f32; 256], importance: Option<Importance<256>>, block: &mut [u8; 136]) {
        let mean_square = fit::square_sum(x) * (2.0 / 256.0);
        let groups = x.as_chunks::<32>().0;
        let mut scales = [0.0; 8];
        for (j, (scale, x)) in scales.iter_mut().zip(groups).enumerate() {
            let columns = importance.map(|importance| &importance.columns[32 * j..32 * j + 32]);
            *scale = fit_table(x, columns, mean_square);
        }
        let d = -fit::extreme(&scales) / 32.0;
        put_half(block, 0, d);
        block[2..8].fill(0);
        let mut high = 0u16;
        for (j, x) in groups.iter().enumerate() {
            let stored = nearest(inverse(d) * scales[j]).clamp(-32, 31);
            let inverse = inverse(d * stored as f32);
            put_nibbles(&x.map(|x| iq4_code(inverse * x)), &mut block[8 + 16 * j..]);
            let stored = (stored + 32) as u8;
            block[4 + j / 2] |= (stored & 0xF) << (4 * (j % 2));
            high |= u16::from(stored >> 4) << (2 * j);
        }
        block[2..4].copy_from_slice(&high.to_le_bytes());
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

    #[inline(always)]
    fn pack(x: &[f32; 256], _: Option<Importance<256>>, block: &mut [u8; 54]) {
        let codes = ternary(x, &mut block[52..]);
        // Five ternary digits as a fixed-point fraction of 256, rounded up.
        let byte = |start: usize, step: usize, digits: usize| {
            let value = (0..5).fold(0u16, |value, n| {
                let digit = if n < digits { codes[start + step * n] } else { 0 };
                3 * value + u16::from(digit)
            });
            (value * 256).div_ceil(243) as u8
        };
        for (m, to) in block.iter_mut().enumerate().take(52) {
            *to = match m {
                0..32 => byte(m, 32, 5),
                32..48 => byte(128 + m, 16, 5),
                _ => byte(192 + m, 4, 4),
            };
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

    #[inline(always)]
    fn pack(x: &[f32; 256], _: Option<Importance<256>>, block: &mut [u8; 66]) {
        let codes = ternary(x, &mut block[64..]);
        for j in 0..2 {
            for m in 0..32 {
                let code = |l: usize| codes[128 * j + 32 * l + m] << (2 * l);
                block[32 * j + m] = code(0) | code(1) | code(2) | code(3);
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
        groups.scales[0] = mxfp4_scale(block[0]);
        nibbles(&block[1..], codes);
    }

    #[inline(always)]
    fn pack(x: &[f32; 32], _: Option<Importance<32>>, block: &mut [u8; 17]) {
        let largest = fit::extreme(x).abs();
        // The largest value of FP4 is 1.5 · 2².
        block[0] = if largest > 0.0 {
            (largest.log2().floor() - 2.0 + 127.0) as u8
        } else {
            0
        };
        let scale = mxfp4_scale(block[0]);
        let code = |x: f32| {
            let (mut found, mut best) = (0, f32::INFINITY);
            for (code, value) in (0..).zip(FP4_DOUBLED) {
                let error = (f32::from(value) * scale - x).abs();
                if error < best {
                    (found, best) = (code, error);
                }
            }
            found
        };
        put_nibbles(&x.map(code), &mut block[1..]);
    }
}

/// Half of 2^(e - 127), to undo the doubling; the two smallest exponents are subnormal.
#[inline(always)]
fn mxfp4_scale(exponent: u8) -> f32 {
    let exponent = u32::from(exponent);
    f32::from_bits(if exponent < 2 {
        0x0020_0000 << exponent
    } else {
        (exponent - 1) << 23
    })
}

/// The code of the value of [`IQ4_VALUES`] that is nearest; half-way, the larger one.
#[inline(always)]
fn iq4_code(x: f32) -> u8 {
    let above = |pair: &[i8]| x + x >= f32::from(i16::from(pair[0]) + i16::from(pair[1]));
    IQ4_VALUES.windows(2).map(|pair| u8::from(above(pair))).sum()
}

/// A scale for `x ≈ scale · value`, with values of [`IQ4_VALUES`]: scales around the one that takes the largest
/// value to the end of the table are tried. Without importance, values weigh their squares.
#[inline(always)]
fn fit_table(x: &[f32; 32], importance: Option<&[f32]>, mean_square: f32) -> f32 {
    const TRIES: i32 = 7;
    let first = i32::from(IQ4_VALUES[0]);
    let mut weights = x.map(|x| x * x);
    if let Some(importance) = importance {
        fit::weigh(x, importance, mean_square, &mut weights);
    }
    let largest = fit::extreme(x);
    if largest.abs() < EPSILON {
        return 0.0;
    }
    let sums = |inverse: f32| {
        let (mut products, mut squares) = (0.0f32, 0.0f32);
        for (x, weight) in x.iter().zip(&weights) {
            let value = f32::from(IQ4_VALUES[usize::from(iq4_code(inverse * x))]);
            products += weight * value * x;
            squares += weight * value * value;
        }
        (products, squares)
    };
    let (products, squares) = sums(1.0 / (-largest / first as f32));
    let mut scale = if squares > 0.0 { products / squares } else { 0.0 };
    let mut best = scale * products;
    for step in -TRIES..=TRIES {
        let (products, squares) = sums((step + first) as f32 / largest);
        if squares > 0.0 && products * products > best * squares {
            scale = products / squares;
            best = scale * products;
        }
    }
    scale
}

/// Codes 0, 1 and 2 for -1, 0 and 1 times the largest magnitude, which is stored.
#[inline(always)]
fn ternary(x: &[f32; 256], scale: &mut [u8]) -> [u8; 256] {
    let largest = fit::extreme(x).abs();
    put_half(scale, 0, largest);
    let inverse = inverse(largest);
    x.map(|x| ((x * inverse).round() as i32 + 1) as u8)
}
