//! GGUF files against those of llama.cpp.

use std::collections::BTreeMap;

use oxiformers_hub::checkpoint::gguf::{Pairs, write};
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorInfo};
use oxiformers_hub::{Error, ModelFiles};
use oxiformers_quant::gguf::{FileType, Plan};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    architecture: String,
    numbers: BTreeMap<String, u32>,
    tensors: Vec<(String, Vec<usize>)>,
    /// Types of the tensors, by types of files.
    types: BTreeMap<String, String>,
}

/// A file of f32 tensors, each full of one value.
fn file(pairs: &Pairs, tensors: &[(String, Vec<usize>)], value: f32) -> ModelFiles {
    let infos: Vec<_> = tensors
        .iter()
        .map(|(name, shape)| TensorInfo {
            name: name.clone(),
            dtype: DType::F32,
            shape: shape.clone(),
        })
        .collect();
    let mut bytes = Vec::new();
    write(&mut bytes, "model.gguf", pairs, &infos, |index, out| {
        let count = tensors[index].1.iter().product();
        let values: Vec<u8> = std::iter::repeat_n(value.to_le_bytes(), count)
            .flatten()
            .collect();
        out.write_all(&values).map_err(Error::io("model.gguf"))
    })
    .unwrap();
    ModelFiles::from_memory("model.gguf", [("model.gguf".to_string(), bytes.into())])
}

fn pairs(architecture: &str, numbers: &BTreeMap<String, u32>) -> Pairs {
    let mut pairs = Pairs::default();
    pairs.set("general.architecture", architecture);
    for (name, value) in numbers {
        let key = match name.strip_prefix("head") {
            Some(_) => format!("{architecture}.attention.{name}"),
            None => format!("{architecture}.{name}"),
        };
        pairs.set(key, *value);
    }
    pairs
}

/// `fixtures/mixtures.py` let llama.cpp quantize small models to every type of file.
#[test]
fn mixtures_are_those_of_llama_cpp() {
    let cases: BTreeMap<String, Case> = serde_json::from_str(include_str!("fixtures/mixtures.json")).unwrap();
    for (name, case) in &cases {
        let checkpoint = Checkpoint::open(&file(
            &pairs(&case.architecture, &case.numbers),
            &case.tensors,
            0.0,
        ))
        .unwrap();
        assert_eq!(case.types.len(), FileType::ALL.len());
        for (ty, expected) in &case.types {
            let plan = Plan::new(checkpoint.clone(), ty.parse().unwrap(), &[]).unwrap();
            let types: BTreeMap<_, _> = plan
                .tensors()
                .iter()
                .map(|info| (info.name.as_str(), info.dtype.name()))
                .collect();
            for ((tensor, shape), expected) in case.tensors.iter().zip(expected.split(' ')) {
                assert_eq!(
                    types[tensor.as_str()],
                    expected,
                    "{name}, {ty}: {tensor} {shape:?}"
                );
            }
        }
    }
}

#[test]
fn values_that_are_none_are_named() {
    for value in [f32::INFINITY, f32::NAN] {
        let tensors = [("blk.0.ffn_up.weight".to_string(), vec![4, 256])];
        let files = file(&pairs("llama", &BTreeMap::new()), &tensors, value);
        let plan = Plan::new(Checkpoint::open(&files).unwrap(), FileType::Q4_K_M, &[]).unwrap();
        let error = plan
            .write(&mut std::io::sink(), "out.gguf", |_| true)
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("model.gguf") && text.contains("blk.0.ffn_up.weight"),
            "{text}"
        );
    }
}
