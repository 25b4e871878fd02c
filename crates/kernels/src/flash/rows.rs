//! Where keys and values come from: f32 that are read where they lie, or what a cache keeps in fewer bits, which is
//! decoded a few rows at a time, into a tile that stays in the nearest cache of the processor.

use std::ops::Range;

use pulp::Simd;

use super::View;
use crate::cached::codes::{decode, widen, widen_all};
use crate::cached::{GroupAxis, RowFormat};

/// Keys or values `[batch, heads, rows, dim]`.
pub(crate) trait Rows: Sync {
    /// Whether rows are decoded to be read.
    const DECODED: bool;

    fn dims(&self) -> [usize; 4];

    /// Values that [`read`](Self::read) needs room for.
    fn room(&self, rows: usize) -> usize;

    /// Some rows of a sequence and a head, which may be decoded into `tile`.
    fn read<'t, S: Simd>(
        &'t self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        tile: &'t mut [f32],
    ) -> Lines<'t>;
}

/// Rows of f32, one at least.
#[derive(Clone, Copy)]
pub(crate) struct Lines<'a> {
    /// From the first row on.
    pub values: &'a [f32],
    /// From row to row.
    pub stride: usize,
    pub dim: usize,
    pub len: usize,
}

impl<'a> Lines<'a> {
    #[inline(always)]
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.values[row * self.stride..][..self.dim]
    }
}

impl Rows for View<'_> {
    const DECODED: bool = false;

    fn dims(&self) -> [usize; 4] {
        self.dims
    }

    fn room(&self, _: usize) -> usize {
        0
    }

    #[inline(always)]
    fn read<'t, S: Simd>(
        &'t self,
        _: S,
        [batch, head]: [usize; 2],
        rows: Range<usize>,
        _: &'t mut [f32],
    ) -> Lines<'t> {
        Lines {
            len: rows.len(),
            values: self.rows(batch, head, rows),
            stride: self.strides[2],
            dim: self.dims[3],
        }
    }
}

/// What a cache keeps in fewer bits.
pub(crate) enum Cached<'a> {
    /// In half precision.
    Half(View<'a, u16>),
    /// As codes, but for the last rows.
    Packed(Packed<'a>),
}

/// Codes of the first rows, and the last rows in half precision.
pub(crate) struct Packed<'a> {
    /// `[batch, heads, rows, bytes]`.
    pub codes: View<'a, u8>,
    /// `[batch, heads, blocks, dim]`, or `[batch, heads, rows, segments]` where groups lie within a row.
    pub scales: View<'a, u16>,
    /// Like the scales.
    pub minimums: View<'a, u16>,
    /// Where each block of rows ends.
    pub ends: &'a [usize],
    pub format: RowFormat,
    /// `[batch, heads, last rows, dim]`.
    pub recent: View<'a, u16>,
}

impl Rows for Cached<'_> {
    const DECODED: bool = true;

    fn dims(&self) -> [usize; 4] {
        match self {
            Self::Half(view) => view.dims,
            Self::Packed(packed) => {
                let [batch, heads, recent, dim] = packed.recent.dims;
                [batch, heads, packed.codes.dims[2] + recent, dim]
            }
        }
    }

    fn room(&self, rows: usize) -> usize {
        (rows + 2) * self.dims()[3]
    }

    #[inline(always)]
    fn read<'t, S: Simd>(
        &'t self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        tile: &'t mut [f32],
    ) -> Lines<'t> {
        let dim = self.dims()[3];
        let (tile, statistics) = tile.split_at_mut(rows.len() * dim);
        match self {
            Self::Half(view) => widen_rows(simd, view, at, rows.start, tile),
            Self::Packed(packed) => {
                let past = packed.codes.dims[2];
                let split = rows.start.max(past).min(rows.end);
                let (decoded, widened) = tile.split_at_mut((split - rows.start) * dim);
                if !decoded.is_empty() {
                    let old = rows.start..split;
                    // A loop for each number of bits.
                    match packed.format.bits as usize {
                        2 => packed.decode::<S, 2>(simd, at, old, decoded, statistics),
                        4 => packed.decode::<S, 4>(simd, at, old, decoded, statistics),
                        _ => packed.decode::<S, 8>(simd, at, old, decoded, statistics),
                    }
                }
                if !widened.is_empty() {
                    widen_rows(simd, &packed.recent, at, split - past, widened);
                }
            }
        }
        Lines {
            values: tile,
            stride: dim,
            dim,
            len: rows.len(),
        }
    }
}

/// The rows from `first` on that fill `tile`.
#[inline(always)]
fn widen_rows<S: Simd>(simd: S, view: &View<u16>, [batch, head]: [usize; 2], first: usize, tile: &mut [f32]) {
    for (i, out) in tile.chunks_exact_mut(view.dims[3].max(1)).enumerate() {
        widen_all(simd, view.row(batch, head, first + i), out);
    }
}

impl Packed<'_> {
    /// Decodes `rows` into `tile`, with room for two numbers per channel.
    #[inline(always)]
    fn decode<S: Simd, const BITS: usize>(
        &self,
        simd: S,
        [batch, head]: [usize; 2],
        rows: Range<usize>,
        tile: &mut [f32],
        room: &mut [f32],
    ) {
        let dim = self.recent.dims[3];
        match self.format.axis {
            GroupAxis::Channel => {
                let (scales, minimums) = room.split_at_mut(dim);
                let minimums = &mut minimums[..dim];
                let mut row = rows.start;
                let mut block = self.ends.partition_point(|end| *end <= row);
                while row < rows.end {
                    widen_all(simd, self.scales.row(batch, head, block), scales);
                    widen_all(simd, self.minimums.row(batch, head, block), minimums);
                    let end = self.ends[block].min(rows.end);
                    let tile = &mut tile[(row - rows.start) * dim..(end - rows.start) * dim];
                    for (i, out) in tile.chunks_exact_mut(dim).enumerate() {
                        let codes = self.codes.row(batch, head, row + i);
                        decode::<S, BITS, [&[f32]; 2]>(simd, codes, [&*scales, &*minimums], out);
                    }
                    row = end;
                    block += 1;
                }
            }
            GroupAxis::Token => {
                let (segment, bytes) = (self.format.segment(dim), 4 * self.format.segment_words(dim));
                for (i, out) in tile.chunks_exact_mut(dim).enumerate() {
                    let row = rows.start + i;
                    let scales = self.scales.row(batch, head, row);
                    let minimums = self.minimums.row(batch, head, row);
                    let codes = self.codes.row(batch, head, row);
                    for (group, out) in out.chunks_mut(segment).enumerate() {
                        let line = [widen(scales[group]), widen(minimums[group])];
                        decode::<S, BITS, [f32; 2]>(simd, &codes[group * bytes..][..bytes], line, out);
                    }
                }
            }
        }
    }
}
