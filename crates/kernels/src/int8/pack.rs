//! From rows of codes to tiles.

use half::slice::HalfFloatSliceExt;

use super::codes::{Kind, Plan, ShiftKind, WIDE};
use super::{BLOCK, CodeRows, TILE, planes};

/// Codes and scales of a tile, on their way from rows to groups of rows.
#[derive(Default)]
pub(super) struct Scratch {
    /// As the rows are stored, `[rows, columns]`.
    stored: Vec<u8>,
    /// As tiles have them: `[TILE, 32 · blocks]`.
    codes: Vec<u8>,
    /// `[TILE, groups]`.
    scales: Vec<f32>,
    shifts: Vec<f32>,
}

impl Scratch {
    /// Regroups the rows of a tile.
    pub fn pack(
        &mut self,
        from: &dyn CodeRows,
        tile: usize,
        plan: &Plan,
        to: &mut [u8],
        factors: &mut [f32],
    ) {
        let [rows, cols] = from.shape();
        let (layout, rows) = (from.layout(), tile * TILE..rows.min((tile + 1) * TILE));
        let groups = layout.groups(cols);
        let shifts = if layout.has_shifts() { groups } else { 0 };
        let refill = |values: &mut Vec<f32>, len, value| {
            values.clear();
            values.resize(len, value);
        };
        refill(&mut self.scales, TILE * groups, 0.0);
        refill(&mut self.shifts, TILE * groups, plan.zero);
        self.stored.resize(rows.len() * cols, 0);
        let own = 0..rows.len() * groups;
        let (codes, scales) = (
            &mut self.stored[..rows.len() * cols],
            &mut self.scales[own.clone()],
        );
        from.unpack(
            rows.clone(),
            codes,
            scales,
            &mut self.shifts[..rows.len() * shifts],
        );
        let padded = plan.blocks * BLOCK;
        self.codes.clear();
        self.codes.resize(TILE * padded, 0);
        let [stored, filled] = plan.columns;
        for (to, from) in self
            .codes
            .chunks_exact_mut(padded.max(1))
            .zip(codes.chunks_exact(cols.max(1)))
        {
            for (to, from) in to.chunks_mut(filled).zip(from.chunks(stored)) {
                to[..from.len()].copy_from_slice(from);
            }
        }
        factors.fill(plan.unit);
        if plan.kind.group != WIDE {
            // Zero points are not scaled.
            let has_mins = plan.kind.shift == ShiftKind::Mins;
            let shifts = self.shifts.chunks_exact_mut(groups.max(1));
            let scales = self.scales.chunks_exact_mut(groups.max(1));
            for ((factor, scales), shifts) in factors.iter_mut().zip(scales).zip(shifts) {
                let mins = if has_mins { shifts } else { &mut [] };
                let power = power(scales.iter().chain(&*mins));
                *factor *= power;
                scales.iter_mut().chain(mins).for_each(|value| *value /= power);
            }
        }
        pulp::Arch::new().dispatch(Place {
            scratch: self,
            plan,
            groups,
            to,
        });
    }
}

/// Puts codes, scales and shifts in their places in a tile.
struct Place<'a> {
    scratch: &'a Scratch,
    plan: &'a Plan,
    groups: usize,
    to: &'a mut [u8],
}

impl pulp::WithSimd for Place<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self {
            scratch,
            plan,
            groups,
            to,
        } = self;
        let kind = plan.kind;
        let arrays = [
            Some(&scratch.scales),
            (kind.shift != ShiftKind::Offset).then_some(&scratch.shifts),
        ];
        let column = |array: &[f32], group: usize| -> [f32; TILE] {
            std::array::from_fn(|row| array[row * groups + group])
        };
        let mut rest = to;
        for block in 0..plan.blocks {
            if kind.group == WIDE && block % plan.group_blocks == 0 {
                let (head, tail) = rest.split_at_mut(kind.head_bytes());
                rest = tail;
                for (array, to) in arrays.iter().flatten().zip(head.chunks_exact_mut(4 * TILE)) {
                    let values = column(array, block / plan.group_blocks);
                    for (to, value) in to.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                        *to = value.to_le_bytes();
                    }
                }
            }
            let (codes, tail) = rest.split_at_mut(kind.code_bytes());
            let (halves, tail) = tail.split_at_mut(kind.block_bytes() - kind.code_bytes());
            rest = tail;
            let rows: [[u32; BLOCK / 4]; TILE] = std::array::from_fn(|row| {
                let from = &scratch.codes[(row * plan.blocks + block) * BLOCK..][..BLOCK];
                let from = from.as_chunks::<4>().0;
                std::array::from_fn(|step| u32::from_le_bytes(from[step]))
            });
            place_codes(&rows, kind, codes);
            if kind.group == WIDE {
                continue;
            }
            let per_block = BLOCK / kind.group;
            for (array, halves) in arrays
                .iter()
                .flatten()
                .zip(halves.chunks_exact_mut(2 * TILE * per_block))
            {
                for (part, halves) in halves.chunks_exact_mut(2 * TILE).enumerate() {
                    // The last half of a block may be empty.
                    let group = (block * BLOCK + part * kind.group) / plan.columns[1];
                    let values = column(array, group.min(groups - 1));
                    // Sixteen at once: one by one, each would ask what the processor can do.
                    let mut rounded = [half::f16::ZERO; TILE];
                    rounded.convert_from_f32_slice(&values);
                    for (half, rounded) in halves.as_chunks_mut::<2>().0.iter_mut().zip(rounded) {
                        *half = rounded.to_le_bytes();
                    }
                }
            }
        }
    }
}

/// The power of two by which the largest value comes close to the largest half float.
fn power<'a>(values: impl Iterator<Item = &'a f32>) -> f32 {
    let largest = values.fold(0.0f32, |most, value| most.max(value.abs()));
    if largest == 0.0 || !largest.is_finite() {
        return 1.0;
    }
    // Between 2^14 and 2^15 after the division; the inverse stays a normal number.
    let exponent = (largest.log2().floor() as i32 - 14).clamp(-126, 126);
    2f32.powi(exponent)
}

/// Cuts the codes of a block into planes of 8, 4, 2 or 1 bits. `rows` has four codes in each word. In a plane of
/// `b` bits, the byte of row `r` and column `4 s + c` is byte `4 r + c` of the 64 bytes numbered `s / (8 / b)`,
/// from bit `b (s mod (8 / b))` on.
#[inline(always)]
fn place_codes(rows: &[[u32; BLOCK / 4]; TILE], kind: Kind, to: &mut [u8]) {
    let (low, high) = to.split_at_mut(64 * planes(kind.bits)[0]);
    match planes(kind.bits) {
        [8, _] => plane::<8>(rows, 0, low),
        [4, 0] => plane::<4>(rows, 0, low),
        [4, 1] => (plane::<4>(rows, 0, low), plane::<1>(rows, 4, high)).1,
        [4, _] => (plane::<4>(rows, 0, low), plane::<2>(rows, 4, high)).1,
        [_, 0] => plane::<2>(rows, 0, low),
        _ => (plane::<2>(rows, 0, low), plane::<1>(rows, 2, high)).1,
    }
}

/// The plane of the bits from `shift` on.
#[inline(always)]
fn plane<const B: usize>(rows: &[[u32; BLOCK / 4]; TILE], shift: u32, to: &mut [u8]) {
    let mask = u32::from_le_bytes([((1u32 << B) - 1) as u8; 4]);
    for (vector, to) in to.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        for (row, to) in rows.iter().zip(to.as_chunks_mut::<4>().0) {
            let steps = &row[vector * (8 / B)..][..8 / B];
            // Four codes at once: what crosses from byte to byte is masked away.
            let parts = steps
                .iter()
                .enumerate()
                .map(|(step, four)| (four >> shift & mask) << (B * step));
            *to = parts.fold(0, |all, part| all | part).to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_of_any_size_fit() {
        for exponent in [-60, 0, 60] {
            let value = 2f32.powi(exponent);
            assert!((value / power([value].iter())).log2() >= 13.9);
            assert!(value / power([value].iter()) < 65504.0);
        }
        assert_eq!(power([0.0].iter()), 1.0);
    }
}
