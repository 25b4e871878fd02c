//! From tiles back to rows of codes.

use std::ops::Range;

use super::codes::{CodeRows, Plan, ShiftKind, WIDE};
use super::{BLOCK, CodeLayout, Int8Matrix, TILE, planes};

/// A matrix of which only what products need is held, as rows of codes again.
///
/// Codes are those that it was made of, and so are the scales, zero points and minimums of groups of 32 · n columns other than
/// 32; those of other groups are what [`Int8Matrix::from_codes`] rounded them to.
#[derive(Debug)]
pub struct Regrouped {
    int8: Int8Matrix,
    layout: CodeLayout,
    permutation: Option<Vec<u32>>,
}

impl Regrouped {
    /// Regroups codes.
    ///
    /// # Panics
    /// As [`Int8Matrix::from_codes`].
    pub fn new(rows: &dyn CodeRows) -> Self {
        Self {
            int8: Int8Matrix::from_codes(rows),
            layout: rows.layout(),
            permutation: rows.permutation().map(<[u32]>::to_vec),
        }
    }

    /// What is multiplied.
    pub fn int8(&self) -> &Int8Matrix {
        &self.int8
    }

    /// Bytes held in memory.
    pub fn num_bytes(&self) -> usize {
        self.int8.num_bytes() + 4 * self.permutation.as_ref().map_or(0, Vec::len)
    }
}

impl CodeRows for Regrouped {
    fn shape(&self) -> [usize; 2] {
        self.int8.shape()
    }

    fn layout(&self) -> CodeLayout {
        self.layout
    }

    fn permutation(&self) -> Option<&[u32]> {
        self.permutation.as_deref()
    }

    fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], shifts: &mut [f32]) {
        let (plan, cols) = (&self.int8.plan, self.int8.cols);
        let groups = self.layout.groups(cols);
        let tile_bytes = plan.tile_bytes();
        for (index, row) in rows.enumerate() {
            let (tile, lane) = (row / TILE, row % TILE);
            let from = Row {
                tile: &self.int8.data[tile * tile_bytes..][..tile_bytes],
                plan,
                lane,
                factor: self.int8.factors[row] / plan.unit,
            };
            let codes = &mut codes[index * cols..(index + 1) * cols];
            for column in 0..plan.blocks * BLOCK {
                if let Some(code) = plan.stored(column).and_then(|stored| codes.get_mut(stored)) {
                    *code = from.code(column);
                }
            }
            for group in 0..groups {
                let (scale, shift) = from.group(group * plan.columns[1]);
                scales[index * groups + group] = scale;
                if let Some(to) = shifts.get_mut(index * groups + group) {
                    *to = shift;
                }
            }
        }
    }
}

/// A row of a tile.
struct Row<'a> {
    tile: &'a [u8],
    plan: &'a Plan,
    lane: usize,
    /// What scales and minimums that are half floats are to be multiplied with.
    factor: f32,
}

impl Row<'_> {
    /// The first byte of the codes of the block of a column, and of the head of its wide group.
    fn places(&self, column: usize) -> (usize, usize) {
        let (plan, block) = (self.plan, column / BLOCK);
        let group = block / plan.group_blocks;
        let head = group * (plan.kind.head_bytes() + plan.group_blocks * plan.kind.block_bytes());
        let within = block % plan.group_blocks;
        (
            head + plan.kind.head_bytes() + within * plan.kind.block_bytes(),
            head,
        )
    }

    fn code(&self, column: usize) -> u8 {
        let (at, _) = self.places(column);
        let (step, byte) = (column % BLOCK / 4, 4 * self.lane + column % 4);
        let plane = |at: usize, bits: usize| {
            let steps = 8 / bits;
            let byte = self.tile[at + 64 * (step / steps) + byte];
            byte >> (bits * (step % steps)) & ((1u32 << bits) - 1) as u8
        };
        match planes(self.plan.kind.bits) {
            [low, 0] => plane(at, low),
            [low, high] => plane(at, low) | plane(at + 64 * low, high) << low,
        }
    }

    /// The scale of the group of a column, and its zero point or minimum.
    fn group(&self, column: usize) -> (f32, f32) {
        let kind = self.plan.kind;
        let (codes, head) = self.places(column);
        if kind.group == WIDE {
            let float = |array: usize| {
                let at = head + 4 * (array * TILE + self.lane);
                self.tile.get(at..at + 4).map_or(0.0, |bytes| {
                    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
                })
            };
            let shift = match kind.shift {
                ShiftKind::Offset => 0.0,
                _ => float(1),
            };
            return (float(0), shift);
        }
        let half = |array: usize| {
            let groups = BLOCK / kind.group;
            let part = column % BLOCK / kind.group;
            let at = codes + kind.code_bytes() + 2 * ((array * groups + part) * TILE + self.lane);
            half::f16::from_le_bytes([self.tile[at], self.tile[at + 1]]).to_f32()
        };
        let shift = match kind.shift {
            ShiftKind::Offset => 0.0,
            ShiftKind::Zeros => half(1),
            ShiftKind::Mins => half(1) * self.factor,
        };
        (half(0) * self.factor, shift)
    }
}
