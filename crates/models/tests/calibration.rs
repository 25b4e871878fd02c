//! Decoders of all architectures, calibrated layer by layer, written and read again.

mod common;

use std::path::{Path, PathBuf};

use common::{Reference, largest_difference, tensor, values};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::Checkpoint;
use oxiformers_hub::checkpoint::safetensors::MAX_SHARD_SIZE;
use oxiformers_models::calibration::{CalibrationError, run, samples};
use oxiformers_models::nn::quant::{MethodOptions, QuantizationConfig, Recipe};
use oxiformers_models::nn::{CacheKind, LoadOptions, LogitsFor};
use oxiformers_models::quantize::QuantizePlan;
use oxiformers_models::{AutoModelForCausalLM, CausalLM};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn logits(files: &ModelFiles, reference: &Reference) -> Vec<f32> {
    let model = AutoModelForCausalLM::from_files(files, &LoadOptions::default()).unwrap();
    let ids = reference.ids("input_ids");
    let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; ids.len()]);
    values(model.forward(tensor(&ids, 0..ids[0].len()), &mut cache, LogitsFor::All))
}

/// Texts that use the whole vocabulary of the fixtures.
fn texts() -> Vec<Vec<i32>> {
    let ids: Vec<i32> = (0..400).map(|at| (at * at * 7 + at * 13) % 96).collect();
    samples(&ids, 20, 12).unwrap()
}

fn recipe(method: &str, bits: Option<u32>) -> Recipe {
    let options = MethodOptions {
        bits,
        group_size: Some(8),
        ..MethodOptions::default()
    };
    Recipe {
        // A single row, which no word of 32 bits holds.
        overrides: vec![("shared_expert_gate".to_string(), None)],
        ..QuantizationConfig::named(method, &options).unwrap().into()
    }
}

/// Quantizes `files` and returns the folder.
fn quantize(files: &ModelFiles, recipe: &Recipe) -> tempfile::TempDir {
    let (work, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let plan = QuantizePlan::new(files, recipe.clone(), None).unwrap();
    let done = run(files, recipe, &texts(), &work.path().join("work"), &mut |_| true);
    let (calibration, modules) = done.unwrap_or_else(|error| panic!("{}: {error}", files.name()));
    assert!(modules.len() >= 4, "{}: {modules:?}", files.name());
    plan.write_calibrated(calibration.source(), folder.path(), MAX_SHARD_SIZE, |_| true)
        .unwrap();
    folder
}

/// Codes of 8 bits change next to nothing, whatever the architecture. Where tokens choose experts, a choice between two
/// that are nearly alike may fall otherwise: there half of the positions count.
#[test]
fn every_decoder() {
    let mut failures = Vec::new();
    for dir in common::fixtures("") {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        // Its experts are stored quantized.
        if name == "gpt_oss-mxfp4" {
            continue;
        }
        let (files, reference) = (ModelFiles::from_dir(&dir).unwrap(), Reference::open(&dir));
        let folder = quantize(&files, &recipe("gptq", Some(8)));
        let written = ModelFiles::from_dir(folder.path()).unwrap();
        let expected = reference.floats("logits");
        let found = logits(&written, &reference);
        let size = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let ids = reference.ids("input_ids");
        let width = expected.len() / ids.iter().map(Vec::len).sum::<usize>();
        let rows = found.chunks(width).zip(expected.chunks(width));
        let mut rows: Vec<f32> = rows
            .map(|(ours, theirs)| largest_difference(ours, theirs) / size)
            .collect();
        rows.sort_by(f32::total_cmp);
        let (median, largest) = (rows[rows.len() / 2], rows[rows.len() - 1]);
        println!("{name}: {largest:.2e}, half of the positions below {median:.2e}");
        let experts = ["deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"];
        let difference = match experts.iter().any(|prefix| name.starts_with(prefix)) {
            true => median,
            false => largest,
        };
        if difference > 0.05 {
            failures.push((name, difference));
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

/// Fewer bits: calibration is better than rounding, for what was seen.
#[test]
fn awq_scales_what_comes_before() {
    let files = ModelFiles::from_dir(&fixture("llama")).unwrap();
    let reference = Reference::open(&fixture("llama"));
    let folder = quantize(&files, &recipe("awq", None));
    let written = ModelFiles::from_dir(folder.path()).unwrap();
    let checkpoint = Checkpoint::open(&written).unwrap();
    let original = Checkpoint::open(&files).unwrap();
    for name in [
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ] {
        let (ours, theirs) = (checkpoint.tensor(name).unwrap(), original.tensor(name).unwrap());
        assert_eq!((ours.dtype, &ours.shape), (theirs.dtype, &theirs.shape));
        assert!(ours.data != theirs.data, "{name} was not scaled");
    }
    assert!(checkpoint.info("model.layers.0.mlp.down_proj.qweight").is_some());
    assert!(checkpoint.info("model.layers.0.mlp.down_proj.weight").is_none());
    let expected = reference.floats("logits");
    let size = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let difference = largest_difference(&logits(&written, &reference), &expected) / size;
    assert!(difference < 0.4, "{difference}");
}

fn weights(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("model.safetensors")).unwrap()
}

#[test]
fn it_goes_on_where_it_was_stopped() {
    let files = ModelFiles::from_dir(&fixture("llama")).unwrap();
    let recipe = recipe("gptq", Some(4));
    let whole = quantize(&files, &recipe);
    let (place, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let work = place.path().join("work");
    let plan = QuantizePlan::new(&files, recipe.clone(), None).unwrap();
    // Stopped in the middle of the second layer.
    let stopped = run(&files, &recipe, &texts(), &work, &mut |progress| {
        progress.layer == 0 || progress.done < 0.5
    });
    assert!(matches!(stopped, Err(CalibrationError::Interrupted)));
    let mut first = false;
    let (calibration, modules) = run(&files, &recipe, &texts(), &work, &mut |progress| {
        first |= progress.layer == 0 && progress.done < 1.0;
        true
    })
    .unwrap();
    assert!(!first, "the first layer was quantized again");
    assert_eq!(modules.len(), 2 * 7);
    plan.write_calibrated(calibration.source(), folder.path(), MAX_SHARD_SIZE, |_| true)
        .unwrap();
    assert!(weights(folder.path()) == weights(whole.path()));
    // With other settings nothing of it is used.
    let other = Recipe::from(
        QuantizationConfig::named(
            "awq",
            &MethodOptions {
                group_size: Some(8),
                ..MethodOptions::default()
            },
        )
        .unwrap(),
    );
    let mut first = false;
    run(&files, &other, &texts(), &work, &mut |progress| {
        first |= progress.layer == 0 && progress.done < 1.0;
        true
    })
    .unwrap();
    assert!(first);
}

#[test]
fn what_cannot_be_done_is_said() {
    let error = samples(&[1; 19], 20, 4).unwrap_err().to_string();
    assert!(error.contains("19") && error.contains("20"), "{error}");
    assert_eq!(samples(&[1; 100], 20, 128).unwrap().len(), 5);
    let files = ModelFiles::from_dir(&fixture("llama")).unwrap();
    let place = tempfile::tempdir().unwrap();
    let work = place.path().join("work");
    let plain = Recipe::from(QuantizationConfig::named("nf4", &MethodOptions::default()).unwrap());
    let error = run(&files, &plain, &texts(), &work, &mut |_| true).err().unwrap();
    assert!(matches!(error, CalibrationError::Method(_)), "{error}");
    let wide = MethodOptions {
        group_size: Some(7),
        ..MethodOptions::default()
    };
    let wide = Recipe::from(QuantizationConfig::named("awq", &wide).unwrap());
    let error = QuantizePlan::new(&files, wide, None).err().unwrap().to_string();
    assert!(error.contains("group_size") && error.contains('7'), "{error}");
}
