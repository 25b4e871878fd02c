//! Every architecture against Transformers, on tiny checkpoints with random weights.
//!
//! `fixtures/make.py` made the checkpoints and the reference.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use common::{Reference, TOLERANCE, largest_difference, tensor, values};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::{Cache, CacheKind, LoadOptions, LogitsFor};
use oxiformers_models::{AutoModelForCausalLM, CausalLM, registry::MODEL_TYPES};

/// Fixtures whose weights stay packed unless they are asked for in f32, and the largest difference while they
/// are: activations are then quantized too.
const QUANTIZED: [&str; 2] = ["q8_0", "mxfp4"];
const PACKED_TOLERANCE: f32 = 5e-3;

fn prefill(model: &dyn CausalLM, ids: &[Vec<i64>], cache: &mut Cache, upto: usize) -> Vec<f32> {
    values(model.forward(tensor(ids, 0..upto), cache, LogitsFor::All))
}

/// Largest differences `[prefill, decode, padded]`, and whether the greedy continuation is equal.
fn compare(files: &ModelFiles, dir: &Path, options: &LoadOptions) -> ([f32; 3], bool) {
    let model = AutoModelForCausalLM::from_files(files, options)
        .unwrap_or_else(|error| panic!("{}: {error}", files.name()));
    let reference = Reference::open(dir);
    let vocab = model.vocab_size();

    let ids = reference.ids("input_ids");
    let seq = ids[0].len();
    let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; ids.len()]);
    let whole = largest_difference(
        &prefill(&model, &ids, &mut cache, seq),
        &reference.floats("logits"),
    );

    let decoded = {
        let expected = reference.floats("decode_logits");
        let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; ids.len()]);
        let mut worst = 0f32;
        for i in 0..seq {
            let ours = values(model.forward(tensor(&ids, i..i + 1), &mut cache, LogitsFor::Last));
            for (row, ours) in ours.chunks(vocab).enumerate() {
                let at = (row * seq + i) * vocab;
                worst = worst.max(largest_difference(ours, &expected[at..at + vocab]));
            }
        }
        worst
    };

    let padded = {
        let (ids, mask) = (reference.ids("padded_ids"), reference.ids("attention_mask"));
        let padding = mask
            .iter()
            .map(|row| row.iter().filter(|m| **m == 0).count())
            .collect();
        let mut cache = model.new_cache(CacheKind::Dynamic, padding);
        let ours = prefill(&model, &ids, &mut cache, seq);
        let expected = reference.floats("padded_logits");
        let real = mask.iter().flatten().enumerate().filter(|(_, m)| **m == 1);
        real.map(|(at, _)| largest_difference(&ours[at * vocab..][..vocab], &expected[at * vocab..][..vocab]))
            .fold(0.0, f32::max)
    };

    let greedy = {
        let mut cache = model.new_cache(CacheKind::Dynamic, vec![0]);
        let mut next = reference.ids("prompt_ids");
        let mut ours = Vec::new();
        for _ in 0..32 {
            let logits = values(model.forward(tensor(&next, 0..next[0].len()), &mut cache, LogitsFor::Last));
            let best = logits
                .iter()
                .enumerate()
                .max_by(|a, b| a.1.total_cmp(b.1))
                .expect("logits")
                .0;
            ours.push(best as i64);
            next = vec![vec![best as i64]];
        }
        ours == reference.ids("greedy_ids")[0]
    };
    ([whole, decoded, padded], greedy)
}

fn fixtures() -> Vec<PathBuf> {
    common::fixtures("")
}

/// Compares each model with the reference in its folder.
fn compare_all(models: impl Iterator<Item = (ModelFiles, PathBuf)>) {
    let mut failures = Vec::new();
    println!(
        "{:<28} {:>10} {:>10} {:>10}  greedy",
        "fixture", "prefill", "decode", "padded"
    );
    for (files, dir) in models {
        let name = dir.file_name().expect("name").to_string_lossy().into_owned();
        if std::env::var("PARITY").is_ok_and(|only| !name.contains(&only)) {
            continue;
        }
        let mut check = |options: LoadOptions, tolerance: f32| {
            let (differences, greedy) = compare(&files, &dir, &options);
            let [whole, decoded, padded] = differences;
            println!("{name:<28} {whole:>10.2e} {decoded:>10.2e} {padded:>10.2e}  {greedy}");
            if !greedy || differences.iter().any(|d| *d > tolerance) {
                failures.push(name.clone());
            }
        };
        if QUANTIZED.iter().any(|scheme| name.ends_with(scheme)) {
            check(LoadOptions::default(), PACKED_TOLERANCE);
            let dtype = Some(FloatDType::F32);
            check(
                LoadOptions {
                    dtype,
                    ..Default::default()
                },
                TOLERANCE,
            );
        } else {
            check(LoadOptions::default(), TOLERANCE);
        }
    }
    assert!(
        failures.is_empty(),
        "beyond {TOLERANCE:e}, or other greedy ids: {failures:?}"
    );
}

#[test]
fn logits_and_greedy_ids_equal_transformers() {
    compare_all(
        fixtures()
            .into_iter()
            .map(|dir| (ModelFiles::from_dir(&dir).expect("fixture"), dir)),
    );
}

/// `fixtures/make_gguf.py` made these from the others; `NAME.how.gguf` from `NAME`.
#[test]
fn gguf_files_give_the_same() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut paths: Vec<_> = std::fs::read_dir(root.join("gguf"))
        .expect("fixtures")
        .map(|entry| entry.expect("entry").path())
        .collect();
    paths.sort();
    compare_all(paths.into_iter().map(|path| {
        let file = path.file_name().expect("name").to_string_lossy();
        let name = file.split('.').next().expect("name").to_owned();
        (ModelFiles::from_file(&path).expect("fixture"), root.join(name))
    }));
}

#[test]
fn every_architecture_has_a_fixture() {
    let held: BTreeSet<String> = (fixtures().iter())
        .chain(&common::fixtures("seq2seq"))
        .chain(&common::fixtures("encoders"))
        .map(|dir| std::fs::read(dir.join("config.json")).expect("config.json"))
        .map(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).expect("JSON")["model_type"].clone())
        .map(|model_type| model_type.as_str().expect("model_type").to_string())
        .collect();
    let missing: Vec<_> = MODEL_TYPES
        .iter()
        .filter(|model_type| !held.contains(**model_type))
        .collect();
    assert!(missing.is_empty(), "no fixture: {missing:?}");
}
