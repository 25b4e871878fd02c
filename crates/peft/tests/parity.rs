//! Adapters of every kind against PEFT, over the tiny checkpoints with which the architectures are tested.
//!
//! `fixtures/make.py` made the adapters and the reference.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use burn::module::{ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, FloatDType, Gradients, Tensor};
use common::{Model, Reference, adapter, cases, difference, values, with};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::LoadOptions;
use oxiformers_peft::merge::merge;

const TOLERANCE: f32 = 1e-4;
const PACKED_TOLERANCE: f32 = 2e-3;

fn all() -> Vec<String> {
    let prompt = |name: &str| {
        ["prompt-", "p_tuning-", "prefix-"]
            .iter()
            .any(|kind| name.starts_with(kind))
    };
    cases(|name| !prompt(name) && std::env::var("ADAPTER").map_or(true, |only| name.contains(&only)))
}

#[test]
fn logits_equal_pefts() {
    let mut failures = Vec::new();
    for name in all() {
        let reference = Reference::open(&name);
        let expected = reference.floats("logits");
        let mut found = Vec::new();
        for (dtype, device) in [
            (None, Device::flex()),
            (Some(FloatDType::F32), Device::flex()),
            (None, Device::flex().autodiff()),
        ] {
            let (adapter, base) = adapter(&name);
            let options = LoadOptions {
                dtype,
                device: device.clone(),
                ..with([Arc::new(adapter)])
            };
            let model = Model::load(&base, &options).unwrap_or_else(|error| panic!("{name}: {error}"));
            found.push(difference(&values(model.logits(&reference, &device)), &expected));
        }
        let shown: Vec<_> = found.iter().map(|x| format!("{x:.1e}")).collect();
        println!("{name:<24} {}", shown.join(" "));
        // Where weights stay packed, in training too, activations are rounded to 15 bits.
        let packed = if name.ends_with("-nf4") {
            PACKED_TOLERANCE
        } else {
            TOLERANCE
        };
        if found[0] > packed || found[1] > TOLERANCE || found[2] > packed {
            failures.push(name);
        }
    }
    assert!(failures.is_empty(), "beyond {TOLERANCE:e}: {failures:?}");
}

#[test]
fn merged_equals_unmerged() {
    let folder = tempfile::tempdir().expect("folder");
    let mut failures = Vec::new();
    for name in all() {
        let reference = Reference::open(&name);
        let expected = reference.floats("logits");
        let device = Device::flex();
        let (adapter, base) = adapter(&name);
        let adapter = Arc::new(adapter);
        if base.starts_with("quantized/") {
            let error = merge(&common::base(&base), &[adapter], folder.path(), None, || true);
            assert!(
                error.expect_err("quantized").to_string().contains("bitsandbytes"),
                "{name}"
            );
            continue;
        }
        // While the model loads.
        let options = LoadOptions {
            merge_adapters: true,
            ..with([adapter.clone()])
        };
        let model = Model::load(&base, &options).unwrap_or_else(|error| panic!("{name}: {error}"));
        let loaded = difference(&values(model.logits(&reference, &device)), &expected);
        // As a folder of its own.
        let folder = folder.path().join(&name);
        let files = common::base(&base);
        merge(&files, &[adapter], &folder, None, || true).unwrap_or_else(|error| panic!("{name}: {error}"));
        let files = ModelFiles::from_dir(&folder).expect("folder");
        let model = Model::from_files(&base, &files, &LoadOptions::default());
        let model = model.unwrap_or_else(|error| panic!("{name}: {error}"));
        let written = difference(&values(model.logits(&reference, &device)), &expected);
        println!("{name:<24} {loaded:.1e} {written:.1e}");
        if loaded.max(written) > 1e-5 {
            failures.push(name);
        }
    }
    assert!(failures.is_empty(), "beyond 1e-5: {failures:?}");
}

/// Gradients by the numbers of their parameters.
struct Gradient<'a>(&'a Gradients, HashMap<ParamId, Vec<f32>>);

impl ModuleVisitor for Gradient<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(self.0) {
            self.1.insert(param.id, values(gradient));
        }
    }
}

#[test]
fn gradients_equal_pytorchs() {
    for name in all() {
        let reference = Reference::open(&name);
        let device = Device::flex().autodiff();
        let (adapter, base) = adapter(&name);
        let adapter = Arc::new(adapter.trained());
        let options = LoadOptions {
            device: device.clone(),
            ..with([adapter.clone()])
        };
        let model = Model::load(&base, &options).unwrap_or_else(|error| panic!("{name}: {error}"));
        let gradients = model.loss(&reference, &device).backward();
        let mut found = Gradient(&gradients, HashMap::new());
        model.visit(&mut found);
        let names: HashMap<String, ParamId> = adapter
            .parameters()
            .into_iter()
            .map(|(id, name)| (name, id))
            .collect();
        let (mut compared, mut own) = (0, 0);
        for (tensor, expected) in reference.with_prefix("grad.base_model.model.") {
            // What PEFT calls its parameters.
            let tensor = tensor.replace(".modules_to_save", "").replace(".base_layer", "");
            let tensor = tensor
                .replace(".default", "")
                .replace("magnitude_vector.weight", "magnitude_vector");
            let Some(id) = names.get(&tensor) else {
                // A bias or a norm of the model itself.
                assert!(
                    !tensor.contains("lora_") && !tensor.contains("ia3_"),
                    "{name}: {tensor}"
                );
                own += 1;
                continue;
            };
            let found = found
                .1
                .get(id)
                .unwrap_or_else(|| panic!("{name}: `{tensor}` has no gradient"));
            let size = expected.iter().fold(0f32, |size, x| size.max(x.abs()));
            let worst = found
                .iter()
                .zip(&expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            let relative = if name.ends_with("-nf4") { 5e-3 } else { 1e-3 };
            assert!(
                worst <= relative * size + 1e-6,
                "{name}: `{tensor}` {worst:e} of {size:e}"
            );
            compared += 1;
        }
        assert!(compared > 0, "{name}");
        // Nothing else has gradients.
        let known = found.1.len();
        assert_eq!(known, compared + own, "{name}");
        println!("{name:<24} {compared} gradients, {own} of the model's own");
    }
}

#[test]
fn without_an_adapter_the_model_is_as_before() {
    for name in all()
        .into_iter()
        .filter(|name| name.ends_with("-llama") || name.ends_with("-gpt2-tied") || name == "lora-llama-saved")
    {
        let reference = Reference::open(&name);
        let (adapter, base) = adapter(&name);
        let adapter = Arc::new(adapter);
        let device = Device::flex();
        let model = Model::load(&base, &with([adapter.clone()])).expect("model");
        let plain = Model::load(&base, &LoadOptions::default()).expect("model");
        let plain = values(plain.logits(&reference, &device));
        let logits = || values(model.logits(&reference, &device));
        assert!(difference(&logits(), &plain) > 1e-2, "{name}");
        adapter.switch().set(false);
        assert_eq!(logits(), plain, "{name}");
        adapter.switch().set(true);
        assert!(
            difference(&logits(), &reference.floats("logits")) < TOLERANCE,
            "{name}"
        );
    }
}
