//! Attention over keys and values of grouped heads.

use std::cell::OnceCell;

use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, Device, Tensor, TensorData};

use crate::flash::Flash;
pub use crate::flash::Visible;
use crate::flex;

/// Which keys a query sees. Layers may share one.
#[derive(Debug)]
pub struct Mask {
    visible: Visible,
    /// What it is for operators that want a tensor.
    tensor: OnceCell<Explicit>,
}

#[derive(Debug, Clone)]
enum Explicit {
    /// Every key.
    Nothing,
    /// The keys up to the query's own.
    Causal,
    /// True where a key is hidden: `[batch or 1, 1, queries, keys]`.
    Hidden(Tensor<4, Bool>),
}

impl Mask {
    /// The mask that `visible` describes.
    pub fn new(visible: Visible) -> Self {
        Self {
            visible,
            tensor: OnceCell::new(),
        }
    }

    fn explicit(&self, queries: usize, keys: usize, device: &Device) -> Explicit {
        self.tensor
            .get_or_init(|| explicit(&self.visible, queries, keys, device))
            .clone()
    }
}

fn explicit(visible: &Visible, queries: usize, keys: usize, device: &Device) -> Explicit {
    let padded = visible.padding.iter().any(|pad| *pad > visible.first_key);
    if !padded && visible.window.is_none_or(|window| keys <= window) {
        return if queries == 1 {
            Explicit::Nothing
        } else {
            Explicit::Causal
        };
    }
    let rows = if padded { visible.padding.len() } else { 1 };
    let mut hidden = vec![true; rows * queries * keys];
    for (index, hidden) in hidden.chunks_mut(keys).enumerate() {
        hidden[visible.keys(index / queries, index % queries)].fill(false);
    }
    if !hidden.contains(&true) {
        return Explicit::Nothing;
    }
    let hidden = TensorData::new(hidden, [rows, 1, queries, keys]);
    Explicit::Hidden(Tensor::from_data(hidden, device))
}

/// Numbers of an attention layer.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttentionOptions {
    /// Scale of the scores; `head_dim^-0.5` where `None`.
    pub scale: Option<f64>,
    /// Soft cap of the scores: `cap · tanh(score / cap)`.
    pub softcap: Option<f64>,
}

/// `softmax(q · kᵀ · scale + bias) · v` under a mask, the heads side by side:
/// `[batch, seq, heads * value_dim]`.
///
/// `q` is `[batch, heads, seq, head_dim]`, `k` `[batch, kv_heads, keys, head_dim]` and `v`
/// `[batch, kv_heads, keys, value_dim]`. `alibi` are slopes `[heads]` of a bias that falls with the distance
/// (Press et al., 2022); `sinks` `[heads]` are scores that take part in the softmax and lead nowhere.
pub fn attention(
    [q, k, v]: [Tensor<4>; 3],
    mask: &Mask,
    alibi: Option<Tensor<1>>,
    sinks: Option<Tensor<1>>,
    options: AttentionOptions,
) -> Tensor<3> {
    let ([batch, heads, seq, head_dim], value_dim) = (q.dims(), v.dims()[3]);
    let per_head = [alibi.map(Tensor::into_dispatch), sinks.map(Tensor::into_dispatch)];
    let qkv = match per_head.iter().flatten().all(flex::is_plain) {
        true => flex::plain([q, k, v].map(Tensor::into_dispatch)),
        false => Err([q, k, v].map(Tensor::into_dispatch)),
    };
    match qkv {
        Ok(qkv) => {
            let [q, k, v] = qkv.map(flex::dense_rows);
            let [alibi, sinks] = per_head.map(|x| x.map(flex::inner).map(flex::contiguous));
            let flash = Flash {
                q: flex::view(&q),
                k: flex::view(&k),
                v: flex::view(&v),
                scale: options.scale.unwrap_or((head_dim as f64).powf(-0.5)) as f32,
                softcap: options.softcap.map(|cap| cap as f32),
                sinks: sinks.as_ref().map(flex::values),
                alibi: alibi.as_ref().map(flex::values),
                visible: &mask.visible,
            };
            flex::tensor(flash.run(), [batch, seq, heads * value_dim])
        }
        Err(qkv) => {
            let [alibi, sinks] = per_head.map(|x| x.map(Tensor::from_dispatch));
            reference(qkv.map(Tensor::from_dispatch), mask, alibi, sinks, options)
                .swap_dims(1, 2)
                .reshape([batch, seq, heads * value_dim])
        }
    }
}

fn reference(
    [q, k, v]: [Tensor<4>; 3],
    mask: &Mask,
    alibi: Option<Tensor<1>>,
    sinks: Option<Tensor<1>>,
    options: AttentionOptions,
) -> Tensor<4> {
    let device = q.device();
    let [batch, heads, seq, head_dim] = q.dims();
    let [_, kv_heads, keys, _] = k.dims();
    // Not every device serves groups, nor does automatic differentiation.
    let for_each_head = |x: Tensor<4>| {
        let dim = x.dims()[3];
        if kv_heads == heads {
            return x;
        }
        x.reshape([batch, kv_heads, 1, keys, dim])
            .expand([batch, kv_heads, heads / kv_heads, keys, dim])
            .reshape([batch, heads, keys, dim])
    };
    let (k, v) = (for_each_head(k), for_each_head(v));
    // `slope · key` differs from `slope · (key − query)` by a constant per query, which softmax does not see.
    // Counted back from the newest key, which keeps the values small where it matters.
    let bias = alibi.map(|slopes| {
        let distance = Tensor::arange(1 - keys as i64..1, &device)
            .float()
            .cast(q.dtype());
        slopes.reshape([1, heads, 1, 1]) * distance.reshape([1, 1, 1, keys])
    });
    let mask = mask.explicit(seq, keys, &device);
    let options = AttentionModuleOptions {
        scale: options.scale,
        softcap: options.softcap,
        is_causal: false,
    };
    let Some(sinks) = sinks else {
        let (mask, is_causal) = match mask {
            Explicit::Nothing => (None, false),
            Explicit::Causal => (None, true),
            Explicit::Hidden(mask) => (Some(mask), false),
        };
        let options = AttentionModuleOptions { is_causal, ..options };
        return burn::tensor::module::attention(q, k, v, mask, bias, options);
    };
    // The sink is one more key whose score is given and whose value is zero.
    let one_more = |x: Tensor<4>| {
        let [batch, kv_heads, _, dim] = x.dims();
        let zero = Tensor::zeros([batch, kv_heads, 1, dim], (&device, x.dtype()));
        Tensor::cat(vec![x, zero], 2)
    };
    let bias = bias.unwrap_or_else(|| Tensor::zeros([1, heads, 1, keys], (&device, q.dtype())));
    let bias = Tensor::cat(vec![bias, sinks.reshape([1, heads, 1, 1])], 3);
    let bias = bias.expand([1, heads, seq, keys + 1]);
    let mask = match mask {
        Explicit::Nothing => None,
        Explicit::Causal => Some(causal(seq, keys, &device)),
        Explicit::Hidden(mask) => Some(mask),
    };
    let mask = mask.map(|mask| {
        let [rows, _, seq, _] = mask.dims();
        let seen = Tensor::<4, Bool>::full([rows, 1, seq, 1], false, &device);
        Tensor::cat(vec![mask, seen], 3)
    });
    let options = AttentionModuleOptions {
        scale: options.scale.or(Some((head_dim as f64).powf(-0.5))),
        ..options
    };
    burn::tensor::module::attention(q, one_more(k), one_more(v), mask, Some(bias), options)
}

/// True above the diagonal that ends in the last key: `[1, 1, seq, keys]`.
fn causal(seq: usize, keys: usize, device: &Device) -> Tensor<4, Bool> {
    let query = Tensor::arange((keys - seq) as i64..keys as i64, device).reshape([seq, 1]);
    let key = Tensor::arange(0..keys as i64, device).reshape([1, keys]);
    key.expand([seq, keys])
        .greater(query.expand([seq, keys]))
        .reshape([1, 1, seq, keys])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, tracked, worst};

    /// The keys that each query sees, as `[row][query]` texts of 1 and 0.
    fn seen(padding: Vec<usize>, window: Option<usize>, past: usize, seq: usize) -> Vec<String> {
        let visible = Visible {
            first_key: 0,
            first_query: past,
            window,
            padding,
        };
        let keys = past + seq;
        match explicit(&visible, seq, keys, &Device::flex()) {
            Explicit::Nothing => vec!["all".to_string()],
            Explicit::Causal => vec!["causal".to_string()],
            Explicit::Hidden(hidden) => {
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
    fn like_the_reference() {
        for (seq, past) in [(1, 0), (1, 40), (2, 5), (33, 0), (7, 300)] {
            for (heads, kv_heads, dim, value_dim) in [(6, 2, 3, 5), (4, 4, 64, 64), (7, 1, 80, 80)] {
                for (window, padding) in [(None, vec![0]), (Some(4), vec![0]), (None, vec![3, 0])] {
                    for extras in [false, true] {
                        let keys = past + seq;
                        let mask = Mask::new(Visible {
                            first_key: 2,
                            first_query: 2 + past,
                            window,
                            padding: padding.clone(),
                        });
                        // Views of larger buffers.
                        let q = noise(1, [2, seq, heads, dim]).swap_dims(1, 2);
                        let cached = |seed, dim| noise(seed, [2, kv_heads, keys + 9, dim]).narrow(2, 4, keys);
                        let qkv = || [q.clone(), cached(2, dim), cached(3, value_dim)];
                        let per_head = extras.then(|| noise(4, [heads]));
                        let options = AttentionOptions {
                            scale: extras.then_some(0.4),
                            softcap: extras.then_some(2.0),
                        };
                        let slow = attention(
                            qkv().map(tracked),
                            &mask,
                            per_head.clone().map(tracked),
                            per_head.clone().map(tracked),
                            options,
                        );
                        let fast = attention(qkv(), &mask, per_head.clone(), per_head, options);
                        assert!(worst(fast, slow) < 1e-5);
                    }
                }
            }
        }
    }
}
