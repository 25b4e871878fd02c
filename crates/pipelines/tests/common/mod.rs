//! What the tests of pipelines share.

use std::path::{Path, PathBuf};

use futures::executor::block_on;
use oxiformers_hub::ModelFiles;
use oxiformers_nn::LoadOptions;
use oxiformers_pipelines::AnyPipeline;
use serde_json::Value;

pub const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

/// A model with a tokenizer.
pub fn files(model: &str, tokenizer: &str) -> ModelFiles {
    let folders = [format!("models/{model}"), format!("tokenizers/{tokenizer}")];
    let entries = folders
        .iter()
        .flat_map(|folder| std::fs::read_dir(Path::new(FIXTURES).join(folder)).unwrap());
    let paths = entries.map(|entry| {
        let path: PathBuf = entry.unwrap().path();
        (path.file_name().unwrap().to_str().unwrap().to_string(), path)
    });
    ModelFiles::from_paths(model, paths)
}

pub fn load(task: &str, model: &str, tokenizer: &str) -> AnyPipeline {
    AnyPipeline::from_files(task, &files(model, tokenizer), &LoadOptions::default()).unwrap()
}

pub fn run(pipeline: &AnyPipeline, inputs: &[Value], options: &Value, batch_size: usize) -> Vec<Value> {
    block_on(pipeline.run(inputs, options, batch_size)).unwrap()
}

/// Where two answers differ: other keys or another order of them, other texts, or numbers further apart.
pub fn difference(ours: &Value, theirs: &Value, tolerance: f64, place: &str) -> Option<String> {
    match (ours, theirs) {
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64()?, b.as_f64()?);
            let near = (a - b).abs() <= tolerance * b.abs().max(1.0);
            (!near).then(|| format!("{place}: {a} and {b}"))
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            let mut pairs = a.iter().zip(b).enumerate();
            pairs.find_map(|(i, (a, b))| difference(a, b, tolerance, &format!("{place}[{i}]")))
        }
        (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => a
            .iter()
            .find_map(|(key, value)| difference(value, &b[key], tolerance, &format!("{place}.{key}"))),
        (a, b) if a == b => None,
        (a, b) => Some(format!("{place}: {a} and {b}")),
    }
}

/// A golden file's cases.
pub fn cases(name: &str) -> Vec<Value> {
    let path = format!("{FIXTURES}/golden/{name}.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    golden["cases"].as_array().unwrap().clone()
}
