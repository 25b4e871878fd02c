//! LoRA over bases that are quantized, in every format that stays packed in memory: forward and backward passes against the
//! same weights as floats.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, FloatDType, Gradients, Int, Tensor, TensorData};
use common::{tensor, values, with};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::safetensors::MAX_SHARD_SIZE;
use oxiformers_models::calibration::{run, samples};
use oxiformers_models::nn::quant::{MethodOptions, QuantizationConfig, Recipe};
use oxiformers_models::nn::{CacheKind, LoadOptions, LogitsFor};
use oxiformers_models::quantize::QuantizePlan;
use oxiformers_models::{AutoModelForCausalLM, CausalLM};
use oxiformers_peft::{Adapter, AdapterConfig};
use serde_json::json;

/// Largest difference, as a part of the largest value: activations are rounded to 15 bits where weights are packed.
const TOLERANCE: f32 = 1e-3;
/// Of gradients, which go through products of such activations in every layer.
const OF_GRADIENTS: f32 = 2e-3;

fn fixture(name: &str) -> ModelFiles {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../models/tests/fixtures")
        .join(name);
    match path.extension() {
        Some(_) => ModelFiles::from_file(&path).expect(name),
        None => ModelFiles::from_dir(&path).expect(name),
    }
}

/// The tiny Llama as a method with calibration writes it.
fn calibrated(method: &str, folder: &Path) -> ModelFiles {
    let files = fixture("llama");
    let options = MethodOptions {
        group_size: Some(8),
        ..MethodOptions::default()
    };
    let recipe: Recipe = QuantizationConfig::named(method, &options).expect(method).into();
    let ids: Vec<i32> = (0..400).map(|at| (at * at * 7 + at * 13) % 96).collect();
    let texts = samples(&ids, 20, 12).expect("texts");
    let plan = QuantizePlan::new(&files, recipe.clone(), None).expect(method);
    let (calibration, _) = run(&files, &recipe, &texts, &folder.join("work"), &mut |_| true).expect(method);
    let out = folder.join("model");
    std::fs::create_dir_all(&out).expect("folder");
    plan.write_calibrated(calibration.source(), &out, MAX_SHARD_SIZE, |_| true)
        .expect(method);
    ModelFiles::from_dir(&out).expect(method)
}

/// Gradients by the numbers of their parameters.
struct Found<'a>(&'a Gradients, BTreeMap<ParamId, Vec<f32>>);

impl ModuleVisitor for Found<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(self.0) {
            self.1.insert(param.id, values(gradient));
        }
    }
}

/// Logits, and the gradients of an adapter of which neither half is zero.
fn learn(files: &ModelFiles, dtype: Option<FloatDType>) -> (Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear",
        "init_lora_weights": false,
    });
    let config = AdapterConfig::from_json(config, "test").expect("config");
    let adapter = Arc::new(Adapter::fresh(config, "fresh", 3).expect("adapter"));
    let device = Device::flex().autodiff();
    let options = LoadOptions {
        device: device.clone(),
        dtype,
        ..with([adapter.clone()])
    };
    let model = AutoModelForCausalLM::from_files(files, &options).expect("model");
    let vocab = model.vocab_size() as u32;
    let ids: Vec<Vec<u32>> = (0..2)
        .map(|row| (0..40).map(|at| (at * at * 5 + row * 31 + at) % vocab).collect())
        .collect();
    let mut cache = model.new_cache(CacheKind::Dynamic, vec![0; 2]);
    let logits = model.forward(tensor(&ids, &device), &mut cache, LogitsFor::All);
    let found = values(logits.clone().inner());
    let next: Vec<i32> = ids
        .iter()
        .flat_map(|row| row[1..].iter().map(|id| *id as i32))
        .collect();
    let count = next.len();
    let next = Tensor::<2, Int>::from_data(TensorData::new(next, [count, 1]), &device);
    let logits = logits.narrow(1, 0, 39).reshape([count, vocab as usize]);
    let loss = burn::tensor::activation::log_softmax(logits, 1)
        .gather(1, next)
        .mean()
        .neg();
    let gradients = loss.backward();
    let mut visitor = Found(&gradients, BTreeMap::new());
    model.decoder.visit(&mut visitor);
    let by_name = |(id, name): (ParamId, String)| {
        let gradient = visitor.1.get(&id).cloned();
        (
            name.clone(),
            gradient.unwrap_or_else(|| panic!("{name} has no gradient")),
        )
    };
    let gradients = adapter.parameters().into_iter().map(by_name).collect();
    (found, gradients)
}

fn difference(ours: &[f32], theirs: &[f32]) -> f32 {
    let size = theirs.iter().fold(f32::MIN_POSITIVE, |size, x| size.max(x.abs()));
    common::difference(
        &ours.iter().map(|x| x / size).collect::<Vec<_>>(),
        &theirs.iter().map(|x| x / size).collect::<Vec<_>>(),
    )
}

#[test]
fn as_over_the_same_weights_in_floats() {
    let folder = tempfile::tempdir().expect("folder");
    let mut bases: Vec<(String, ModelFiles)> = [
        "quantized/llama-int8",
        "quantized/llama-fp4",
        "quantized/llama-nf4",
        "quantized/gpt2-int8",
        "gguf/llama.gguf",
        "gguf/llama-q8_0.gguf",
        "gguf/qwen2.gguf",
    ]
    .map(|name| (name.to_string(), fixture(name)))
    .into();
    for method in ["gptq", "awq"] {
        bases.push((
            method.to_string(),
            calibrated(method, &folder.path().join(method)),
        ));
    }
    let mut failures = Vec::new();
    for (name, files) in bases {
        let (packed, of_packed) = learn(&files, None);
        let (dense, of_dense) = learn(&files, Some(FloatDType::F32));
        let of_logits = difference(&packed, &dense);
        assert_eq!(of_packed.len(), of_dense.len(), "{name}");
        let (mut worst, mut place) = (0f32, "");
        for (tensor, gradient) in &of_packed {
            let difference = difference(gradient, &of_dense[tensor]);
            if difference > worst {
                (worst, place) = (difference, tensor);
            }
        }
        println!("{name:<24} logits {of_logits:.1e}, gradients {worst:.1e}");
        if of_logits > TOLERANCE || worst > OF_GRADIENTS {
            failures.push(format!(
                "{name}: logits {of_logits:e}, gradients {worst:e} ({place})"
            ));
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}
