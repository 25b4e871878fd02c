//! The key/value cache: one object per layer.

use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use oxiformers_kernels::cached::halved;
use oxiformers_kernels::{CachedPart, CachedRows, CodeBits, GroupAxis, PackedRows, RowFormat, zeros_like};

/// The buffer of the latest tokens of a quantized cache grows by so many: there is little to copy.
const STEP: usize = 16;

/// How a cache keeps what it has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheKind {
    /// Grows as needed; layers with a sliding window drop what no query can reach any more.
    #[default]
    Dynamic,
    /// Room for a fixed number of tokens from the start; never moved.
    Static {
        /// Tokens per sequence, the prompt included.
        max_len: usize,
    },
    /// Grows as needed and keeps everything, so that it can be [cut back](Cache::truncate) to any length.
    Full,
}

/// What a cache keeps keys and values as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CachePrecision {
    /// The numbers that the model computes with.
    #[default]
    Full,
    /// Half precision, where the device has it.
    F16,
    /// Codes of a few bits, but for the latest tokens.
    Quantized(QuantizedCacheConfig),
}

/// Numbers of a quantized cache (Liu et al., 2024, "KIVI"). The latest tokens are kept in 8 bits or in half precision;
/// where they would become more than `residual_length`, the oldest `group_size` of them are packed, once and for all. What
/// a pass appends is never packed before its end. The first token, which is attended to like no other (Xiao et al., 2024,
/// "StreamingLLM"), is packed by itself: by channel, that keeps it as it is, and its outliers out of others' groups.
///
/// What an encoder has read is not packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizedCacheConfig {
    /// Bits of a code.
    pub bits: CodeBits,
    /// Values that share a scale and a minimum, and tokens that are packed at a time: above 0.
    pub group_size: usize,
    /// Most tokens that are not packed between passes; `group_size` if that is more.
    pub residual_length: usize,
    /// Bits of these tokens, whose groups are those of neighbouring channels; `None` for half precision.
    pub residual_bits: Option<CodeBits>,
    /// Groups of keys.
    pub key_axis: GroupAxis,
    /// Groups of values.
    pub value_axis: GroupAxis,
}

impl QuantizedCacheConfig {
    /// Groups of 64, a window of 128 tokens in 8 bits (of codes of 8 bits, in half precision), keys by channel, values by
    /// token.
    pub fn new(bits: CodeBits) -> Self {
        Self {
            bits,
            group_size: 64,
            residual_length: 128,
            residual_bits: (bits != CodeBits::Eight).then_some(CodeBits::Eight),
            key_axis: GroupAxis::Channel,
            value_axis: GroupAxis::Token,
        }
    }

    fn format(&self, bits: CodeBits, axis: GroupAxis) -> RowFormat {
        RowFormat {
            bits,
            group: self.group_size.max(1),
            axis,
        }
    }

    /// The latest tokens, before there are any.
    fn recent(&self) -> Recent {
        match self.residual_bits {
            None => Recent::Floats(None),
            Some(bits) => Recent::Codes(PackedRows::new(self.format(bits, GroupAxis::Token))),
        }
    }
}

/// Keys and values of the tokens seen so far, for every layer, with the left padding of each sequence; for the decoder
/// of an encoder-decoder, also those of what the encoder has read.
#[derive(Debug, Clone)]
pub struct Cache {
    layers: Vec<LayerCache>,
    source: Option<Source>,
    padding: Vec<usize>,
    /// Where the sequence of each token begins, where several stand in a row.
    segments: Vec<Vec<usize>>,
    len: usize,
    /// Virtual tokens before the others, which count nowhere else.
    virtual_tokens: usize,
    /// What the layers made of the last of them.
    prompt_state: Option<Tensor<3>>,
    /// Length that the sequences are to have, as far as is known.
    context: usize,
    /// Length beyond which the rotary frequencies of all positions are others.
    rope_switch: Option<usize>,
    precision: CachePrecision,
}

impl Cache {
    /// An empty cache. `windows` has one entry per layer: its sliding window, or `None` for full
    /// attention. `padding` has one entry per sequence: how many padding tokens stand left of it.
    pub fn new(kind: CacheKind, windows: &[Option<usize>], padding: Vec<usize>) -> Self {
        let layers = windows
            .iter()
            .map(|window| LayerCache {
                packed: None,
                half: false,
                dequantizing: false,
                recent: [const { Recent::Floats(None) }; 2],
                start: 0,
                len: 0,
                window: window.filter(|_| kind == CacheKind::Dynamic),
                reserve: if let CacheKind::Static { max_len } = kind {
                    max_len
                } else {
                    0
                },
            })
            .collect();
        Self {
            layers,
            source: None,
            padding,
            segments: Vec::new(),
            len: 0,
            virtual_tokens: 0,
            prompt_state: None,
            context: 0,
            rope_switch: None,
            precision: CachePrecision::Full,
        }
    }

    /// Keeps keys and values in another precision. For a cache that has not seen anything.
    #[must_use]
    pub fn with_precision(mut self, precision: CachePrecision) -> Self {
        self.precision = precision;
        for layer in &mut self.layers {
            layer.half = precision != CachePrecision::Full;
            layer.packed = None;
            if let CachePrecision::Quantized(config) = precision {
                layer.packed = Some(Packed::new(config));
                layer.recent = [config.recent(), config.recent()];
            }
        }
        self
    }

    /// Gives attention floats in the place of codes: what it must come to, for tests.
    #[doc(hidden)]
    #[must_use]
    pub fn dequantizing(mut self) -> Self {
        self.layers.iter_mut().for_each(|layer| layer.dequantizing = true);
        self
    }

    /// What keys and values are kept as.
    pub fn precision(&self) -> CachePrecision {
        self.precision
    }

    /// Number of tokens seen, padding included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Says which sequence each token of the first pass belongs to, where several stand in a row (`[batch][seq]`): they do
    /// not see each other, and positions begin anew with each. Nothing can be appended to such rows.
    pub fn set_segments(&mut self, segments: &[Vec<u32>]) {
        let starts = |row: &Vec<u32>| {
            let mut start = 0;
            let of = |at: usize| {
                if at > 0 && row[at] != row[at - 1] {
                    start = at;
                }
                start
            };
            (0..row.len()).map(of).collect()
        };
        self.segments = segments.iter().map(starts).collect();
    }

    /// Where the sequence of each token begins, where several stand in a row.
    pub fn segments(&self) -> &[Vec<usize>] {
        &self.segments
    }

    /// Left padding of each sequence.
    pub fn padding(&self) -> &[usize] {
        &self.padding
    }

    /// Gives the sequences another padding; returns what they had.
    pub(crate) fn replace_padding(&mut self, padding: Vec<usize>) -> Vec<usize> {
        std::mem::replace(&mut self.padding, padding)
    }

    /// Virtual tokens that stand before all others.
    pub(crate) fn virtual_tokens(&self) -> usize {
        self.virtual_tokens
    }

    /// Keeps what the layers made of the last virtual token: `[batch, 1, hidden_size]`.
    pub(crate) fn set_prompt_state(&mut self, x: Tensor<3>) {
        self.prompt_state = Some(x);
    }

    /// The hidden state of the last virtual token, of which the first token of a text follows: `[batch, 1, hidden_size]`.
    /// None where there is no such token, or it was taken already.
    pub fn take_prompt_state(&mut self) -> Option<Tensor<3>> {
        self.prompt_state.take()
    }

    /// Says that what the layers hold are virtual tokens.
    pub(crate) fn set_virtual_tokens(&mut self, count: usize) {
        self.virtual_tokens = count;
    }

    /// The cache of one layer.
    pub(crate) fn layer(&mut self, index: usize) -> &mut LayerCache {
        &mut self.layers[index]
    }

    /// First position that the layer still holds once `seq` more tokens are appended.
    pub(crate) fn start_after(&self, index: usize, seq: usize) -> usize {
        self.layers[index].start_after(seq)
    }

    /// Counts the tokens of a finished forward pass.
    pub(crate) fn advance(&mut self, seq: usize) {
        self.len += seq;
    }

    /// Sets what decoders attend to besides their own tokens: keys and values `[batch, heads, source, head_dim]` of
    /// each layer, and where the real tokens of each sequence lie.
    pub fn set_source(&mut self, layers: Vec<(Tensor<4>, Tensor<4>)>, tokens: Vec<Range<usize>>) {
        self.source = Some(Source {
            layers,
            rows: (0..tokens.len()).collect(),
            tokens,
        });
    }

    /// Keys and values of what an encoder has read, for one layer.
    pub(crate) fn source_of(&self, layer: usize) -> Option<(Tensor<4>, Tensor<4>)> {
        self.source.as_ref()?.layers.get(layer).cloned()
    }

    /// Others in their place; those of other layers are forgotten.
    pub(crate) fn set_source_of(&mut self, layer: usize, own: (Tensor<4>, Tensor<4>)) {
        if let Some(source) = &mut self.source {
            source.layers = vec![own; layer + 1];
        }
    }

    /// The same without any token.
    pub(crate) fn emptied(&self) -> Self {
        let mut own = self.clone();
        for layer in &mut own.layers {
            layer.recent.iter_mut().for_each(Recent::clear);
            let packed = layer.packed.iter_mut().flat_map(|packed| &mut packed.rows);
            packed.for_each(PackedRows::clear);
        }
        own.clear();
        own.context = self.context;
        own
    }

    /// Whether there is a source.
    pub fn has_source(&self) -> bool {
        self.source.is_some()
    }

    pub(crate) fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }

    /// Keeps the sequences `rows`, in that order; a row may be named several times.
    pub fn select(&mut self, rows: &[usize]) {
        self.padding = rows.iter().map(|row| self.padding[*row]).collect();
        if let Some(source) = &mut self.source {
            source.select(rows);
        }
        for layer in &mut self.layers {
            let Some(device) = layer.recent[0].device() else {
                continue;
            };
            let ids = row_ids(rows, &device);
            for packed in layer.packed.iter_mut().flat_map(|packed| &mut packed.rows) {
                packed.select(ids.clone());
            }
            for recent in &mut layer.recent {
                recent.select(ids.clone());
            }
        }
    }

    /// Makes room for `len` tokens at the next allocation, so that appending up to there moves nothing.
    pub fn reserve(&mut self, len: usize) {
        for layer in &mut self.layers {
            layer.reserve = layer
                .reserve
                .max(layer.window.map_or(len, |window| len.min(2 * window)));
        }
    }

    /// Forgets everything after the first `len` tokens. Returns whether that was possible: a layer with a
    /// sliding window has dropped what such a shorter past would need, unless the cache is
    /// [`CacheKind::Full`] or [`CacheKind::Static`].
    pub fn truncate(&mut self, len: usize) -> bool {
        if len >= self.len {
            return true;
        }
        if self.layers.iter().any(|layer| layer.start > 0) {
            return false;
        }
        for layer in &mut self.layers {
            layer.truncate(self.virtual_tokens + len);
        }
        self.len = len;
        true
    }

    /// Says how long the sequences, padding aside, will be after what runs next, so that a prompt that runs in
    /// pieces gets the rotary frequencies of the whole where these depend on the length (dynamic, longrope).
    ///
    /// Returns false, and forgets everything, where what is held was made with other frequencies.
    pub fn prepare(&mut self, context: usize) -> bool {
        let switched = self.len > 0
            && self
                .rope_switch
                .is_some_and(|most| (self.context > most) != (context > most));
        if switched {
            self.clear();
        }
        self.context = context;
        !switched
    }

    /// Number of tokens that can follow before [`prepare`](Self::prepare) forgets everything.
    pub fn until_switch(&self) -> Option<usize> {
        self.rope_switch?.checked_sub(self.context)
    }

    pub(crate) fn context(&self) -> usize {
        self.context
    }

    pub(crate) fn set_rope_switch(&mut self, most: usize) {
        self.rope_switch = Some(most);
    }

    /// Forgets everything, keeping the sequences' padding.
    pub fn clear(&mut self) {
        for layer in &mut self.layers {
            layer.truncate(0);
            layer.start = 0;
        }
        self.len = 0;
        self.virtual_tokens = 0;
        self.prompt_state = None;
        self.context = 0;
    }

    /// Bytes that keys and values occupy, room for more included.
    pub fn num_bytes(&self) -> usize {
        let layer = |layer: &LayerCache| {
            let packed = layer.packed.iter().flat_map(|packed| &packed.rows);
            let recent = layer.recent.iter().map(Recent::num_bytes);
            packed.map(PackedRows::num_bytes).chain(recent).sum::<usize>()
        };
        let source = self.source.iter().flat_map(|source| &source.layers);
        let source = source.map(|(keys, values)| num_bytes(keys) + num_bytes(values));
        self.layers.iter().map(layer).chain(source).sum()
    }
}

fn num_bytes(x: &Tensor<4>) -> usize {
    x.shape().num_elements() * x.dtype().size()
}

fn row_ids(rows: &[usize], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
    let len = ids.len();
    Tensor::from_data(TensorData::new(ids, [len]), device)
}

/// What decoders attend to besides their own tokens.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// Keys and values of each layer: `[batch, heads, source, head_dim]`.
    pub(crate) layers: Vec<(Tensor<4>, Tensor<4>)>,
    /// Where the real tokens of each sequence lie.
    pub(crate) tokens: Vec<Range<usize>>,
    /// Which of the sources that were set each sequence has.
    rows: Vec<usize>,
}

impl Source {
    fn select(&mut self, rows: &[usize]) {
        let selected: Vec<usize> = rows.iter().map(|row| self.rows[*row]).collect();
        // Beams change places among those of the same source.
        if selected == self.rows {
            return;
        }
        self.rows = selected;
        self.tokens = rows.iter().map(|row| self.tokens[*row].clone()).collect();
        for (keys, values) in &mut self.layers {
            let ids = row_ids(rows, &keys.device());
            *keys = keys.clone().select(0, ids.clone());
            *values = values.clone().select(0, ids);
        }
    }
}

/// Keys and values of one layer, in buffers with room at the end.
#[derive(Debug, Clone)]
pub(crate) struct LayerCache {
    /// The first entries as codes, in a quantized cache.
    packed: Option<Packed>,
    /// Whether the others are kept in half precision.
    half: bool,
    dequantizing: bool,
    /// Keys and values of these others; they may differ in `head_dim`.
    recent: [Recent; 2],
    /// Position of the first entry.
    start: usize,
    /// Number of entries, packed ones included.
    len: usize,
    window: Option<usize>,
    reserve: usize,
}

/// Entries as codes.
#[derive(Debug, Clone)]
struct Packed {
    /// Keys and values.
    rows: [PackedRows; 2],
    group_size: usize,
    residual_length: usize,
}

impl Packed {
    fn new(config: QuantizedCacheConfig) -> Self {
        let axes = [config.key_axis, config.value_axis];
        Self {
            rows: axes.map(|axis| PackedRows::new(config.format(config.bits, axis))),
            group_size: config.group_size.max(1),
            residual_length: config.residual_length,
        }
    }

    fn len(&self) -> usize {
        self.rows[0].len()
    }

    /// The whole groups among `tokens`.
    fn whole(&self, tokens: usize) -> usize {
        tokens - tokens % self.group_size
    }

    /// How many of `tokens` that are not packed must be for one more to have its place among them.
    fn leaving(&self, tokens: usize) -> usize {
        let most = self.whole(tokens);
        let excess = (tokens + 1).saturating_sub(self.residual_length);
        // No more than there are, before a multiple that may be beyond any.
        excess.min(most).next_multiple_of(self.group_size)
    }
}

/// Keys or values of the latest tokens, in a buffer with room at the end.
#[derive(Debug, Clone)]
enum Recent {
    /// `[batch, heads, capacity, head_dim]`.
    Floats(Option<Tensor<4>>),
    Codes(PackedRows),
}

impl Recent {
    /// Forgets all but some tokens, and appends those of `new` `[batch, heads, seq, head_dim]`. There is room for as many
    /// as `reserve` and for half as many again where that is not enough; without it, for [`STEP`] at most.
    fn update(&mut self, kept: Range<usize>, new: Tensor<4>, reserve: Option<usize>) {
        let buffer = match self {
            Self::Floats(buffer) => buffer,
            Self::Codes(rows) => {
                rows.drop_front(kept.start);
                return rows.append(new, 0);
            }
        };
        let needed = kept.len() + new.dims()[2];
        let Some(old) = buffer.take() else {
            let capacity = reserve.unwrap_or(0);
            *buffer = Some(match capacity <= needed {
                true => new,
                false => write(grown(&new, capacity), 0, new),
            });
            return;
        };
        let held = old.dims()[2];
        let capacity = match reserve {
            None => needed.next_multiple_of(STEP),
            Some(_) if needed <= held => held,
            Some(reserve) => (needed + needed / 2).max(64).max(reserve),
        };
        let old = match kept.start == 0 && capacity == held {
            true => old,
            false if kept.is_empty() => grown(&new, capacity),
            false => write(grown(&new, capacity), 0, old.narrow(2, kept.start, kept.len())),
        };
        *buffer = Some(write(old, kept.len(), new));
    }

    fn device(&self) -> Option<Device> {
        match self {
            Self::Floats(buffer) => buffer.as_ref().map(Tensor::device),
            Self::Codes(rows) => rows.device(),
        }
    }

    /// Some of the tokens, one at least, as floats.
    fn values(&self, tokens: Range<usize>) -> Option<Tensor<4>> {
        match self {
            Self::Floats(buffer) => Some(buffer.clone()?.narrow(2, tokens.start, tokens.len())),
            Self::Codes(rows) => rows.values(tokens),
        }
    }

    /// The first `len` tokens, which are all.
    fn seen(&self, len: usize) -> Option<CachedPart> {
        match self {
            Self::Floats(buffer) => Some(CachedPart::Dense(view(buffer.as_ref()?, len))),
            Self::Codes(rows) => Some(CachedPart::Packed(rows.clone())),
        }
    }

    /// Forgets what comes after the first `len` tokens.
    fn truncate(&mut self, len: usize) {
        if let Self::Codes(rows) = self {
            rows.truncate(len);
        }
    }

    /// Forgets all tokens and the room for them.
    fn clear(&mut self) {
        match self {
            Self::Floats(buffer) => *buffer = None,
            Self::Codes(rows) => rows.clear(),
        }
    }

    /// Keeps the sequences `ids`, in that order.
    fn select(&mut self, ids: Tensor<1, Int>) {
        match self {
            Self::Floats(buffer) => *buffer = buffer.take().map(|x| x.select(0, ids)),
            Self::Codes(rows) => rows.select(ids),
        }
    }

    fn num_bytes(&self) -> usize {
        match self {
            Self::Floats(buffer) => buffer.as_ref().map_or(0, num_bytes),
            Self::Codes(rows) => rows.num_bytes(),
        }
    }
}

impl LayerCache {
    /// First position that is held once `seq` more tokens are appended.
    fn start_after(&self, seq: usize) -> usize {
        let [codes, floats] = self.dropped(seq);
        self.start + codes + floats
    }

    /// How many of the first packed entries, and of the first others, no query reaches any more.
    fn dropped(&self, seq: usize) -> [usize; 2] {
        let unreached = match self.window {
            // The earliest of the new queries still sees `window - 1` tokens before itself.
            Some(window) => (self.start + self.len + 1)
                .saturating_sub(window.max(1))
                .saturating_sub(self.start)
                .min(self.len + seq),
            None => 0,
        };
        match &self.packed {
            None => [0, unreached],
            // Whole blocks, and not one by one what stands beside codes: there is little of it.
            Some(packed) => {
                let codes = packed.rows[0].block_end(unreached);
                let floats = match packed.len() {
                    all if codes == all => packed.whole(unreached.min(self.len) - all),
                    _ => 0,
                };
                [codes, floats]
            }
        }
    }

    /// Forgets what comes after the first `len` entries.
    fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for packed in self.packed.iter_mut().flat_map(|packed| &mut packed.rows) {
            packed.truncate(len);
        }
        let recent = self.len - self.num_packed();
        self.recent.iter_mut().for_each(|rows| rows.truncate(recent));
    }

    /// Number of packed entries.
    fn num_packed(&self) -> usize {
        self.packed.as_ref().map_or(0, Packed::len)
    }

    /// Appends keys and values `[batch, heads, seq, head_dim]`; returns all that the new queries may see.
    pub(crate) fn update(&mut self, keys: Tensor<4>, values: Tensor<4>) -> [CachedRows; 2] {
        let (keys, values) = match self.half {
            true => (halved(keys), halved(values)),
            false => (keys, values),
        };
        let seq = keys.dims()[2];
        let [codes, mut floats] = self.dropped(seq);
        self.start += codes + floats;
        self.len -= codes + floats;
        let mut reserve = Some(self.reserve);
        if let Some(packed) = &mut self.packed {
            let leaving = packed.leaving(self.len + codes - packed.len());
            // Room for all that will be packed by then.
            let room = packed.leaving(self.reserve.saturating_sub(1));
            // The first of all tokens makes a block of its own.
            let first = usize::from(packed.rows[0].is_empty() && self.start == 0).min(leaving);
            for (rows, recent) in packed.rows.iter_mut().zip(&self.recent) {
                rows.drop_front(codes);
                for tokens in [floats..floats + first, floats + first..floats + leaving] {
                    if !tokens.is_empty()
                        && let Some(x) = recent.values(tokens)
                    {
                        rows.append(x, room);
                    }
                }
            }
            floats += leaving;
            reserve = None;
        }
        let kept = self.len - self.num_packed();
        for (recent, new) in self.recent.iter_mut().zip([keys, values]) {
            recent.update(floats..floats + kept, new, reserve);
        }
        self.len += seq;
        [0, 1].map(|index| {
            let packed = self.packed.iter().map(|packed| &packed.rows[index]);
            let packed = packed.filter(|rows| !rows.is_empty()).cloned();
            let recent = self.recent[index].seen(kept + seq);
            let rows = CachedRows(packed.map(CachedPart::Packed).chain(recent).collect());
            match self.dequantizing {
                true => rows.dense(DType::F32).into(),
                false => rows,
            }
        })
    }
}

/// An empty buffer for `capacity` entries like `like`'s.
fn grown(like: &Tensor<4>, capacity: usize) -> Tensor<4> {
    let [batch, heads, _, head_dim] = like.dims();
    zeros_like(like, [batch, heads, capacity, head_dim])
}

fn write(buffer: Tensor<4>, at: usize, values: Tensor<4>) -> Tensor<4> {
    let [batch, heads, seq, head_dim] = values.dims();
    buffer.slice_assign([0..batch, 0..heads, at..at + seq, 0..head_dim], values)
}

fn view(buffer: &Tensor<4>, len: usize) -> Tensor<4> {
    if buffer.dims()[2] == len {
        buffer.clone()
    } else {
        buffer.clone().narrow(2, 0, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nearest(x: Tensor<4>) -> Vec<i32> {
        x.into_data().iter::<f32>().map(|x| x.round() as i32).collect()
    }

    fn dense(rows: [CachedRows; 2]) -> [Tensor<4>; 2] {
        rows.map(|rows| rows.dense(DType::F32))
    }

    /// Appends positions `from..to` in pieces of `step` and returns the positions that the last piece sees.
    fn feed(cache: &mut Cache, layer: usize, from: usize, to: usize, step: usize) -> Vec<i32> {
        let mut seen = Vec::new();
        for at in (from..to).step_by(step) {
            let positions: Vec<f32> = (at..to.min(at + step)).map(|position| position as f32).collect();
            let shape = [1, 1, positions.len(), 1];
            let values = Tensor::<4>::from_data(TensorData::new(positions, shape), &Device::flex());
            let [keys, same] = dense(cache.layer(layer).update(values.clone(), values));
            seen = nearest(keys);
            assert_eq!(seen, nearest(same));
        }
        seen
    }

    #[test]
    fn a_window_drops_what_no_query_reaches() {
        for step in [1, 2, 3, 5] {
            let mut cache = Cache::new(CacheKind::Dynamic, &[Some(4), None], vec![0]);
            let seen = feed(&mut cache, 0, 0, 30, step);
            // The first query of the last piece sees three tokens before itself.
            let first = 30 - (30 - 1) % step - 1;
            assert_eq!(seen, (first as i32 - 3..30).collect::<Vec<_>>(), "step {step}");
            assert_eq!(feed(&mut cache, 1, 0, 30, step), (0..30).collect::<Vec<_>>());
        }
        let mut full = Cache::new(CacheKind::Full, &[Some(4)], vec![0]);
        assert_eq!(feed(&mut full, 0, 0, 30, 7), (0..30).collect::<Vec<_>>());
    }

    #[test]
    fn a_static_cache_is_never_moved() {
        let mut cache = Cache::new(CacheKind::Static { max_len: 16 }, &[None], vec![0]);
        assert_eq!(feed(&mut cache, 0, 0, 3, 3), [0, 1, 2]);
        let bytes = cache.num_bytes();
        assert_eq!(feed(&mut cache, 0, 3, 16, 1), (0..16).collect::<Vec<_>>());
        assert_eq!(cache.num_bytes(), bytes);
        // Beyond its room it grows rather than lose anything.
        assert_eq!(feed(&mut cache, 0, 16, 18, 1), (0..18).collect::<Vec<_>>());
    }

    #[test]
    fn cutting_back() {
        let mut cache = Cache::new(CacheKind::Full, &[Some(4), None], vec![0]);
        for layer in 0..2 {
            feed(&mut cache, layer, 0, 10, 5);
        }
        cache.advance(10);
        assert!(cache.truncate(6));
        assert_eq!(cache.len(), 6);
        assert_eq!(feed(&mut cache, 1, 6, 8, 1), (0..8).collect::<Vec<_>>());

        let mut windowed = Cache::new(CacheKind::Dynamic, &[Some(4)], vec![0]);
        feed(&mut windowed, 0, 0, 10, 1);
        windowed.advance(10);
        assert!(!windowed.truncate(6));
        assert_eq!(windowed.len(), 10);
        assert!(windowed.truncate(12));
        windowed.clear();
        assert_eq!(feed(&mut windowed, 0, 0, 2, 1), [0, 1]);
    }

    #[test]
    fn rows_are_selected_and_repeated() {
        let mut cache = Cache::new(CacheKind::Dynamic, &[None], vec![2, 0]);
        let rows = |values: [f32; 2]| {
            Tensor::<4>::from_data(TensorData::new(values.to_vec(), [2, 1, 1, 1]), &Device::flex())
        };
        cache.layer(0).update(rows([1.0, 2.0]), rows([1.0, 2.0]));
        cache.select(&[1, 1, 0]);
        assert_eq!(cache.padding(), [0, 0, 2]);
        let next = Tensor::<4>::zeros([3, 1, 1, 1], &Device::flex());
        let [keys, _] = dense(cache.layer(0).update(next.clone(), next));
        assert_eq!(
            keys.into_data().iter::<i32>().collect::<Vec<_>>(),
            [2, 0, 2, 0, 1, 0]
        );
    }

    /// Caches with blocks of 4 tokens and a window of 6, in half precision and in 8 bits.
    fn quantized(windows: &[Option<usize>], kind: CacheKind) -> [Cache; 2] {
        [None, Some(CodeBits::Eight)].map(|residual_bits| {
            let config = QuantizedCacheConfig {
                group_size: 4,
                residual_length: 6,
                residual_bits,
                ..QuantizedCacheConfig::new(CodeBits::Eight)
            };
            Cache::new(kind, windows, vec![0]).with_precision(CachePrecision::Quantized(config))
        })
    }

    /// Where the values of a quantized cache begin to be the floats that they were, and how many there are.
    fn packed(cache: &Cache, layer: usize) -> [usize; 2] {
        let layer = &cache.layers[layer];
        [layer.start + layer.num_packed(), layer.start + layer.len]
    }

    #[test]
    fn codes_are_made_when_the_window_is_full() {
        for step in [1, 2, 7] {
            for mut cache in quantized(&[None], CacheKind::Dynamic) {
                for to in (step..=40).step_by(step) {
                    let seen = feed(&mut cache, 0, to - step, to, step);
                    assert_eq!(seen, (0..to as i32).collect::<Vec<_>>(), "step {step}");
                    let [codes, len] = packed(&cache, 0);
                    assert_eq!((len, codes % 4), (to, 0));
                    // Before what a pass appends there is room for one token, and no more than a block of it.
                    let kept = len - step - codes;
                    assert!(kept < 6 && (codes == 0 || kept + 4 >= 6), "{codes} of {len}");
                }
            }
        }
    }

    #[test]
    fn windows_drop_whole_blocks_of_codes() {
        for window in [1, 3, 8, 20] {
            for step in [1, 3, 11] {
                for mut cache in quantized(&[Some(window)], CacheKind::Dynamic) {
                    for to in (step..=77).step_by(step) {
                        let start = cache.start_after(0, step);
                        let seen = feed(&mut cache, 0, to - step, to, step);
                        let first = *seen.first().expect("tokens") as usize;
                        assert_eq!(first, start);
                        assert_eq!(seen, (first as i32..to as i32).collect::<Vec<_>>());
                        let needed = (to - step + 1).saturating_sub(window);
                        assert!(first <= needed && first + 4 > needed, "{first} of {needed}");
                    }
                }
                for mut full in quantized(&[Some(window)], CacheKind::Full) {
                    assert_eq!(feed(&mut full, 0, 0, 77, step), (0..77).collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn cutting_back_codes() {
        for mut cache in quantized(&[None], CacheKind::Full) {
            feed(&mut cache, 0, 0, 30, 1);
            cache.advance(30);
            assert_eq!(packed(&cache, 0), [24, 30]);
            assert!(cache.truncate(27) && packed(&cache, 0) == [24, 27]);
            assert_eq!(feed(&mut cache, 0, 27, 28, 1), (0..28).collect::<Vec<_>>());
            // Within a block.
            assert!(cache.truncate(14) && packed(&cache, 0) == [14, 14]);
            assert_eq!(feed(&mut cache, 0, 14, 40, 2), (0..40).collect::<Vec<_>>());
            cache.select(&[0, 0]);
            let next = Tensor::<4>::zeros([2, 1, 1, 1], &Device::flex());
            let [keys, _] = dense(cache.layer(0).update(next.clone(), next));
            let expected: Vec<i32> = (0..40).chain([0]).chain(0..40).chain([0]).collect();
            assert_eq!(nearest(keys), expected);
            let mut cache = cache.emptied();
            cache.select(&[0]);
            assert_eq!(feed(&mut cache, 0, 0, 25, 5), (0..25).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_is_packed_is_not_packed_again() {
        let config = QuantizedCacheConfig {
            group_size: 4,
            residual_length: 2,
            ..QuantizedCacheConfig::new(CodeBits::Two)
        };
        let mut cache =
            Cache::new(CacheKind::Full, &[None], vec![0]).with_precision(CachePrecision::Quantized(config));
        let mut before: Vec<f32> = Vec::new();
        for at in 0..60 {
            let value = ((at * 37) % 101) as f32 / 10.0;
            let value = Tensor::<4>::full([1, 1, 1, 8], value, &Device::flex());
            let [keys, _] = dense(cache.layer(0).update(value.clone(), value));
            let keys: Vec<f32> = keys.into_data().iter::<f32>().collect();
            let [codes, _] = packed(&cache, 0);
            let old = codes.saturating_sub(4) * 8;
            assert_eq!(keys[..old], before[..old]);
            before = keys;
        }
    }

    #[test]
    fn bytes_of_a_quantized_cache() {
        let tokens = |cache: &mut Cache, count: usize| {
            let x = Tensor::<4>::ones([1, 3, count, 64], &Device::flex());
            cache.layer(0).update(x.clone(), x);
        };
        let bytes = |precision| {
            let mut cache = Cache::new(CacheKind::Full, &[None], vec![0]).with_precision(precision);
            cache.reserve(2048);
            for count in [256, 512, 256, 512, 511] {
                tokens(&mut cache, count);
            }
            let before = cache.num_bytes();
            tokens(&mut cache, 1);
            assert!(cache.num_bytes() <= before);
            cache.num_bytes()
        };
        let per_token = 2 * 3 * 64;
        assert_eq!(bytes(CachePrecision::Full), 2048 * per_token * 4);
        assert_eq!(bytes(CachePrecision::F16), 2048 * per_token * 2);
        for (code_bits, bits) in [(CodeBits::Two, 2), (CodeBits::Four, 4), (CodeBits::Eight, 8)] {
            // A scale and a minimum of 16 bits for each group of 64, and for each channel of the first key; a window of 128 in
            // half precision, or in 8 bits.
            let packed = (2048 - 128) * per_token * (2 * bits + 1) / 16 + 3 * 64 * 4;
            for (residual_bits, window) in [(None, 32), (Some(CodeBits::Eight), 17)] {
                let config = QuantizedCacheConfig {
                    residual_bits,
                    ..QuantizedCacheConfig::new(code_bits)
                };
                let found = bytes(CachePrecision::Quantized(config));
                assert_eq!(found, packed + 128 * per_token * window / 16);
            }
        }
    }

    #[test]
    fn half_precision_takes_half() {
        let mut cache = Cache::new(CacheKind::Full, &[None], vec![0]).with_precision(CachePrecision::F16);
        assert_eq!(feed(&mut cache, 0, 0, 30, 3), (0..30).collect::<Vec<_>>());
        let bytes = cache.num_bytes();
        let mut full = Cache::new(CacheKind::Full, &[None], vec![0]);
        feed(&mut full, 0, 0, 30, 3);
        assert_eq!(2 * bytes, full.num_bytes());
    }

    #[test]
    fn sources_follow_their_rows() {
        let mut cache = Cache::new(CacheKind::Dynamic, &[None], vec![0, 0]);
        let keys = Tensor::<4>::from_data(TensorData::new(vec![1.0f32, 2.0], [2, 1, 1, 1]), &Device::flex());
        cache.set_source(vec![(keys.clone(), keys)], vec![0..4, 0..7]);
        for (rows, lengths) in [
            (vec![0, 0, 1, 1], [4, 4, 7, 7]),
            (vec![1, 0, 3, 3], [4, 4, 7, 7]),
            (vec![2, 1, 0, 3], [7, 4, 4, 7]),
        ] {
            cache.select(&rows);
            let source = cache.source().expect("source");
            assert_eq!(source.tokens, lengths.map(|length| 0..length));
            let keys: Vec<f32> = source.layers[0].0.to_data().iter::<f32>().collect();
            let expected = lengths.map(|length| if length == 4 { 1.0 } else { 2.0 });
            assert_eq!(keys, expected);
        }
    }
}
