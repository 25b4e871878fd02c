//! Checkpoints that Python's libraries quantized, and our own, against Transformers with their dequantized weights.
//!
//! `fixtures/make_quantized.py` made the checkpoints and the reference.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::FloatDType;
use common::{Reference, largest_difference, tensor, values};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::Checkpoint;
use oxiformers_hub::checkpoint::safetensors::MAX_SHARD_SIZE;
use oxiformers_models::nn::quant::{MethodOptions, QuantizationConfig, Recipe};
use oxiformers_models::nn::{CacheKind, EncoderInputs, LoadOptions, LogitsFor};
use oxiformers_models::quantize::{QuantizeError, QuantizePlan, survey};
use oxiformers_models::registry::Kind;
use oxiformers_models::{
    AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, CausalLM,
    Seq2SeqLM,
};

/// Largest difference of logits while weights stay packed, as a part of the largest: activations are then quantized, too.
const PACKED: f32 = 2e-3;

fn fixtures() -> Vec<PathBuf> {
    common::fixtures("quantized")
}

fn name(dir: &Path) -> String {
    dir.file_name().unwrap().to_string_lossy().into_owned()
}

/// The logits for the inputs of `reference`.
fn logits(files: &ModelFiles, reference: &Reference, options: &LoadOptions) -> Vec<f32> {
    let failed = |error: oxiformers_models::Error| -> ! { panic!("{}: {error}", files.name()) };
    let ids = reference.ids("input_ids");
    let kind = AutoConfig::from_files(files)
        .unwrap_or_else(|error| failed(error))
        .architecture
        .kind();
    match kind {
        Kind::Decoder => {
            let model =
                AutoModelForCausalLM::from_files(files, options).unwrap_or_else(|error| failed(error));
            let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; ids.len()]);
            values(model.forward(tensor(&ids, 0..ids[0].len()), &mut cache, LogitsFor::All))
        }
        Kind::EncoderDecoder => {
            let model =
                AutoModelForSeq2SeqLM::from_files(files, options).unwrap_or_else(|error| failed(error));
            let targets = reference.ids("decoder_input_ids");
            let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; ids.len()]);
            let tokens = vec![0..ids[0].len(); ids.len()];
            Seq2SeqLM::encode(&model, tensor(&ids, 0..ids[0].len()), tokens, &mut cache);
            values(model.forward(tensor(&targets, 0..targets[0].len()), &mut cache, LogitsFor::All))
        }
        Kind::Encoder => {
            let model = AutoModelForSequenceClassification::from_files(files, options)
                .unwrap_or_else(|error| failed(error));
            let rows: Vec<Vec<u32>> = ids
                .iter()
                .map(|row| row.iter().map(|id| *id as u32).collect())
                .collect();
            let output = model.forward(&EncoderInputs::padded(&rows, 0)).unwrap();
            output.logits.into_data().try_to_vec().unwrap()
        }
    }
}

fn dense() -> LoadOptions {
    LoadOptions {
        dtype: Some(FloatDType::F32),
        ..LoadOptions::default()
    }
}

#[test]
fn checkpoints_of_python_give_its_logits() {
    let mut failures = Vec::new();
    for dir in fixtures() {
        let files = ModelFiles::from_dir(&dir).unwrap();
        let reference = Reference::open(&dir);
        let expected = reference.floats("logits");
        let packed = largest_difference(&logits(&files, &reference, &LoadOptions::default()), &expected);
        let dense = largest_difference(&logits(&files, &reference, &dense()), &expected);
        println!("{:<16} packed {packed:.2e}, dense {dense:.2e}", name(&dir));
        let size = expected.iter().fold(1.0f32, |most, value| most.max(value.abs()));
        if packed > PACKED * size || dense > 1e-4 {
            failures.push(name(&dir));
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

/// The unquantized models that [`fixtures`] were made of are not kept: others take their place.
fn originals() -> [(&'static str, ModelFiles); 4] {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    [
        ("llama", "llama"),
        ("gpt2", "gpt2"),
        ("t5", "seq2seq/t5-gated"),
        ("mixtral", "mixtral"),
    ]
    .map(|(name, place)| (name, ModelFiles::from_dir(&root.join(place)).unwrap()))
}

fn recipe(method: &str, skip: &[&str]) -> Recipe {
    let mut config = QuantizationConfig::named(method, &MethodOptions::default()).unwrap();
    if !skip.is_empty() {
        config.skip(skip.iter().map(|name| name.to_string()).collect());
    }
    config.into()
}

/// Output layers in 8 bits, one with a matrix of its own and one that shares the table of embeddings.
#[test]
fn output_layers_of_8_bits() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    for name in ["llama", "qwen3-window"] {
        let files = ModelFiles::from_dir(&root.join(name)).unwrap();
        let reference = Reference::open(&root.join(name));
        let of = |quantize_output| {
            let options = LoadOptions {
                quantize_output,
                ..LoadOptions::default()
            };
            logits(&files, &reference, &options)
        };
        let floats = of(false);
        let size = floats.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let difference = largest_difference(&of(true), &floats);
        assert!(
            (1e-4 * size..2e-2 * size).contains(&difference),
            "{name}: {difference} of {size}"
        );
    }
}

/// A model that is quantized while it is loaded, and one that was written quantized, are the same.
#[test]
fn written_and_loaded_as_quantized_while_loading() {
    for (name, files) in originals() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let reference = Reference::open(&match name {
            "t5" => dir.join("seq2seq/t5-gated"),
            name => dir.join(name),
        });
        for method in ["int8", "nf4", "fp4"] {
            let folder = tempfile::tempdir().unwrap();
            let mut recipe = recipe(method, &[]);
            recipe.overrides = vec![
                ("k_proj|k".to_string(), None),
                ("lm_head".to_string(), None),
                (".*experts".to_string(), None),
            ];
            let plan = QuantizePlan::new(&files, recipe.clone(), None).unwrap();
            plan.write(folder.path(), MAX_SHARD_SIZE, |_| true).unwrap();
            let written = ModelFiles::from_dir(folder.path()).unwrap();
            let options = LoadOptions {
                quantization: Some(Arc::new(recipe)),
                ..LoadOptions::default()
            };
            let ours = logits(&files, &reference, &options);
            assert_eq!(
                ours,
                logits(&written, &reference, &LoadOptions::default()),
                "{name} {method}"
            );
            let plain = logits(&files, &reference, &LoadOptions::default());
            let difference = largest_difference(&ours, &plain);
            println!("{name} {method}: {difference}");
            assert!(
                difference > 1e-6 && difference < 3.0,
                "{name} {method}: {difference}"
            );
        }
    }
}

/// A folder in which modules are stored by different methods is loaded as it was written.
#[test]
fn mixed_methods_load_again() {
    let [(_, llama), ..] = originals();
    let reference = Reference::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama"));
    let config = |name: &str| QuantizationConfig::named(name, &MethodOptions::default()).unwrap();
    let recipe = Recipe {
        config: config("nf4"),
        overrides: vec![
            ("v_proj".to_string(), Some(config("int8"))),
            ("model.layers.1.mlp".to_string(), Some(config("bitnet"))),
            (".*k_proj".to_string(), None),
        ],
    };
    let folder = tempfile::tempdir().unwrap();
    let plan = QuantizePlan::new(&llama, recipe.clone(), None).unwrap();
    plan.write(folder.path(), MAX_SHARD_SIZE, |_| true).unwrap();
    let written = ModelFiles::from_dir(folder.path()).unwrap();
    let counts = survey(&written).unwrap();
    let count = |scheme: &str| counts.iter().filter(|matrix| matrix.scheme == scheme).count();
    assert_eq!(
        [count("nf4"), count("int8"), count("bitnet"), count("F32")],
        [7, 2, 3, 4]
    );
    let options = LoadOptions {
        quantization: Some(Arc::new(recipe)),
        ..LoadOptions::default()
    };
    assert_eq!(
        logits(&llama, &reference, &options),
        logits(&written, &reference, &LoadOptions::default())
    );
    // What Python would have to know is said where Python looks for it.
    let kept = &plan.config()["quantization_config"]["llm_int8_skip_modules"];
    assert_eq!(kept, &serde_json::json!([".*k_proj", "lm_head"]));
}

/// Matrices that are no whole number of fp8's blocks stay as they are, as in Transformers, and are named.
#[test]
fn shapes_that_no_block_divides() {
    let [(_, llama), ..] = originals();
    let fp8 = |block_size| {
        let options = MethodOptions {
            block_size: Some(block_size),
            ..MethodOptions::default()
        };
        Recipe::from(QuantizationConfig::named("fp8", &options).unwrap())
    };
    // Hidden states of 32, 48 within the feed-forward block, heads of 16.
    let plan = QuantizePlan::new(&llama, fp8(32), None).unwrap();
    let kept: Vec<_> = plan
        .tensors()
        .filter(|tensor| tensor.scheme == "F32" && tensor.shape.len() > 1)
        .map(|tensor| tensor.name)
        .collect();
    assert_eq!(kept.len(), 2 + 2 * 3, "{kept:?}");
    let folder = tempfile::tempdir().unwrap();
    plan.write(folder.path(), MAX_SHARD_SIZE, |_| true).unwrap();
    let skipped = &plan.config()["quantization_config"]["modules_to_not_convert"];
    let skipped: Vec<String> = serde_json::from_value(skipped.clone()).unwrap();
    assert!(
        skipped.contains(&"model.layers.0.mlp.up_proj".to_string()),
        "{skipped:?}"
    );
    assert!(skipped.contains(&"lm_head".to_string()), "{skipped:?}");
    let reference = Reference::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama"));
    let options = LoadOptions {
        quantization: Some(Arc::new(fp8(32))),
        ..LoadOptions::default()
    };
    let written = ModelFiles::from_dir(folder.path()).unwrap();
    assert_eq!(
        logits(&llama, &reference, &options),
        logits(&written, &reference, &LoadOptions::default())
    );
    let error = QuantizePlan::new(&llama, fp8(128), None)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("blocks") && error.contains("mlp.down_proj"),
        "{error}"
    );
    let options = LoadOptions {
        quantization: Some(Arc::new(fp8(128))),
        ..LoadOptions::default()
    };
    let error = AutoModelForCausalLM::from_files(&llama, &options)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("no module is quantized"), "{error}");
}

#[test]
fn modules_are_chosen_as_transformers_chooses_them() {
    let [(_, llama), (_, gpt2), (_, t5), (_, mixtral)] = originals();
    let kept = |files: &ModelFiles, recipe: Recipe| -> Vec<String> {
        let plan = QuantizePlan::new(files, recipe, None).unwrap();
        let kept = plan
            .tensors()
            .filter(|tensor| tensor.scheme != "nf4" && tensor.shape.len() > 1);
        kept.map(|tensor| tensor.name).collect()
    };
    assert_eq!(
        kept(&llama, recipe("nf4", &[])),
        ["lm_head.weight", "model.embed_tokens.weight"]
    );
    let with_skip = kept(&llama, recipe("nf4", &["model.layers.1.self_attn", "up_proj"]));
    assert_eq!(with_skip.len(), 2 + 4 + 2, "{with_skip:?}");
    assert_eq!(
        kept(&gpt2, recipe("nf4", &[])),
        ["transformer.wpe.weight", "transformer.wte.weight"]
    );
    let t5 = kept(&t5, recipe("nf4", &[]));
    assert!(
        t5.iter().any(|name| name.ends_with("DenseReluDense.wo.weight")),
        "{t5:?}"
    );
    assert!(!t5.iter().any(|name| name.ends_with("wi_0.weight")), "{t5:?}");
    // Experts are no linear layers in Transformers, nor is what chooses them.
    let mixtral = kept(&mixtral, recipe("nf4", &[]));
    assert!(mixtral.iter().any(|name| name.contains("experts")), "{mixtral:?}");
    assert!(
        mixtral.iter().any(|name| name.ends_with("gate.weight")),
        "{mixtral:?}"
    );

    let plan = QuantizePlan::new(&llama, recipe("nf4", &["up_proj"]), None).unwrap();
    let skipped = &plan.config()["quantization_config"]["llm_int8_skip_modules"];
    assert_eq!(skipped, &serde_json::json!(["up_proj", "lm_head"]));
}

#[test]
fn what_cannot_be_done_is_said() {
    let [(_, llama), ..] = originals();
    let refused = |files: &ModelFiles, recipe: Recipe| {
        let error = QuantizePlan::new(files, recipe, None).err().unwrap();
        error.to_string()
    };
    let error = refused(&llama, recipe("nf4", &["model"]));
    assert!(error.contains("no module is left"), "{error}");
    let error = refused(&llama, recipe("nf4", &["a("]));
    assert!(error.contains("a("), "{error}");
    let quantized = ModelFiles::from_dir(&fixtures()[0]).unwrap();
    let error = refused(&quantized, recipe("int8", &[]));
    assert!(error.contains("already"), "{error}");
    assert!(QuantizationConfig::named("zip", &MethodOptions::default()).is_err());

    let folder = tempfile::tempdir().unwrap();
    let plan = QuantizePlan::new(&llama, recipe("nf4", &[]), None).unwrap();
    let stopped = plan.write(folder.path(), MAX_SHARD_SIZE, |_| false);
    assert!(matches!(stopped, Err(QuantizeError::Interrupted)));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// The tensors that are planned are those that Python stores.
#[test]
fn tensors_are_stored_as_python_stores_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized");
    for case in ["llama-nf4", "gpt2-int8", "bert-nf4", "t5-int8"] {
        let files = ModelFiles::from_dir(&root.join(case)).unwrap();
        let schemes: Vec<_> = survey(&files).unwrap();
        let quantized = schemes
            .iter()
            .filter(|matrix| matrix.scheme == case.split_once('-').unwrap().1);
        let checkpoint = Checkpoint::open(&files).unwrap();
        let marks = checkpoint
            .tensors()
            .filter(|info| info.name.ends_with(".SCB") || info.name.ends_with(".weight.absmax"));
        assert_eq!(quantized.count(), marks.count(), "{case}");
    }
}
