//! Where keys and values come from: f32 that are read where they lie, or what a cache keeps in fewer bits. For few queries
//! codes are multiplied as they come, scales and minimums being taken into the queries, the weights or the results; for
//! many they are decoded, a block of rows at a time, into a tile that stays in a near cache of the processor.

use std::ops::Range;

use pulp::Simd;

use super::{FEW, KEYS, View, few_scores, few_sums, load};
use crate::cached::codes::{decode, load_codes, load_halves, widen, widen_all};
use crate::cached::{GroupAxis, RowFormat};

/// Keys or values `[batch, heads, rows, dim]`.
pub(crate) trait Rows: Sync {
    fn dims(&self) -> [usize; 4];

    /// Values that methods need room for, besides others: for so many queries and [`KEYS`] rows.
    fn room(&self, queries: usize) -> usize;

    /// Some rows of a sequence and a head, which may be decoded into `tile`.
    fn read<'t, S: Simd>(
        &'t self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        tile: &'t mut [f32],
    ) -> Lines<'t>;

    /// `scores[query, j] = q[query] · rows[j]` of up to [`FEW`] queries; scores are [`KEYS`] apart.
    fn few_scores<S: Simd>(
        &self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        q: &[f32],
        scores: &mut [f32],
        room: &mut [f32],
    );

    /// `sums[query] += Σⱼ weights[query, j] · rows[j]` for up to [`FEW`] queries; weights are [`KEYS`] apart.
    fn few_sums<S: Simd>(
        &self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        weights: &[f32],
        sums: &mut [f32],
        room: &mut [f32],
    );
}

/// Rows of numbers as vectors: `P` parts of [`width`](Self::width) values each, of which vectors at the same place are
/// loaded together.
pub(super) trait Vectors<const P: usize>: Copy {
    /// What a row is stored as: one for each place of its parts.
    type Stored;

    /// Rows.
    fn len(self) -> usize;

    /// Values of a part.
    fn width(self) -> usize;

    /// A row, of as many places as parts have values.
    fn row<'a>(self, row: usize) -> &'a [Self::Stored]
    where
        Self: 'a;

    /// The vectors of the parts of as many places as a vector has values, or of fewer, filled up with zeros.
    fn load<S: Simd>(simd: S, places: &[Self::Stored]) -> [S::f32s; P];
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

impl Vectors<1> for Lines<'_> {
    type Stored = f32;

    #[inline(always)]
    fn len(self) -> usize {
        self.len
    }

    #[inline(always)]
    fn width(self) -> usize {
        self.dim
    }

    #[inline(always)]
    fn row<'a>(self, row: usize) -> &'a [f32]
    where
        Self: 'a,
    {
        &self.values[row * self.stride..][..self.dim]
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, places: &[f32]) -> [S::f32s; 1] {
        [load(simd, places)]
    }
}

/// Rows of a sequence and a head, in half precision.
#[derive(Clone, Copy)]
struct Halves<'a> {
    /// From the first row on.
    values: &'a [u16],
    stride: usize,
    dim: usize,
    len: usize,
}

impl<'a> Halves<'a> {
    #[inline(always)]
    fn new(view: &View<'a, u16>, [batch, head]: [usize; 2], rows: Range<usize>) -> Self {
        Self {
            len: rows.len(),
            values: view.rows(batch, head, rows),
            stride: view.strides[2],
            dim: view.dims[3],
        }
    }
}

impl Vectors<1> for Halves<'_> {
    type Stored = u16;

    #[inline(always)]
    fn len(self) -> usize {
        self.len
    }

    #[inline(always)]
    fn width(self) -> usize {
        self.dim
    }

    #[inline(always)]
    fn row<'a>(self, row: usize) -> &'a [u16]
    where
        Self: 'a,
    {
        &self.values[row * self.stride..][..self.dim]
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, places: &[u16]) -> [S::f32s; 1] {
        [load_halves(simd, places)]
    }
}

/// A segment of the rows of a sequence and a head, in codes of which a byte has `P`: the codes alone.
#[derive(Clone, Copy)]
struct Codes<'a, const P: usize> {
    /// From the segment of the first row on.
    bytes: &'a [u8],
    stride: usize,
    /// Bytes of the segment.
    width: usize,
    len: usize,
}

impl<const P: usize> Vectors<P> for Codes<'_, P> {
    type Stored = u8;

    #[inline(always)]
    fn len(self) -> usize {
        self.len
    }

    #[inline(always)]
    fn width(self) -> usize {
        self.width
    }

    #[inline(always)]
    fn row<'a>(self, row: usize) -> &'a [u8]
    where
        Self: 'a,
    {
        &self.bytes[row * self.stride..][..self.width]
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, places: &[u8]) -> [S::f32s; P] {
        load_codes(simd, places)
    }
}

impl Rows for View<'_> {
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

    #[inline(always)]
    fn few_scores<S: Simd>(
        &self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        q: &[f32],
        scores: &mut [f32],
        room: &mut [f32],
    ) {
        let queries = q.len() / self.dims[3].max(1);
        few_scores(simd, q, queries, self.read(simd, at, rows, room), scores);
    }

    #[inline(always)]
    fn few_sums<S: Simd>(
        &self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        weights: &[f32],
        sums: &mut [f32],
        room: &mut [f32],
    ) {
        let queries = sums.len() / self.dims[3].max(1);
        few_sums(simd, weights, queries, self.read(simd, at, rows, room), sums);
    }
}

/// What a cache keeps in fewer bits: parts, the rows of one after those of another.
pub(crate) struct Cached<'a>(pub Vec<Part<'a>>);

/// Some of its rows.
pub(crate) enum Part<'a> {
    /// In half precision.
    Half(View<'a, u16>),
    /// As codes.
    Packed(Packed<'a>),
}

/// Rows as codes.
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
    /// Values of a row.
    pub dim: usize,
}

impl Part<'_> {
    fn dims(&self) -> [usize; 4] {
        match self {
            Self::Half(view) => view.dims,
            Self::Packed(packed) => {
                let [batch, heads, rows, _] = packed.codes.dims;
                [batch, heads, rows, packed.dim]
            }
        }
    }
}

impl<'a> Cached<'a> {
    /// The parts that hold some of `rows`: which of their own rows these are, and how many of `rows` stand before them.
    #[inline(always)]
    fn parts(&self, rows: Range<usize>) -> impl Iterator<Item = (&Part<'a>, Range<usize>, usize)> {
        let mut first = 0;
        self.0.iter().filter_map(move |part| {
            let own = first..first + part.dims()[2];
            first = own.end;
            let held = rows.start.max(own.start)..rows.end.min(own.end);
            let seen = held.start.saturating_sub(rows.start);
            (!held.is_empty()).then(|| (part, held.start - own.start..held.end - own.start, seen))
        })
    }
}

impl Rows for Cached<'_> {
    fn dims(&self) -> [usize; 4] {
        let mut dims = self.0.first().map_or([0; 4], Part::dims);
        dims[2] = self.0.iter().map(|part| part.dims()[2]).sum();
        dims
    }

    fn room(&self, queries: usize) -> usize {
        let dim = self.dims()[3];
        if queries > FEW {
            return (KEYS + 2) * dim;
        }
        let room = |part: &Part| match part {
            Part::Half(_) => 0,
            Part::Packed(packed) => queries * (KEYS + packed.padded()) + 2 * KEYS.max(dim),
        };
        self.0.iter().map(room).max().unwrap_or(0)
    }

    #[inline(always)]
    fn read<'t, S: Simd>(
        &'t self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        tile: &'t mut [f32],
    ) -> Lines<'t> {
        let (dim, len) = (self.dims()[3], rows.len());
        let (tile, statistics) = tile.split_at_mut(len * dim);
        for (part, rows, seen) in self.parts(rows) {
            let tile = &mut tile[seen * dim..][..rows.len() * dim];
            match part {
                Part::Half(view) => widen_rows(simd, view, at, rows.start, tile),
                // A loop for each number of bits.
                Part::Packed(packed) => match packed.format.bits as usize {
                    2 => packed.decode::<S, 2>(simd, at, rows, tile, statistics),
                    4 => packed.decode::<S, 4>(simd, at, rows, tile, statistics),
                    _ => packed.decode::<S, 8>(simd, at, rows, tile, statistics),
                },
            }
        }
        Lines {
            values: tile,
            stride: dim,
            dim,
            len,
        }
    }

    #[inline(always)]
    fn few_scores<S: Simd>(
        &self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        q: &[f32],
        scores: &mut [f32],
        room: &mut [f32],
    ) {
        let queries = q.len() / self.dims()[3].max(1);
        for (part, rows, seen) in self.parts(rows) {
            let scores = &mut scores[seen..];
            match part {
                Part::Half(view) => few_scores(simd, q, queries, Halves::new(view, at, rows), scores),
                // A loop for each number of bits.
                Part::Packed(packed) => match packed.format.bits as usize {
                    2 => packed.few_scores::<S, 4>(simd, at, rows, q, scores, room),
                    4 => packed.few_scores::<S, 2>(simd, at, rows, q, scores, room),
                    _ => packed.few_scores::<S, 1>(simd, at, rows, q, scores, room),
                },
            }
        }
    }

    #[inline(always)]
    fn few_sums<S: Simd>(
        &self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        weights: &[f32],
        sums: &mut [f32],
        room: &mut [f32],
    ) {
        let queries = sums.len() / self.dims()[3].max(1);
        for (part, rows, seen) in self.parts(rows) {
            let weights = &weights[seen..];
            match part {
                Part::Half(view) => few_sums(simd, weights, queries, Halves::new(view, at, rows), sums),
                Part::Packed(packed) => match packed.format.bits as usize {
                    2 => packed.few_sums::<S, 4>(simd, at, rows, weights, sums, room),
                    4 => packed.few_sums::<S, 2>(simd, at, rows, weights, sums, room),
                    _ => packed.few_sums::<S, 1>(simd, at, rows, weights, sums, room),
                },
            }
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
    /// Most values of a segment, filled up to whole words.
    fn padded(&self) -> usize {
        self.format.segment_words(self.dim) * 32 / self.format.bits as usize
    }

    /// The codes of a segment of `rows`.
    #[inline(always)]
    fn segment<const P: usize>(
        &self,
        [batch, head]: [usize; 2],
        rows: Range<usize>,
        segment: usize,
    ) -> Codes<'_, P> {
        let width = 4 * self.format.segment_words(self.dim);
        Codes {
            len: rows.len(),
            bytes: &self.codes.rows(batch, head, rows)[segment * width..],
            stride: self.codes.strides[2],
            width,
        }
    }

    /// The number of the block of a row, and where the block ends, or `end` if that comes first.
    #[inline(always)]
    fn block_end(&self, row: usize, end: usize) -> (usize, usize) {
        let block = self.ends.partition_point(|end| *end <= row);
        (block, self.ends[block].min(end))
    }

    /// [`Rows::few_scores`] of packed rows, in codes of which a byte has `P`.
    #[inline(always)]
    fn few_scores<S: Simd, const P: usize>(
        &self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        q: &[f32],
        scores: &mut [f32],
        room: &mut [f32],
    ) {
        let dim = self.dim;
        let queries = q.len() / dim.max(1);
        let padded = self.padded();
        let (own, room) = room.split_at_mut(queries * padded);
        let (scales, room) = room.split_at_mut(KEYS.max(dim));
        let (minimums, products) = room.split_at_mut(KEYS.max(dim));
        match self.format.axis {
            // q · (codes · scales + minimums) = (q · scales) · codes + q · minimums.
            GroupAxis::Channel => {
                let mut row = rows.start;
                while row < rows.end {
                    let (block, end) = self.block_end(row, rows.end);
                    widen_all(simd, self.scales.row(at[0], at[1], block), scales);
                    widen_all(simd, self.minimums.row(at[0], at[1], block), minimums);
                    let mut constants = [0.0; FEW];
                    for query in 0..queries {
                        let (q, own) = (&q[query * dim..][..dim], &mut own[query * padded..][..padded]);
                        for ((own, q), scale) in own.iter_mut().zip(q).zip(&*scales) {
                            *own = q * scale;
                        }
                        own[dim..].fill(0.0);
                        constants[query] = dot(simd, q, minimums);
                    }
                    let scores = &mut scores[row - rows.start..];
                    few_scores(simd, own, queries, self.segment::<P>(at, row..end, 0), scores);
                    for query in 0..queries {
                        for score in &mut scores[query * KEYS..][..end - row] {
                            *score += constants[query];
                        }
                    }
                    row = end;
                }
            }
            // The same with a scale and a minimum for the segment of each row.
            GroupAxis::Token => {
                let len = rows.len();
                for (index, start) in (0..dim).step_by(self.format.segment(dim)).enumerate() {
                    let width = self.format.segment(dim).min(dim - start);
                    self.of_tokens(simd, at, rows.clone(), index, [&mut *scales, &mut *minimums]);
                    let mut totals = [0.0; FEW];
                    for query in 0..queries {
                        let own = &mut own[query * padded..][..padded];
                        own[..width].copy_from_slice(&q[query * dim + start..][..width]);
                        own[width..].fill(0.0);
                        totals[query] = own.iter().sum();
                    }
                    few_scores(
                        simd,
                        own,
                        queries,
                        self.segment::<P>(at, rows.clone(), index),
                        products,
                    );
                    for query in 0..queries {
                        let (scores, products) = (
                            &mut scores[query * KEYS..][..len],
                            &products[query * KEYS..][..len],
                        );
                        if index == 0 {
                            scores.fill(0.0);
                        }
                        let lines = products.iter().zip(&*scales).zip(&*minimums);
                        for (score, ((product, scale), minimum)) in scores.iter_mut().zip(lines) {
                            *score += product * scale + totals[query] * minimum;
                        }
                    }
                }
            }
        }
    }

    /// [`Rows::few_sums`] of packed rows, in codes of which a byte has `P`.
    #[inline(always)]
    fn few_sums<S: Simd, const P: usize>(
        &self,
        simd: S,
        at: [usize; 2],
        rows: Range<usize>,
        weights: &[f32],
        sums: &mut [f32],
        room: &mut [f32],
    ) {
        let dim = self.dim;
        let queries = sums.len() / dim.max(1);
        let padded = self.padded();
        let (own, room) = room.split_at_mut(queries * padded);
        let (scales, room) = room.split_at_mut(KEYS.max(dim));
        let (minimums, scaled) = room.split_at_mut(KEYS.max(dim));
        match self.format.axis {
            // Σ w · (codes · scales + minimums) = (Σ w · codes) · scales + (Σ w) · minimums.
            GroupAxis::Channel => {
                let mut row = rows.start;
                while row < rows.end {
                    let (block, end) = self.block_end(row, rows.end);
                    widen_all(simd, self.scales.row(at[0], at[1], block), scales);
                    widen_all(simd, self.minimums.row(at[0], at[1], block), minimums);
                    let weights = &weights[row - rows.start..];
                    own.fill(0.0);
                    few_sums(simd, weights, queries, self.segment::<P>(at, row..end, 0), own);
                    for query in 0..queries {
                        let total: f32 = weights[query * KEYS..][..end - row].iter().sum();
                        let (sums, own) = (&mut sums[query * dim..][..dim], &own[query * padded..][..dim]);
                        let lines = own.iter().zip(&*scales).zip(&*minimums);
                        for (sum, ((own, scale), minimum)) in sums.iter_mut().zip(lines) {
                            *sum += own * scale + total * minimum;
                        }
                    }
                    row = end;
                }
            }
            // Σ w · (codes · scale + minimum) = Σ (w · scale) · codes + Σ w · minimum.
            GroupAxis::Token => {
                let len = rows.len();
                for (index, start) in (0..dim).step_by(self.format.segment(dim)).enumerate() {
                    let width = self.format.segment(dim).min(dim - start);
                    self.of_tokens(simd, at, rows.clone(), index, [&mut *scales, &mut *minimums]);
                    let mut constants = [0.0; FEW];
                    for query in 0..queries {
                        let (weights, scaled) = (
                            &weights[query * KEYS..][..len],
                            &mut scaled[query * KEYS..][..len],
                        );
                        for ((scaled, weight), scale) in scaled.iter_mut().zip(weights).zip(&*scales) {
                            *scaled = weight * scale;
                        }
                        constants[query] = dot(simd, weights, minimums);
                    }
                    own.fill(0.0);
                    few_sums(
                        simd,
                        scaled,
                        queries,
                        self.segment::<P>(at, rows.clone(), index),
                        own,
                    );
                    for query in 0..queries {
                        let own = &own[query * padded..][..width];
                        for (sum, own) in sums[query * dim + start..][..width].iter_mut().zip(own) {
                            *sum += own + constants[query];
                        }
                    }
                }
            }
        }
    }

    /// Scales and minimums of a segment of `rows`, where each row has its own.
    #[inline(always)]
    fn of_tokens<S: Simd>(
        &self,
        simd: S,
        [batch, head]: [usize; 2],
        rows: Range<usize>,
        segment: usize,
        to: [&mut [f32]; 2],
    ) {
        for (view, to) in [&self.scales, &self.minimums].into_iter().zip(to) {
            let from = view.rows(batch, head, rows.clone());
            match view.strides[2] {
                1 => widen_all(simd, from, to),
                stride => {
                    for (to, from) in to.iter_mut().zip(from[segment..].iter().step_by(stride)) {
                        *to = widen(*from);
                    }
                }
            }
        }
    }

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
        let dim = self.dim;
        match self.format.axis {
            GroupAxis::Channel => {
                let (scales, minimums) = room.split_at_mut(dim);
                let minimums = &mut minimums[..dim];
                let mut row = rows.start;
                while row < rows.end {
                    let (block, end) = self.block_end(row, rows.end);
                    widen_all(simd, self.scales.row(batch, head, block), scales);
                    widen_all(simd, self.minimums.row(batch, head, block), minimums);
                    let tile = &mut tile[(row - rows.start) * dim..(end - rows.start) * dim];
                    for (i, out) in tile.chunks_exact_mut(dim).enumerate() {
                        let codes = self.codes.row(batch, head, row + i);
                        decode::<S, BITS, [&[f32]; 2]>(simd, codes, [&*scales, &*minimums], out);
                    }
                    row = end;
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

/// `a · b`, over the values of `a`.
#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let (vectors, rest) = S::as_simd_f32s(a);
    let mut sum = simd.splat_f32s(0.0);
    for (a, b) in vectors.iter().zip(S::as_simd_f32s(b).0) {
        sum = simd.mul_add_e_f32s(*a, *b, sum);
    }
    let first = a.len() - rest.len();
    let rest: f32 = rest.iter().zip(&b[first..]).map(|(a, b)| a * b).sum();
    simd.reduce_sum_f32s(sum) + rest
}
