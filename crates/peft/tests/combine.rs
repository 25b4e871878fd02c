//! Combinations of adapters against PEFT's `add_weighted_adapter`; `fixtures/make.py` made them.

mod common;

use std::collections::BTreeMap;

use common::{Reference, difference, root};
use oxiformers_hub::ModelFiles;
use oxiformers_nn::weights::to_f32;
use oxiformers_peft::Adapter;
use oxiformers_peft::combine::{Combination, CombinationType, combine};
use oxiformers_peft::save::save;
use serde_json::Value;

/// The modules in the order in which PEFT visits them, and which of the two adapters have them.
const MODULES: [(&str, &[usize]); 4] = [
    ("model.embed_tokens", &[0]),
    ("model.layers.0.self_attn.q_proj", &[0, 1]),
    ("model.layers.0.self_attn.v_proj", &[0]),
    ("model.layers.0.mlp.down_proj", &[1]),
];

fn adapters() -> [Adapter; 2] {
    ["first", "second"].map(|name| {
        let files = ModelFiles::from_dir(&root().join("combined").join(name)).expect(name);
        Adapter::from_files(&files, name).expect(name)
    })
}

#[test]
fn like_add_weighted_adapter() {
    let [first, second] = adapters();
    let reference = Reference::open("combined");
    let path = root().join("combined/combinations.json");
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path).expect("cases")).expect("cases");
    assert!(cases.len() > 10);
    for (index, case) in cases.iter().enumerate() {
        let name = case["combination_type"].as_str().expect("type");
        let kind: CombinationType = name.parse().expect(name);
        let weights = case["weights"].as_array().expect("weights").iter();
        let mut combination = Combination::new(kind, weights.map(|w| w.as_f64().expect("weight")).collect());
        combination.density = case.get("density").and_then(Value::as_f64);
        combination.svd_rank = case
            .get("svd_rank")
            .and_then(Value::as_u64)
            .map(|rank| rank as usize);
        if let Some(method) = case.get("majority_sign_method").and_then(Value::as_str) {
            combination.majority_sign_method = method.parse().expect("method");
        }
        let products = name.ends_with("svd");
        // What PEFT drew, in its order: for each module each adapter's tensor, first all of `A`, then all of `B`.
        let mut masks: BTreeMap<(String, usize), Vec<Vec<bool>>> = BTreeMap::new();
        let mut next = 0;
        if case["masks"].as_u64() > Some(0) {
            for (module, adapters) in MODULES {
                for _ in 0..if products { 1 } else { 2 } {
                    for adapter in adapters {
                        let view = reference
                            .0
                            .tensor(&format!("{index}.masks.{next}"))
                            .expect("mask");
                        let mask = view.data.iter().map(|kept| *kept == 1).collect();
                        masks
                            .entry((module.to_string(), *adapter))
                            .or_default()
                            .push(mask);
                        next += 1;
                    }
                }
            }
            assert_eq!(case["masks"].as_u64(), Some(next));
        }
        let mut draw = |module: &str, adapter: usize, len: usize, _: f64| {
            let mask = masks
                .get_mut(&(module.to_string(), adapter))
                .expect("mask")
                .remove(0);
            assert_eq!(mask.len(), len);
            mask
        };
        let (_, tensors) = combine(&[&first, &second], &combination, &mut draw).expect(name);
        let expected = reference.with_prefix(&format!("{index}."));
        let mut compared = 0;
        for (tensor, expected) in &expected {
            let of = |name: &str| {
                let view = tensors.get(name).unwrap_or_else(|| panic!("{name}"));
                (to_f32(view).expect("floats"), view.shape.clone())
            };
            let found = if products {
                let embedding = tensor.ends_with("embed_tokens");
                let endings = if embedding {
                    [".lora_embedding_A", ".lora_embedding_B"]
                } else {
                    [".lora_A.weight", ".lora_B.weight"]
                };
                let [(a, a_shape), (b, b_shape)] = endings.map(|ending| of(&format!("{tensor}{ending}")));
                let (rank, inputs, outputs) = (a_shape[0], a_shape[1], b_shape[0]);
                let entry = |at: usize| {
                    (0..rank)
                        .map(|i| b[at / inputs * rank + i] * a[i * inputs + at % inputs])
                        .sum::<f32>()
                };
                (0..outputs * inputs).map(entry).collect()
            } else {
                of(tensor).0
            };
            let worst = difference(&found, expected);
            assert!(worst < 1e-5, "{index} {name}: `{tensor}` {worst:e}");
            compared += 1;
        }
        assert_eq!(compared, if products { 4 } else { 8 }, "{index} {name}");
    }
}

#[test]
fn what_cannot_be_combined() {
    let [first, second] = adapters();
    let mut draw = |_: &str, _: usize, len: usize, _: f64| vec![true; len];
    let mut of = |adapters: &[&Adapter], combination: &Combination| {
        combine(adapters, combination, &mut draw)
            .expect_err("refused")
            .to_string()
    };
    let linear = Combination::new(CombinationType::Linear, vec![1.0]);
    assert!(of(&[&first, &second], &linear).contains("1 weights for 2"));
    let ties = Combination::new(CombinationType::Ties, vec![1.0, 1.0]);
    assert!(of(&[&first, &second], &ties).contains("density"));
    let (dora, _) = common::adapter("dora-llama");
    assert!(of(&[&dora], &linear).contains("DoRA"));
    let (ia3, _) = common::adapter("ia3-llama");
    assert!(of(&[&ia3], &linear).contains("IA3"));
    assert!(
        "average"
            .parse::<CombinationType>()
            .expect_err("no type")
            .contains("linear, cat")
    );
}

/// What is written is read again, and is what PEFT wrote: names, types and values.
#[test]
fn written_as_read() {
    let folder = tempfile::tempdir().expect("folder");
    for name in common::cases(|_| true) {
        let (adapter, _) = common::adapter(&name);
        let folder = folder.path().join(&name);
        save(&folder, adapter.config(), adapter.tensors()).expect(&name);
        let read = |path: &std::path::Path| {
            let bytes = std::fs::read(path.join("adapter_model.safetensors")).expect("file");
            let files = ModelFiles::from_memory("x", [("model.safetensors".to_string(), bytes.into())]);
            let checkpoint = oxiformers_hub::checkpoint::Checkpoint::open(&files).expect("checkpoint");
            let names: Vec<_> = checkpoint.tensors().map(|info| info.name.clone()).collect();
            let tensors = names
                .into_iter()
                .filter(|name| !name.contains("original_module") && !name.contains("modules_to_save"));
            let tensors = tensors.map(|name| {
                let view = checkpoint.tensor(&name).expect("tensor");
                (name, (view.dtype, view.shape, view.data))
            });
            tensors.collect::<BTreeMap<_, _>>()
        };
        assert!(read(&folder) == read(&root().join(&name)), "{name}");
        let again = ModelFiles::from_dir(&folder).expect("folder");
        let again = Adapter::from_files(&again, &name).expect(&name);
        assert_eq!(again.config(), adapter.config(), "{name}");
    }
}
