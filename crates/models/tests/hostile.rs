//! Configurations whose numbers make no sense: an error each, or a model, never a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::{EncoderInputs, LoadOptions};
use oxiformers_models::{AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM};
use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn read(path: &Path) -> Bytes {
    Bytes::from(std::fs::read(path).expect("fixture"))
}

/// Loads as whatever it may be, runs what reads texts, and says whether that was a panic.
fn panics(files: &ModelFiles) -> bool {
    let options = LoadOptions::default();
    let load = || {
        drop(AutoModelForCausalLM::from_files(files, &options));
        drop(AutoModelForSeq2SeqLM::from_files(files, &options));
        let inputs = EncoderInputs::padded(&[vec![5, 6, 7], vec![8]], 0);
        AutoModel::from_files(files, &options)?.forward(&inputs)
    };
    catch_unwind(AssertUnwindSafe(|| load().map(drop))).is_err()
}

/// Every place in `json` that holds a number, as a JSON pointer.
fn numbers(json: &Value, at: &str, found: &mut Vec<String>) {
    match json {
        Value::Number(_) => found.push(at.to_string()),
        Value::Object(map) => {
            (map.iter()).for_each(|(key, value)| numbers(value, &format!("{at}/{key}"), found))
        }
        Value::Array(list) => {
            (list.iter().enumerate()).for_each(|(i, value)| numbers(value, &format!("{at}/{i}"), found))
        }
        _ => {}
    }
}

#[test]
fn no_number_of_a_config_panics() {
    let values = [
        json!(0),
        json!(1),
        json!(7),
        json!(-1),
        json!(1u64 << 40),
        json!(u64::MAX),
        json!(0.5),
        json!(1e300),
    ];
    let mut dirs: Vec<_> = ["", "seq2seq", "seq2seq_heads", "encoders"]
        .map(|folder| fixtures().join(folder))
        .into_iter()
        .flat_map(|folder| std::fs::read_dir(folder).expect("fixtures"))
        .map(|e| e.expect("entry").path())
        .collect();
    dirs.sort();
    let mut failures = Vec::new();
    for dir in dirs.iter().filter(|dir| dir.join("config.json").exists()) {
        let weights = read(&dir.join("model.safetensors"));
        let config: Value = serde_json::from_slice(&read(&dir.join("config.json"))).expect("JSON");
        let mut places = Vec::new();
        numbers(&config, "", &mut places);
        for place in places {
            for value in &values {
                let mut changed = config.clone();
                *changed.pointer_mut(&place).expect("place") = value.clone();
                let files = ModelFiles::from_memory(
                    "changed",
                    [
                        ("config.json".to_string(), Bytes::from(changed.to_string())),
                        ("model.safetensors".to_string(), weights.clone()),
                    ],
                );
                if panics(&files) {
                    failures.push(format!("{}: {place} = {value}", dir.display()));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn no_number_of_a_gguf_panics() {
    let mut failures = Vec::new();
    let mut tried = 0;
    for entry in std::fs::read_dir(fixtures().join("gguf")).expect("fixtures") {
        let path = entry.expect("entry").path();
        let file = read(&path);
        // Every u32 or f32 of the metadata: its key is followed by the type (4 or 6) and the value.
        let head = &file[..file.len().min(4096)];
        let places = (0..head.len() - 8).filter(|at| {
            let (ty, rest) = head[*at..].split_at(4);
            matches!(ty, [4 | 6, 0, 0, 0])
                && head[..*at].last().is_some_and(u8::is_ascii_lowercase)
                && rest.len() > 4
        });
        for at in places {
            tried += 1;
            for value in [0u32, 1, 7, 1 << 20, u32::MAX, f32::NAN.to_bits()] {
                let mut changed = file.to_vec();
                changed[at + 4..at + 8].copy_from_slice(&value.to_le_bytes());
                let files =
                    ModelFiles::from_memory("changed", [("changed.gguf".to_string(), Bytes::from(changed))]);
                if panics(&files) {
                    let key = String::from_utf8_lossy(&file[at.saturating_sub(30)..at]).into_owned();
                    failures.push(format!("{}: {key} = {value}", path.display()));
                }
            }
        }
    }
    assert!(tried > 300, "{tried} numbers found");
    assert!(failures.is_empty(), "{failures:#?}");
}
