//! Attention on the CPU, over slices of f32.
//!
//! Queries in tiles, keys in blocks, and a softmax that goes along with them (Dao et al., 2022), so that scores
//! never leave the cache. A tile holds queries of all the heads that share a key head: each key and value is
//! read once for all of them. Few queries are multiplied by vector code, many by the matrix product. A long
//! context of few queries is cut into pieces, whose results are put together at the end.

use std::cell::Cell;
use std::ops::Range;

use pulp::Simd;

use crate::Dropout;
use crate::cached::codes::sum_each;
use crate::math;
use crate::output::Output;
use crate::threads::{for_each, for_each_chunk, num_threads};

mod rows;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles;

pub(crate) use rows::{Cached, Packed, Part, Rows};
use rows::{Lines, Vectors};

/// Where there are none.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod tiles {
    pub fn scores(_: &[f32], _: [usize; 3], _: &[f32], _: usize, _: &mut [f32]) -> bool {
        false
    }

    pub fn sums(_: &[f32], _: [usize; 3], _: &[f32], _: usize, _: &mut [f32]) -> bool {
        false
    }
}

/// Rows of a tile: pairs of a query and one of the heads of a group.
const ROWS: usize = 128;
/// Keys of a block.
const KEYS: usize = 256;
/// Tiles of up to so many rows are not worth the packing that a matrix product begins with.
const FEW: usize = 16;
/// Multiplications below which nothing is handed to another thread.
const SMALL: usize = 1 << 16;

/// `[batch, heads, rows, dim]` within a larger slice; the last dimension is dense.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, T = f32> {
    pub values: &'a [T],
    pub dims: [usize; 4],
    /// Of the first three dimensions.
    pub strides: [usize; 3],
}

impl<'a, T> View<'a, T> {
    /// One row.
    #[inline(always)]
    pub fn row(&self, batch: usize, head: usize, row: usize) -> &'a [T] {
        let [a, b, c] = self.strides;
        let start = batch * a + head * b + row * c;
        &self.values[start..start + self.dims[3]]
    }

    /// The same values wherever a dimension of one is asked for in another size.
    pub fn broadcast(mut self, dims: [usize; 4]) -> Self {
        for (stride, dim) in self.strides.iter_mut().zip(self.dims) {
            if dim == 1 {
                *stride = 0;
            }
        }
        // The row of numbers itself must have its whole length.
        assert!((0..3).all(|i| self.dims[i] == 1 || self.dims[i] == dims[i]) && self.dims[3] == dims[3]);
        Self { dims, ..self }
    }

    /// All values from the row `rows.start` to the end of the last of `rows`.
    pub fn rows(&self, batch: usize, head: usize, rows: Range<usize>) -> &'a [T] {
        let [a, b, c] = self.strides;
        let start = batch * a + head * b;
        &self.values[start + rows.start * c..start + (rows.end - 1) * c + self.dims[3]]
    }
}

/// Which keys a query sees: always a range of them, and always one at least, so that every row of the result is
/// made of numbers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Visible {
    /// Those up to itself that are no padding and not beyond the window. A padding token sees itself only.
    Causal {
        /// Position of the first key.
        first_key: usize,
        /// Position of the first query.
        first_query: usize,
        /// How many tokens a query sees, itself included.
        window: Option<usize>,
        /// Left padding of each sequence, or one for all.
        padding: Vec<usize>,
    },
    /// Those of a range that each sequence has, before and after the query alike: encoders and cross-attention.
    Range {
        /// Where each sequence's real tokens lie among the keys, or one range for all.
        tokens: Vec<Range<usize>>,
        /// How far from its own place a query sees, to either side. A query that nothing is left for sees the
        /// nearest token.
        reach: Option<usize>,
    },
    /// Those up to itself of the sequence that it belongs to, where several stand in a row; no key stands before the first
    /// query.
    Segments {
        /// Where the sequence of each query begins, row by row.
        starts: Vec<Vec<usize>>,
        /// How many tokens a query sees, itself included.
        window: Option<usize>,
    },
}

impl Visible {
    /// The keys that the `query`th query of the sequence `row` sees, counted from the first key. Neither end
    /// falls from one query to the next.
    pub fn keys(&self, row: usize, query: usize) -> Range<usize> {
        match self {
            Self::Causal {
                first_key,
                first_query,
                window,
                padding,
            } => {
                let padding = padding.get(row).or(padding.first());
                let query = first_query + query;
                let reach = window.map_or(0, |window| (query + 1).saturating_sub(window));
                let first = reach
                    .max(padding.copied().unwrap_or(0))
                    .max(*first_key)
                    .min(query);
                first - first_key..query + 1 - first_key
            }
            Self::Range { tokens, reach } => {
                let tokens = tokens.get(row).or(tokens.first()).cloned().unwrap_or(0..1);
                let reach = reach.unwrap_or(usize::MAX);
                let start = tokens.start.max(query.saturating_sub(reach));
                let end = tokens.end.min(query.saturating_add(reach).saturating_add(1));
                if start < end {
                    return start..end;
                }
                let nearest = start.min(tokens.end.saturating_sub(1));
                nearest..nearest + 1
            }
            Self::Segments { starts, window } => {
                let start = starts.get(row).and_then(|starts| starts.get(query)).copied();
                let reach = window.map_or(0, |window| (query + 1).saturating_sub(window));
                start.unwrap_or(0).max(reach).min(query)..query + 1
            }
        }
    }
}

/// One call of [`run`](Flash::run).
pub(crate) struct Flash<'a, R = View<'a>> {
    /// `[batch, heads, seq, dim]`.
    pub q: View<'a>,
    /// `[batch, kv_heads, keys, dim]`.
    pub k: R,
    /// `[batch, kv_heads, keys, value_dim]`.
    pub v: R,
    pub scale: f32,
    pub softcap: Option<f32>,
    /// `[heads]`.
    pub sinks: Option<&'a [f32]>,
    /// `[heads]`.
    pub alibi: Option<&'a [f32]>,
    /// `[batch, heads, seq, keys]`.
    pub bias: Option<View<'a>>,
    /// Which weights are left out after the softmax; a row for each sequence, head and query.
    pub dropout: Option<Dropout>,
    pub visible: &'a Visible,
    /// Where a backward pass wants to know of each row its largest score, and 1 divided by the sum of its weights:
    /// `[batch, heads, seq, 2]`.
    pub kept: Option<&'a Output>,
}

/// How the work is cut.
struct Cut {
    /// Heads that share a key head.
    group: usize,
    /// Queries of a tile.
    queries: usize,
    /// Tiles of a sequence.
    tiles: usize,
    /// Pieces of a tile's keys.
    pieces: usize,
}

thread_local! {
    static PART: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

impl<R: Rows> Flash<'_, R> {
    /// `[batch, seq, heads * value_dim]`.
    pub fn run(&self) -> Vec<f32> {
        let [batch, heads, seq, dim] = self.q.dims;
        let [_, kv_heads, keys, value_dim] = self.v.dims();
        let len = batch * seq * heads * value_dim;
        if len == 0 {
            return Vec::new();
        }
        let group = heads / kv_heads;
        let queries = (ROWS / group).clamp(1, seq);
        let tiles = seq.div_ceil(queries);
        let small = batch * heads * seq * keys * (dim + value_dim) < SMALL;
        let tasks = batch * kv_heads * tiles;
        let pieces = if small || self.kept.is_some() {
            1
        } else {
            (4 * num_threads()).div_ceil(tasks).clamp(1, keys.div_ceil(KEYS))
        };
        let cut = Cut {
            group,
            queries,
            tiles,
            pieces,
        };
        // Of each piece: sums [rows, value_dim], largest scores [rows], totals [rows].
        let rows = queries * group;
        let width = rows * (value_dim + 2);
        let piece = |index: usize, part: &mut [f32], out: Option<&Output>| {
            pulp::Arch::new().dispatch(Piece {
                flash: self,
                cut: &cut,
                index,
                part,
                out,
            });
        };
        if pieces == 1 {
            let out = Output::new(len);
            let task = |index: usize| {
                let mut part = PART.take();
                part.clear();
                part.resize(width, 0.0);
                piece(index, &mut part, Some(&out));
                PART.set(part);
            };
            if small {
                (0..tasks).for_each(task);
            } else {
                for_each(tasks, task);
            }
            // SAFETY: the tasks have written the results of all queries and heads.
            return unsafe { out.done() };
        }
        let mut parts = vec![0.0; tasks * pieces * width];
        for_each_chunk(&mut parts, width, |index, part| piece(index, part, None));
        let mut out = vec![0.0; len];
        for_each_chunk(&mut out, heads * value_dim, |index, out| {
            let (b, i) = (index / seq, index % seq);
            for (head, out) in out.chunks_mut(value_dim).enumerate() {
                let (kv, row) = (head / group, i % queries * group + head % group);
                let first = ((b * kv_heads + kv) * tiles + i / queries) * pieces * width;
                let parts = parts[first..].chunks(width).take(pieces);
                merge(parts, rows, row, out);
            }
        });
        out
    }
}

/// Puts the pieces of a row together.
fn merge<'a>(parts: impl Iterator<Item = &'a [f32]> + Clone, rows: usize, row: usize, out: &mut [f32]) {
    let dim = out.len();
    let most = |part: &[f32]| part[rows * dim + row];
    let total = |part: &[f32]| part[rows * (dim + 1) + row];
    let largest = parts.clone().map(most).fold(f32::NEG_INFINITY, f32::max);
    let weight = |part: &[f32]| math::exp(most(part) - largest);
    let sum: f32 = parts.clone().map(|part| weight(part) * total(part)).sum();
    for part in parts {
        let weight = weight(part) / sum;
        for (out, x) in out.iter_mut().zip(&part[row * dim..]) {
            *out += weight * x;
        }
    }
}

/// One tile of queries over one piece of the keys.
struct Piece<'a, R> {
    flash: &'a Flash<'a, R>,
    cut: &'a Cut,
    index: usize,
    /// Zeros.
    part: &'a mut [f32],
    /// `[batch, seq, heads * value_dim]`, where the piece is all of the keys.
    out: Option<&'a Output>,
}

impl<R: Rows> pulp::WithSimd for Piece<'_, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (f, cut) = (self.flash, self.cut);
        let [_, kv_heads, all_keys, value_dim] = f.v.dims();
        let [_, _, seq, dim] = f.q.dims;
        let (index, piece) = (self.index / cut.pieces, self.index % cut.pieces);
        let (index, tile) = (index / cut.tiles, index % cut.tiles);
        let (b, kv) = (index / kv_heads, index % kv_heads);
        let queries = tile * cut.queries..((tile + 1) * cut.queries).min(seq);
        let rows = queries.len() * cut.group;

        let seen = f.visible.keys(b, queries.start).start..f.visible.keys(b, queries.end - 1).end;
        let len = seen.len().div_ceil(cut.pieces);
        let keys = seen.start + piece * len..(seen.start + (piece + 1) * len).min(seen.end);

        let all = cut.queries * cut.group;
        let (sums, rest) = self.part.split_at_mut(all * value_dim);
        let (most, total) = rest.split_at_mut(all);
        most.fill(f32::NEG_INFINITY);
        if let (Some(sinks), 0) = (f.sinks, piece) {
            // A sink is a score that leads nowhere.
            for row in 0..rows {
                most[row] = sinks[kv * cut.group + row % cut.group];
                total[row] = 1.0;
            }
        }

        let few = rows <= FEW;
        let room = f.k.room(rows).max(f.v.room(rows));
        let mut scratch = SCRATCH.take();
        scratch.resize(scratch.len().max(rows * (dim + KEYS) + room), 0.0);
        let (q, rest) = scratch.split_at_mut(rows * dim);
        let (scores, tile) = rest.split_at_mut(rows * KEYS);
        for (row, q) in q.chunks_mut(dim.max(1)).enumerate() {
            let (query, head) = (queries.start + row / cut.group, kv * cut.group + row % cut.group);
            for (q, x) in q.iter_mut().zip(f.q.row(b, head, query)) {
                *q = x * f.scale;
            }
        }
        for start in keys.clone().step_by(KEYS) {
            let block = start..(start + KEYS).min(keys.end);
            if few {
                f.k.few_scores(simd, [b, kv], block.clone(), q, scores, tile);
            } else {
                many_scores(q, rows, f.k.read(simd, [b, kv], block.clone(), tile), scores);
            }
            for row in 0..rows {
                let scores = &mut scores[row * KEYS..row * KEYS + block.len()];
                let seen = f.visible.keys(b, queries.start + row / cut.group);
                let end = seen.end.clamp(block.start, block.end);
                let seen = seen.start.clamp(block.start, end) - start..end - start;
                scores[..seen.start].fill(0.0);
                scores[seen.end..].fill(0.0);
                let scores = &mut scores[seen.clone()];
                if scores.is_empty() {
                    continue;
                }
                if let Some(cap) = f.softcap {
                    for x in scores.iter_mut() {
                        *x = cap * math::tanh(*x / cap);
                    }
                }
                if let Some(bias) = f.bias {
                    let (query, head) = (queries.start + row / cut.group, kv * cut.group + row % cut.group);
                    let bias = &bias.row(b, head, query)[start + seen.start..];
                    for (x, bias) in scores.iter_mut().zip(bias) {
                        *x += bias;
                    }
                }
                if let Some(slopes) = f.alibi {
                    let slope = slopes[kv * cut.group + row % cut.group];
                    // Counted back from the newest key, which keeps the values small where it matters.
                    let first = (start + seen.start) as f32 - (all_keys - 1) as f32;
                    for (i, x) in scores.iter_mut().enumerate() {
                        *x += slope * (first + i as f32);
                    }
                }
                // A bias may be -∞ for a whole block; differences of such scores are no numbers.
                let largest = math::max(scores).max(most[row]).max(f32::MIN);
                let scale = math::exp(most[row] - largest);
                total[row] = total[row] * scale + math::exp_sum(scores, largest);
                if let Some(dropout) = f.dropout {
                    let (query, head) = (queries.start + row / cut.group, kv * cut.group + row % cut.group);
                    let row = (b * f.q.dims[1] + head) * seq + query;
                    dropout.of_row(row as u64).apply(start + seen.start, scores);
                }
                if largest > most[row] {
                    for x in &mut sums[row * value_dim..][..value_dim] {
                        *x *= scale;
                    }
                    most[row] = largest;
                }
            }
            if few {
                f.v.few_sums(simd, [b, kv], block, scores, &mut sums[..rows * value_dim], tile);
            } else {
                many_sums(scores, rows, f.v.read(simd, [b, kv], block, tile), sums);
            }
        }
        SCRATCH.set(scratch);
        let Some(out) = self.out else {
            return;
        };
        for (row, sums) in sums.chunks_exact(value_dim).take(rows).enumerate() {
            let (query, head) = (queries.start + row / cut.group, kv * cut.group + row % cut.group);
            let to = out.at(((b * seq + query) * f.q.dims[1] + head) * value_dim);
            let scale = total[row].recip();
            if let Some(kept) = f.kept {
                let to = kept.at(2 * ((b * f.q.dims[1] + head) * seq + query));
                // SAFETY: as below.
                unsafe { to.cast::<[f32; 2]>().write([most[row], scale]) };
            }
            for (i, sum) in sums.iter().enumerate() {
                // SAFETY: nobody else writes the result of this query and head.
                unsafe { to.add(i).write(sum * scale) };
            }
        }
    }
}

/// `scores[row, j] = q[row] · k[j]`. Loops, here and below: closures would not be compiled for the machine's vectors.
#[inline(always)]
fn few_scores<S: Simd, const P: usize>(
    simd: S,
    q: &[f32],
    rows: usize,
    k: impl Vectors<P>,
    scores: &mut [f32],
) {
    struct FewScores<'a, K, const P: usize>(&'a [f32], usize, K, &'a mut [f32]);

    impl<K: Vectors<P>, const P: usize> pulp::WithSimd for FewScores<'_, K, P> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(q, rows, k, scores) = self;
            let mut row = 0;
            while row < rows {
                let scores = &mut scores[row * KEYS..];
                row += match rows - row {
                    1 => scores_of::<S, 1, P>(simd, q, row, k, scores),
                    2 => scores_of::<S, 2, P>(simd, q, row, k, scores),
                    3 => scores_of::<S, 3, P>(simd, q, row, k, scores),
                    _ => scores_of::<S, 4, P>(simd, q, row, k, scores),
                };
            }
        }
    }

    // A function for each kind of rows, however often it is called.
    simd.vectorize(FewScores(q, rows, k, scores));
}

/// Those of `R` rows, four keys at a time; returns `R`.
#[inline(always)]
fn scores_of<S: Simd, const R: usize, const P: usize>(
    simd: S,
    q: &[f32],
    row: usize,
    k: impl Vectors<P>,
    scores: &mut [f32],
) -> usize {
    let width = k.width();
    let q: [[&[f32]; P]; R] =
        std::array::from_fn(|r| std::array::from_fn(|p| &q[((row + r) * P + p) * width..][..width]));
    let fours = k.len() - k.len() % 4;
    for j in (0..fours).step_by(4) {
        let sums = dots::<S, R, 4, P, _>(simd, q, k, j);
        for r in 0..R {
            scores[r * KEYS + j..][..4].copy_from_slice(&sum_each(simd, sums[r]));
        }
    }
    for j in fours..k.len() {
        let sums = dots::<S, R, 1, P, _>(simd, q, k, j);
        for r in 0..R {
            scores[r * KEYS + j] = simd.reduce_sum_f32s(sums[r][0]);
        }
    }
    R
}

/// `q[r] · k[first + j]`, not yet summed up across lanes.
#[inline(always)]
fn dots<S: Simd, const R: usize, const J: usize, const P: usize, K: Vectors<P>>(
    simd: S,
    q: [[&[f32]; P]; R],
    k: K,
    first: usize,
) -> [[S::f32s; J]; R] {
    let (width, lanes) = (k.width(), S::F32_LANES);
    let k: [&[K::Stored]; J] = std::array::from_fn(|j| k.row(first + j));
    let mut sums = [[simd.splat_f32s(0.0); J]; R];
    let whole = width - width % lanes;
    for at in (0..whole).step_by(lanes) {
        for j in 0..J {
            let k = K::load(simd, &k[j][at..at + lanes]);
            for p in 0..P {
                for r in 0..R {
                    sums[r][j] = simd.mul_add_e_f32s(load(simd, &q[r][p][at..at + lanes]), k[p], sums[r][j]);
                }
            }
        }
    }
    if whole < width {
        for j in 0..J {
            let k = K::load(simd, &k[j][whole..]);
            for p in 0..P {
                for r in 0..R {
                    sums[r][j] = simd.mul_add_e_f32s(load(simd, &q[r][p][whole..]), k[p], sums[r][j]);
                }
            }
        }
    }
    sums
}

/// As many values as a vector has, or fewer, filled up with zeros.
#[inline(always)]
fn load<S: Simd>(simd: S, x: &[f32]) -> S::f32s {
    match S::as_simd_f32s(x) {
        ([x, ..], _) => *x,
        (_, rest) => simd.partial_load_f32s(rest),
    }
}

/// The inverse of [`load`].
#[inline(always)]
fn store<S: Simd>(simd: S, values: S::f32s, to: &mut [f32]) {
    match S::as_mut_simd_f32s(to) {
        ([to, ..], _) => *to = values,
        (_, rest) => simd.partial_store_f32s(rest, values),
    }
}

/// `sums[row] += Σⱼ weights[row, j] · v[j]`.
#[inline(always)]
fn few_sums<S: Simd, const P: usize>(
    simd: S,
    weights: &[f32],
    rows: usize,
    v: impl Vectors<P>,
    sums: &mut [f32],
) {
    struct FewSums<'a, V, const P: usize>(&'a [f32], usize, V, &'a mut [f32]);

    impl<V: Vectors<P>, const P: usize> pulp::WithSimd for FewSums<'_, V, P> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(weights, rows, v, sums) = self;
            let mut row = 0;
            while row < rows {
                let weights = &weights[row * KEYS..];
                let sums = &mut sums[row * P * v.width()..];
                row += match rows - row {
                    1 => sums_of::<S, 1, P, _>(simd, weights, v, sums),
                    2 => sums_of::<S, 2, P, _>(simd, weights, v, sums),
                    3 => sums_of::<S, 3, P, _>(simd, weights, v, sums),
                    _ => sums_of::<S, 4, P, _>(simd, weights, v, sums),
                };
            }
        }
    }

    simd.vectorize(FewSums(weights, rows, v, sums));
}

/// Those of `R` rows; returns `R`.
#[inline(always)]
fn sums_of<S: Simd, const R: usize, const P: usize, V: Vectors<P>>(
    simd: S,
    weights: &[f32],
    v: V,
    sums: &mut [f32],
) -> usize {
    let weights: [&[f32]; R] = std::array::from_fn(|r| &weights[r * KEYS..][..v.len()]);
    let mut at = 0;
    while at < v.width() {
        at += match ((v.width() - at) / S::F32_LANES, P) {
            (0, _) => columns_of::<S, R, 1, P, true, V>(simd, weights, v, at, sums),
            (4.., 1) => columns_of::<S, R, 4, P, false, V>(simd, weights, v, at, sums),
            (2.., 2) => columns_of::<S, R, 2, P, false, V>(simd, weights, v, at, sums),
            _ => columns_of::<S, R, 1, P, false, V>(simd, weights, v, at, sums),
        };
    }
    R
}

/// Those of `C` vectors of columns in each part, or of one that is `PARTIAL`ly filled; returns the number of columns.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn columns_of<S: Simd, const R: usize, const C: usize, const P: usize, const PARTIAL: bool, V: Vectors<P>>(
    simd: S,
    weights: [&[f32]; R],
    v: V,
    at: usize,
    sums: &mut [f32],
) -> usize {
    let (width, lanes) = (v.width(), S::F32_LANES);
    let columns = if PARTIAL { width - at } else { C * lanes };
    let ends = |c: usize| c * lanes..if PARTIAL { columns } else { (c + 1) * lanes };
    let place = |r: usize, p: usize| (r * P + p) * width + at;
    let mut totals = [[[simd.splat_f32s(0.0); P]; C]; R];
    for r in 0..R {
        for p in 0..P {
            let sums = &sums[place(r, p)..][..columns];
            for c in 0..C {
                totals[r][c][p] = load(simd, &sums[ends(c)]);
            }
        }
    }
    for j in 0..v.len() {
        let v = &v.row(j)[at..at + columns];
        for c in 0..C {
            let v = V::load(simd, &v[ends(c)]);
            for r in 0..R {
                let weight = simd.splat_f32s(weights[r][j]);
                for p in 0..P {
                    totals[r][c][p] = simd.mul_add_e_f32s(weight, v[p], totals[r][c][p]);
                }
            }
        }
    }
    for r in 0..R {
        for p in 0..P {
            let sums = &mut sums[place(r, p)..][..columns];
            for c in 0..C {
                store(simd, totals[r][c][p], &mut sums[ends(c)]);
            }
        }
    }
    columns
}

/// Like [`few_scores`], as a matrix product.
fn many_scores(q: &[f32], rows: usize, k: Lines, scores: &mut [f32]) {
    let Lines {
        values: k,
        stride,
        dim,
        len: keys,
    } = k;
    if tiles::scores(q, [rows, dim, keys], k, stride, scores) {
        return;
    }
    assert!(q.len() >= rows * dim && scores.len() >= (rows - 1) * KEYS + keys);
    assert!(k.len() >= (keys - 1) * stride + dim);
    // SAFETY: the strides describe the scores [rows, keys], rows KEYS apart, the queries [rows, dim], and the
    // keys [keys, dim], rows `stride` apart, read transposed, all of which lie in the slices.
    unsafe {
        gemm::gemm(
            rows,
            keys,
            dim,
            scores.as_mut_ptr(),
            1,
            KEYS as isize,
            false,
            q.as_ptr(),
            1,
            dim as isize,
            k.as_ptr(),
            stride as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Like [`few_sums`], as a matrix product.
fn many_sums(weights: &[f32], rows: usize, v: Lines, sums: &mut [f32]) {
    let Lines {
        values: v,
        stride,
        dim,
        len: keys,
    } = v;
    if tiles::sums(weights, [rows, keys, dim], v, stride, sums) {
        return;
    }
    assert!(weights.len() >= (rows - 1) * KEYS + keys && sums.len() >= rows * dim);
    assert!(v.len() >= (keys - 1) * stride + dim);
    // SAFETY: the strides describe the sums [rows, dim], the weights [rows, keys], rows KEYS apart, and the
    // values [keys, dim], rows `stride` apart, all of which lie in the slices.
    unsafe {
        gemm::gemm(
            rows,
            dim,
            keys,
            sums.as_mut_ptr(),
            1,
            dim as isize,
            true,
            weights.as_ptr(),
            1,
            KEYS as isize,
            v.as_ptr(),
            1,
            stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Case {
        batch: usize,
        heads: usize,
        kv_heads: usize,
        seq: usize,
        past: usize,
        dim: usize,
        value_dim: usize,
    }

    fn noise(seed: usize, len: usize) -> Vec<f32> {
        let mut state = seed as u32 ^ 0x9e37_79b9;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// `[batch, heads, rows, dim]` with room between the rows.
    fn view(values: &[f32], dims: [usize; 4]) -> View<'_> {
        let [_, heads, rows, dim] = dims;
        let strides = [rows * heads * (dim + 1), dim + 1, heads * (dim + 1)];
        View {
            values,
            dims,
            strides,
        }
    }

    fn naive(f: &Flash) -> Vec<f32> {
        let [batch, heads, seq, _] = f.q.dims;
        let [_, kv_heads, keys, value_dim] = f.v.dims;
        let mut out = Vec::new();
        for b in 0..batch {
            for i in 0..seq {
                for h in 0..heads {
                    let kv = h / (heads / kv_heads);
                    let q = f.q.row(b, h, i);
                    let score = |j| {
                        let dot: f32 = q.iter().zip(f.k.row(b, kv, j)).map(|(q, k)| q * k).sum();
                        let x = dot * f.scale;
                        let x = f.softcap.map_or(x, |cap| cap * (x / cap).tanh());
                        let x = x + f.bias.map_or(0.0, |bias| bias.row(b, h, i)[j]);
                        x + f
                            .alibi
                            .map_or(0.0, |slopes| slopes[h] * (j as f32 - (keys - 1) as f32))
                    };
                    let seen = f.visible.keys(b, i);
                    let weights: Vec<f64> = seen.clone().map(|j| f64::from(score(j)).exp()).collect();
                    let sink = f.sinks.map_or(0.0, |sinks| f64::from(sinks[h]).exp());
                    let total = weights.iter().sum::<f64>() + sink;
                    out.extend((0..value_dim).map(|c| {
                        let sum: f64 = (seen.clone().zip(&weights))
                            .map(|(j, weight)| weight * f64::from(f.v.row(b, kv, j)[c]))
                            .sum();
                        (sum / total) as f32
                    }));
                }
            }
        }
        out
    }

    /// Left padding and a window, as decoders have them.
    fn check(c: &Case, window: Option<usize>, padding: Vec<usize>, extras: bool) {
        let visible = Visible::Causal {
            first_key: 5,
            first_query: 5 + c.past,
            window,
            padding,
        };
        check_visible(c, c.past + c.seq, &visible, extras);
    }

    fn check_visible(c: &Case, keys: usize, visible: &Visible, extras: bool) {
        let values = |seed, heads, rows, dim| noise(seed, c.batch * heads * rows * (dim + 1));
        let q = values(1, c.heads, c.seq, c.dim);
        let k = values(2, c.kv_heads, keys, c.dim);
        let v = values(3, c.kv_heads, keys, c.value_dim);
        // Slopes that grow with the distance would leave the precision to chance.
        let per_head: Vec<f32> = noise(4, c.heads).into_iter().map(f32::abs).collect();
        // One row for all queries of a head.
        let bias = noise(5, c.heads * keys);
        let bias = View {
            values: &bias,
            dims: [c.batch, c.heads, c.seq, keys],
            strides: [0, keys, 0],
        };
        let flash = Flash {
            q: view(&q, [c.batch, c.heads, c.seq, c.dim]),
            k: view(&k, [c.batch, c.kv_heads, keys, c.dim]),
            v: view(&v, [c.batch, c.kv_heads, keys, c.value_dim]),
            scale: 0.7,
            softcap: extras.then_some(3.0),
            sinks: extras.then_some(&per_head),
            alibi: extras.then_some(&per_head),
            bias: extras.then_some(bias),
            dropout: None,
            visible,
            kept: None,
        };
        let worst = (flash.run().iter().zip(naive(&flash)))
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst < 2e-5, "{worst}");
    }

    #[test]
    fn like_the_naive_sum() {
        for (dim, value_dim) in [(3, 3), (64, 64), (80, 80), (24, 17)] {
            for (heads, kv_heads) in [(1, 1), (6, 2), (7, 1), (40, 2)] {
                for (seq, past) in [(1, 0), (1, 300), (2, 7), (7, 0), (33, 5), (1, 1100)] {
                    let case = Case {
                        batch: 2,
                        heads,
                        kv_heads,
                        seq,
                        past,
                        dim,
                        value_dim,
                    };
                    check(&case, None, vec![0], false);
                    check(&case, Some(4), vec![0], false);
                    check(&case, None, vec![9, 5], false);
                    check(&case, Some(17), vec![0, 20], true);
                }
            }
        }
    }

    #[test]
    fn many_tiles() {
        let case = Case {
            batch: 1,
            heads: 3,
            kv_heads: 1,
            seq: 600,
            past: 30,
            dim: 16,
            value_dim: 16,
        };
        check(&case, None, vec![0], false);
        check(&case, Some(100), vec![40], true);
    }

    #[test]
    fn ranges() {
        for (seq, keys) in [(1, 1), (1, 300), (7, 7), (7, 3), (2, 40), (33, 33), (150, 700)] {
            for (heads, kv_heads) in [(3, 3), (6, 2)] {
                let case = Case {
                    batch: 2,
                    heads,
                    kv_heads,
                    seq,
                    past: 0,
                    dim: 24,
                    value_dim: 17,
                };
                // Whole, padded on either side, and one that is padding only.
                for tokens in [
                    vec![0..keys],
                    vec![0..keys / 2, keys / 3..keys],
                    vec![0..0, 0..keys],
                ] {
                    for reach in [None, Some(0), Some(2), Some(64)] {
                        let visible = Visible::Range {
                            tokens: tokens.clone(),
                            reach,
                        };
                        check_visible(&case, keys, &visible, false);
                        check_visible(&case, keys, &visible, true);
                    }
                }
            }
        }
    }
}
