//! Fused operators against the gradients of what they are made of elsewhere, and against differences.

use burn::tensor::{Device, Gradients, Tensor, TensorData};

use crate::attention::{AttentionOptions, Mask, ScoreBias, Visible};
use crate::autodiff::REFERENCE;
use crate::dense::{DenseMatrix, Float};
use crate::testing::noise;
use crate::{
    Activation, CrossEntropyOptions, Dropout, Form, PackedMatrix, Weight, add_layer_norm, add_rms_norm,
    attention, cross_entropy, feed_forward, gated_feed_forward, layer_norm, linear, linears, rms_norm,
    rotary, rows, split,
};

/// The same tensor, whose gradient is asked for.
fn leaf<const D: usize>(x: &Tensor<D>) -> Tensor<D> {
    Tensor::from_data(x.clone().into_data(), &Device::flex().autodiff()).require_grad()
}

/// Numbers of a result and of gradients.
type Numbers = Vec<Vec<f32>>;

fn numbers<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}

/// The sum of all values, each times its own number: all have different gradients.
fn weighted<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let weights = noise(77, x.dims());
    (x * Tensor::from_data(weights.into_data(), &Device::flex().autodiff())).sum()
}

/// What `run` gives, fused and made of tensor operations.
fn both(run: impl Fn() -> Numbers) -> [Numbers; 2] {
    [false, true].map(|reference| {
        REFERENCE.set(reference);
        let found = run();
        REFERENCE.set(false);
        found
    })
}

/// Holds all numbers of both ways to each other, relative to the largest of their kind; those that are 0 but for rounding,
/// as a lonely key's, to what rounding makes of numbers around 1.
fn same(name: &str, run: impl Fn() -> Numbers) {
    let [fused, reference] = both(&run);
    assert_eq!(fused.len(), reference.len());
    for (index, (fused, reference)) in fused.iter().zip(&reference).enumerate() {
        assert_eq!(fused.len(), reference.len(), "{name}: {index}");
        let largest = reference.iter().fold(5e-2f32, |most, x| most.max(x.abs()));
        for (place, (a, b)) in fused.iter().zip(reference).enumerate() {
            assert!(
                (a - b).abs() <= 3e-5 * largest,
                "{name}: number {place} of {index}: {a} {b}"
            );
        }
    }
    assert_eq!(fused, both(run)[0], "{name}: another time, other numbers");
}

/// Holds the gradient of `x` to differences of the sum, at some places.
fn like_differences<const D: usize>(x: &Tensor<D>, run: impl Fn(Tensor<D>) -> Tensor<1>) {
    let tracked = leaf(x);
    let gradients = run(tracked.clone()).backward();
    let found = numbers(tracked.grad(&gradients).expect("a gradient"));
    let values = numbers(x.clone());
    let at = |place: usize, step: f32| {
        let mut values = values.clone();
        values[place] += step;
        let x = Tensor::from_data(TensorData::new(values, x.dims()), &Device::flex().autodiff());
        run(x).into_scalar::<f32>()
    };
    let largest = found.iter().fold(0f32, |most, x| most.max(x.abs()));
    for place in (0..values.len()).step_by((values.len() / 7).max(1)) {
        let step = 1e-2;
        let slope = (at(place, step) - at(place, -step)) / (2.0 * step);
        assert!(
            (slope - found[place]).abs() < 2e-2 * largest,
            "{place}: {slope} {}",
            found[place]
        );
    }
}

fn gradient<const D: usize>(x: &Tensor<D>, gradients: &Gradients) -> Vec<f32> {
    numbers(x.grad(gradients).expect("a gradient"))
}

#[test]
fn products() {
    for [batch, in_features, out_features] in [[1, 5, 7], [3, 64, 33], [40, 33, 20], [150, 400, 70]] {
        let (x, w) = (
            noise(1, [2, batch, in_features]),
            noise(2, [out_features, in_features]),
        );
        let b = noise(3, [out_features]);
        for act in [None, Some(Activation::Gelu)] {
            same("linear", || {
                let (x, w, b) = (leaf(&x), leaf(&w), leaf(&b));
                let y = linear(x.clone(), (Weight::Dense(w.clone()), Some(b.clone())), act);
                let loss = weighted(y.clone());
                let g = loss.backward();
                vec![numbers(y), gradient(&x, &g), gradient(&w, &g), gradient(&b, &g)]
            });
        }
        // The same input twice, once without a bias, and of a view.
        same("linears", || {
            let (x, w, v) = (leaf(&x), leaf(&w), leaf(&(w.clone() * 2.0)));
            let layers = [(Weight::Dense(w.clone()), None), (Weight::Dense(v.clone()), None)];
            let [a, b] = linears(x.clone().swap_dims(0, 1), layers, None);
            let g = (weighted(a.clone()) + weighted(b * 0.5)).backward();
            vec![numbers(a), gradient(&x, &g), gradient(&w, &g), gradient(&v, &g)]
        });
        same("feed-forward", || {
            let (x, w, b) = (leaf(&x), leaf(&w), leaf(&b));
            let second = leaf(&noise(4, [9, out_features]));
            let layers = [
                (Weight::Dense(w.clone()), Some(b.clone())),
                (Weight::Dense(second.clone()), None),
            ];
            let y = feed_forward(x.clone(), layers, Activation::GeluTanh);
            let g = weighted(y.clone()).backward();
            let all = [
                gradient(&x, &g),
                gradient(&w, &g),
                gradient(&b, &g),
                gradient(&second, &g),
            ];
            std::iter::once(numbers(y)).chain(all).collect()
        });
    }
    let (x, up, down) = (noise(1, [2, 9, 24]), noise(5, [50, 24]), noise(6, [11, 50]));
    let (gate, b) = (noise(4, [50, 24]), noise(3, [50]));
    same("gated feed-forward", || {
        let (x, gate, up, down, b) = (leaf(&x), leaf(&gate), leaf(&up), leaf(&down), leaf(&b));
        let layers = [(&gate, Some(&b)), (&up, None), (&down, None)];
        let layers = layers.map(|(w, b)| (Weight::Dense(w.clone()), b.cloned()));
        let y = gated_feed_forward(x.clone(), layers, Activation::Silu);
        let g = weighted(y.clone()).backward();
        let of_weights = [&gate, &up, &down].map(|w| gradient(w, &g));
        let all = [numbers(y), gradient(&x, &g), gradient(&b, &g)];
        all.into_iter().chain(of_weights).collect()
    });
    let w = noise(2, [7, 5]);
    like_differences(&noise(1, [3, 5]), |x| {
        weighted(linear(
            x,
            (Weight::Dense(w.clone()), None),
            Some(Activation::Silu),
        ))
    });
}

#[derive(Debug)]
struct Halves(DenseMatrix, Vec<half::bf16>);

impl PackedMatrix for Halves {
    fn shape(&self) -> [usize; 2] {
        self.0.shape()
    }
    fn scheme(&self) -> &str {
        "BF16"
    }
    fn num_bytes(&self) -> usize {
        2 * self.1.len()
    }
    fn dequantize_rows(&self, rows: std::ops::Range<usize>, dst: &mut [f32]) {
        let first = rows.start * self.shape()[1];
        for (to, x) in dst.iter_mut().zip(&self.1[first..]) {
            *to = x.to_f32();
        }
    }
    fn form(&self) -> Form<'_> {
        Form::Float(&self.0)
    }
}

#[test]
fn products_with_packed_weights() {
    for [batch, in_features, out_features] in [[3, 64, 33], [70, 40, 900]] {
        let w: Vec<half::bf16> = numbers(noise(2, [out_features, in_features]))
            .into_iter()
            .map(half::bf16::from_f32)
            .collect();
        let bytes: Vec<u8> = w.iter().flat_map(|x| x.to_le_bytes()).collect();
        let matrix = DenseMatrix::pack(Float::Bf16, out_features, in_features, &bytes, &|_| ());
        let matrix: std::sync::Arc<dyn PackedMatrix> = std::sync::Arc::new(Halves(matrix, w));
        let (x, b) = (noise(1, [2, batch, in_features]), noise(3, [out_features]));
        same("packed", || {
            let (x, b) = (leaf(&x), leaf(&b));
            let y = linear(x.clone(), (Weight::Packed(matrix.clone()), Some(b.clone())), None);
            let g = weighted(y.clone()).backward();
            vec![numbers(y), gradient(&x, &g), gradient(&b, &g)]
        });
    }
}

#[test]
fn activations() {
    use Activation::*;
    for act in [Relu, Relu2, Gelu, GeluTanh, QuickGelu, Silu, Tanh, Sigmoid] {
        for shape in [[1, 1, 3], [2, 7, 33], [5, 100, 80]] {
            let (x, up) = (noise(1, shape) * 6.0, noise(2, shape));
            same(&format!("{act:?}"), || {
                let x = leaf(&x);
                let y = act.forward(x.clone());
                let g = weighted(y.clone()).backward();
                vec![numbers(y), gradient(&x, &g)]
            });
            same(&format!("gated {act:?}"), || {
                let (x, up) = (leaf(&x), leaf(&up));
                let y = act.gated(x.clone(), up.clone());
                let g = weighted(y.clone()).backward();
                vec![numbers(y), gradient(&x, &g), gradient(&up, &g)]
            });
        }
        like_differences(&(noise(1, [3, 5]) * 2.0), |x| weighted(act.forward(x)));
    }
}

#[test]
fn norms() {
    for size in [1, 3, 64, 80, 577] {
        for count in [1, 7, 300] {
            let (x, residual) = (noise(1, [2, count, size]) * 3.0 + 0.5, noise(4, [2, count, size]));
            let (w, b) = (noise(2, [size]), noise(3, [size]));
            for offset in [0.0, 1.0] {
                same("RMS norm", || {
                    let (x, residual, w) = (leaf(&x), leaf(&residual), leaf(&w));
                    let (y, sum) = add_rms_norm(x.clone(), residual.clone(), Some(w.clone()), offset, 1e-5);
                    let g = (weighted(y.clone()) + weighted(sum * 0.3)).backward();
                    vec![
                        numbers(y),
                        gradient(&x, &g),
                        gradient(&residual, &g),
                        gradient(&w, &g),
                    ]
                });
            }
            same("RMS norm without weight", || {
                let x = leaf(&x);
                let y = rms_norm(x.clone(), None, 0.0, 1e-5);
                let g = weighted(y.clone()).backward();
                vec![numbers(y), gradient(&x, &g)]
            });
            // Of one number nothing is left but what rounding makes of it.
            if size == 1 {
                continue;
            }
            same("layer norm", || {
                let (x, residual, w, b) = (leaf(&x), leaf(&residual), leaf(&w), leaf(&b));
                let y = add_layer_norm(
                    x.clone(),
                    residual.clone(),
                    Some(w.clone()),
                    Some(b.clone()),
                    1e-5,
                );
                let g = weighted(y.clone()).backward();
                let all = [
                    gradient(&x, &g),
                    gradient(&residual, &g),
                    gradient(&w, &g),
                    gradient(&b, &g),
                ];
                std::iter::once(numbers(y)).chain(all).collect()
            });
        }
    }
    let (w, b) = (noise(2, [9]), noise(3, [9]));
    like_differences(&noise(1, [3, 9]), |x| {
        weighted(layer_norm(x, Some(w.clone()), Some(b.clone()), 1e-5))
    });
    like_differences(&noise(1, [3, 9]), |x| {
        weighted(rms_norm(x, Some(w.clone()), 0.0, 1e-5))
    });
}

#[test]
fn rotations() {
    for (dim, half) in [(64, 32), (80, 16), (6, 3)] {
        for interleaved in [false, true] {
            let x = noise(1, [2, 7, 3, dim]);
            let (cos, sin) = (noise(2, [1, 1, 7, half]), noise(3, [1, 1, 7, half]));
            same("rotary", || {
                let x = leaf(&x);
                let y = rotary(x.clone().swap_dims(1, 2), cos.clone(), sin.clone(), interleaved);
                let g = weighted(y.clone()).backward();
                vec![numbers(y), gradient(&x, &g)]
            });
        }
    }
}

#[test]
fn parts() {
    let x = noise(1, [2, 5, 9]);
    same("split", || {
        let x = leaf(&x);
        let [a, _, c] = split(x.clone() * 1.0, [4, 2, 3]);
        let loss = weighted(a.clone()) + weighted(c.clone().swap_dims(0, 1)) + weighted(c.clone() * 0.5);
        let g = loss.backward();
        vec![numbers(a), numbers(c), gradient(&x, &g)]
    });
}

#[test]
fn rows_of_tables() {
    let table = noise(1, [11, 6]);
    let ids = || {
        let ids = TensorData::new(vec![3, 0, 3, 10, 3], [5]);
        Tensor::from_data(ids, &Device::flex().autodiff())
    };
    for padding in [None, Some(10), Some(3), Some(99)] {
        same("rows", || {
            let table = leaf(&table);
            let y = rows(table.clone(), ids(), padding);
            let g = weighted(y.clone()).backward();
            vec![numbers(y), gradient(&table, &g)]
        });
    }
    let table = leaf(&table);
    let g = weighted(rows(table.clone(), ids(), Some(3))).backward();
    let g = gradient(&table, &g);
    assert!(g[18..24].iter().all(|x| *x == 0.0) && g[60..].iter().all(|x| *x != 0.0));
}

#[test]
fn losses() {
    for [count, classes] in [[1, 2], [5, 33], [70, 1000]] {
        let logits = noise(1, [count, classes]) * 4.0;
        let labels: Vec<i64> = (0..count)
            .map(|i| {
                if i % 3 == 1 {
                    -100
                } else {
                    (i * 7 % classes) as i64
                }
            })
            .collect();
        for (label_smoothing, divisor) in [(0.0, None), (0.1, None), (0.3, Some(7.0))] {
            let options = CrossEntropyOptions {
                label_smoothing,
                divisor,
                ..CrossEntropyOptions::default()
            };
            for factor in [1.0, -2.5] {
                same("cross entropy", || {
                    let x = leaf(&logits);
                    let loss = cross_entropy(x.clone() * 1.0, &labels, options).expect("labels") * factor;
                    let g = loss.backward();
                    vec![numbers(loss), gradient(&x, &g)]
                });
            }
            // The caller holds the logits, or wants no gradient.
            same("cross entropy of logits that are held", || {
                let x = leaf(&logits);
                let loss = cross_entropy(x.clone(), &labels, options).expect("labels");
                let g = loss.backward();
                let untracked = cross_entropy(x.clone().detach(), &labels, options).expect("labels");
                let plain = cross_entropy(logits.clone(), &labels, options).expect("labels");
                vec![
                    numbers(loss),
                    numbers(untracked),
                    numbers(plain),
                    gradient(&x, &g),
                    numbers(x),
                ]
            });
        }
    }
    let labels = [2, -100, 0];
    like_differences(&noise(1, [3, 5]), |x| {
        cross_entropy(x, &labels, CrossEntropyOptions::default()).expect("labels")
    });
}

#[test]
fn attentions() {
    for (seq, past) in [(1, 0), (2, 5), (33, 0), (7, 300), (300, 0)] {
        for (heads, kv_heads, dim, value_dim) in [(6, 2, 3, 5), (4, 4, 64, 64), (7, 1, 20, 20)] {
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
                for visible in [causal, range] {
                    for extras in 0..4 {
                        attentions_of(&visible, [seq, keys], [heads, kv_heads, dim, value_dim], extras);
                    }
                }
            }
        }
    }
}

/// With all that there is besides queries, keys and values, where `extras` says so, with a bias of its own for each
/// sequence, one for all, or one row of it.
fn attentions_of(
    visible: &Visible,
    [seq, keys]: [usize; 2],
    [heads, kv_heads, dim, value_dim]: [usize; 4],
    extras: usize,
) {
    let q = noise(1, [2, seq, heads, dim]);
    let k = noise(2, [2, kv_heads, keys + 9, dim]);
    let v = noise(3, [2, kv_heads, keys, value_dim]);
    let bias_shape = [
        [2, heads, seq, keys],
        [2, heads, seq, keys],
        [1, heads, seq, keys],
        [1, 1, 1, keys],
    ];
    let (bias, sinks) = (noise(5, bias_shape[extras]), noise(4, [heads]));
    let alibi = noise(6, [heads]).abs();
    let options = AttentionOptions {
        scale: (extras > 0).then_some(0.4),
        softcap: (extras == 1).then_some(2.0),
        dropout: (extras > 0).then_some(Dropout { rate: 0.2, seed: 5 }),
    };
    same(
        &format!("attention {visible:?} {seq} {keys} {heads} {kv_heads} {extras}"),
        || {
            let mask = Mask::new(visible.clone());
            let (q, k, v, bias, sinks) = (leaf(&q), leaf(&k), leaf(&v), leaf(&bias), leaf(&sinks));
            let given = match extras {
                0 => ScoreBias::default(),
                _ => ScoreBias {
                    bias: Some(bias.clone()),
                    alibi: (extras == 2).then(|| alibi.clone()),
                    sinks: (extras != 2).then(|| sinks.clone()),
                },
            };
            // Views of larger buffers.
            let qkv = [q.clone().swap_dims(1, 2), k.clone().narrow(2, 4, keys), v.clone()];
            let y = attention(qkv, &mask, given, options);
            let g = weighted(y.clone()).backward();
            let mut all = vec![numbers(y), gradient(&q, &g), gradient(&k, &g), gradient(&v, &g)];
            if extras > 0 {
                all.push(gradient(&bias, &g));
            }
            if extras == 1 || extras == 3 {
                all.push(gradient(&sinks, &g));
            }
            all
        },
    );
}

#[test]
fn attention_like_differences() {
    let (k, v) = (noise(2, [1, 1, 6, 4]), noise(3, [1, 1, 6, 4]));
    for dropout in [None, Some(Dropout { rate: 0.4, seed: 2 })] {
        let options = AttentionOptions {
            scale: None,
            softcap: Some(1.5),
            dropout,
        };
        like_differences(&noise(1, [1, 2, 6, 4]), |q| {
            let mask = Mask::new(Visible::Causal {
                first_key: 0,
                first_query: 0,
                window: Some(4),
                padding: vec![1],
            });
            let qkv = [q, k.clone(), v.clone()];
            weighted(attention(qkv, &mask, ScoreBias::default(), options))
        });
    }
}

/// What is left out of one sum may be in another: a long sequence is cut among tasks.
#[test]
fn long_sequences() {
    let visible = Visible::Causal {
        first_key: 0,
        first_query: 0,
        window: None,
        padding: vec![0],
    };
    attentions_of(&visible, [1100, 1100], [2, 1, 8, 8], 0);
}

/// Over many draws, what is left out and what is scaled up make no difference.
#[test]
fn dropout_of_attention_in_expectation() {
    let qkv = || [1, 2, 3].map(|seed| noise(seed, [1, 2, 3, 4]));
    let mask = Mask::new(Visible::Range {
        tokens: vec![0..3],
        reach: None,
    });
    let run = |dropout| {
        let options = AttentionOptions {
            dropout,
            ..AttentionOptions::default()
        };
        numbers(attention(qkv(), &mask, ScoreBias::default(), options))
    };
    let draws = 4000;
    let mut mean = [0.0; 24];
    for seed in 0..draws {
        for (mean, x) in mean.iter_mut().zip(run(Some(Dropout { rate: 0.3, seed }))) {
            *mean += x / draws as f32;
        }
    }
    let plain = run(None);
    for (a, b) in mean.iter().zip(&plain) {
        assert!((a - b).abs() < 0.02, "{a} {b}");
    }
    assert_ne!(run(Some(Dropout { rate: 0.3, seed: 1 })), plain);
}
