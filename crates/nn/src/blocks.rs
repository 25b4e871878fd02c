//! Attention whose cost grows with the length of a sequence, not with its square: blocks of queries see the keys around
//! them, and some keys of the sequence that all queries see.

use std::collections::HashSet;
use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};
use oxiformers_kernels::attention::attention;
use oxiformers_kernels::{AttentionOptions, Mask, ScoreBias, Visible};

/// What is added to the score of a key that is not seen. No infinity: a query may see nothing, and its result must be
/// made of numbers all the same.
const HIDDEN: f32 = -1e30;

/// A key that all queries of a sequence see.
#[derive(Debug, Clone, Copy)]
pub struct GlobalKey {
    /// Its place in the sequence.
    pub place: usize,
    /// What is added to its scores.
    pub bias: f32,
}

/// Which keys the queries of a batch see. Each block sees itself and its two neighbours.
#[derive(Debug, Clone)]
pub struct BlockWindows {
    block: usize,
    /// Global keys of each sequence, among the rows of the whole batch: `[batch * globals]`.
    rows: Tensor<1, Int>,
    /// `[batch * blocks, 1, block or 1, globals + 3 * block]`.
    bias: Tensor<4>,
}

impl BlockWindows {
    /// For sequences of `seq` tokens, of which the real ones lie at `tokens`, one entry each. `globals` are the keys
    /// that all queries of a sequence see, whatever the window; `reach` is how far a query sees within the three
    /// blocks, if that is less than all of them.
    pub fn new(
        tokens: &[Range<usize>],
        seq: usize,
        block: usize,
        globals: &[Vec<GlobalKey>],
        reach: Option<usize>,
        device: &Device,
    ) -> Self {
        let block = block.clamp(1, seq.max(1));
        let (batch, blocks) = (tokens.len(), seq.div_ceil(block));
        let most = globals.iter().map(Vec::len).max().unwrap_or(0);
        let queries = if reach.is_some() { block } else { 1 };
        let mut rows = Vec::with_capacity(batch * most);
        let mut bias = Vec::with_capacity(batch * blocks * queries * (most + 3 * block));
        for (row, tokens) in tokens.iter().enumerate() {
            let globals = globals.get(row).map_or(&[][..], Vec::as_slice);
            // Sequences with fewer of them see others of their keys, hidden.
            let place = |i: usize| {
                globals
                    .get(i)
                    .map_or(0, |key| key.place.min(seq.saturating_sub(1)))
            };
            rows.extend((0..most).map(|i| (row * seq + place(i)) as i32));
            let seen = |key: &GlobalKey| tokens.contains(&key.place).then_some(key.bias);
            let everywhere: Vec<f32> = (0..most)
                .map(|i| globals.get(i).and_then(seen).unwrap_or(HIDDEN))
                .collect();
            // What is global counts once.
            let places: HashSet<usize> = globals.iter().map(|key| key.place).collect();
            let near: Vec<bool> = (0..(blocks + 2) * block)
                .map(|i| {
                    let place = i.checked_sub(block);
                    place.is_some_and(|place| tokens.contains(&place) && !places.contains(&place))
                })
                .collect();
            for index in 0..blocks {
                for query in 0..queries {
                    bias.extend_from_slice(&everywhere);
                    bias.extend((0..3 * block).map(|key| {
                        let far = reach.is_some_and(|reach| key.abs_diff(block + query) > reach);
                        match near.get(index * block + key) {
                            Some(true) if !far => 0.0,
                            _ => HIDDEN,
                        }
                    }));
                }
            }
        }
        let shape = [batch * blocks, 1, queries, most + 3 * block];
        Self {
            block,
            rows: Tensor::from_data(TensorData::new(rows, [batch * most]), device),
            bias: Tensor::from_data(TensorData::new(bias, shape), device),
        }
    }

    /// `[batch, heads, seq, head_dim]` each to `[batch, seq, heads * head_dim]`.
    pub fn attend(&self, [q, k, v]: [Tensor<4>; 3], options: AttentionOptions) -> Tensor<3> {
        let ([batch, heads, seq, dim], block) = (q.dims(), self.block);
        let blocks = seq.div_ceil(block);
        let device = q.device();
        let globals = self.rows.dims()[0] / batch.max(1);
        let keys = globals + 3 * block;
        let cut = |x: Tensor<4>| {
            let missing = blocks * block - seq;
            let x = match missing {
                0 => x,
                _ => {
                    let nothing = Tensor::zeros([batch, heads, missing, dim], (&device, x.dtype()));
                    Tensor::cat(vec![x, nothing], 2)
                }
            };
            x.reshape([batch, heads, blocks, block, dim])
        };
        // Blocks of all sequences side by side, as sequences of their own.
        let alone = |x: Tensor<5>, rows: usize| x.swap_dims(1, 2).reshape([batch * blocks, heads, rows, dim]);
        let around = |x: Tensor<4>| {
            let edge = Tensor::zeros([batch, heads, 1, block, dim], (&device, x.dtype()));
            let wide = Tensor::cat(vec![edge.clone(), cut(x.clone()), edge], 2);
            let mut parts: Vec<_> = (0..3).map(|i| wide.clone().narrow(2, i, blocks)).collect();
            if globals > 0 {
                let all = x.swap_dims(1, 2).reshape([batch * seq, heads * dim]);
                let global = all
                    .select(0, self.rows.clone())
                    .reshape([batch, globals, heads, dim])
                    .swap_dims(1, 2)
                    .unsqueeze_dim::<5>(2)
                    .expand([batch, heads, blocks, globals, dim]);
                parts.insert(0, global);
            }
            alone(Tensor::cat(parts, 3), keys)
        };
        let mask = Mask::new(Visible::Range {
            tokens: vec![0..keys],
            reach: None,
        });
        let bias = ScoreBias {
            bias: Some(self.bias.clone().cast(q.dtype())),
            ..ScoreBias::default()
        };
        let qkv = [alone(cut(q), block), around(k), around(v)];
        attention(qkv, &mask, bias, options)
            .reshape([batch, blocks * block, heads * dim])
            .narrow(1, 0, seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attention over all keys, those that `sees(row, query, key)` gives nothing for hidden.
    fn plain([q, k, v]: [Tensor<4>; 3], sees: impl Fn(usize, usize, usize) -> Option<f32>) -> Tensor<3> {
        let [batch, _, seq, _] = q.dims();
        let sees = &sees;
        let pairs =
            move |row| (0..seq).flat_map(move |i| (0..seq).map(move |j| sees(row, i, j).unwrap_or(HIDDEN)));
        let bias: Vec<f32> = (0..batch).flat_map(pairs).collect();
        let bias = Tensor::from_data(TensorData::new(bias, [batch, 1, seq, seq]), &q.device());
        let bias = ScoreBias {
            bias: Some(bias),
            ..ScoreBias::default()
        };
        let mask = Mask::new(Visible::Range {
            tokens: vec![0..seq],
            reach: None,
        });
        attention([q, k, v], &mask, bias, AttentionOptions::default())
    }

    #[test]
    fn like_attention_over_all_keys() {
        let device = Device::flex();
        let tokens = [0..13, 2..9];
        let key = |place| GlobalKey {
            place,
            bias: place as f32 / 8.0,
        };
        let globals = [vec![key(0), key(7), key(12)], vec![key(3)]];
        let x = |shift: f64| {
            let x = Tensor::arange(0..2 * 3 * 13 * 4, &device).float();
            (x * 0.7 + shift).sin().reshape([2, 3, 13, 4])
        };
        for (block, reach) in [
            (1, None),
            (4, None),
            (4, Some(4)),
            (4, Some(2)),
            (6, Some(0)),
            (99, None),
        ] {
            let windows = BlockWindows::new(&tokens, 13, block, &globals, reach, &device);
            let ours = windows.attend([x(0.0), x(0.3), x(0.9)], AttentionOptions::default());
            let block = block.min(13);
            let expected = plain([x(0.0), x(0.3), x(0.9)], |row, query, key| {
                let global = globals[row].iter().find(|global| global.place == key);
                let near = (query / block).abs_diff(key / block) <= 1
                    && reach.is_none_or(|reach| query.abs_diff(key) <= reach);
                tokens[row].contains(&key).then_some(())?;
                global.map(|global| global.bias).or(near.then_some(0.0))
            });
            let difference = |row: usize| {
                let cut = |x: &Tensor<3>| {
                    x.clone()
                        .narrow(0, row, 1)
                        .narrow(1, tokens[row].start, tokens[row].len())
                };
                (cut(&ours) - cut(&expected)).abs().max().into_scalar::<f32>()
            };
            assert!(difference(0) < 1e-5 && difference(1) < 1e-5, "{block} {reach:?}");
        }
    }
}
