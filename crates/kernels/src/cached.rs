//! Keys and values as a cache keeps them: in half precision, or in codes of a few bits, which attention reads as they
//! are.
//!
//! Rows are packed in blocks of tokens, each once, with a scale and a minimum for every group of values (Liu et al.,
//! 2024, "KIVI"): `value = code · scale + minimum`. A group is either a channel within a block, which suits keys, whose
//! outliers keep to their channels, or some neighbouring channels of one token, which suits values.

use std::ops::Range;

use burn::backend::flex::FlexTensor;
use burn::tensor::kind::Basic;
use burn::tensor::{DType, Device, FloatDType, Int, IntDType, Shape, Tensor, TensorData};
use half::f16;
use half::slice::HalfFloatSliceExt;
use pulp::Simd;

use crate::attention::{self, AttentionOptions, Mask, ScoreBias, attention};
use crate::flash::{Cached, Packed, Part, Rows, View};
use crate::flex::{self, zeros_like};

pub(crate) mod codes;

/// Room for codes grows by so many tokens: little, because that is all that stands empty, and copying them all for each
/// block that comes costs less than it takes to attend to them once.
const STEP: usize = 16;

/// Bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeBits {
    /// Four values.
    Two = 2,
    /// Sixteen.
    Four = 4,
    /// 256.
    Eight = 8,
}

/// What values that share a scale and a minimum have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupAxis {
    /// The channel: the group is that of neighbouring tokens.
    Channel,
    /// The token: the group is that of neighbouring channels.
    Token,
}

/// How rows are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowFormat {
    /// Bits of a code.
    pub bits: CodeBits,
    /// Tokens of a block, and most values of a group: above 0.
    pub group: usize,
    /// What groups are.
    pub axis: GroupAxis,
}

impl RowFormat {
    /// Values of a row that have words of their own.
    pub(crate) fn segment(&self, dim: usize) -> usize {
        match self.axis {
            GroupAxis::Channel => dim,
            GroupAxis::Token => self.group.min(dim),
        }
        .max(1)
    }

    /// How often scale and minimum are fitted to the codes that they give, beginning with the range of the values. That
    /// takes a tenth of the squared error from codes of 4 bits and half of it from those of 2; those of 8 are close enough.
    /// The largest values of a token count for more than their squares say: these keep their range.
    pub(crate) fn rounds(&self) -> usize {
        match (self.bits, self.axis) {
            (CodeBits::Eight, _) | (_, GroupAxis::Token) => 0,
            (_, GroupAxis::Channel) => 4,
        }
    }

    fn segments(&self, dim: usize) -> usize {
        dim.div_ceil(self.segment(dim))
    }

    /// 32-bit words of a segment.
    pub(crate) fn segment_words(&self, dim: usize) -> usize {
        (self.segment(dim) * self.bits as usize).div_ceil(32)
    }

    /// 32-bit words of a row.
    pub(crate) fn row_words(&self, dim: usize) -> usize {
        self.segments(dim) * self.segment_words(dim)
    }

    /// Packs `x` `[batch, heads, tokens, dim]` in blocks of `group` tokens.
    fn quantize(&self, x: Tensor<4>) -> Buffers {
        let [batch, heads, tokens, dim] = x.dims();
        let (device, dtype) = (x.device(), x.dtype());
        let x = match flex::unwrap(x.cast(FloatDType::F32)) {
            Ok(x) => flex::contiguous(x),
            Err(x) => return self.quantize_by_tensors(x, dtype),
        };
        let encoded = codes::quantize(flex::values(&x), [tokens, dim], *self);
        let rows = |width: usize, len: usize| [batch, heads, len / (batch * heads * width).max(1), width];
        let width = match self.axis {
            GroupAxis::Channel => dim,
            GroupAxis::Token => self.segments(dim),
        };
        let statistics = |x: Vec<f16>| {
            let shape = rows(width, x.len());
            Tensor::from_data(TensorData::new(x, shape), (&device, DType::F16))
        };
        let words = [batch, heads, tokens, self.row_words(dim)];
        Buffers {
            codes: Tensor::from_data(TensorData::new(encoded.codes, words), (&device, DType::I32)),
            scales: statistics(encoded.scales),
            minimums: statistics(encoded.minimums),
        }
    }

    /// The same for every device; statistics are kept in `dtype`.
    fn quantize_by_tensors(&self, x: Tensor<4>, dtype: DType) -> Buffers {
        let device = x.device();
        let [batch, heads, tokens, dim] = x.dims();
        let (bits, most) = (self.bits as usize, ((1 << self.bits as usize) - 1) as f32);
        let segment = self.segment(dim);
        // Groups along the dimension 3 of `[batch, heads, blocks or tokens, group, rest]`.
        let statistics = |groups: Tensor<5>| {
            let (mut minimum, largest) = (groups.clone().min_dim(3), groups.clone().max_dim(3));
            let mut scale = (largest - minimum.clone()) / most;
            let count = groups.dims()[3] as f32;
            for _ in 0..self.rounds() {
                let x = groups.clone() - minimum.clone();
                let inverse = scale.clone().recip();
                let inverse = inverse.mask_fill(scale.clone().lower_equal_elem(0.0), 0.0);
                let codes = (x.clone() * inverse).clamp(0.0, most).round();
                let products = (codes.clone() * x.clone()).sum_dim(3);
                let squares = codes.clone().square().sum_dim(3);
                let (values, codes) = (x.sum_dim(3), codes.sum_dim(3));
                let spread = squares * count - codes.clone().square();
                let fitted = (products * count - codes.clone() * values.clone()) / spread;
                let is_one = fitted.clone().greater_elem(0.0);
                let is_one = is_one.bool_and(fitted.clone().lower_elem(f32::INFINITY));
                let moved = minimum.clone() + (values - codes * fitted.clone()) / count;
                minimum = minimum.mask_where(is_one.clone(), moved);
                scale = scale.mask_where(is_one, fitted);
            }
            // A value that is no number, or infinite, shows in all of its group.
            let minimum = minimum + (groups * 0.0).sum_dim(3);
            [scale, minimum].map(|x| x.squeeze_dim::<4>(3).cast(dtype))
        };
        let [scales, minimums] = match self.axis {
            GroupAxis::Channel => {
                let whole = tokens - tokens % self.group;
                let mut parts = Vec::new();
                for (start, len, group) in [(0, whole, self.group), (whole, tokens - whole, tokens - whole)] {
                    if len > 0 {
                        let block = x.clone().narrow(2, start, len);
                        parts.push(statistics(block.reshape([batch, heads, len / group, group, dim])));
                    }
                }
                [0, 1].map(|i| Tensor::cat(parts.iter().map(|part| part[i].clone()).collect(), 2))
            }
            GroupAxis::Token => {
                let mut parts = Vec::new();
                for start in (0..dim).step_by(segment) {
                    let len = segment.min(dim - start);
                    let group = x.clone().narrow(3, start, len);
                    parts.push(statistics(group.reshape([batch, heads, tokens, len, 1])));
                }
                [0, 1].map(|i| Tensor::cat(parts.iter().map(|part| part[i].clone()).collect(), 3))
            }
        };
        let ends = blocks(tokens, self.group);
        let [scale, minimum] =
            [&scales, &minimums].map(|x| self.spread(x.clone(), &ends, dim).cast(FloatDType::F32));
        let inverse = scale.clone().recip().mask_fill(scale.lower_equal_elem(0.0), 0.0);
        let codes = ((x - minimum) * inverse).clamp(0.0, most).round();
        let codes: Tensor<4, Int> = codes.cast(IntDType::I32);
        // `[batch, heads, tokens, segments, parts of a byte, words, bytes of a word]`, filled up with zeros.
        let (segments, words, parts) = (self.segments(dim), self.segment_words(dim), 8 / bits);
        let filled = |x: Tensor<4, Int>, width: usize| {
            let [a, b, c, d] = x.dims();
            let zeros = Tensor::zeros([a, b, c, width - d], (&x.device(), x.dtype()));
            if width > d {
                Tensor::cat(vec![x, zeros], 3)
            } else {
                x
            }
        };
        let codes = filled(codes, segments * segment).reshape([batch, heads, tokens * segments, segment]);
        let codes =
            filled(codes, parts * words * 4).reshape([batch * heads, tokens * segments, parts, words, 4]);
        let mut all: Option<Tensor<5, Int>> = None;
        for part in 0..parts {
            for byte in 0..4 {
                let codes = codes.clone().narrow(2, part, 1).narrow(4, byte, 1);
                let codes = codes.bitwise_left_shift_scalar((8 * byte + part * bits) as i32);
                all = Some(match all {
                    Some(all) => all.bitwise_or(codes),
                    None => codes,
                });
            }
        }
        let words = [batch, heads, tokens, segments * words];
        Buffers {
            codes: match all {
                Some(all) => all.reshape(words),
                None => Tensor::zeros(words, (&device, DType::I32)),
            },
            scales,
            minimums,
        }
    }

    /// Statistics of groups as those of values: `[batch, heads, tokens, dim]`.
    fn spread(&self, x: Tensor<4>, ends: &[usize], dim: usize) -> Tensor<4> {
        let [batch, heads, rows, groups] = x.dims();
        match self.axis {
            GroupAxis::Channel => {
                let mut ids = Vec::new();
                for (block, end) in ends.iter().enumerate() {
                    ids.resize(*end, block as i32);
                }
                let len = ids.len();
                let ids = Tensor::from_data(TensorData::new(ids, [len]), (&x.device(), DType::I32));
                x.select(2, ids)
            }
            GroupAxis::Token => {
                let segment = self.segment(dim);
                x.reshape([batch, heads, rows, groups, 1])
                    .expand([batch, heads, rows, groups, segment])
                    .reshape([batch, heads, rows, groups * segment])
                    .narrow(3, 0, dim)
            }
        }
    }

    /// The values behind `codes` `[batch, heads, tokens, words]`, as codes.
    fn unpack(&self, codes: Tensor<4, Int>, dim: usize) -> Tensor<4, Int> {
        let [batch, heads, tokens, _] = codes.dims();
        let (bits, segment) = (self.bits as usize, self.segment(dim));
        let (segments, words) = (self.segments(dim), self.segment_words(dim));
        let codes = codes.reshape([batch * heads, tokens * segments, words]);
        let mut parts = Vec::new();
        for part in 0..8 / bits {
            let bytes = (0..4).map(|byte| {
                let shifted = codes
                    .clone()
                    .bitwise_right_shift_scalar((8 * byte + part * bits) as i32);
                shifted.bitwise_and_scalar((1 << bits) - 1)
            });
            let bytes: Tensor<4, Int> = Tensor::stack(bytes.collect(), 3);
            parts.push(bytes.reshape([batch * heads, tokens * segments, 4 * words]));
        }
        Tensor::cat(parts, 2)
            .narrow(2, 0, segment)
            .reshape([batch, heads, tokens, segments * segment])
            .narrow(3, 0, dim)
    }
}

/// Where blocks of `group` tokens end.
fn blocks(tokens: usize, group: usize) -> Vec<usize> {
    let end = |block: usize| ((block + 1) * group).min(tokens);
    (0..tokens.div_ceil(group)).map(end).collect()
}

/// What rows are kept as where full precision is not needed: f16, or as it is where the device has none. Values beyond
/// its range stay at the ends.
pub fn halved(x: Tensor<4>) -> Tensor<4> {
    if x.dtype() == DType::F16 || !x.device().supports_dtype(DType::F16) {
        return x;
    }
    x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())
        .cast(FloatDType::F16)
}

/// Rows of a cache as codes, with room for more.
#[derive(Debug, Clone)]
pub struct PackedRows {
    format: RowFormat,
    dim: usize,
    buffers: Option<Buffers>,
    /// Where each block of tokens ends.
    ends: Vec<usize>,
}

#[derive(Debug, Clone)]
struct Buffers {
    /// `[batch, heads, room for tokens, words]`.
    codes: Tensor<4, Int>,
    /// `[batch, heads, room for blocks, dim]`, or `[batch, heads, room for tokens, segments]`.
    scales: Tensor<4>,
    /// Like the scales.
    minimums: Tensor<4>,
}

impl PackedRows {
    /// No rows.
    pub fn new(format: RowFormat) -> Self {
        Self {
            format,
            dim: 0,
            buffers: None,
            ends: Vec::new(),
        }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Packs `x` `[batch, heads, tokens, dim]` after what there is. Where buffers must grow, they get room for `room`
    /// tokens, or little more than there are.
    pub fn append(&mut self, x: Tensor<4>, room: usize) {
        let [_, _, tokens, dim] = x.dims();
        if tokens == 0 {
            return;
        }
        self.dim = dim;
        let (len, rows) = (self.len(), self.statistics_rows());
        let new = self.format.quantize(halved(x));
        let room = (len + tokens).next_multiple_of(STEP).max(room);
        let ends = blocks(tokens, self.format.group);
        let statistics_room = match self.format.axis {
            GroupAxis::Channel => rows + ends.len() + (room - len - tokens).div_ceil(self.format.group),
            GroupAxis::Token => room,
        };
        let (codes, scales, minimums) = match self.buffers.take() {
            None => (None, None, None),
            Some(old) => (Some(old.codes), Some(old.scales), Some(old.minimums)),
        };
        self.buffers = Some(Buffers {
            codes: put(codes, len, new.codes, room),
            scales: put(scales, rows, new.scales, statistics_room),
            minimums: put(minimums, rows, new.minimums, statistics_room),
        });
        self.ends.extend(ends.iter().map(|end| len + end));
    }

    /// The end of the last block that ends within the first `tokens`.
    pub fn block_end(&self, tokens: usize) -> usize {
        let blocks = self.ends.partition_point(|end| *end <= tokens);
        blocks.checked_sub(1).map_or(0, |block| self.ends[block])
    }

    /// Forgets the first tokens and the room that there was.
    pub fn drop_front(&mut self, tokens: usize) {
        if tokens == 0 {
            return;
        }
        let blocks = self.ends.partition_point(|end| *end <= tokens);
        let rows = match self.format.axis {
            GroupAxis::Channel => blocks,
            GroupAxis::Token => tokens,
        };
        let (len, all) = (self.len(), self.statistics_rows());
        let buffers = self.buffers.take().filter(|_| tokens < len);
        self.buffers = buffers.map(|buffers| Buffers {
            codes: copied(buffers.codes, tokens..len),
            scales: copied(buffers.scales, rows..all),
            minimums: copied(buffers.minimums, rows..all),
        });
        self.ends.drain(..blocks);
        self.ends.iter_mut().for_each(|end| *end -= tokens);
    }

    /// Forgets what comes after the first `len` tokens. Others keep their codes, also within a block.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len() {
            return;
        }
        let whole = self.ends.partition_point(|end| *end <= len);
        self.ends.truncate(whole);
        if self.len() < len {
            self.ends.push(len);
        }
    }

    /// Forgets all rows and the room for them.
    pub fn clear(&mut self) {
        *self = Self::new(self.format);
    }

    /// Where the rows are; `None` where there are none yet.
    pub fn device(&self) -> Option<Device> {
        self.buffers.as_ref().map(|buffers| buffers.codes.device())
    }

    /// Keeps the sequences `rows`, in that order.
    pub fn select(&mut self, rows: Tensor<1, Int>) {
        self.buffers = self.buffers.take().map(|buffers| Buffers {
            codes: buffers.codes.select(0, rows.clone()),
            scales: buffers.scales.select(0, rows.clone()),
            minimums: buffers.minimums.select(0, rows),
        });
    }

    /// Bytes of codes and statistics, room for more included.
    pub fn num_bytes(&self) -> usize {
        let Some(buffers) = &self.buffers else {
            return 0;
        };
        let bytes = |shape: Shape, dtype: DType| shape.num_elements() * dtype.size();
        bytes(buffers.codes.shape(), buffers.codes.dtype())
            + bytes(buffers.scales.shape(), buffers.scales.dtype())
            + bytes(buffers.minimums.shape(), buffers.minimums.dtype())
    }

    /// The values as f32: `[batch, heads, tokens, dim]`; `None` where there are no tokens.
    pub fn dequantize(&self) -> Option<Tensor<4>> {
        self.values(0..self.len())
    }

    /// Those of some of the tokens; `None` where these are none.
    pub fn values(&self, tokens: Range<usize>) -> Option<Tensor<4>> {
        let buffers = self.buffers.as_ref().filter(|_| !tokens.is_empty())?;
        let Some(held) = Held::packed(self) else {
            return Some(
                self.values_by_tensors(buffers)
                    .narrow(2, tokens.start, tokens.len()),
            );
        };
        let (device, rows) = (buffers.codes.device(), Cached(vec![held.rows()]));
        let mut shape = rows.dims();
        shape[2] = tokens.len();
        let values = pulp::Arch::new().dispatch(Decode(&rows, tokens));
        Some(Tensor::from_data(TensorData::new(values, shape), &device))
    }

    /// All of them, on every device.
    fn values_by_tensors(&self, buffers: &Buffers) -> Tensor<4> {
        let codes = buffers.codes.clone().narrow(2, 0, self.len());
        let codes = self.format.unpack(codes, self.dim);
        let statistics = |x: &Tensor<4>| {
            let x = x.clone().narrow(2, 0, self.statistics_rows());
            self.format.spread(x.cast(FloatDType::F32), &self.ends, self.dim)
        };
        let codes: Tensor<4> = codes.cast(FloatDType::F32);
        codes * statistics(&buffers.scales) + statistics(&buffers.minimums)
    }

    /// Rows of statistics that count.
    fn statistics_rows(&self) -> usize {
        match self.format.axis {
            GroupAxis::Channel => self.ends.len(),
            GroupAxis::Token => self.len(),
        }
    }
}

/// Some rows of all sequences and heads, as f32.
struct Decode<'a>(&'a Cached<'a>, Range<usize>);

impl pulp::WithSimd for Decode<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let Self(rows, range) = self;
        let [batch, heads, _, dim] = rows.dims();
        // With two numbers for each channel besides.
        let mut tile = vec![0.0; (range.len() + 2) * dim];
        let mut values = Vec::with_capacity(batch * heads * range.len() * dim);
        for index in 0..batch * heads {
            let at = [index / heads, index % heads];
            values.extend_from_slice(rows.read(simd, at, range.clone(), &mut tile).values);
        }
        values
    }
}

/// Writes `new` after the first `used` rows of a buffer; where it is too small, into one with `room`.
fn put<K: Basic>(buffer: Option<Tensor<4, K>>, used: usize, new: Tensor<4, K>, room: usize) -> Tensor<4, K> {
    let [batch, heads, rows, width] = new.dims();
    let needed = used + rows;
    let buffer = match buffer {
        Some(buffer) if buffer.dims()[2] >= needed => buffer,
        None if room <= rows => return new,
        old => {
            let shape = [batch, heads, room.max(needed), width];
            let buffer = zeros_like(&new, shape);
            match old {
                Some(old) if used > 0 => write(buffer, 0, old.narrow(2, 0, used)),
                _ => buffer,
            }
        }
    };
    write(buffer, used, new)
}

/// Some rows of a buffer in one of their own.
fn copied<K: Basic>(buffer: Tensor<4, K>, rows: Range<usize>) -> Tensor<4, K> {
    let [batch, heads, _, width] = buffer.dims();
    let shape = [batch, heads, rows.len(), width];
    let empty = zeros_like(&buffer, shape);
    write(empty, 0, buffer.narrow(2, rows.start, rows.len()))
}

fn write<K: Basic>(buffer: Tensor<4, K>, at: usize, rows: Tensor<4, K>) -> Tensor<4, K> {
    let [batch, heads, len, width] = rows.dims();
    buffer.slice_assign([0..batch, 0..heads, at..at + len, 0..width], rows)
}

/// Keys or values `[batch, heads, tokens, dim]` as a cache keeps them: parts, the tokens of one after those of another.
#[derive(Debug, Clone)]
pub struct CachedRows(pub Vec<CachedPart>);

/// Some of its tokens, one at least.
#[derive(Debug, Clone)]
pub enum CachedPart {
    /// As floats, which need not be those that a model computes with.
    Dense(Tensor<4>),
    /// As codes.
    Packed(PackedRows),
}

impl From<Tensor<4>> for CachedRows {
    fn from(x: Tensor<4>) -> Self {
        Self(vec![CachedPart::Dense(x)])
    }
}

impl CachedRows {
    /// As floats of `dtype`.
    pub fn dense(self, dtype: DType) -> Tensor<4> {
        let dense = |part| match part {
            CachedPart::Dense(x) => Some(x.cast(dtype)),
            CachedPart::Packed(packed) => packed.dequantize().map(|x| x.cast(dtype)),
        };
        let mut parts: Vec<_> = self.0.into_iter().filter_map(dense).collect();
        match parts.len() {
            1 => parts.remove(0),
            _ => Tensor::cat(parts, 2),
        }
    }
}

/// [`attention`](attention()) to what a cache holds. On the CPU codes are read as they are; other devices get them dequantized.
pub fn cached_attention(
    q: Tensor<4>,
    [k, v]: [CachedRows; 2],
    mask: &Mask,
    bias: ScoreBias,
    options: AttentionOptions,
) -> Tensor<3> {
    let dtype = q.dtype();
    let is_computed = |x: &CachedRows| matches!(x.0.as_slice(), [CachedPart::Dense(x)] if x.dtype() == dtype);
    if !(is_computed(&k) && is_computed(&v))
        && bias.is_plain()
        && let (Some(k), Some(v)) = (Held::new(&k), Held::new(&v))
        && let Ok(q) = flex::unwrap(q.clone())
    {
        let rows = [&k, &v].map(|parts| Cached(parts.iter().map(Held::rows).collect()));
        return attention::flash(&flex::dense_rows(q), rows, bias, mask, options);
    }
    let [k, v] = [k, v].map(|x| x.dense(dtype));
    attention([q, k, v], mask, bias, options)
}

/// What the kernel of the CPU reads.
enum Held<'a> {
    Half(FlexTensor),
    Packed {
        rows: &'a PackedRows,
        codes: FlexTensor,
        scales: FlexTensor,
        minimums: FlexTensor,
    },
}

impl<'a> Held<'a> {
    /// None where rows are elsewhere, or neither codes nor in half precision.
    fn new(rows: &'a CachedRows) -> Option<Vec<Self>> {
        let part = |part: &'a CachedPart| match part {
            CachedPart::Dense(x) => half(x).map(Self::Half),
            CachedPart::Packed(rows) => Self::packed(rows),
        };
        rows.0.iter().map(part).collect()
    }

    fn packed(rows: &'a PackedRows) -> Option<Self> {
        let buffers = rows.buffers.as_ref()?;
        let codes = flex::of_dtype(buffers.codes.clone().into_dispatch(), DType::I32)?;
        Some(Self::Packed {
            rows,
            codes: flex::contiguous(codes),
            scales: half(&buffers.scales)?,
            minimums: half(&buffers.minimums)?,
        })
    }

    fn rows(&self) -> Part<'_> {
        match self {
            Self::Half(x) => Part::Half(halves(x)),
            Self::Packed {
                rows,
                codes,
                scales,
                minimums,
            } => {
                let words = flex::view_of::<i32>(codes);
                let [batch, heads, _, width] = words.dims;
                Part::Packed(Packed {
                    codes: View {
                        values: bytemuck::cast_slice(words.values),
                        dims: [batch, heads, rows.len(), 4 * width],
                        strides: words.strides.map(|stride| 4 * stride),
                    },
                    scales: halves(scales),
                    minimums: halves(minimums),
                    ends: &rows.ends,
                    format: rows.format,
                    dim: rows.dim,
                })
            }
        }
    }
}

/// Half precision on the CPU.
fn half(x: &Tensor<4>) -> Option<FlexTensor> {
    flex::of_dtype(x.clone().into_dispatch(), DType::F16).map(flex::dense_rows)
}

fn halves(x: &FlexTensor) -> View<'_, u16> {
    let view = flex::view_of::<f16>(x);
    View {
        values: view.values.reinterpret_cast(),
        dims: view.dims,
        strides: view.strides,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Visible;
    use crate::testing::{noise, worst};

    fn formats() -> impl Iterator<Item = RowFormat> {
        let bits = [CodeBits::Two, CodeBits::Four, CodeBits::Eight];
        let axes = [GroupAxis::Channel, GroupAxis::Token];
        bits.into_iter().flat_map(move |bits| {
            axes.into_iter()
                .flat_map(move |axis| [5, 32].map(|group| RowFormat { bits, group, axis }))
        })
    }

    fn values(x: &Tensor<4>) -> Vec<f32> {
        x.clone().into_data().iter::<f32>().collect()
    }

    fn squared_error(x: &Tensor<4>, y: &Tensor<4>) -> f32 {
        let x = x.clone().cast(FloatDType::F32);
        (x - y.clone()).square().sum().into_scalar()
    }

    #[test]
    fn the_kernel_packs_like_tensor_operations() {
        for format in formats() {
            for shape in [[2, 3, 10, 7], [1, 1, 1, 1], [1, 2, 64, 64], [2, 1, 37, 80]] {
                let x = halved(noise(3, shape) * 3.0 + 1.0);
                let ours = format.quantize(x.clone());
                let reference = format.quantize_by_tensors(x.clone().cast(FloatDType::F32), DType::F16);
                if format.rounds() > 0 {
                    // Sums in another order may make another code of a value between two.
                    let [ours, reference] = [ours, reference].map(|buffers| {
                        let mut rows = PackedRows::new(format);
                        rows.append(x.clone(), 0);
                        rows.buffers = Some(buffers);
                        squared_error(&x, &rows.dequantize().unwrap())
                    });
                    assert!(
                        (ours - reference).abs() <= 1e-2 * reference,
                        "{format:?} {shape:?}"
                    );
                    continue;
                }
                for (ours, reference) in [
                    (&ours.scales, &reference.scales),
                    (&ours.minimums, &reference.minimums),
                ] {
                    assert_eq!(ours.dims(), reference.dims());
                    assert_eq!(values(ours), values(reference), "{format:?} {shape:?}");
                }
                let words = |x: Tensor<4, Int>| x.into_data().iter::<i32>().collect::<Vec<_>>();
                assert_eq!(words(ours.codes), words(reference.codes), "{format:?} {shape:?}");
            }
        }
    }

    /// The squared error of codes that reach from the least to the largest value of each channel of each block.
    fn error_of_ranges(x: &Tensor<4>, format: RowFormat) -> f32 {
        let [_, _, tokens, dim] = x.dims();
        let most = ((1 << format.bits as usize) - 1) as f32;
        let mut error = 0.0;
        for rows in values(x).chunks(tokens * dim) {
            for block in rows.chunks(format.group * dim) {
                for channel in 0..dim {
                    let group: Vec<f32> = block.iter().skip(channel).step_by(dim).copied().collect();
                    let least = group.iter().copied().fold(f32::INFINITY, f32::min);
                    let largest = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let scale = (largest - least) / most;
                    let of = |x: &f32| ((x - least) / scale).round() * scale + least - x;
                    error += group.iter().map(|x| of(x) * of(x)).sum::<f32>();
                }
            }
        }
        error
    }

    #[test]
    fn values_are_close() {
        for format in formats() {
            let x = halved(noise(3, [2, 3, 64, 48]));
            let mut rows = PackedRows::new(format);
            rows.append(x.clone(), 0);
            let y = rows.dequantize().unwrap();
            let reference = rows.values_by_tensors(rows.buffers.as_ref().unwrap());
            assert_eq!(values(&y), values(&reference), "{format:?}");
            // Values lie between -1 and 1; scales are rounded to 11 bits.
            let step = 2.0 / ((1 << format.bits as usize) - 1) as f32;
            let steps = if format.rounds() > 0 {
                let (error, of_ranges) = (squared_error(&x, &y), error_of_ranges(&x, format));
                let less = match (format.bits, format.group) {
                    (CodeBits::Two, 32) => 0.8,
                    _ => 0.95,
                };
                assert!(error < less * of_ranges, "{format:?}: {error} {of_ranges}");
                1.0
            } else {
                0.5
            };
            assert!(
                worst(x.cast(FloatDType::F32), y) < step * steps + 1.1e-3,
                "{format:?}"
            );
        }
        // What has no range is kept exactly.
        let same = halved(noise::<4>(3, [1, 1, 1, 1]).expand([1, 1, 9, 33]));
        for format in formats() {
            let mut rows = PackedRows::new(format);
            rows.append(same.clone(), 0);
            assert_eq!(
                worst(same.clone().cast(FloatDType::F32), rows.dequantize().unwrap()),
                0.0
            );
        }
    }

    #[test]
    fn what_is_no_number_shows() {
        let mut x = vec![0.5f32; 4 * 8];
        x[2 * 8 + 3] = f32::NAN;
        let x = || Tensor::<4>::from_data(TensorData::new(x.clone(), [1, 1, 4, 8]), &Device::flex());
        for (axis, nans) in [(GroupAxis::Channel, 4), (GroupAxis::Token, 8)] {
            let format = RowFormat {
                bits: CodeBits::Four,
                group: 8,
                axis,
            };
            let mut rows = PackedRows::new(format);
            rows.append(x(), 0);
            let y = values(&rows.dequantize().unwrap());
            assert_eq!(y.iter().filter(|x| x.is_nan()).count(), nans);
            let y = format.quantize_by_tensors(x(), DType::F32).minimums;
            assert_eq!(values(&y).iter().filter(|x| x.is_nan()).count(), 1);
        }
        // What half precision cannot hold stays at its ends.
        let large = Tensor::<4>::full([1, 1, 1, 2], 1e9, &Device::flex());
        assert_eq!(values(&halved(large)), [65504.0; 2]);
    }

    /// Rows of several blocks, cut back within one, with room or without, and what they must give.
    fn rows(
        format: RowFormat,
        seed: u32,
        [batch, heads, dim]: [usize; 3],
        room: usize,
    ) -> (PackedRows, Tensor<4>) {
        let mut rows = PackedRows::new(format);
        let mut expected = Vec::new();
        for (index, (tokens, keep)) in [(2 * format.group, 2 * format.group), (format.group, 3)]
            .into_iter()
            .chain([(3 * format.group, 3 * format.group)])
            .enumerate()
        {
            let x = noise(seed + index as u32, [batch, heads, tokens, dim]);
            let mut alone = PackedRows::new(format);
            alone.append(x.clone(), 0);
            expected.push(alone.dequantize().unwrap().narrow(2, 0, keep));
            rows.append(x, room);
            rows.truncate(rows.len() - (tokens - keep));
        }
        (rows, Tensor::cat(expected, 2))
    }

    #[test]
    fn rows_are_packed_once() {
        for format in formats() {
            for room in [0, 1000] {
                let (mut ours, expected) = rows(format, 3, [2, 2, 24], room);
                let len = 5 * format.group + 3;
                assert_eq!(ours.len(), len);
                assert_eq!(worst(ours.dequantize().unwrap(), expected.clone()), 0.0);

                let ids =
                    Tensor::from_data(TensorData::new(vec![1, 0, 1], [3]), (&Device::flex(), DType::I32));
                ours.select(ids.clone());
                let expected = expected.select(0, ids);
                assert_eq!(worst(ours.dequantize().unwrap(), expected.clone()), 0.0);

                // The second block ends after two groups, the third within one.
                let first = ours.block_end(2 * format.group + 1);
                assert_eq!((first, ours.block_end(format.group - 1)), (2 * format.group, 0));
                ours.drop_front(first);
                let expected = expected.narrow(2, first, len - first);
                assert_eq!(worst(ours.dequantize().unwrap(), expected.clone()), 0.0);
                assert_eq!(ours.block_end(3), 3);
                // Within a block.
                ours.drop_front(2);
                let expected = expected.narrow(2, 2, len - first - 2);
                assert_eq!(worst(ours.dequantize().unwrap(), expected.clone()), 0.0);
                let some = ours.values(1..format.group).unwrap();
                assert_eq!(worst(some, expected.narrow(2, 1, format.group - 1)), 0.0);
                assert_eq!(ours.block_end(3), 1);
                ours.truncate(0);
                assert!(ours.is_empty() && ours.dequantize().is_none());
                ours.append(noise(9, [3, 2, 1, 24]), 0);
                assert_eq!(ours.len(), 1);
            }
        }
    }

    #[test]
    fn room_is_taken_once() {
        let format = RowFormat {
            bits: CodeBits::Four,
            group: 64,
            axis: GroupAxis::Token,
        };
        let mut rows = PackedRows::new(format);
        rows.append(noise(1, [1, 2, 64, 64]), 640);
        let bytes = rows.num_bytes();
        // Codes of 32 bytes, a scale and a minimum.
        assert_eq!(bytes, 2 * 640 * (32 + 4));
        for _ in 0..9 {
            rows.append(noise(1, [1, 2, 64, 64]), 640);
        }
        assert_eq!((rows.len(), rows.num_bytes()), (640, bytes));
    }

    #[test]
    fn attention_reads_codes_as_they_are() {
        for format in formats() {
            for (seq, recent) in [(1, 1), (2, 9), (33, 40), (1, 5)] {
                for (heads, kv_heads, dim, value_dim) in [(6, 2, 3, 5), (4, 4, 64, 64), (40, 1, 80, 24)] {
                    let (past, _) = rows(format, 1, [2, kv_heads, dim], 0);
                    let (past_values, _) = rows(format, 5, [2, kv_heads, value_dim], 500);
                    let keys = past.len() + recent;
                    let last =
                        |seed, dim| halved(noise(seed, [2, kv_heads, recent + 3, dim])).narrow(2, 1, recent);
                    let packed = CachedPart::Packed;
                    for extras in [false, true] {
                        // The latest tokens in half precision, or in 8 bits.
                        let window = |x: Tensor<4>| match extras {
                            false => CachedPart::Dense(x),
                            true => {
                                let bits = CodeBits::Eight;
                                let axis = GroupAxis::Token;
                                let mut rows = PackedRows::new(RowFormat {
                                    bits,
                                    group: 32,
                                    axis,
                                });
                                rows.append(x, 0);
                                packed(rows)
                            }
                        };
                        let mask = Mask::new(Visible::Causal {
                            first_key: 2,
                            first_query: 2 + keys - seq,
                            window: extras.then_some(37),
                            padding: if extras { vec![0] } else { vec![11, 0] },
                        });
                        let bias = || match extras {
                            false => ScoreBias::default(),
                            true => ScoreBias {
                                bias: Some(noise(5, [1, 1, seq, keys])),
                                alibi: Some(noise::<1>(4, [heads]).abs()),
                                sinks: Some(noise(4, [heads])),
                            },
                        };
                        let options = AttentionOptions {
                            scale: extras.then_some(0.4),
                            softcap: extras.then_some(2.0),
                            dropout: None,
                        };
                        let q = noise(9, [2, seq, heads, dim]).swap_dims(1, 2);
                        let kv = [
                            [packed(past.clone()), window(last(7, dim))],
                            [packed(past_values.clone()), window(last(8, value_dim))],
                        ];
                        let kv = kv.map(|parts| CachedRows(parts.to_vec()));
                        assert!(kv.iter().all(|rows| Held::new(rows).is_some()));
                        let dense = kv.clone().map(|rows| rows.dense(DType::F32));
                        let [k, v] = dense.clone();
                        let expected = attention([q.clone(), k, v], &mask, bias(), options);
                        let ours = cached_attention(q.clone(), kv, &mask, bias(), options);
                        assert!(worst(ours, expected) < 1e-5, "{format:?}");

                        let halves = dense.map(|x| CachedRows::from(halved(x)));
                        let [k, v] = halves.clone().map(|x| x.dense(DType::F32));
                        let expected = attention([q.clone(), k, v], &mask, bias(), options);
                        let ours = cached_attention(q, halves, &mask, bias(), options);
                        assert!(worst(ours, expected) < 1e-5);
                    }
                }
            }
        }
    }
}
