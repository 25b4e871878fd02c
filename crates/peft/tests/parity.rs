//! Adapters of every kind against PEFT, over the tiny checkpoints with which the architectures are tested.
//!
//! `fixtures/make.py` made the adapters and the reference.

mod common;

use std::sync::Arc;

use burn::tensor::{Device, FloatDType};
use common::{Model, Reference, adapter, cases, difference, values, with};
use oxiformers_models::nn::LoadOptions;

const TOLERANCE: f32 = 1e-4;

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
        if found.iter().any(|x| *x > TOLERANCE) {
            failures.push(name);
        }
    }
    assert!(failures.is_empty(), "beyond {TOLERANCE:e}: {failures:?}");
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
