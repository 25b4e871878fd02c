//! What one forward pass knows besides the hidden states.

use std::collections::HashMap;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::cache::Cache;
use crate::rope::Rope;

/// Positions, masks and rotary tables of one forward pass, built on demand and shared by all layers.
pub struct Context<'a> {
    cache: &'a mut Cache,
    device: Device,
    seq: usize,
    layer: usize,
    masks: HashMap<(Option<usize>, usize), Option<Tensor<4, Bool>>>,
    ropes: HashMap<usize, (Tensor<4>, Tensor<4>)>,
}

/// Which keys a query may see.
pub(crate) enum Mask {
    /// Every key.
    Nothing,
    /// The keys up to the query's own.
    Causal,
    /// True where a key is hidden: `[batch or 1, 1, queries, keys]`.
    Explicit(Tensor<4, Bool>),
}

impl<'a> Context<'a> {
    /// A forward pass over `seq` tokens per sequence, appended to `cache`.
    pub fn new(cache: &'a mut Cache, seq: usize, device: Device) -> Self {
        Self {
            cache,
            device,
            seq,
            layer: 0,
            masks: HashMap::new(),
            ropes: HashMap::new(),
        }
    }

    /// Says which layer runs next.
    pub fn enter_layer(&mut self, index: usize) {
        self.layer = index;
    }

    /// Index of the running layer.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Number of tokens before this pass.
    pub fn past(&self) -> usize {
        self.cache.len()
    }

    /// Number of tokens in this pass.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// The device of the model.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Positions `[batch or 1][seq]` counted from each sequence's first real token; 0 within the padding.
    pub fn positions(&self) -> Vec<Vec<usize>> {
        let range = self.past()..self.past() + self.seq;
        let row = |pad: usize| {
            range
                .clone()
                .map(|position| position.saturating_sub(pad))
                .collect()
        };
        let padding = self.cache.padding();
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
        if let Some(most) = rope.switch() {
            self.cache.set_rope_switch(most);
        }
        let tables = rope.tables(&self.positions(), self.cache.context(), &self.device);
        self.ropes.insert(rope.key(), tables.clone());
        tables
    }

    /// Appends to the running layer's cache; returns all keys and values that may be seen.
    pub fn update(&mut self, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let layer = self.layer;
        self.cache.layer(layer).update(keys, values)
    }

    /// The mask of the running layer. Ask before [`update`](Self::update).
    pub(crate) fn mask(&mut self, window: Option<usize>) -> Mask {
        let (past, seq) = (self.past(), self.seq);
        let start = self.cache.start_after(self.layer, seq);
        let keys = past + seq - start;
        let padded = self.cache.padding().iter().any(|pad| *pad > start);
        let windowed = window.is_some_and(|window| keys > window);
        if !padded && !windowed {
            return if seq == 1 { Mask::Nothing } else { Mask::Causal };
        }
        let key = (window, start);
        if !self.masks.contains_key(&key) {
            let mask = self.explicit(window, start, keys);
            self.masks.insert(key, mask);
        }
        match self.masks.get(&key).cloned().flatten() {
            Some(mask) => Mask::Explicit(mask),
            None => Mask::Nothing,
        }
    }

    /// `None` where nothing is hidden.
    fn explicit(&self, window: Option<usize>, start: usize, keys: usize) -> Option<Tensor<4, Bool>> {
        let padding = self.cache.padding();
        let rows = if padding.iter().all(|pad| *pad <= start) {
            &padding[..1]
        } else {
            padding
        };
        let mut hidden = Vec::with_capacity(rows.len() * self.seq * keys);
        for pad in rows {
            for query in self.past()..self.past() + self.seq {
                let reach = window.map_or(0, |window| (query + 1).saturating_sub(window));
                hidden.extend((start..start + keys).map(|key| {
                    // A padding token sees itself, so that no row of scores is empty.
                    key > query || (key != query && (key < *pad || key < reach))
                }));
            }
        }
        if !hidden.contains(&true) {
            return None;
        }
        let shape = [rows.len(), 1, self.seq, keys];
        Some(Tensor::from_data(TensorData::new(hidden, shape), &self.device))
    }

    /// ALiBi (Press et al., 2022) for the running layer: `slope · key position`, `[1, heads, 1, keys]`. It
    /// differs from `slope · (key − query)` by a constant per query, which softmax does not see. Ask before
    /// [`update`](Self::update).
    pub fn alibi(&self, slopes: &Tensor<1>) -> Tensor<4> {
        let start = self.cache.start_after(self.layer, self.seq);
        let last = self.past() + self.seq - 1;
        // Counted back from the newest key, which keeps the values small where it matters.
        let distance: Vec<f32> = (start..=last).map(|key| -((last - key) as f32)).collect();
        let keys = distance.len();
        let distance = Tensor::<1>::from_data(TensorData::new(distance, [keys]), &self.device);
        let heads = slopes.dims()[0];
        slopes.clone().reshape([1, heads, 1, 1]) * distance.reshape([1, 1, 1, keys])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CacheKind;

    /// The keys that each query sees, as `[row][query]` texts of 1 and 0.
    fn seen(padding: Vec<usize>, window: Option<usize>, past: usize, seq: usize) -> Vec<String> {
        let mut cache = Cache::new(CacheKind::Full, &[window], padding);
        let filler = Tensor::<4>::zeros([1, 1, past, 1], &Device::flex());
        if past > 0 {
            cache.layer(0).update(filler.clone(), filler);
            cache.advance(past);
        }
        match Context::new(&mut cache, seq, Device::flex()).mask(window) {
            Mask::Nothing => vec!["all".to_string()],
            Mask::Causal => vec!["causal".to_string()],
            Mask::Explicit(hidden) => {
                let keys = hidden.dims()[3];
                let hidden: Vec<bool> = hidden.into_data().iter::<bool>().collect();
                hidden
                    .chunks(keys)
                    .map(|row| row.iter().map(|hidden| if *hidden { '0' } else { '1' }).collect())
                    .collect()
            }
        }
    }

    #[test]
    fn masks() {
        assert_eq!(seen(vec![0], None, 0, 3), ["causal"]);
        assert_eq!(seen(vec![0], None, 3, 1), ["all"]);
        assert_eq!(seen(vec![0], Some(9), 0, 3), ["causal"]);
        assert_eq!(seen(vec![0], Some(2), 0, 4), ["1000", "1100", "0110", "0011"]);
        assert_eq!(seen(vec![0], Some(2), 3, 1), ["0011"]);
        // A padding token sees itself, so that its row is not empty; nobody sees it.
        assert_eq!(
            seen(vec![2, 0], None, 0, 3),
            ["100", "010", "001", "100", "110", "111"]
        );
        assert_eq!(seen(vec![2, 0], None, 2, 1), ["001", "111"]);
        assert_eq!(
            seen(vec![1, 0], Some(2), 0, 3),
            ["100", "010", "011", "100", "110", "011"]
        );
    }

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
    }
}
