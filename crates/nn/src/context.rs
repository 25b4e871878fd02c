//! What one forward pass knows besides the hidden states.

use std::collections::HashMap;
use std::rc::Rc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use oxiformers_kernels::{Mask, Visible};

use crate::cache::Cache;
use crate::rope::Rope;

/// Positions, masks and rotary tables of one forward pass, built on demand and shared by all layers.
pub struct Context<'a> {
    cache: &'a mut Cache,
    device: Device,
    seq: usize,
    layer: usize,
    masks: HashMap<(Option<usize>, usize), Rc<Mask>>,
    ropes: HashMap<usize, (Tensor<4>, Tensor<4>)>,
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
    pub(crate) fn mask(&mut self, window: Option<usize>) -> Rc<Mask> {
        let first_key = self.cache.start_after(self.layer, self.seq);
        let mask = self.masks.entry((window, first_key)).or_insert_with(|| {
            Rc::new(Mask::new(Visible {
                first_key,
                first_query: self.cache.len(),
                window,
                padding: self.cache.padding().to_vec(),
            }))
        });
        mask.clone()
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
    }
}
