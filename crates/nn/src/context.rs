//! What one forward pass knows besides the hidden states.

use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use oxiformers_kernels::{CachedRows, Mask, Visible};

use crate::cache::Cache;
use crate::rope::Rope;

/// Positions, masks and rotary tables of one forward pass, built on demand and shared by all layers.
pub struct Context<'a> {
    past: Past<'a>,
    device: Device,
    seq: usize,
    layer: usize,
    given_positions: Vec<Vec<usize>>,
    bias: Option<Tensor<4>>,
    source_mask: Option<Rc<Mask>>,
    masks: HashMap<(Option<usize>, usize), Rc<Mask>>,
    ropes: HashMap<usize, (Tensor<4>, Tensor<4>)>,
}

/// What a layer that runs alone is told, of a pass without earlier tokens.
#[derive(Clone)]
pub(crate) struct Alone {
    /// Empty, or none in an encoder.
    cache: Option<Cache>,
    tokens: Vec<Range<usize>>,
    device: Device,
    seq: usize,
    layer: usize,
    given_positions: Vec<Vec<usize>>,
    bias: Option<Tensor<4>>,
}

impl Alone {
    /// Tensors that gradients go to: the bias, and keys and values of what an encoder has read.
    pub(crate) fn tensors(&self) -> Vec<Tensor<4>> {
        let source = self.cache.as_ref().and_then(|cache| cache.source_of(self.layer));
        let source = source.into_iter().flat_map(|(keys, values)| [keys, values]);
        self.bias.clone().into_iter().chain(source).collect()
    }

    /// The same with others in place of these.
    pub(crate) fn with(&self, tensors: Vec<Tensor<4>>) -> Self {
        let mut own = self.clone();
        let mut tensors = tensors.into_iter();
        if own.bias.is_some() {
            own.bias = tensors.next();
        }
        if let (Some(cache), Some(keys), Some(values)) = (&mut own.cache, tensors.next(), tensors.next()) {
            cache.set_source_of(own.layer, (keys, values));
        }
        own
    }

    /// A pass of that layer.
    pub(crate) fn context(&mut self) -> Context<'_> {
        let past = match &mut self.cache {
            Some(cache) => Past::Cache(cache),
            None => Past::None(self.tokens.clone()),
        };
        let mut cx = Context::with_past(past, self.seq, self.device.clone());
        cx.layer = self.layer;
        cx.given_positions = self.given_positions.clone();
        cx.bias = self.bias.clone();
        cx
    }
}

/// What the tokens of a pass see besides each other.
enum Past<'a> {
    /// The tokens of earlier passes; no token sees a later one.
    Cache(&'a mut Cache),
    /// Nothing. All real tokens see each other; they lie at these places of each sequence.
    None(Vec<Range<usize>>),
}

impl<'a> Context<'a> {
    /// A forward pass over `seq` tokens per sequence, appended to `cache`.
    pub fn new(cache: &'a mut Cache, seq: usize, device: Device) -> Self {
        Self::with_past(Past::Cache(cache), seq, device)
    }

    /// A forward pass of an encoder over `seq` tokens per sequence, which see each other in both directions.
    /// `tokens` says where the real ones lie, sequence by sequence, or for all at once; what is not among them
    /// is padding, which nobody sees.
    pub fn bidirectional(tokens: Vec<Range<usize>>, seq: usize, device: Device) -> Self {
        let clamp = |range: Range<usize>| range.start.min(seq)..range.end.min(seq);
        let tokens = tokens.into_iter().map(clamp).collect();
        Self::with_past(Past::None(tokens), seq, device)
    }

    fn with_past(past: Past<'a>, seq: usize, device: Device) -> Self {
        Self {
            past,
            device,
            seq,
            layer: 0,
            given_positions: Vec::new(),
            bias: None,
            source_mask: None,
            masks: HashMap::new(),
            ropes: HashMap::new(),
        }
    }

    /// Gives the tokens positions `[batch or 1][seq]` of the caller's choice; none for those that
    /// [`positions`](Self::positions) finds.
    pub fn set_positions(&mut self, positions: Vec<Vec<usize>>) {
        self.given_positions = positions;
    }

    /// Adds `bias` `[1 or batch, 1 or heads, 1 or seq, keys]` to the scores of all attention layers that run from
    /// now on, as models with relative positions do.
    pub fn set_bias(&mut self, bias: Option<Tensor<4>>) {
        self.bias = bias;
    }

    /// See [`set_bias`](Self::set_bias).
    pub fn bias(&self) -> Option<Tensor<4>> {
        self.bias.clone()
    }

    /// What the running layer is told; none where there are earlier tokens.
    pub(crate) fn alone(&self) -> Option<Alone> {
        let (cache, tokens) = match &self.past {
            Past::Cache(cache) if cache.is_empty() => (Some(cache.emptied()), Vec::new()),
            Past::Cache(_) => return None,
            Past::None(tokens) => (None, tokens.clone()),
        };
        Some(Alone {
            cache,
            tokens,
            device: self.device.clone(),
            seq: self.seq,
            layer: self.layer,
            given_positions: self.given_positions.clone(),
            bias: self.bias.clone(),
        })
    }

    /// Says which layer runs next.
    pub fn enter_layer(&mut self, index: usize) {
        self.layer = index;
    }

    /// Index of the running layer.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Number of tokens before this pass, virtual ones among them.
    pub fn past(&self) -> usize {
        match &self.past {
            Past::Cache(cache) => cache.virtual_tokens() + cache.len(),
            Past::None(_) => 0,
        }
    }

    /// Number of tokens in this pass.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// The device of the model.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Positions `[batch or 1][seq]`: after a cache, counted from each sequence's first real token, 0 within the
    /// padding; in an encoder, from the first token, whatever it is.
    pub fn positions(&self) -> Vec<Vec<usize>> {
        if !self.given_positions.is_empty() {
            return self.given_positions.clone();
        }
        let range = self.past()..self.past() + self.seq;
        let row = |pad: usize| {
            range
                .clone()
                .map(|position| position.saturating_sub(pad))
                .collect()
        };
        let Past::Cache(cache) = &self.past else {
            return vec![row(0)];
        };
        if !cache.segments().is_empty() {
            let row = |starts: &Vec<usize>| {
                (starts.iter().enumerate())
                    .map(|(at, start)| at - start)
                    .collect()
            };
            return cache.segments().iter().map(row).collect();
        }
        let padding = cache.padding();
        match padding.first() {
            Some(first) if padding.iter().any(|pad| pad != first) => {
                padding.iter().map(|p| row(*p)).collect()
            }
            first => vec![row(first.copied().unwrap_or(0))],
        }
    }

    /// [`positions`](Self::positions) plus `offset`, as ids for a table of learned positions.
    pub fn position_ids(&self, offset: usize) -> Tensor<2, Int> {
        let rows = self.positions();
        let shape = [rows.len(), self.seq];
        let ids: Vec<i32> = rows
            .into_iter()
            .flatten()
            .map(|position| (position + offset) as i32)
            .collect();
        Tensor::from_data(TensorData::new(ids, shape), &self.device)
    }

    /// Cosine and sine `[batch or 1, 1, seq, rotary_dim / 2]` for the positions of this pass.
    pub fn rope(&mut self, rope: &Rope) -> (Tensor<4>, Tensor<4>) {
        if let Some(found) = self.ropes.get(&rope.key()) {
            return found.clone();
        }
        let context = match &mut self.past {
            Past::Cache(cache) => {
                if let Some(most) = rope.switch() {
                    cache.set_rope_switch(most);
                }
                match cache.context() {
                    0 => 0,
                    context => cache.virtual_tokens() + context,
                }
            }
            Past::None(_) => self.seq,
        };
        let tables = rope.tables(&self.positions(), context, &self.device);
        self.ropes.insert(rope.key(), tables.clone());
        tables
    }

    /// Appends to the running layer's cache; returns all keys and values that may be seen, as it keeps them.
    pub fn update(&mut self, keys: Tensor<4>, values: Tensor<4>) -> [CachedRows; 2] {
        match &mut self.past {
            Past::Cache(cache) => cache.layer(self.layer).update(keys, values),
            Past::None(_) => [keys, values].map(CachedRows::from),
        }
    }

    /// Keys and values of what an encoder has read, for the running layer, and which of them are seen; none where
    /// nothing has been read.
    pub(crate) fn source(&mut self) -> Option<(Tensor<4>, Tensor<4>, Rc<Mask>)> {
        let Past::Cache(cache) = &self.past else {
            return None;
        };
        let source = cache.source()?;
        let (keys, values) = source.layers.get(self.layer)?.clone();
        let mask = self.source_mask.get_or_insert_with(|| {
            Rc::new(Mask::new(Visible::Range {
                tokens: source.tokens.clone(),
                reach: None,
            }))
        });
        Some((keys, values, mask.clone()))
    }

    /// The mask of the running layer. Ask before [`update`](Self::update).
    ///
    /// `window` is how many tokens a query sees: itself and those before it, or in an encoder itself and half of
    /// them on either side.
    pub fn mask(&mut self, window: Option<usize>) -> Rc<Mask> {
        let first_key = match &self.past {
            Past::Cache(cache) => cache.start_after(self.layer, self.seq),
            Past::None(_) => 0,
        };
        self.hide_padding_after_virtual_tokens(first_key);
        let mask = self.masks.entry((window, first_key)).or_insert_with(|| {
            Rc::new(Mask::new(match &self.past {
                Past::Cache(cache) if !cache.segments().is_empty() => Visible::Segments {
                    starts: cache.segments().to_vec(),
                    window,
                },
                Past::Cache(cache) => Visible::Causal {
                    first_key,
                    first_query: cache.virtual_tokens() + cache.len(),
                    window,
                    padding: match cache.virtual_tokens() {
                        0 => cache.padding().to_vec(),
                        // It is no longer the first thing in a sequence; the bias hides it.
                        _ => vec![0; cache.padding().len()],
                    },
                },
                Past::None(tokens) => Visible::Range {
                    tokens: tokens.clone(),
                    reach: window.map(|window| window / 2),
                },
            }))
        });
        mask.clone()
    }

    /// Where padding stands behind virtual tokens, a bias keeps it from being seen.
    fn hide_padding_after_virtual_tokens(&mut self, first_key: usize) {
        let Past::Cache(cache) = &self.past else { return };
        let first = cache.virtual_tokens();
        if first == 0 || cache.padding().iter().all(|padding| *padding == 0) {
            return;
        }
        // No infinity: a padding token sees nothing else.
        const HIDDEN: f32 = -1e30;
        let keys = first_key..first + cache.len() + self.seq;
        let shape = [cache.padding().len(), 1, 1, keys.len()];
        let row = |padding: &usize| {
            let hidden = first..first + padding;
            keys.clone()
                .map(move |key| if hidden.contains(&key) { HIDDEN } else { 0.0 })
        };
        let bias: Vec<f32> = cache.padding().iter().flat_map(row).collect();
        self.bias = Some(Tensor::from_data(TensorData::new(bias, shape), &self.device));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CacheKind;

    #[test]
    fn positions_begin_after_the_padding() {
        let mut cache = Cache::new(CacheKind::Dynamic, &[], vec![2, 0]);
        assert_eq!(
            Context::new(&mut cache, 4, Device::flex()).positions(),
            [[0, 0, 0, 1], [0, 1, 2, 3]]
        );
        let mut cache = Cache::new(CacheKind::Dynamic, &[], vec![1, 1]);
        assert_eq!(
            Context::new(&mut cache, 3, Device::flex()).positions(),
            [[0, 0, 1]]
        );
        let mut cache = Cache::new(CacheKind::Dynamic, &[], vec![0]);
        cache.set_segments(&[vec![0, 0, 0, 1, 1, 2]]);
        assert_eq!(
            Context::new(&mut cache, 6, Device::flex()).positions(),
            [[0, 1, 2, 0, 1, 0]]
        );
        let encoder = Context::bidirectional(vec![0..3, 1..9], 4, Device::flex());
        assert_eq!(encoder.positions(), [[0, 1, 2, 3]]);
    }
}
