//! Attention over keys and values of grouped heads.

use std::cell::OnceCell;

use burn::backend::flex::FlexTensor;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, Device, Tensor, TensorData, activation};

pub use crate::flash::Visible;
use crate::flash::{Flash, Rows};
use crate::{Dropout, backward, flex};

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

    pub(crate) fn visible(&self) -> &Visible {
        &self.visible
    }

    fn explicit(&self, queries: usize, keys: usize, device: &Device) -> Explicit {
        self.tensor
            .get_or_init(|| explicit(&self.visible, queries, keys, device))
            .clone()
    }
}

fn explicit(visible: &Visible, queries: usize, keys: usize, device: &Device) -> Explicit {
    let rows = match visible {
        Visible::Causal {
            first_key,
            window,
            padding,
            ..
        } => {
            let padded = padding.iter().any(|pad| pad > first_key);
            if !padded && window.is_none_or(|window| keys <= window) {
                return if queries == 1 {
                    Explicit::Nothing
                } else {
                    Explicit::Causal
                };
            }
            if padded { padding.len() } else { 1 }
        }
        Visible::Range { tokens, .. } => tokens.len().max(1),
        Visible::Segments { starts, .. } => starts.len(),
    };
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
    /// Which of the weights that the softmax gives are left out: those of each query and head are a row, counted over
    /// `[batch, heads, seq]`.
    pub dropout: Option<Dropout>,
}

/// What the scores of queries and keys meet on their way to the softmax.
#[derive(Debug, Clone, Default)]
pub struct ScoreBias {
    /// Is added: `[1 or batch, 1 or heads, 1 or seq, keys]`. Positions relative to each other (Raffel et al.,
    /// 2020), or -∞ where a key is hidden for reasons that the [`Mask`] cannot tell.
    pub bias: Option<Tensor<4>>,
    /// Slopes `[heads]` of a bias that falls with the distance from the query back to the key (Press et al.,
    /// 2022).
    pub alibi: Option<Tensor<1>>,
    /// Scores `[heads]` that take part in the softmax and lead nowhere.
    pub sinks: Option<Tensor<1>>,
}

/// `softmax(q · kᵀ · scale + bias) · v` under a mask, the heads side by side:
/// `[batch, seq, heads * value_dim]`.
///
/// `q` is `[batch, heads, seq, head_dim]`, `k` `[batch, kv_heads, keys, head_dim]` and `v`
/// `[batch, kv_heads, keys, value_dim]`.
pub fn attention(
    [q, k, v]: [Tensor<4>; 3],
    mask: &Mask,
    bias: ScoreBias,
    options: AttentionOptions,
) -> Tensor<3> {
    let ([q, k, v], bias) = match backward::attention([q, k, v], mask, bias, options) {
        Ok(x) => return x,
        Err(plain) => plain,
    };
    if !bias.is_plain() {
        return reference([q, k, v], mask, bias, options);
    }
    match flex::plain([q, k, v].map(Tensor::into_dispatch)) {
        Ok(qkv) => {
            let [q, k, v] = qkv.map(flex::dense_rows);
            flash(&q, [flex::view(&k), flex::view(&v)], bias, mask, options)
        }
        Err(qkv) => reference(qkv.map(Tensor::from_dispatch), mask, bias, options),
    }
}

impl ScoreBias {
    /// Whether a kernel of the CPU may read all of it.
    pub(crate) fn is_plain(&self) -> bool {
        let per_head = [&self.alibi, &self.sinks];
        let per_head = per_head.map(|x| x.clone().map(Tensor::into_dispatch));
        let bias = self.bias.clone().map(Tensor::into_dispatch);
        per_head.iter().flatten().chain(&bias).all(flex::is_plain)
    }
}

/// The kernel of the CPU, for queries with [dense rows](flex::dense_rows) and a [plain](ScoreBias::is_plain) bias.
pub(crate) fn flash<R: Rows>(
    q: &FlexTensor,
    [k, v]: [R; 2],
    bias: ScoreBias,
    mask: &Mask,
    options: AttentionOptions,
) -> Tensor<3> {
    let q = flex::view(q);
    let ([batch, heads, seq, head_dim], [_, _, keys, value_dim]) = (q.dims, v.dims());
    let inner = |x: Tensor<1>| flex::contiguous(flex::inner(x.into_dispatch()));
    let [alibi, sinks] = [bias.alibi, bias.sinks].map(|x| x.map(inner));
    let bias = (bias.bias).map(|x| flex::dense_rows(flex::inner(x.into_dispatch())));
    let flash = Flash {
        q,
        k,
        v,
        scale: options.scale.unwrap_or((head_dim as f64).powf(-0.5)) as f32,
        softcap: options.softcap.map(|cap| cap as f32),
        sinks: sinks.as_ref().map(flex::values),
        alibi: alibi.as_ref().map(flex::values),
        bias: (bias.as_ref()).map(|bias| flex::view(bias).broadcast([batch, heads, seq, keys])),
        dropout: options.dropout,
        visible: &mask.visible,
        kept: None,
    };
    flex::tensor(flash.run(), [batch, seq, heads * value_dim])
}

fn reference(qkv: [Tensor<4>; 3], mask: &Mask, bias: ScoreBias, options: AttentionOptions) -> Tensor<3> {
    let x = by_heads(qkv, mask, bias, options);
    let [batch, heads, seq, value_dim] = x.dims();
    x.swap_dims(1, 2).reshape([batch, seq, heads * value_dim])
}

/// `[batch, heads, seq, value_dim]`.
fn by_heads(
    [q, k, v]: [Tensor<4>; 3],
    mask: &Mask,
    ScoreBias { bias, alibi, sinks }: ScoreBias,
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
    let alibi = alibi.map(|slopes| {
        let distance = Tensor::arange(1 - keys as i64..1, &device)
            .float()
            .cast(q.dtype());
        slopes.reshape([1, heads, 1, 1]) * distance.reshape([1, 1, 1, keys])
    });
    let bias = match (bias, alibi) {
        (Some(bias), Some(alibi)) => Some(bias + alibi),
        (bias, alibi) => bias.or(alibi),
    };
    let mask = mask.explicit(seq, keys, &device);
    let dropout = options.dropout;
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
        return match dropout {
            Some(dropout) => with_dropout([q, k, v], mask, bias, options, dropout),
            None => burn::tensor::module::attention(q, k, v, mask, bias, options),
        };
    };
    // The sink is one more key whose score is given and whose value is zero.
    let one_more = |x: Tensor<4>| {
        let [batch, kv_heads, _, dim] = x.dims();
        let zero = Tensor::zeros([batch, kv_heads, 1, dim], (&device, x.dtype()));
        Tensor::cat(vec![x, zero], 2)
    };
    let bias = bias.unwrap_or_else(|| Tensor::zeros([1, heads, 1, keys], (&device, q.dtype())));
    let [rows, ..] = bias.dims();
    let bias = Tensor::cat(
        vec![
            bias.expand([rows, heads, seq, keys]),
            sinks.reshape([1, heads, 1, 1]).expand([rows, heads, seq, 1]),
        ],
        3,
    );
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
    let (k, v) = (one_more(k), one_more(v));
    match dropout {
        Some(dropout) => with_dropout([q, k, v], mask, Some(bias), options, dropout),
        None => burn::tensor::module::attention(q, k, v, mask, Some(bias), options),
    }
}

/// The same with some of the weights left out.
fn with_dropout(
    [q, k, v]: [Tensor<4>; 3],
    mask: Option<Tensor<4, Bool>>,
    bias: Option<Tensor<4>>,
    options: AttentionModuleOptions,
    dropout: Dropout,
) -> Tensor<4> {
    let (device, dtype) = (q.device(), q.dtype());
    let ([batch, heads, seq, head_dim], keys) = (q.dims(), k.dims()[2]);
    let scale = options.scale.unwrap_or((head_dim as f64).powf(-0.5));
    let mut scores = q.matmul(k.swap_dims(2, 3)) * scale;
    if let Some(cap) = options.softcap {
        scores = (scores / cap).tanh() * cap;
    }
    if let Some(bias) = bias {
        scores = scores + bias;
    }
    let mask = mask.or_else(|| options.is_causal.then(|| causal(seq, keys, &device)));
    if let Some(mask) = mask {
        scores = scores.mask_fill(mask.expand([batch, heads, seq, keys]), f32::NEG_INFINITY);
    }
    let weights = activation::softmax(scores, 3);
    let rows = 0..(batch * heads * seq) as u64;
    let factors: Vec<f32> = rows.flat_map(|row| dropout.of_row(row).factors(keys)).collect();
    let factors = TensorData::new(factors, [batch, heads, seq, keys]);
    let factors = Tensor::<4>::from_data(factors, &device).cast(dtype);
    (weights * factors).matmul(v)
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
        let visible = Visible::Causal {
            first_key: 0,
            first_query: past,
            window,
            padding,
        };
        seen_of(&visible, seq, past + seq)
    }

    fn seen_of(visible: &Visible, seq: usize, keys: usize) -> Vec<String> {
        match explicit(visible, seq, keys, &Device::flex()) {
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
    fn masks_of_ranges() {
        let seen = |tokens: &[std::ops::Range<usize>], reach, seq, keys| {
            let tokens = tokens.to_vec();
            seen_of(&Visible::Range { tokens, reach }, seq, keys)
        };
        assert_eq!(seen(&[0..3, 0..3], None, 3, 3), ["all"]);
        assert_eq!(seen(&[0..2, 1..3], None, 2, 3), ["110", "110", "011", "011"]);
        assert_eq!(seen(&[0..4], Some(1), 4, 4), ["1100", "1110", "0111", "0011"]);
        // Padding sees the nearest token, or any where there is none.
        assert_eq!(seen(&[0..1], Some(1), 4, 4), ["1000", "1000", "1000", "1000"]);
        assert_eq!(seen(&[3..4], Some(1), 3, 4), ["0001", "0001", "0001"]);
        assert_eq!(seen(&[0..0], None, 2, 2), ["10", "10"]);
    }

    #[test]
    fn masks_of_segments() {
        let visible = |window| Visible::Segments {
            starts: vec![vec![0, 0, 2, 2], vec![0, 1, 1, 1]],
            window,
        };
        assert_eq!(
            seen_of(&visible(None), 4, 4),
            ["1000", "1100", "0010", "0011", "1000", "0100", "0110", "0111"]
        );
        assert_eq!(
            seen_of(&visible(Some(2)), 4, 4)[4..],
            ["1000", "0100", "0110", "0011"]
        );
    }

    #[test]
    fn segments_like_the_reference() {
        let start_of =
            |cuts: &[usize], at: usize| cuts.iter().rev().find(|cut| **cut <= at).map_or(0, |cut| *cut);
        let starts = |cuts: &[usize]| (0..90).map(|at| start_of(cuts, at)).collect::<Vec<usize>>();
        let mask = Mask::new(Visible::Segments {
            starts: vec![starts(&[0, 3, 40, 41]), starts(&[0, 70])],
            window: None,
        });
        let qkv = || {
            [
                noise(1, [2, 4, 90, 16]),
                noise(2, [2, 2, 90, 16]),
                noise(3, [2, 2, 90, 16]),
            ]
        };
        let slow = attention(
            qkv().map(tracked),
            &mask,
            ScoreBias::default(),
            AttentionOptions::default(),
        );
        let fast = attention(qkv(), &mask, ScoreBias::default(), AttentionOptions::default());
        assert!(worst(fast, slow) < 1e-5);
    }

    #[test]
    fn like_the_reference() {
        for (seq, past) in [(1, 0), (1, 40), (2, 5), (33, 0), (7, 300)] {
            for (heads, kv_heads, dim, value_dim) in [(6, 2, 3, 5), (4, 4, 64, 64), (7, 1, 80, 80)] {
                for (window, padding) in [(None, vec![0]), (Some(4), vec![0]), (None, vec![3, 0])] {
                    let keys = past + seq;
                    let causal = Visible::Causal {
                        first_key: 2,
                        first_query: 2 + past,
                        window,
                        padding: padding.clone(),
                    };
                    let range = Visible::Range {
                        tokens: padding.iter().map(|pad| keys.min(*pad)..keys).collect(),
                        reach: window,
                    };
                    for (visible, extras) in
                        [(&causal, false), (&causal, true), (&range, false), (&range, true)]
                    {
                        let mask = Mask::new(visible.clone());
                        // Views of larger buffers.
                        let q = noise(1, [2, seq, heads, dim]).swap_dims(1, 2);
                        let cached = |seed, dim| noise(seed, [2, kv_heads, keys + 9, dim]).narrow(2, 4, keys);
                        let qkv = || [q.clone(), cached(2, dim), cached(3, value_dim)];
                        let with = |track: fn(Tensor<1>) -> Tensor<1>,
                                    track_4: fn(Tensor<4>) -> Tensor<4>| {
                            if !extras {
                                return ScoreBias::default();
                            }
                            ScoreBias {
                                // A row for every head and query, or for all of them.
                                bias: Some(track_4(match past {
                                    0 => noise(5, [2, heads, seq, keys]),
                                    _ => noise(5, [1, 1, 1, keys]),
                                })),
                                // Slopes that grow with the distance would leave the precision to chance.
                                alibi: Some(track(noise(4, [heads]).abs())),
                                sinks: Some(track(noise(4, [heads]))),
                            }
                        };
                        let options = AttentionOptions {
                            scale: extras.then_some(0.4),
                            softcap: extras.then_some(2.0),
                            dropout: extras.then_some(Dropout { rate: 0.3, seed: 8 }),
                        };
                        let slow = attention(qkv().map(tracked), &mask, with(tracked, tracked), options);
                        let fast = attention(qkv(), &mask, with(|x| x, |x| x), options);
                        assert!(worst(fast, slow) < 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn hidden_by_the_bias() {
        let mask = Mask::new(Visible::Range {
            tokens: vec![0..400],
            reach: None,
        });
        let qkv = || [1, 2, 3].map(|seed| noise(seed, [1, 2, 400, 8]));
        let mut bias = vec![0.0; 400 * 400];
        for (query, row) in bias.chunks_mut(400).enumerate() {
            // A whole block of keys, and every key of one query.
            row[..300].fill(f32::NEG_INFINITY);
            if query == 7 {
                row.fill(f32::NEG_INFINITY);
            }
        }
        let bias = ScoreBias {
            bias: Some(Tensor::from_data(
                TensorData::new(bias, [1, 1, 400, 400]),
                &Device::flex(),
            )),
            ..ScoreBias::default()
        };
        let hidden = attention(qkv(), &mask, bias, AttentionOptions::default());
        let range = Mask::new(Visible::Range {
            tokens: vec![300..400],
            reach: None,
        });
        let seen = attention(qkv(), &range, ScoreBias::default(), AttentionOptions::default());
        assert!(worst(hidden.clone().narrow(1, 8, 392), seen.narrow(1, 8, 392)) < 1e-6);
        let numbers = hidden.into_data();
        assert!(numbers.iter::<f32>().all(f32::is_finite));
    }
}
