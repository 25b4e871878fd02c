//! How long each operator takes, in the shapes of small decoders (hidden size 576, nine heads of 64, three of keys) and
//! encoders (hidden size 384, twelve heads of 32).

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{Device, Tensor, TensorData};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use oxiformers_hub::checkpoint::{DType, gguf::GgmlType};
use oxiformers_kernels::attention::{AttentionOptions, Mask, ScoreBias, Visible, attention};
use oxiformers_kernels::linear::feed_forward;
use oxiformers_kernels::{Activation, PackedMatrix, Weight, layer_norm, linear, rms_norm, rotary};
use oxiformers_quant::{float::FloatMatrix, ggml::GgmlMatrix};

/// Numbers between -1 and 1 that look random.
fn noise<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let values = words(shape.iter().product()).map(|word| (word >> 8) as f32 / (1 << 23) as f32 - 1.0);
    Tensor::from_data(
        TensorData::new(values.collect::<Vec<_>>(), shape),
        &Device::flex(),
    )
}

fn words(len: usize) -> impl Iterator<Item = u32> {
    let mut state = 0x9E37_79B9u32;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state
    })
    .take(len)
}

fn elementwise(c: &mut Criterion) {
    let mut group = c.benchmark_group("elementwise");
    for tokens in [1, 512] {
        let (x, up) = (noise([1, tokens, 1536]), noise([1, tokens, 1536]));
        group.throughput(Throughput::Elements(tokens as u64 * 1536));
        for act in [
            Activation::Relu,
            Activation::Silu,
            Activation::Gelu,
            Activation::GeluTanh,
        ] {
            group.bench_function(BenchmarkId::new(format!("{act:?}"), tokens), |b| {
                b.iter(|| act.forward(x.clone()));
            });
        }
        group.bench_function(BenchmarkId::new("Silu, gated", tokens), |b| {
            b.iter(|| Activation::Silu.gated(x.clone(), up.clone()));
        });
    }
}

fn norms(c: &mut Criterion) {
    let mut group = c.benchmark_group("norm");
    for tokens in [1, 512] {
        let (x, weight, bias) = (noise([1, tokens, 576]), noise([576]), noise([576]));
        group.throughput(Throughput::Elements(tokens as u64 * 576));
        group.bench_function(BenchmarkId::new("rms", tokens), |b| {
            b.iter(|| rms_norm(x.clone(), Some(weight.clone()), 0.0, 1e-5));
        });
        group.bench_function(BenchmarkId::new("layer", tokens), |b| {
            b.iter(|| layer_norm(x.clone(), Some(weight.clone()), Some(bias.clone()), 1e-5));
        });
    }
}

fn rotary_embedding(c: &mut Criterion) {
    let mut group = c.benchmark_group("rotary");
    for tokens in [1, 512] {
        let x = noise([1, 9, tokens, 64]);
        let [cos, sin] = [0, 1].map(|_| noise([1, 1, tokens, 32]));
        group.throughput(Throughput::Elements(tokens as u64 * 9 * 64));
        for (name, interleaved) in [("halves", false), ("interleaved", true)] {
            group.bench_function(BenchmarkId::new(name, tokens), |b| {
                b.iter(|| rotary(x.clone(), cos.clone(), sin.clone(), interleaved));
            });
        }
    }
}

fn attentions(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    let mut bench =
        |name: &str, [batch, heads, kv_heads, dim]: [usize; 4], queries: Range<usize>, visible: Visible| {
            let keys = queries.end;
            let q = noise([batch, heads, queries.len(), dim]);
            let (k, v) = (
                noise([batch, kv_heads, keys, dim]),
                noise([batch, kv_heads, keys, dim]),
            );
            let mask = Mask::new(visible);
            group.throughput(Throughput::Elements((batch * queries.len()) as u64));
            group.bench_function(name, |b| {
                b.iter(|| {
                    let bias = ScoreBias::default();
                    attention(
                        [q.clone(), k.clone(), v.clone()],
                        &mask,
                        bias,
                        AttentionOptions::default(),
                    )
                });
            });
        };
    for (batch, keys) in [(1, 128), (1, 2048), (16, 128)] {
        let name = format!("decode, {keys} keys, batch {batch}");
        bench(&name, [batch, 9, 3, 64], keys - 1..keys, causal(keys - 1));
    }
    for keys in [128, 512, 2048] {
        bench(
            &format!("prefill, {keys} tokens"),
            [1, 9, 3, 64],
            0..keys,
            causal(0),
        );
    }
    for (batch, tokens) in [(1, 16), (32, 128)] {
        let visible = Visible::Range {
            tokens: std::iter::once(0..tokens).collect(),
            reach: None,
        };
        bench(
            &format!("encoder, {tokens} tokens, batch {batch}"),
            [batch, 12, 12, 32],
            0..tokens,
            visible,
        );
    }
}

fn causal(first_query: usize) -> Visible {
    Visible::Causal {
        first_key: 0,
        first_query,
        window: None,
        padding: vec![0],
    }
}

/// Bytes below 64: as half floats they are no larger than 2, and positive.
fn small_bytes(len: usize) -> Vec<u8> {
    words(len).map(|word| (word >> 26) as u8).collect()
}

fn products(c: &mut Criterion) {
    const SHAPE: [usize; 2] = [1536, 1536];
    let values = SHAPE[0] * SHAPE[1];
    let ggml = GgmlType::ALL.iter().map(|ty| {
        let bytes = small_bytes(values / ty.block_size() * ty.type_size());
        let matrix = GgmlMatrix::new(*ty, SHAPE, bytes.into()).expect("whole blocks");
        (ty.name(), Arc::new(matrix) as Arc<dyn PackedMatrix>)
    });
    let floats = [
        ("F32", DType::F32, 4),
        ("F16", DType::F16, 2),
        ("BF16", DType::BF16, 2),
    ]
    .map(|(name, dtype, size)| {
        let matrix =
            FloatMatrix::new(dtype, SHAPE, small_bytes(values * size).into()).expect("as many values");
        (name, Arc::new(matrix) as Arc<dyn PackedMatrix>)
    });
    let mut group = c.benchmark_group("product with 1536 x 1536");
    for (name, matrix) in ggml.chain(floats) {
        let weight = Weight::Packed(matrix);
        for batch in [1, 4, 16, 512] {
            let x = noise([batch, SHAPE[1]]);
            group.throughput(Throughput::Elements((2 * batch * values) as u64));
            group.bench_function(BenchmarkId::new(name, batch), |b| {
                b.iter(|| linear(x.clone(), (weight.clone(), None), None));
            });
        }
    }
}

fn dense(c: &mut Criterion) {
    let mut group = c.benchmark_group("dense f32");
    let layer = |inputs, outputs| (Weight::Dense(noise([outputs, inputs])), Some(noise([outputs])));
    for (rows, inputs, outputs) in [
        (16, 384, 384),
        (4096, 384, 384),
        (4096, 384, 1536),
        (4096, 1536, 384),
    ] {
        let (x, layer) = (noise([rows, inputs]), layer(inputs, outputs));
        group.throughput(Throughput::Elements((2 * rows * inputs * outputs) as u64));
        group.bench_function(format!("{rows} rows, {inputs} to {outputs}"), |b| {
            b.iter(|| linear(x.clone(), layer.clone(), None));
        });
    }
    for rows in [16, 4096] {
        let (x, layers) = (noise([rows, 384]), [layer(384, 1536), layer(1536, 384)]);
        group.throughput(Throughput::Elements((4 * rows * 384 * 1536) as u64));
        group.bench_function(format!("{rows} rows, feed-forward 384 to 1536 to 384"), |b| {
            b.iter(|| feed_forward(x.clone(), layers.clone(), Activation::Gelu));
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    targets = elementwise, norms, rotary_embedding, attentions, products, dense
}
criterion_main!(benches);
