//! Attention.
//!
//! Scores are computed again, tile by tile, from what the forward pass kept of each row: its largest score and the sum
//! of its weights (Dao et al., 2022). Nothing is as long as a sequence in both directions but the gradient of a bias
//! that is.

use std::cell::Cell;
use std::ops::Range;

use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::tensor;
use crate::attention::{AttentionOptions, Mask, ScoreBias};
use crate::autodiff::{Tape, is_tracked};
use crate::flash::{Flash, View, Visible};
use crate::output::Output;
use crate::threads::{for_each, for_each_chunk};
use crate::{Dropout, flex, math};

/// Rows of a tile: pairs of a query and one of the heads of a group.
const ROWS: usize = 128;
/// Keys of a block.
const KEYS: usize = 256;
/// Tasks that there are at least, where sequences are long enough to be cut.
const TASKS: usize = 8;
/// Queries of a task at least, where sequences are cut.
const QUERIES: usize = 256;

/// [`attention`](crate::attention()).
#[allow(clippy::type_complexity)]
pub(crate) fn attention(
    qkv: [Tensor<4>; 3],
    mask: &Mask,
    bias: ScoreBias,
    options: AttentionOptions,
) -> Result<Tensor<3>, ([Tensor<4>; 3], ScoreBias)> {
    let [q, k, v] = qkv;
    let ([batch, heads, seq, head_dim], [_, _, keys, value_dim]) = (q.dims(), v.dims());
    let qkv = [q, k, v].map(Tensor::into_dispatch);
    let [alibi, sinks] = [bias.alibi, bias.sinks].map(|x| x.map(Tensor::into_dispatch));
    let bias = bias.bias.map(Tensor::into_dispatch);
    // Slopes are constants.
    let constant = !alibi.as_ref().is_some_and(is_tracked);
    let all = qkv.iter().chain(&bias).chain(&sinks).chain(&alibi);
    let Some(mut tape) = Tape::over(all).filter(|_| constant) else {
        let [alibi, sinks] = [alibi, sinks].map(|x| x.map(Tensor::from_dispatch));
        let bias = bias.map(Tensor::from_dispatch);
        return Err((qkv.map(Tensor::from_dispatch), ScoreBias { bias, alibi, sinks }));
    };
    let mut place = 0;
    let tensors = Tensors {
        qkv: qkv.map(|x| {
            place += 1;
            flex::dense_rows(tape.open(place - 1, x))
        }),
        bias: bias.map(|bias| flex::dense_rows(tape.open(3, bias))),
        sinks: sinks.map(|sinks| flex::contiguous(tape.open(4, sinks))),
        alibi: alibi.map(|alibi| flex::contiguous(tape.open(5, alibi))),
        scale: options.scale.unwrap_or((head_dim as f64).powf(-0.5)) as f32,
        softcap: options.softcap.map(|cap| cap as f32),
        dropout: options.dropout,
        visible: mask.visible().clone(),
    };
    let rows = Output::new(batch * heads * seq * 2);
    let out = tensors.flash(Some(&rows)).run();
    // SAFETY: the forward pass has written two numbers for each query and head.
    let rows = unsafe { rows.done() };
    let out = tensor(out, &[batch, seq, heads * value_dim]);
    let kept = out.clone();
    Ok(tape.record(out, move |g, wanted| {
        let g = flex::contiguous(g);
        let [_, _, _, wants_bias, wants_sinks, _] = wanted;
        let gradients = Gradients {
            flash: tensors.flash(None),
            rows: &rows,
            out: flex::values(&kept),
            g: flex::values(&g),
            bias_dims: tensors.bias.as_ref().filter(|_| wants_bias).map(dims),
        };
        let Found { q, k, v, bias, sinks } = gradients.run();
        let kv_heads = tensors.qkv[1].layout().shape()[1];
        let shapes = [
            [batch, seq, heads, head_dim],
            [batch, keys, kv_heads, head_dim],
            [batch, keys, kv_heads, value_dim],
        ];
        let mut shapes = shapes.iter();
        let [q, k, v] = [q, k, v].map(|values| {
            let shape = shapes.next().map_or(&[][..], |shape| &shape[..]);
            Some(tensor(values, shape).permute(&[0, 2, 1, 3]))
        });
        let bias = bias.zip(tensors.bias.as_ref());
        [
            q,
            k,
            v,
            bias.map(|(values, bias)| tensor(values, &dims(bias))),
            wants_sinks.then(|| tensor(sinks, &[heads])),
            None,
        ]
    }))
}

fn dims(x: &FlexTensor) -> [usize; 4] {
    std::array::from_fn(|i| x.layout().shape()[i])
}

/// What the backward pass keeps.
struct Tensors {
    qkv: [FlexTensor; 3],
    bias: Option<FlexTensor>,
    sinks: Option<FlexTensor>,
    alibi: Option<FlexTensor>,
    scale: f32,
    softcap: Option<f32>,
    dropout: Option<Dropout>,
    visible: Visible,
}

impl Tensors {
    fn flash<'a>(&'a self, kept: Option<&'a Output>) -> Flash<'a, View<'a>> {
        let [q, k, v] = self.qkv.each_ref().map(flex::view);
        let all = [q.dims[0], q.dims[1], q.dims[2], k.dims[2]];
        Flash {
            q,
            k,
            v,
            scale: self.scale,
            softcap: self.softcap,
            sinks: self.sinks.as_ref().map(flex::values),
            alibi: self.alibi.as_ref().map(flex::values),
            bias: self.bias.as_ref().map(|bias| flex::view(bias).broadcast(all)),
            dropout: self.dropout,
            visible: &self.visible,
            kept,
        }
    }
}

struct Gradients<'a> {
    flash: Flash<'a, View<'a>>,
    /// `[batch, heads, seq, 2]`: the largest score of a row, and 1 divided by the sum of its weights.
    rows: &'a [f32],
    /// The result and its gradient: `[batch, seq, heads * value_dim]`.
    out: &'a [f32],
    g: &'a [f32],
    /// The shape of the bias, where its gradient is wanted.
    bias_dims: Option<[usize; 4]>,
}

/// Gradients `[batch, seq, heads, dim]`, `[batch, keys, kv_heads, dim]` twice, as the bias is, `[heads]`.
struct Found {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    bias: Option<Vec<f32>>,
    sinks: Vec<f32>,
}

thread_local! {
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Where several tasks write, each its own.
struct Outputs {
    /// `[batch, seq, heads, dim]`.
    q: Output,
    /// `[chunks, batch, keys, kv_heads, dim]`.
    k: Output,
    v: Output,
    bias: Option<Output>,
    /// `[chunks, batch, heads]`.
    sinks: Output,
}

impl Gradients<'_> {
    fn run(&self) -> Found {
        let f = &self.flash;
        let [batch, heads, seq, dim] = f.q.dims;
        let [_, kv_heads, keys, value_dim] = f.v.dims;
        // Pairs of a sequence and a key head that add to the same part of the bias are of one task.
        let [own_batch, own_heads] = match self.bias_dims {
            Some([b, h, ..]) => [b > 1 || batch == 1, h > 1 || heads == 1],
            None => [true; 2],
        };
        let sequences = if own_batch { batch } else { 1 };
        let groups = if own_heads { kv_heads } else { 1 };
        let chunks = match self.bias_dims {
            Some(_) => 1,
            None => TASKS
                .div_ceil((batch * kv_heads).max(1))
                .clamp(1, (seq / QUERIES).max(1)),
        };
        let zeros = |len: usize| Output::over(vec![0.0; len]);
        let outputs = Outputs {
            q: zeros(batch * seq * heads * dim),
            k: zeros(chunks * batch * keys * kv_heads * dim),
            v: zeros(chunks * batch * keys * kv_heads * value_dim),
            bias: self.bias_dims.map(|dims| zeros(dims.iter().product())),
            sinks: zeros(chunks * batch * heads),
        };
        for_each(chunks * sequences * groups, |index| {
            let (chunk, index) = (index / (sequences * groups), index % (sequences * groups));
            let (b, kv) = (index / groups, index % groups);
            let sequences = if own_batch { b..b + 1 } else { 0..batch };
            for b in sequences {
                for kv in if own_heads { kv..kv + 1 } else { 0..kv_heads } {
                    pulp::Arch::new().dispatch(Head {
                        of: self,
                        to: &outputs,
                        chunk,
                        b,
                        kv,
                        queries: chunk * seq / chunks..(chunk + 1) * seq / chunks,
                    });
                }
            }
        });
        // SAFETY: all had values.
        unsafe {
            Found {
                q: outputs.q.done(),
                k: together(outputs.k.done(), chunks),
                v: together(outputs.v.done(), chunks),
                bias: outputs.bias.map(|bias| bias.done()),
                sinks: together(together(outputs.sinks.done(), chunks), batch),
            }
        }
    }
}

/// The sum of `count` parts.
fn together(mut values: Vec<f32>, count: usize) -> Vec<f32> {
    if count <= 1 {
        return values;
    }
    let rest = values.split_off(values.len() / count);
    let len = values.len();
    for_each_chunk(&mut values, 1 << 14, |index, sums| {
        for part in rest.chunks_exact(len) {
            for (sum, x) in sums.iter_mut().zip(&part[index << 14..]) {
                *sum += x;
            }
        }
    });
    values
}

/// Some queries of the heads that share a key head, over all keys.
struct Head<'a> {
    of: &'a Gradients<'a>,
    to: &'a Outputs,
    chunk: usize,
    b: usize,
    kv: usize,
    queries: Range<usize>,
}

impl pulp::WithSimd for Head<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let f = &self.of.flash;
        let ([_, heads, seq, dim], [batch, kv_heads, keys, value_dim]) = (f.q.dims, f.v.dims);
        let (b, kv, group) = (self.b, self.kv, heads / kv_heads);
        let queries_of_tile = (ROWS / group).max(1);
        let most = queries_of_tile.min(self.queries.len()) * group;
        let lens = [dim, value_dim, KEYS, KEYS, dim, 1].map(|width| most * width);
        let mut scratch = SCRATCH.take();
        scratch.resize(scratch.len().max(lens.iter().sum()), 0.0);
        let (q, rest) = scratch.split_at_mut(lens[0]);
        let (g, rest) = rest.split_at_mut(lens[1]);
        let (weights, rest) = rest.split_at_mut(lens[2]);
        let (slopes, rest) = rest.split_at_mut(lens[3]);
        let (of_q, rest) = rest.split_at_mut(lens[4]);
        let along = &mut rest[..lens[5]];
        let part = (self.chunk * batch + b) * keys;
        for start in self.queries.clone().step_by(queries_of_tile) {
            let queries = start..self.queries.end.min(start + queries_of_tile);
            let rows = queries.len() * group;
            let place = |row: usize| (queries.start + row / group, kv * group + row % group);
            for row in 0..rows {
                let (query, head) = place(row);
                for (to, x) in q[row * dim..].iter_mut().zip(f.q.row(b, head, query)) {
                    *to = x * f.scale;
                }
                let at = ((b * seq + query) * heads + head) * value_dim;
                let (own, out) = (&self.of.g[at..at + value_dim], &self.of.out[at..at + value_dim]);
                g[row * value_dim..][..value_dim].copy_from_slice(own);
                along[row] = math::dot(own, out);
                if let Some(sinks) = f.sinks {
                    let [largest, share] = self.of.row(b, head, query);
                    // SAFETY: this task alone has this chunk of this head of this sequence.
                    unsafe {
                        let to = self.to.sinks.at((self.chunk * batch + b) * heads + head);
                        *to -= math::exp(sinks[head] - largest) * share * along[row];
                    }
                }
            }
            of_q[..rows * dim].fill(0.0);
            let seen = f.visible.keys(b, queries.start).start..f.visible.keys(b, queries.end - 1).end;
            for start in seen.clone().step_by(KEYS) {
                let block = start..seen.end.min(start + KEYS);
                let len = block.len();
                let (k, v) = (rows_of(f.k, b, kv, &block), rows_of(f.v, b, kv, &block));
                // SAFETY: the slices have all rows that are said, and nobody else has the keys of this head.
                unsafe {
                    let weights = Side::of_mut(weights, [rows, len], KEYS);
                    let slopes = Side::of_mut(slopes, [rows, len], KEYS);
                    product(weights, Side::new(q, [rows, dim], dim), k.turned(), false);
                    product(
                        slopes,
                        Side::new(g, [rows, value_dim], value_dim),
                        v.turned(),
                        false,
                    );
                }
                for row in 0..rows {
                    let (query, head) = place(row);
                    let seen = f.visible.keys(b, query);
                    let end = seen.end.clamp(block.start, block.end);
                    let seen = seen.start.clamp(block.start, end) - start..end - start;
                    let weights = &mut weights[row * KEYS..][..len];
                    let slopes = &mut slopes[row * KEYS..][..len];
                    for x in [&mut *weights, &mut *slopes] {
                        x[..seen.start].fill(0.0);
                        x[seen.end..].fill(0.0);
                    }
                    let first = start + seen.start;
                    let (weights, slopes) = (&mut weights[seen.clone()], &mut slopes[seen]);
                    let dropout = (f.dropout).map(|of| of.of_row(((b * heads + head) * seq + query) as u64));
                    // What a weight is multiplied with, its slope is, too.
                    if let Some(dropout) = dropout {
                        dropout.apply(first, slopes);
                    }
                    self.of.scores(weights, [b, head, query, first]);
                    let [largest, share] = self.of.row(b, head, query);
                    let along = along[row];
                    match f.softcap {
                        // The slope of the cap follows from the capped score, before anything is added to it.
                        Some(cap) => {
                            let of_cap = |x: f32| 1.0 - (x / cap) * (x / cap);
                            for (i, (x, slope)) in weights.iter_mut().zip(slopes.iter_mut()).enumerate() {
                                let capped = *x;
                                let added = self.of.added([b, head, query, first + i]);
                                *x = math::exp(capped + added - largest) * share;
                                let raw = *x * (*slope - along);
                                self.to_bias(raw, [b, head, query, first + i]);
                                *slope = raw * of_cap(capped);
                            }
                        }
                        None => {
                            for (x, slope) in weights.iter_mut().zip(slopes.iter_mut()) {
                                *x = math::exp(*x - largest) * share;
                                *slope = *x * (*slope - along);
                            }
                            self.all_to_bias(slopes, [b, head, query, first]);
                        }
                    }
                    if let Some(dropout) = dropout {
                        dropout.apply(first, weights);
                    }
                }
                // SAFETY: as above; the outputs of these keys and heads are this task's.
                unsafe {
                    let to_k = self.to.k.at(((part + start) * kv_heads + kv) * dim);
                    let to_v = self.to.v.at(((part + start) * kv_heads + kv) * value_dim);
                    let to_k = Side::at(to_k, [len, dim], kv_heads * dim);
                    let to_v = Side::at(to_v, [len, value_dim], kv_heads * value_dim);
                    let weights = Side::new(weights, [rows, len], KEYS);
                    let slopes = Side::new(slopes, [rows, len], KEYS);
                    product(
                        to_v,
                        weights.turned(),
                        Side::new(g, [rows, value_dim], value_dim),
                        true,
                    );
                    product(to_k, slopes.turned(), Side::new(q, [rows, dim], dim), true);
                    product(Side::of_mut(of_q, [rows, dim], dim), slopes, k, true);
                }
            }
            for row in 0..rows {
                let (query, head) = place(row);
                let to = self.to.q.at(((b * seq + query) * heads + head) * dim);
                for (i, x) in of_q[row * dim..][..dim].iter().enumerate() {
                    // SAFETY: nobody else writes the gradient of this query and head.
                    unsafe { to.add(i).write(x * f.scale) };
                }
            }
        }
        SCRATCH.set(scratch);
    }
}

impl Gradients<'_> {
    fn row(&self, b: usize, head: usize, query: usize) -> [f32; 2] {
        let [_, heads, seq, _] = self.flash.q.dims;
        let at = 2 * ((b * heads + head) * seq + query);
        [self.rows[at], self.rows[at + 1]]
    }

    /// Makes products scores; where there is a cap, only caps them.
    #[inline(always)]
    fn scores(&self, x: &mut [f32], [b, head, query, first]: [usize; 4]) {
        let f = &self.flash;
        if let Some(cap) = f.softcap {
            for x in x.iter_mut() {
                *x = cap * math::tanh(*x / cap);
            }
            return;
        }
        if let Some(bias) = f.bias {
            for (x, bias) in x.iter_mut().zip(&bias.row(b, head, query)[first..]) {
                *x += bias;
            }
        }
        if let Some(slopes) = f.alibi {
            let (slope, newest) = (slopes[head], (f.k.dims[2] - 1) as f32);
            for (i, x) in x.iter_mut().enumerate() {
                *x += slope * (first as f32 - newest + i as f32);
            }
        }
    }

    /// What is added to one score.
    #[inline(always)]
    fn added(&self, [b, head, query, key]: [usize; 4]) -> f32 {
        let f = &self.flash;
        let bias = f.bias.map_or(0.0, |bias| bias.row(b, head, query)[key]);
        let newest = (f.k.dims[2] - 1) as f32;
        bias + f.alibi.map_or(0.0, |slopes| slopes[head] * (key as f32 - newest))
    }
}

impl Head<'_> {
    /// Where the gradient of a bias is.
    #[inline(always)]
    fn bias_at(&self, [b, head, query, key]: [usize; 4]) -> Option<*mut f32> {
        let [batch, heads, rows, keys] = self.of.bias_dims?;
        let own = |index: usize, size: usize| if size == 1 { 0 } else { index };
        let row = (own(b, batch) * heads + own(head, heads)) * rows + own(query, rows);
        Some(self.to.bias.as_ref()?.at(row * keys + key))
    }

    #[inline(always)]
    fn to_bias(&self, slope: f32, place: [usize; 4]) {
        if let Some(to) = self.bias_at(place) {
            // SAFETY: all that add to this part of the bias are of this task.
            unsafe { *to += slope };
        }
    }

    #[inline(always)]
    fn all_to_bias(&self, slopes: &[f32], place: [usize; 4]) {
        if let Some(to) = self.bias_at(place) {
            for (i, slope) in slopes.iter().enumerate() {
                // SAFETY: as above; the keys lie side by side.
                unsafe { *to.add(i) += slope };
            }
        }
    }
}

/// A matrix in memory.
#[derive(Clone, Copy)]
struct Side {
    start: *mut f32,
    size: [usize; 2],
    /// From a row to the next, and from a column.
    strides: [isize; 2],
}

impl Side {
    fn at(start: *mut f32, size: [usize; 2], stride: usize) -> Self {
        Self {
            start,
            size,
            strides: [stride as isize, 1],
        }
    }

    /// Rows that are `stride` apart.
    fn new(values: &[f32], size: [usize; 2], stride: usize) -> Self {
        assert!(size[0] == 0 || values.len() >= (size[0] - 1) * stride + size[1]);
        Self::at(values.as_ptr().cast_mut(), size, stride)
    }

    /// The same, to be written.
    fn of_mut(values: &mut [f32], size: [usize; 2], stride: usize) -> Self {
        assert!(size[0] == 0 || values.len() >= (size[0] - 1) * stride + size[1]);
        Self::at(values.as_mut_ptr(), size, stride)
    }

    fn turned(self) -> Self {
        let ([rows, columns], [a, b]) = (self.size, self.strides);
        Self {
            size: [columns, rows],
            strides: [b, a],
            ..self
        }
    }
}

fn rows_of(x: View, b: usize, head: usize, rows: &Range<usize>) -> Side {
    Side::new(
        x.rows(b, head, rows.clone()),
        [rows.len(), x.dims[3]],
        x.strides[2],
    )
}

/// `out = left · right`, or added to what is there.
///
/// # Safety
/// All that the sides say is there, and nobody else reads or writes `out`.
unsafe fn product(out: Side, left: Side, right: Side, add: bool) {
    let ([rows, depth], [_, columns]) = (left.size, right.size);
    debug_assert!(out.size == [rows, columns] && right.size[0] == depth);
    // SAFETY: the caller's.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            depth,
            out.start,
            out.strides[1],
            out.strides[0],
            add,
            left.start,
            left.strides[1],
            left.strides[0],
            right.start,
            right.strides[1],
            right.strides[0],
            if add { 1.0 } else { 0.0 },
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
