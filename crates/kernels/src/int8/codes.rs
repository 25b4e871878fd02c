//! Codes as quantization schemes store them, and the plan by which kernels take them.

use std::fmt::Debug;
use std::ops::Range;

use super::{BLOCK, TILE};

/// Rows of codes, as a quantization scheme stores them.
///
/// Implementations check what they are made of: [`unpack`](Self::unpack) cannot fail.
pub trait CodeRows: Debug + Send + Sync {
    /// `[out_features, in_features]`, any sizes.
    fn shape(&self) -> [usize; 2];

    /// What codes stand for.
    fn layout(&self) -> CodeLayout;

    /// Writes the codes of `rows`, one byte each below `2^bits`, to `codes` `[rows.len(), in_features]`, and for every
    /// group of columns its scale to `scales` and what [`CodeLayout::shift`] names to `shifts`, both
    /// `[rows.len(), groups]` with `in_features / group` groups, rounded up. `shifts` is empty where groups have none.
    fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], shifts: &mut [f32]);

    /// The input column of each position of [`unpack`](Self::unpack)'s rows, where they are not in the order of the
    /// input: a permutation of `0..in_features`.
    fn permutation(&self) -> Option<&[u32]> {
        None
    }

    /// Is told what has been regrouped and will hardly be read again.
    fn release(&self, _rows: Range<usize>) {}
}

/// What the codes of a matrix stand for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CodeLayout {
    /// Bits of a code, 1 to 8.
    pub bits: usize,
    /// Columns that share a scale: any number, [`usize::MAX`] for whole rows. The last group of a row may be shorter.
    pub group: usize,
    /// What is taken from codes.
    pub shift: Shift,
    /// What codes of up to 4 bits stand for, where they are no numbers: a value is `scale · table[code]`.
    ///
    /// Tables that are whole multiples of one number, up to 127 of it, are multiplied exactly; values of others are
    /// rounded to 14 bits, which changes none by more than two parts in 10⁴.
    pub table: Option<&'static [f32; 16]>,
}

/// How a code becomes a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shift {
    /// `scale · (code − offset)`, with the same offset everywhere.
    Offset(i32),
    /// `scale · (code − zero)`, with a zero point for each group, whole or not.
    Zeros,
    /// `scale · code + min`, with a minimum for each group.
    Mins,
}

impl CodeLayout {
    /// Number of groups in rows of so many columns.
    pub fn groups(&self, in_features: usize) -> usize {
        in_features.div_ceil(self.group.max(1))
    }

    /// Whether [`CodeRows::unpack`] writes shifts.
    pub fn has_shifts(&self) -> bool {
        self.table.is_none() && !matches!(self.shift, Shift::Offset(_))
    }
}

/// Columns of a group that spans whole blocks.
pub(super) const WIDE: usize = 0;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind {
    /// Bits of a code: 2, 3, 4, 5, 6 or 8.
    pub bits: usize,
    /// Columns of a group: 16, 32, or several blocks ([`WIDE`]).
    pub group: usize,
    pub shift: ShiftKind,
    /// Tables of bytes: none, one, or one for the high and one for the low parts of values.
    pub tables: usize,
}

/// [`Shift`], for all matrices alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ShiftKind {
    Offset,
    Zeros,
    Mins,
}

/// A [`Kind`] that the compiler knows.
pub(super) trait Shape {
    const KIND: Kind;

    /// Groups in a block.
    const GROUPS: usize = if Self::KIND.group == 16 { 2 } else { 1 };
    /// Bytes of a block's codes.
    const CODE_BYTES: usize = Self::KIND.code_bytes();
    /// Bytes of what lies before the codes of a wide group.
    const HEAD_BYTES: usize = Self::KIND.head_bytes();
    /// Bytes of a block, codes and scales.
    const BLOCK_BYTES: usize = Self::KIND.block_bytes();
}

impl Kind {
    pub const fn code_bytes(self) -> usize {
        TILE * BLOCK / 8 * self.bits
    }

    /// Scales, and shifts if any.
    const fn arrays(self) -> usize {
        if matches!(self.shift, ShiftKind::Offset) {
            1
        } else {
            2
        }
    }

    pub const fn head_bytes(self) -> usize {
        if self.group == WIDE {
            4 * TILE * self.arrays()
        } else {
            0
        }
    }

    pub const fn block_bytes(self) -> usize {
        match self.group {
            WIDE => self.code_bytes(),
            group => self.code_bytes() + 2 * TILE * (BLOCK / group) * self.arrays(),
        }
    }
}

/// How the codes of a matrix lie in a tile.
///
/// Rows begin with a group and have no gaps, but that groups of a size that 16 does not divide are filled up, and so is
/// the last block.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub kind: Kind,
    /// What is taken from codes, or from the first table.
    pub offset: i32,
    /// What takes the place of zero points where the codes come without.
    pub zero: f32,
    /// See [`Kind::tables`]: a value is `128 · (high − 128) + low`, or `high − 128` if there is one table.
    pub tables: [[u8; 16]; 2],
    /// What a table's number 1 stands for.
    pub unit: f32,
    /// Blocks in a row.
    pub blocks: usize,
    /// Blocks in a wide group; the last group may have fewer.
    pub group_blocks: usize,
    /// Columns of a group, as it is stored and in a tile.
    pub columns: [usize; 2],
}

impl Plan {
    /// `known` lists the kinds that there are kernels for, those with fewer bits first.
    pub fn new(layout: CodeLayout, in_features: usize, known: &[Kind]) -> Option<Self> {
        let group = layout.group.clamp(1, in_features.max(1));
        let whole_row = group == in_features.max(1);
        let filled = match group {
            // A single group may end anywhere.
            _ if whole_row => group.next_multiple_of(BLOCK),
            _ => group.next_multiple_of(TILE),
        };
        let padded = in_features / group * filled + in_features % group;
        let (tables, unit) = match layout.table {
            Some(table) => {
                let (tables, unit) = Tables::new(table);
                (Some(tables), unit)
            }
            None => (None, 1.0),
        };
        let (shift, offset) = match layout.shift {
            _ if tables.is_some() => (ShiftKind::Offset, 128),
            Shift::Offset(offset) => (ShiftKind::Offset, offset),
            Shift::Zeros => (ShiftKind::Zeros, 0),
            Shift::Mins => (ShiftKind::Mins, 0),
        };
        let wanted = Kind {
            bits: layout.bits,
            group: match filled {
                BLOCK => BLOCK,
                filled if filled.is_multiple_of(BLOCK) => WIDE,
                _ => 16,
            },
            shift,
            tables: tables.as_ref().map_or(0, Tables::count),
        };
        // Codes with more room than they need; and one offset for all is a zero point as well as another, where what is
        // left after it does not fit a signed byte, too.
        let fits = |kind: &&Kind| {
            let Kind { group, tables, .. } = wanted;
            kind.bits >= wanted.bits && kind.group == group && kind.tables == tables
        };
        let mut fitting = known.iter().filter(fits);
        let signed = (1 << layout.bits) - 128..=128;
        let same = |kind: &&Kind| {
            kind.shift == wanted.shift && (shift != ShiftKind::Offset || signed.contains(&offset))
        };
        let zeros = |kind: &&Kind| shift == ShiftKind::Offset && kind.shift == ShiftKind::Zeros;
        let kind = fitting.clone().find(same).or_else(|| fitting.find(zeros))?;
        let (offset, zero) = if kind.shift == shift {
            (offset, 0.0)
        } else {
            (0, offset as f32)
        };
        Some(Self {
            kind: *kind,
            offset,
            zero,
            tables: tables.map_or([[0; 16]; 2], |tables| tables.0),
            unit,
            blocks: padded.div_ceil(BLOCK),
            group_blocks: if kind.group == WIDE { filled / BLOCK } else { 1 },
            columns: [group, filled],
        })
    }

    /// Bytes of a tile.
    pub fn tile_bytes(&self) -> usize {
        self.blocks * self.kind.block_bytes()
            + self.blocks.div_ceil(self.group_blocks) * self.kind.head_bytes()
    }

    /// Whether columns of tiles are those that are stored, but for some at the end.
    pub fn is_in_order(&self) -> bool {
        self.columns[0] == self.columns[1] || self.blocks * BLOCK <= self.columns[1]
    }

    /// The stored column of a column of a tile.
    pub fn stored(&self, column: usize) -> Option<usize> {
        let [stored, filled] = self.columns;
        let (group, column) = (column / filled, column % filled);
        (column < stored).then_some(group * stored + column)
    }
}

/// Values of a table as bytes: see [`Plan::tables`].
struct Tables([[u8; 16]; 2]);

impl Tables {
    /// The tables, and what the number 1 in them stands for.
    fn new(values: &[f32; 16]) -> (Self, f32) {
        let largest = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        if largest == 0.0 || !largest.is_finite() {
            return (Self([[128; 16], [0; 16]]), largest);
        }
        // The largest value becomes the number `most`.
        let rounded =
            |value: f32, most: u32| (f64::from(value) / f64::from(largest) * f64::from(most)).round();
        let error = |most: u32| {
            let each = values.iter().filter(|value| **value != 0.0).map(|value| {
                let exact = f64::from(*value) / f64::from(largest) * f64::from(most);
                (exact.round() / exact - 1.0).abs()
            });
            each.fold(0.0, f64::max)
        };
        let best = |mut range: Range<u32>| -> (u32, f64) {
            let first = range.next().unwrap_or(1);
            range.fold((first, error(first)), |(best, least), most| match error(most) {
                error if error < least => (most, error),
                _ => (best, least),
            })
        };
        // What is left is the rounding of the table itself.
        let (most, tables) = match best(1..128) {
            (most, error) if error < 1e-6 => {
                let high = values.map(|value| (rounded(value, most) as i32 + 128) as u8);
                (most, [high, [0; 16]])
            }
            _ => {
                // Sums of 16 products with activations of 15 bits fit 32 bits.
                let (most, _) = best(4 * 1024..8 * 1024);
                let whole = values.map(|value| rounded(value, most) as i32 + (128 << 7));
                (
                    most,
                    [
                        whole.map(|whole| (whole >> 7) as u8),
                        whole.map(|whole| (whole & 127) as u8),
                    ],
                )
            }
        };
        (Self(tables), (f64::from(largest) / f64::from(most)) as f32)
    }

    fn count(&self) -> usize {
        if self.0[1] == [0; 16] { 1 } else { 2 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_close() {
        const NORMAL: [f32; 16] = [
            -1.0,
            -0.696_192_8,
            -0.525_073_05,
            -0.394_917_5,
            -0.284_441_38,
            -0.184_773_43,
            -0.091_050_036,
            0.0,
            0.079_580_3,
            0.160_930_2,
            0.246_112_3,
            0.337_915_24,
            0.440_709_83,
            0.562_617,
            0.722_956_84,
            1.0,
        ];
        let sixths = [0.0, 1.0 / 192.0, 2.0 / 3.0, 1.0, 1.0 / 3.0, 0.5, 1.0 / 6.0, 0.25]
            .map(|value: f32| [value, -value]);
        let fourths = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0].map(|value: f32| [value, -value]);
        let flat = |pairs: [[f32; 2]; 8]| std::array::from_fn(|at| pairs[at / 2][at % 2]);
        for (values, count, limit) in [
            (NORMAL, 2, 2e-4),
            (flat(sixths), 2, 1e-6),
            (flat(fourths), 1, 0.0),
        ] {
            let (tables, unit) = Tables::new(&values);
            assert_eq!(tables.count(), count);
            for (at, value) in values.iter().enumerate() {
                let high = i32::from(tables.0[0][at]) - 128;
                let whole = if count == 1 {
                    high
                } else {
                    128 * high + i32::from(tables.0[1][at])
                };
                let found = whole as f32 * unit;
                assert!((found - value).abs() <= limit * value.abs(), "{found} {value}");
            }
        }
    }
}
