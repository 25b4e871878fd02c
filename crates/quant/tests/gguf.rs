//! GGUF files against those of llama.cpp.

use std::collections::BTreeMap;

use oxiformers_hub::checkpoint::gguf::{Pairs, write};
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorInfo};
use oxiformers_hub::{Error, ModelFiles};
use oxiformers_kernels::ggml;
use oxiformers_quant::gguf::{FileType, ImportanceMatrix, Plan};
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
            let plan = Plan::new(checkpoint.clone(), ty.parse().unwrap(), &[], None).unwrap();
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

/// Numbers that look random, the same every time.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// A GGUF in memory with tensors of f32.
fn gguf(name: &str, pairs: &Pairs, tensors: &[(&str, Vec<usize>, Vec<f32>)]) -> ModelFiles {
    let info = |(name, shape, _): &(&str, Vec<usize>, Vec<f32>)| TensorInfo {
        name: name.to_string(),
        dtype: DType::F32,
        shape: shape.clone(),
    };
    let infos: Vec<_> = tensors.iter().map(info).collect();
    let mut bytes = Vec::new();
    write(&mut bytes, name, pairs, &infos, |index, out| {
        let values = tensors[index].2.iter().flat_map(|value| value.to_le_bytes());
        out.write_all(&values.collect::<Vec<u8>>())
            .map_err(Error::io(name))
    })
    .unwrap();
    ModelFiles::from_memory(name, [(name.to_string(), bytes.into())])
}

/// As `llama-imatrix` writes it.
fn imatrix(tensors: &[(&str, Vec<usize>, Vec<f32>)]) -> ModelFiles {
    let mut pairs = Pairs::default();
    pairs.set("general.type", "imatrix");
    pairs.set("imatrix.chunk_count", 3u32);
    pairs.set("imatrix.chunk_size", 512u32);
    gguf("imatrix.gguf", &pairs, tensors)
}

/// Blocks are those that ggml makes with the mean squares of each expert's inputs, and errors that are weighed by them
/// are smaller than without.
#[test]
fn errors_count_by_importance() {
    let shape = vec![2, 8, 512];
    let values = noise(2 * 8 * 512, 1);
    let model = gguf(
        "model.gguf",
        &pairs("llama", &BTreeMap::from([("block_count".to_string(), 1)])),
        &[("blk.0.ffn_up_exps.weight", shape.clone(), values.clone())],
    );
    let checkpoint = Checkpoint::open(&model).unwrap();
    let sums: Vec<f32> = noise(2 * 512, 7).iter().map(|x| 64.0 * x.powi(6)).collect();
    let counts = vec![32.0, 8.0];
    let importance = ImportanceMatrix::open(&imatrix(&[
        ("blk.0.ffn_up_exps.weight.in_sum2", vec![2, 512], sums.clone()),
        ("blk.0.ffn_up_exps.weight.counts", vec![2, 1], counts.clone()),
    ]))
    .unwrap();
    let means: Vec<f32> = (sums.chunks(512).zip(&counts))
        .flat_map(|(sums, count)| sums.iter().map(move |sum| sum / count))
        .collect();
    for ty in [
        FileType::Q2_K,
        FileType::Q4_K_S,
        FileType::Q5_K_S,
        FileType::Q6_K,
        FileType::Q4_0,
        FileType::IQ4_XS,
    ] {
        let quantized = |importance: Option<ImportanceMatrix>| {
            let has = importance.is_some();
            let plan = Plan::new(checkpoint.clone(), ty, &[], importance).unwrap();
            let mut bytes = Vec::new();
            plan.write(&mut bytes, "out.gguf", |_| true).unwrap();
            let files = ModelFiles::from_memory("out.gguf", [("out.gguf".to_string(), bytes.into())]);
            let written = Checkpoint::open(&files).unwrap();
            let chunks = written.gguf().unwrap().get_u64("quantize.imatrix.chunks_count");
            assert_eq!(chunks, has.then_some(3));
            written.tensor("blk.0.ffn_up_exps.weight").unwrap()
        };
        let (with, without) = (quantized(Some(importance.clone())), quantized(None));
        let DType::Ggml(block) = with.dtype else {
            panic!("{ty:?}")
        };
        let mut expected = Vec::new();
        for (values, means) in values.chunks(8 * 512).zip(means.chunks(512)) {
            let mut bytes = vec![0; values.len() / block.block_size() * block.type_size()];
            ggml::quantize(block, values, 512, Some(means), &mut bytes).unwrap();
            expected.extend(bytes);
        }
        assert!(with.data == expected, "{ty:?}");
        let error = |view: &oxiformers_hub::checkpoint::TensorView| -> f64 {
            let mut found = vec![0.0; values.len()];
            let DType::Ggml(block) = view.dtype else {
                panic!("{ty:?}")
            };
            ggml::dequantize(block, &view.data, &mut found).unwrap();
            let weight = |at: usize| f64::from(means[at / (8 * 512) * 512 + at % 512]);
            let each = found.iter().zip(&values).enumerate();
            each.map(|(at, (a, b))| weight(at) * f64::from(a - b).powi(2))
                .sum()
        };
        if with.dtype == without.dtype {
            assert!(error(&with) < 0.95 * error(&without), "{ty:?}");
        }
    }
}

#[test]
fn importance_that_does_not_fit_is_named() {
    let name = "blk.0.ffn_up.weight";
    let entry = |sums: Vec<f32>| {
        vec![
            ("blk.0.ffn_up.weight.in_sum2", vec![1, sums.len()], sums),
            ("blk.0.ffn_up.weight.counts", vec![1, 1], vec![1.0]),
        ]
    };
    let importance = ImportanceMatrix::open(&imatrix(&entry(vec![1.0; 128]))).unwrap();
    let files = file(
        &pairs("llama", &BTreeMap::new()),
        &[(name.to_string(), vec![4, 256])],
        1.0,
    );
    let plan = |importance| {
        Plan::new(
            Checkpoint::open(&files).unwrap(),
            FileType::Q4_K_M,
            &[],
            Some(importance),
        )
        .map(drop)
    };
    let error = plan(importance).unwrap_err().to_string();
    assert!(
        error.contains("imatrix.gguf") && error.contains(name) && error.contains("128"),
        "{error}"
    );
    for bad in [-1.0, f32::NAN, f32::INFINITY] {
        let error = ImportanceMatrix::open(&imatrix(&entry(vec![bad; 256])))
            .unwrap_err()
            .to_string();
        assert!(error.contains("imatrix.gguf") && error.contains(name), "{error}");
    }
    let error = ImportanceMatrix::open(&files).unwrap_err().to_string();
    assert!(
        error.contains("model.gguf") && error.contains("imatrix"),
        "{error}"
    );
    assert!(ImportanceMatrix::open(&imatrix(&[])).is_err());
}

#[test]
fn values_that_are_none_are_named() {
    for value in [f32::INFINITY, f32::NAN] {
        let tensors = [("blk.0.ffn_up.weight".to_string(), vec![4, 256])];
        let files = file(&pairs("llama", &BTreeMap::new()), &tensors, value);
        let plan = Plan::new(Checkpoint::open(&files).unwrap(), FileType::Q4_K_M, &[], None).unwrap();
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
