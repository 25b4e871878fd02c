//! Pooling and the modules after it against sentence-transformers (`fixtures/make_sentence.py`).

mod common;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::{EncoderInputs, LoadOptions};
use oxiformers_models::{PoolingMode, SentenceModel};

use common::{Reference, largest_difference};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sentence/bert")
}

fn inputs(reference: &Reference) -> EncoderInputs {
    let rows = |name| {
        let row = |row: &Vec<i64>| row.iter().map(|id| *id as u32).collect();
        reference.ids(name).iter().map(row).collect::<Vec<Vec<u32>>>()
    };
    EncoderInputs::with_mask(rows("input_ids"), &rows("attention_mask")).expect("mask")
}

#[test]
fn pooling_and_modules_equal_sentence_transformers() {
    let files = ModelFiles::from_dir(&folder()).expect("fixture");
    let model = SentenceModel::from_files(&files, &LoadOptions::default()).expect("model");
    let reference = Reference::open(&folder());
    let inputs = inputs(&reference);
    let hidden = model.model.forward(&inputs).expect("forward").last_hidden_state;
    for (name, mode) in [
        ("cls", PoolingMode::Cls),
        ("max", PoolingMode::Max),
        ("mean", PoolingMode::Mean),
        ("mean_sqrt_len_tokens", PoolingMode::MeanSqrtLenTokens),
        ("weightedmean", PoolingMode::WeightedMean),
        ("lasttoken", PoolingMode::LastToken),
    ] {
        for (name, skip) in [(name.to_string(), 0), (format!("{name}.prompt"), 2)] {
            let pooled = mode.pool(hidden.clone(), &inputs.tokens, skip);
            let pooled: Vec<f32> = pooled.into_data().iter().collect();
            let difference = largest_difference(&pooled, &reference.floats(&name));
            assert!(difference < 1e-5, "{name}: {difference}");
        }
    }
    let embeddings = model.forward(&inputs, 2).expect("forward");
    let embeddings: Vec<f32> = embeddings.into_data().iter().collect();
    assert!(largest_difference(&embeddings, &reference.floats("embeddings")) < 1e-5);
}

#[test]
fn modules_that_do_not_fit_are_errors() {
    let dir = ModelFiles::from_dir(&folder()).expect("fixture");
    let with = |file: &str, content: &str| {
        let names = dir.names().map(str::to_owned).collect::<Vec<_>>();
        let files = names.into_iter().map(|name| {
            let bytes = dir.get(&name).expect("file").expect("file");
            (name, bytes)
        });
        let changed = (file.to_string(), Bytes::from(content.to_string()));
        let files = ModelFiles::from_memory("m", files.chain([changed]));
        SentenceModel::from_files(&files, &LoadOptions::default()).map(drop)
    };
    let entry = |kind: &str| format!(r#"{{"path": "1_X", "type": "sentence_transformers.models.{kind}"}}"#);
    let list = |kinds: &[&str]| {
        format!(
            "[{}]",
            kinds.iter().map(|kind| entry(kind)).collect::<Vec<_>>().join(",")
        )
    };
    for (file, content, message) in [
        ("modules.json", list(&["CLIPModel"]), "no Transformer"),
        ("modules.json", list(&["Transformer", "Normalize"]), "no Pooling"),
        ("modules.json", "{}".to_string(), "modules.json"),
        (
            "1_Pooling/config.json",
            r#"{"pooling_mode": "median"}"#.to_string(),
            "median",
        ),
        (
            "2_Dense/config.json",
            r#"{"out_features": 4}"#.to_string(),
            "in_features",
        ),
        (
            "2_Dense/config.json",
            r#"{"in_features": 3, "out_features": 4}"#.to_string(),
            "linear.weight",
        ),
        (
            "2_Dense/config.json",
            r#"{"activation_function": "torch.Mish"}"#.to_string(),
            "Mish",
        ),
        (
            "2_Dense/config.json",
            r#"{"module_input_name": "token_embeddings"}"#.to_string(),
            "module_input_name",
        ),
    ] {
        let error = with(file, &content).expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
    }
    // Only a Transformer and Pooling; or no list at all.
    let alone = format!(
        r#"[{{"path": "", "type": "Transformer"}}, {{"path": "1_Pooling", "type": "{}"}}]"#,
        "x.Pooling"
    );
    with("modules.json", &alone).expect("two modules");
    let twice = alone.replace(']', r#", {"path": "1_Pooling", "type": "Pooling"}]"#);
    assert!(
        with("modules.json", &twice)
            .expect_err("twice")
            .to_string()
            .contains("twice")
    );
}
