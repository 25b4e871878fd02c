//! Data whose tokens and labels are given, and models of the fixtures.

// Each test uses some of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use oxiformers_data::tasks::{Batch, Draw, IGNORED, Objective, Padding, Row, Targets};
use oxiformers_data::{CacheOptions, DataFile, Dataset, Example, Preprocessor, SampleBy, prepare};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::DType;
use oxiformers_models::AutoConfig;
use oxiformers_models::nn::{LoadOptions, Parameters};
use oxiformers_train::{ModelSaver, TrainingArguments};
use serde_json::{Map, Value, json};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/curves")
        .join(name)
}

/// Examples as they stand in a file: `input_ids` and `labels`.
#[derive(Debug, Clone, Copy)]
pub struct Given {
    /// Whether a label is one for the whole example.
    pub classes: bool,
}

const PADDING: Padding = Padding {
    pad_token_id: 0,
    pad_token_type_id: 0,
    multiple_of: 1,
};

impl Preprocessor for Given {
    fn settings(&self) -> Value {
        json!({ "given": self.classes })
    }

    fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
        let column = |name: &str| -> Result<Vec<i32>, String> {
            let list = record
                .get(name)
                .and_then(Value::as_array)
                .ok_or_else(|| format!("has no `{name}`"))?;
            Ok(list
                .iter()
                .filter_map(Value::as_i64)
                .map(|id| id as i32)
                .collect())
        };
        let example = Example::default().with("input_ids", column("input_ids")?);
        Ok(vec![example.with("labels", column("labels")?)])
    }
}

impl Objective for Given {
    fn collate(&self, rows: &[Row], _: Draw) -> Batch {
        let labels = |row: &Row| -> Vec<i64> {
            let labels = row.example.ints("labels").unwrap_or_default();
            labels.iter().map(|label| i64::from(*label)).collect()
        };
        let mut labels: Vec<_> = rows.iter().map(labels).collect();
        let batch = Batch::padded(rows, PADDING);
        if self.classes {
            return batch.with_labels(Targets::Classes(labels.iter().map(|labels| labels[0]).collect()));
        }
        PADDING.fill(&mut labels, IGNORED);
        batch.with_labels(Targets::Tokens(labels))
    }
}

/// The examples of a file.
pub fn dataset(path: &Path, given: &dyn Preprocessor, cache: &Path) -> Dataset {
    let options = CacheOptions {
        folder: cache.to_path_buf(),
        sample_by: SampleBy::Line,
        bad_data: oxiformers_data::BadData::Stop,
        max_records: None,
    };
    let file = DataFile::new(path, None).expect("data");
    let cache = prepare(&[file], given, &options, &mut |_| {
        std::ops::ControlFlow::Continue(())
    });
    Dataset::new(cache.expect("cache"))
}

/// The arguments of a fixture, changed.
pub fn arguments(name: &str, output: &Path, changes: Value) -> TrainingArguments {
    let text = std::fs::read(fixture(name).join("arguments.json")).expect("arguments");
    let mut map: Map<String, Value> = serde_json::from_slice(&text).expect("arguments");
    map.insert("output_dir".to_string(), json!(output));
    if let Value::Object(changes) = changes {
        map.extend(changes);
    }
    TrainingArguments::from_json(map).expect("arguments")
}

/// The files of a fixture, its parameters to be, and how it is loaded and saved.
pub fn open(name: &str) -> (ModelFiles, Arc<Parameters>, LoadOptions, ModelSaver) {
    load(&fixture(name))
}

/// The same of a folder.
pub fn load(folder: &Path) -> (ModelFiles, Arc<Parameters>, LoadOptions, ModelSaver) {
    let files = ModelFiles::from_dir(folder).expect("fixture");
    let parameters = Arc::new(Parameters::all());
    let options = LoadOptions {
        device: Device::flex().autodiff(),
        parameters: Some(parameters.clone()),
        ..LoadOptions::default()
    };
    let saver = ModelSaver {
        config: AutoConfig::from_files(&files).expect("config").json,
        files: None,
        dtype: DType::F32,
    };
    (files, parameters, options, saver)
}

/// A file of the fixtures that TRL made.
pub fn objective(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/objectives")
        .join(name)
}

/// What TRL logged, case by case.
pub fn curves() -> Map<String, Value> {
    let text = std::fs::read(objective("curves.json")).expect("curves");
    serde_json::from_slice(&text).expect("curves")
}

/// Compares what is logged of every step with what TRL has logged.
pub fn compare(name: &str, logs: &[Map<String, Value>], theirs: &Value) {
    let ours: Vec<_> = logs.iter().filter(|log| log.contains_key("loss")).collect();
    let theirs = theirs.as_array().expect("steps");
    assert_eq!(ours.len(), theirs.len(), "{name}");
    let mut worst = 0.0f64;
    for (step, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        for (key, expected) in theirs.as_object().expect("step") {
            let expected = expected.as_f64().expect("number");
            let found = ours.get(key).and_then(Value::as_f64);
            let found = found.unwrap_or_else(|| panic!("{name}: step {step}: nothing is logged as {key}"));
            // Rewards are differences of much larger numbers, and begin at 0.
            let difference = (found - expected).abs() / expected.abs().max(0.05);
            worst = worst.max(difference);
            assert!(
                difference < if key == "grad_norm" { 1e-2 } else { 1e-3 },
                "{name}: step {step}: {key} {found}, TRL has {expected}"
            );
        }
    }
    println!("{name}: largest relative difference {worst:.1e}");
}
