//! Every encoder-decoder against Transformers, on tiny checkpoints with random weights.
//!
//! `fixtures/make_seq2seq.py` made the checkpoints and the reference.

mod common;

use std::ops::Range;
use std::path::Path;

use burn::tensor::Tensor;
use common::{Reference, TOLERANCE, largest_difference, tensor, values};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::{CacheKind, EncoderInputs, LoadOptions, LogitsFor};
use oxiformers_models::tasks::{QuestionAnswering, SequenceClassification, TaskType, TokenClassification};
use oxiformers_models::{
    AutoModel, AutoModelFor, AutoModelForSeq2SeqLM, AutoModelForTextEncoding, CausalLM, Seq2SeqLM,
};

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
    assert!(error.contains("that of an encoder-decoder"), "{error}");
}

/// Largest differences `[logits, hidden states]` of tokens that are no padding.
fn compare_head<T: TaskType>(dir: &Path, flat: impl Fn(T::Logits) -> (Vec<f32>, bool)) -> [f32; 2] {
    let files = ModelFiles::from_dir(dir).expect("fixture");
    let model = AutoModelFor::<T>::from_files(&files, &LoadOptions::default())
        .unwrap_or_else(|error| panic!("{}: {error}", files.name()));
    let (inputs, reference) = head_inputs(dir);
    let output = model.forward(&inputs).expect("forward");
    let (logits, of_each_token) = flat(output.logits);
    let theirs = reference.floats("logits");
    let logits = if of_each_token {
        of_tokens(&logits, &theirs, &inputs)
    } else {
        largest_difference(&logits, &theirs)
    };
    [logits, hidden_states(output.hidden_states, &inputs, &reference)]
}

fn head_inputs(dir: &Path) -> (EncoderInputs, Reference) {
    let reference = Reference::open(dir);
    let ids = |name| {
        let rows = reference.ids(name).into_iter();
        rows.map(|row| row.into_iter().map(|id| id as u32).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    let inputs = EncoderInputs::with_mask(ids("input_ids"), &ids("attention_mask")).expect("mask");
    let inputs = EncoderInputs {
        output_hidden_states: true,
        ..inputs
    };
    (inputs, reference)
}

fn of_tokens(ours: &[f32], theirs: &[f32], inputs: &EncoderInputs) -> f32 {
    let [batch, seq] = inputs.dims();
    let real = |row: usize| inputs.tokens[row / seq].contains(&(row % seq));
    difference_where(ours, theirs, theirs.len() / (batch * seq), real)
}

fn hidden_states(ours: Vec<Tensor<3>>, inputs: &EncoderInputs, reference: &Reference) -> f32 {
    let theirs = reference.floats("hidden_states");
    let layers = ours.len();
    let theirs = theirs.chunks(theirs.len() / layers);
    ours.into_iter()
        .zip(theirs)
        .map(|(ours, theirs)| of_tokens(&values(ours), theirs, inputs))
        .fold(0.0, f32::max)
}

fn rows(x: Tensor<2>) -> (Vec<f32>, bool) {
    (values(x.unsqueeze()), false)
}

#[test]
fn heads_equal_transformers() {
    let mut failures = Vec::new();
    for dir in common::fixtures("seq2seq_heads") {
        let name = dir.file_name().expect("name").to_string_lossy().into_owned();
        let differences = match name.split_once('@').expect("task").1 {
            "SequenceClassification" => compare_head::<SequenceClassification>(&dir, rows),
            "TokenClassification" => compare_head::<TokenClassification>(&dir, |x| (values(x), true)),
            "QuestionAnswering" => compare_head::<QuestionAnswering>(&dir, |x| {
                let ends = [x.start_logits, x.end_logits].map(|x| x.unsqueeze_dim::<3>(2));
                (values(Tensor::cat(ends.to_vec(), 2)), true)
            }),
            "TextEncoding" => {
                let files = ModelFiles::from_dir(&dir).expect("fixture");
                let model =
                    AutoModelForTextEncoding::from_files(&files, &LoadOptions::default()).expect("model");
                let (inputs, reference) = head_inputs(&dir);
                let output = model.forward(&inputs).expect("forward");
                let last = values(output.last_hidden_state);
                [
                    of_tokens(&last, &reference.floats("logits"), &inputs),
                    hidden_states(output.hidden_states, &inputs, &reference),
                ]
            }
            task => panic!("{task}"),
        };
        println!("{name:<32} {:>10.2e} {:>10.2e}", differences[0], differences[1]);
        if differences.iter().any(|d| *d > TOLERANCE) {
            failures.push(name);
        }
    }
    assert!(failures.is_empty(), "beyond {TOLERANCE:e}: {failures:?}");
}

#[test]
fn encoders_of_language_models() {
    let load = |name: &str| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/seq2seq");
        let files = ModelFiles::from_dir(&root.join(name)).expect("fixture");
        (AutoModel::from_files(&files, &LoadOptions::default()), files)
    };
    let inputs = EncoderInputs::padded(&[vec![5, 6, 7, 1], vec![8, 1]], 0);
    for name in [
        "t5-released",
        "umt5",
        "bart",
        "bart-released",
        "plbart",
        "marian-separate",
        "m2m_100",
    ] {
        let (model, files) = load(name);
        let output = model
            .unwrap_or_else(|error| panic!("{name}: {error}"))
            .forward(&inputs);
        assert_eq!(
            output.expect("forward").last_hidden_state.dims(),
            [2, 4, 32],
            "{name}"
        );
        let error = AutoModelFor::<SequenceClassification>::from_files(&files, &LoadOptions::default());
        let error = error.expect_err("no head").to_string();
        assert!(error.contains("SequenceClassification"), "{name}: {error}");
    }
    let long = EncoderInputs::padded(&[vec![5; 65]], 0);
    let error = load("bart")
        .0
        .expect("model")
        .forward(&long)
        .expect_err("too long");
    assert!(error.to_string().contains("made for 64"), "{error}");
}
