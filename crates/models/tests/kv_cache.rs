//! Caches in fewer bits, on models with full attention, sliding windows, both, sinks, ALiBi, soft caps and latents.

mod common;

use common::largest_difference;
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::{
    Cache, CacheKind, CachePrecision, CodeBits, GroupAxis, LoadOptions, LogitsFor, QuantizedCacheConfig,
};
use oxiformers_models::{AutoModelForCausalLM, CausalLM};

const MODELS: [&str; 8] = [
    "llama",
    "mistral",
    "gemma3_text",
    "gpt_oss",
    "qwen3-window",
    "gemma2-caps",
    "falcon-alibi",
    "deepseek_v3",
];

/// Tokens of each pass: a prompt, steps of decoding, a draft.
const PASSES: [usize; 16] = [12, 1, 1, 1, 1, 1, 5, 1, 1, 1, 1, 7, 1, 1, 1, 1];

/// Largest difference of logits, which are of the size of 1, between the cache in 8 bits or in half precision and in f32.
const TOLERANCE: [f32; 2] = [0.05, 0.02];

/// Latents, which all keys and values are made of, lose more.
const TOLERANCE_OF_LATENTS: f32 = 0.2;

/// Between two ways to compute the same, as a share of what packing changes: the last bit of a sum may decide which code a
/// key of the next layer gets.
const ROUNDED: f32 = 0.05;

fn model(name: &str) -> AutoModelForCausalLM {
    let dir = common::fixtures("")
        .into_iter()
        .find(|dir| dir.file_name().is_some_and(|found| found == name))
        .expect("the fixture");
    let files = ModelFiles::from_dir(&dir).expect("a model");
    AutoModelForCausalLM::from_files(&files, &LoadOptions::default()).expect("a model")
}

/// Small enough for a few tokens to be packed, also within the windows of five tokens that the fixtures have.
fn small(bits: CodeBits) -> QuantizedCacheConfig {
    QuantizedCacheConfig {
        group_size: 4,
        residual_length: 1,
        ..QuantizedCacheConfig::new(bits)
    }
}

/// Logits of the last token of every pass, of two sequences of which one is padded.
fn logits(model: &AutoModelForCausalLM, kind: CacheKind, precision: CachePrecision) -> Vec<f32> {
    run(model, |padding| {
        model.new_cache(kind, padding).with_precision(precision)
    })
}

fn run(model: &AutoModelForCausalLM, cache: impl Fn(Vec<usize>) -> Cache) -> Vec<f32> {
    let total: usize = PASSES.iter().sum();
    let ids = |row: usize| {
        (0..total)
            .map(|i| ((i * 37 + row * 11 + 5) % 90) as i64)
            .collect()
    };
    let ids: Vec<Vec<i64>> = (0..2).map(ids).collect();
    let mut cache = cache(vec![0, 3]);
    let (mut at, mut all) = (0, Vec::new());
    for pass in PASSES {
        let input = common::tensor(&ids, at..at + pass);
        let logits = model.forward(input, &mut cache, LogitsFor::Last);
        all.extend(logits.into_data().iter::<f32>());
        at += pass;
    }
    all
}

#[test]
fn eight_bits_and_half_precision_are_near() {
    for name in MODELS {
        let model = model(name);
        let full = logits(&model, CacheKind::Dynamic, CachePrecision::Full);
        let size = full.iter().map(|x| x * x).sum::<f32>() / full.len() as f32;
        let [eight, half] = [
            CachePrecision::Quantized(small(CodeBits::Eight)),
            CachePrecision::F16,
        ]
        .map(|precision| largest_difference(&logits(&model, CacheKind::Dynamic, precision), &full));
        println!(
            "{name}: int8 {eight:.1e}, f16 {half:.1e}, logits {:.2}",
            size.sqrt()
        );
        let most = match name {
            "deepseek_v3" => TOLERANCE_OF_LATENTS,
            _ => TOLERANCE[0],
        };
        assert!(eight > 0.0 && eight < most, "{name}: {eight}");
        assert!(half > 0.0 && half < TOLERANCE[1], "{name}: {half}");
        // All kinds of caches pack the same.
        for kind in [CacheKind::Full, CacheKind::Static { max_len: 64 }] {
            let other = logits(&model, kind, CachePrecision::F16);
            let dynamic = logits(&model, CacheKind::Dynamic, CachePrecision::F16);
            assert!(largest_difference(&other, &dynamic) < TOLERANCE[1], "{name}");
        }
    }
}

/// Attention gets either the codes or what tensor operations make of them.
#[test]
fn codes_are_attended_to_as_if_they_were_dequantized() {
    for name in MODELS {
        let model = model(name);
        let full = logits(&model, CacheKind::Dynamic, CachePrecision::Full);
        for bits in [CodeBits::Two, CodeBits::Four, CodeBits::Eight] {
            let other = QuantizedCacheConfig {
                group_size: 5,
                residual_length: 0,
                residual_bits: None,
                key_axis: GroupAxis::Token,
                value_axis: GroupAxis::Channel,
                ..small(bits)
            };
            for config in [small(bits), other] {
                let precision = CachePrecision::Quantized(config);
                let ours = logits(&model, CacheKind::Dynamic, precision);
                let expected = run(&model, |padding| {
                    let cache = model.new_cache(CacheKind::Dynamic, padding);
                    cache.with_precision(precision).dequantizing()
                });
                let difference = largest_difference(&ours, &expected);
                let lost = largest_difference(&ours, &full);
                println!("{name}, {bits:?}: {difference:.1e}; {lost:.1e} from full precision");
                assert!(difference < ROUNDED * lost, "{name}: {difference}");
                assert!(bits != CodeBits::Two || lost > 0.1, "{name}: {lost}");
            }
        }
    }
}
