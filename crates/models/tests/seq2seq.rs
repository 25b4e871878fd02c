//! Every encoder-decoder against Transformers, on tiny checkpoints with random weights.
//!
//! `fixtures/make_seq2seq.py` made the checkpoints and the reference.

mod common;

use std::ops::Range;
use std::path::Path;

use common::{Reference, TOLERANCE, largest_difference, tensor, values};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::{CacheKind, LoadOptions, LogitsFor};
use oxiformers_models::{AutoModelForSeq2SeqLM, CausalLM, Seq2SeqLM};

/// The largest difference in the rows, `width` numbers each, for which `counts` says so.
fn difference_where(ours: &[f32], theirs: &[f32], width: usize, counts: impl Fn(usize) -> bool) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let rows = ours.chunks(width).zip(theirs.chunks(width)).enumerate();
    rows.filter(|(row, _)| counts(*row))
        .map(|(_, (ours, theirs))| largest_difference(ours, theirs))
        .fold(0.0, f32::max)
}

/// Largest differences `[encoder, logits, decode]`.
fn compare(dir: &Path) -> [f32; 3] {
    let files = ModelFiles::from_dir(dir).expect("fixture");
    let model = AutoModelForSeq2SeqLM::from_files(&files, &LoadOptions::default())
        .unwrap_or_else(|error| panic!("{}: {error}", files.name()));
    let reference = Reference::open(dir);
    let vocab = model.vocab_size();
    let (ids, mask) = (reference.ids("input_ids"), reference.ids("attention_mask"));
    let source = ids[0].len();
    let tokens: Vec<Range<usize>> = mask
        .iter()
        .map(|row| 0..row.iter().filter(|m| **m == 1).count())
        .collect();
    let targets = reference.ids("decoder_input_ids");
    let seq = targets[0].len();

    let encoded = model.model.encode(tensor(&ids, 0..source), tokens.clone());
    let width = encoded.hidden_states.dims()[2];
    let ours = values(encoded.hidden_states);
    let theirs = reference.floats("encoder_hidden");
    let encoder = difference_where(&ours, &theirs, width, |row| mask[row / source][row % source] == 1);

    let begin = || {
        let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; ids.len()]);
        Seq2SeqLM::encode(&model, tensor(&ids, 0..source), tokens.clone(), &mut cache);
        cache
    };
    let logits = values(model.forward(tensor(&targets, 0..seq), &mut begin(), LogitsFor::All));
    let logits = largest_difference(&logits, &reference.floats("logits"));

    let theirs = reference.floats("decode_logits");
    let mut cache = begin();
    let mut decoded = 0f32;
    for i in 0..seq {
        let ours = values(model.forward(tensor(&targets, i..i + 1), &mut cache, LogitsFor::Last));
        for (row, ours) in ours.chunks(vocab).enumerate() {
            let at = (row * seq + i) * vocab;
            decoded = decoded.max(largest_difference(ours, &theirs[at..at + vocab]));
        }
    }
    [encoder, logits, decoded]
}

#[test]
fn hidden_states_and_logits_equal_transformers() {
    let mut failures = Vec::new();
    println!(
        "{:<20} {:>10} {:>10} {:>10}",
        "fixture", "encoder", "logits", "decode"
    );
    for dir in common::fixtures("seq2seq") {
        let name = dir.file_name().expect("name").to_string_lossy().into_owned();
        let [encoder, logits, decoded] = compare(&dir);
        println!("{name:<20} {encoder:>10.2e} {logits:>10.2e} {decoded:>10.2e}");
        if [encoder, logits, decoded].iter().any(|d| *d > TOLERANCE) {
            failures.push(name);
        }
    }
    assert!(failures.is_empty(), "beyond {TOLERANCE:e}: {failures:?}");
}

#[test]
fn the_wrong_kind_of_model_is_named() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let files = ModelFiles::from_dir(&root.join("llama")).expect("fixture");
    let error = AutoModelForSeq2SeqLM::from_files(&files, &LoadOptions::default()).expect_err("a decoder");
    assert!(error.to_string().contains("no encoder-decoder"), "{error}");
    let files = ModelFiles::from_dir(&root.join("seq2seq/t5")).expect("fixture");
    let error = oxiformers_models::AutoModelForCausalLM::from_files(&files, &LoadOptions::default());
    let error = error.expect_err("an encoder-decoder").to_string();
    assert!(error.contains("is an encoder-decoder"), "{error}");
}
