//! The key/value cache: one object per layer.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};

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

/// Keys and values of the tokens seen so far, for every layer, with the left padding of each sequence; for the decoder
/// of an encoder-decoder, also those of what the encoder has read.
#[derive(Debug, Clone)]
pub struct Cache {
    layers: Vec<LayerCache>,
    source: Option<Source>,
    padding: Vec<usize>,
    len: usize,
    /// Virtual tokens before the others, which count nowhere else.
    virtual_tokens: usize,
    /// Length that the sequences are to have, as far as is known.
    context: usize,
    /// Length beyond which the rotary frequencies of all positions are others.
    rope_switch: Option<usize>,
}

impl Cache {
    /// An empty cache. `windows` has one entry per layer: its sliding window, or `None` for full
    /// attention. `padding` has one entry per sequence: how many padding tokens stand left of it.
    pub fn new(kind: CacheKind, windows: &[Option<usize>], padding: Vec<usize>) -> Self {
        let layers = windows
            .iter()
            .map(|window| LayerCache {
                entries: None,
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
            len: 0,
            virtual_tokens: 0,
            context: 0,
            rope_switch: None,
        }
    }

    /// Number of tokens seen, padding included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.len == 0
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
            if let Some((keys, values)) = layer.entries.take() {
                let ids = row_ids(rows, &keys.device());
                layer.entries = Some((keys.select(0, ids.clone()), values.select(0, ids)));
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
            layer.len = layer.len.min(self.virtual_tokens + len);
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
            layer.start = 0;
            layer.len = 0;
        }
        self.len = 0;
        self.virtual_tokens = 0;
        self.context = 0;
    }

    /// Bytes that keys and values occupy.
    pub fn num_bytes(&self) -> usize {
        self.layers
            .iter()
            .filter_map(|layer| layer.entries.as_ref())
            .chain(self.source.iter().flat_map(|source| &source.layers))
            .map(|(k, v)| (k.shape().num_elements() + v.shape().num_elements()) * k.dtype().size())
            .sum()
    }
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
    /// Buffers `[batch, heads, capacity, head_dim]`; keys and values may differ in `head_dim`.
    entries: Option<(Tensor<4>, Tensor<4>)>,
    /// Position of the first entry.
    start: usize,
    /// Number of entries.
    len: usize,
    window: Option<usize>,
    reserve: usize,
}

impl LayerCache {
    fn start_after(&self, seq: usize) -> usize {
        match self.window {
            // The earliest of the new queries still sees `window - 1` tokens before itself.
            Some(window) => self
                .start
                .max((self.start + self.len + 1).saturating_sub(window.max(1))),
            None => self.start,
        }
        .min(self.start + self.len + seq)
    }

    /// Appends keys and values `[batch, heads, seq, head_dim]`; returns all that the new queries may see.
    pub(crate) fn update(&mut self, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let seq = keys.dims()[2];
        let drop = self.start_after(seq) - self.start;
        let kept = self.len - drop;
        let needed = kept + seq;
        let (keys, values) = match self.entries.take() {
            None if self.reserve <= seq => (keys, values),
            None => {
                let capacity = self.reserve.max(needed);
                (
                    write(grown(&keys, capacity), 0, keys),
                    write(grown(&values, capacity), 0, values),
                )
            }
            Some((old_keys, old_values)) => {
                let capacity = old_keys.dims()[2];
                let append = |old: Tensor<4>, new: Tensor<4>| {
                    if drop == 0 && needed <= capacity {
                        return write(old, kept, new);
                    }
                    // Half as much again, so that appending stays cheap on average.
                    let capacity = if needed <= capacity {
                        capacity
                    } else {
                        (needed + needed / 2).max(64).max(self.reserve)
                    };
                    let buffer = grown(&new, capacity);
                    let buffer = if kept > 0 {
                        write(buffer, 0, old.narrow(2, drop, kept))
                    } else {
                        buffer
                    };
                    write(buffer, kept, new)
                };
                (append(old_keys, keys), append(old_values, values))
            }
        };
        self.start += drop;
        self.len = needed;
        let seen = (view(&keys, needed), view(&values, needed));
        self.entries = Some((keys, values));
        seen
    }
}

/// An empty buffer for `capacity` entries like `like`'s.
fn grown(like: &Tensor<4>, capacity: usize) -> Tensor<4> {
    let [batch, heads, _, head_dim] = like.dims();
    Tensor::zeros([batch, heads, capacity, head_dim], (&like.device(), like.dtype()))
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

    /// Appends positions `from..to` in pieces of `step` and returns the positions that the last piece sees.
    fn feed(cache: &mut Cache, layer: usize, from: usize, to: usize, step: usize) -> Vec<i32> {
        let mut seen = Vec::new();
        for at in (from..to).step_by(step) {
            let positions: Vec<f32> = (at..to.min(at + step)).map(|position| position as f32).collect();
            let shape = [1, 1, positions.len(), 1];
            let values = Tensor::<4>::from_data(TensorData::new(positions, shape), &Device::flex());
            let (keys, same) = cache.layer(layer).update(values.clone(), values);
            seen = keys.into_data().iter::<i32>().collect();
            assert_eq!(seen, same.into_data().iter::<i32>().collect::<Vec<_>>());
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
        let (keys, _) = cache.layer(0).update(next.clone(), next);
        assert_eq!(
            keys.into_data().iter::<i32>().collect::<Vec<_>>(),
            [2, 0, 2, 0, 1, 0]
        );
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
