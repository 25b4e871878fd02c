//! Preferences, rewards and what else TRL trains: the same records in the same order, the same first weights and arguments.
//!
//! `fixtures/make_objectives.py` made the reference.

mod given;

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::Device;
use given::{curves, objective};
use oxiformers_hub::ModelFiles;
use oxiformers_train::{Job, Recipe, Result, Surroundings};
use serde_json::{Map, Value, json};

fn prepare(recipe: Value) -> Result<Box<dyn Job>> {
    Recipe::from_json(recipe)?.prepare(Surroundings {
        resolve: &|name| Ok(ModelFiles::from_dir(Path::new(name))?),
        device: Device::flex(),
        report: &mut |_| ControlFlow::Continue(()),
        evaluation: false,
    })
}

/// A recipe for one of them.
fn recipe(case: &Value, output: &Path) -> Value {
    let of = &case["recipe"];
    let text = |name: &str| of[name].as_str().expect("text");
    let mut recipe = json!({
        "task": of["task"],
        "model": { "name": objective(text("model")) },
        "data": { "train": objective(&format!("{}.jsonl", text("data"))) },
        "objective": of["objective"],
        "training": of["training"],
    });
    recipe["training"]["output_dir"] = json!(output);
    recipe["training"]["save_strategy"] = json!("no");
    if let Some(length) = of.get("max_length") {
        recipe["data"]["max_length"] = length.clone();
    }
    if let Some(steps) = of.get("lambda_warmup_steps") {
        recipe["model"]["lambda_warmup_steps"] = steps.clone();
        recipe["model"]["straight_through"] = json!("bitnet");
    }
    // Models lie beside the records.
    let rewards = recipe["objective"]
        .get_mut("rewards")
        .and_then(Value::as_array_mut);
    let models = rewards
        .into_iter()
        .flatten()
        .filter_map(|reward| reward.get_mut("model"));
    for model in models {
        *model = json!(objective(model.as_str().expect("name")));
    }
    if let Some(teacher) = recipe["objective"].get_mut("teacher_model_name_or_path") {
        *teacher = json!(objective(teacher.as_str().expect("name")));
    }
    if matches!(text("task"), "distillation" | "causal-lm") && text("data") == "pairs" {
        recipe["data"]["prompt_column"] = json!("prompt");
        recipe["data"]["completion_column"] = json!("chosen");
    }
    recipe
}

/// Trains as the cases whose names begin with this say, and compares what is logged of every step.
fn compare(start: &str) {
    let curves = curves();
    let cases: Vec<_> = curves
        .iter()
        .filter(|(name, _)| name.starts_with(start))
        .collect();
    assert!(!cases.is_empty());
    for (name, case) in cases {
        let folder = tempfile::tempdir().expect("folder");
        let job = prepare(recipe(case, folder.path()));
        let mut job = job.unwrap_or_else(|error| panic!("{name}: {error}"));
        job.train().unwrap_or_else(|error| panic!("{name}: {error}"));
        given::compare(name, &job.state().log_history, &case["steps"]);
    }
}

#[test]
fn rewards() {
    compare("reward");
}

#[test]
fn pairs() {
    compare("dpo");
}

#[test]
fn single_answers() {
    compare("kto");
}

#[test]
fn odds() {
    compare("orpo");
}

#[test]
fn teachers() {
    compare("distillation");
}

/// Ternary weights, and what is saved of them.
#[test]
fn weights_that_become_ternary() {
    compare("bitnet");
    let folder = tempfile::tempdir().expect("folder");
    let mut recipe = recipe(&curves()["bitnet"], folder.path());
    recipe["data"]["eval"] = recipe["data"]["train"].clone();
    recipe["training"]["save_strategy"] = json!("steps");
    recipe["training"]["save_steps"] = json!(5);
    let mut job = prepare(recipe.clone()).expect("training");
    job.train().expect("training");
    let trained = job.evaluate().expect("evaluation");
    job.save_model(folder.path()).expect("model");
    let config = ModelFiles::from_dir(folder.path()).expect("folder");
    let config: Value = config.json("config.json").expect("config").expect("config");
    assert_eq!(config["quantization_config"]["quant_method"], "bitnet");
    let size = |folder: &Path| folder.join("model.safetensors").metadata().expect("model").len();
    assert!(
        size(folder.path()) * 2 < size(&objective("model")),
        "{}",
        size(folder.path())
    );
    assert!(!folder.path().join(".dense.part").exists());
    // What is loaded predicts as what was trained.
    recipe["model"] = json!({ "name": folder.path() });
    recipe["training"]["output_dir"] = json!(folder.path().join("again"));
    let packed = prepare(recipe.clone())
        .expect("model")
        .evaluate()
        .expect("evaluation");
    let loss = |log: &Map<String, Value>| log["eval_loss"].as_f64().expect("loss");
    assert!(
        (loss(&trained) - loss(&packed)).abs() < 1e-3,
        "{trained:?} {packed:?}"
    );
    // Checkpoints hold the values that learn.
    recipe["model"] =
        json!({ "name": objective("model"), "straight_through": "bitnet", "lambda_warmup_steps": 5 });
    recipe["training"]["output_dir"] = json!(folder.path());
    recipe["training"]["resume_from_checkpoint"] = json!(folder.path().join("checkpoint-5"));
    let mut job = prepare(recipe).expect("training");
    let whole = saved(folder.path());
    job.train().expect("training");
    job.save_model(folder.path()).expect("model");
    assert!(saved(folder.path()) == whole);
}

/// The case `name`, changed, and its last losses.
fn losses(name: &str, changes: &[(&str, &str, Value)]) -> Result<Vec<f64>> {
    let folder = tempfile::tempdir().expect("folder");
    let mut recipe = recipe(&curves()[name], folder.path());
    for (table, key, value) in changes {
        recipe[table][key] = value.clone();
    }
    let mut job = prepare(recipe)?;
    job.train()?;
    let logs = job.state().log_history.iter();
    Ok(logs.filter_map(|log| log.get("loss")?.as_f64()).collect())
}

/// The reference of an adapter is the model without it.
#[test]
fn an_adapter_is_held_to_the_model_without_it() {
    let adapter = json!({ "r": 4, "target_modules": "all-linear", "lora_alpha": 16 });
    let changes = [
        ("model", "adapter", adapter),
        ("training", "learning_rate", json!(2e-2)),
    ];
    let plain = losses("dpo", &changes).expect("training");
    // At first both are the same.
    assert!((plain[0] - 2f64.ln()).abs() < 1e-6, "{plain:?}");
    assert!(plain[19] < 0.5, "{plain:?}");
    let mut changes = changes.to_vec();
    changes.push(("objective", "precompute_ref_log_probs", json!(true)));
    let known = losses("dpo", &changes).expect("training");
    assert!(
        plain.iter().zip(&known).all(|(a, b)| (a - b).abs() < 1e-5),
        "{plain:?} {known:?}"
    );
}

/// `disable_dropout` is for adapters, too.
#[test]
fn adapters_drop_out_nothing_where_nothing_is_dropped() {
    let losses = |dropout: f64, disabled: bool| {
        let adapter =
            json!({ "r": 4, "target_modules": "all-linear", "lora_alpha": 16, "lora_dropout": dropout });
        let changes = [
            ("model", "adapter", adapter),
            ("training", "learning_rate", json!(2e-2)),
            ("training", "max_steps", json!(4)),
            ("objective", "disable_dropout", json!(disabled)),
        ];
        losses("dpo", &changes).expect("training")
    };
    let plain = losses(0.0, true);
    assert_eq!(losses(0.5, true), plain);
    assert_eq!(losses(0.0, false), plain);
    assert_ne!(losses(0.5, false), plain);
}

/// Files of a folder with the model that was saved there.
fn saved(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("model.safetensors")).expect("model")
}

/// A training that was killed after its checkpoint ends as one that was not.
#[test]
fn what_was_killed_goes_on() {
    let curves = curves();
    let names = [
        "reward",
        "dpo-precomputed",
        "dpo-follows",
        "kto",
        "orpo",
        "distillation",
        "grpo",
    ];
    for name in names {
        let run = |folder: &Path, resume: bool| {
            let mut recipe = recipe(&curves[name], folder);
            let training = &mut recipe["training"];
            training["max_steps"] = json!(6);
            training["save_strategy"] = json!("steps");
            training["save_steps"] = json!(3);
            training["resume_from_checkpoint"] = json!(resume);
            training["train_sampling_strategy"] = json!("random");
            // So that logs go across the checkpoint.
            training["logging_steps"] = json!(5);
            let mut job = prepare(recipe).unwrap_or_else(|error| panic!("{name}: {error}"));
            job.train().unwrap_or_else(|error| panic!("{name}: {error}"));
            job.save_model(folder).expect("model");
            let log = job.state().log_history[0].clone();
            assert!(log.contains_key("loss"));
            (saved(folder), log)
        };
        let (whole, killed) = (
            tempfile::tempdir().expect("folder"),
            tempfile::tempdir().expect("folder"),
        );
        let expected = run(whole.path(), false);
        // Two steps learn from the same answers, and nothing is saved between them.
        let checkpoint = if name == "grpo" {
            "checkpoint-4"
        } else {
            "checkpoint-3"
        };
        let from = whole.path().join(checkpoint);
        let to = killed.path().join(checkpoint);
        std::fs::create_dir(&to).expect("checkpoint");
        for entry in std::fs::read_dir(&from).unwrap_or_else(|error| panic!("{name}: {error}")) {
            let path = entry.expect("file").path();
            std::fs::copy(&path, to.join(path.file_name().expect("name"))).expect("copy");
        }
        assert!(run(killed.path(), true) == expected, "{name}");
    }
}

/// What the reference says is read again where nothing has changed, and computed where something has.
#[test]
fn what_the_reference_says_is_kept() {
    let folder = tempfile::tempdir().expect("folder");
    let files = || {
        let files = std::fs::read_dir(folder.path().join("cache")).expect("cache");
        let name = |entry: std::io::Result<std::fs::DirEntry>| entry.expect("file").file_name();
        let is_reference = |name: &std::ffi::OsString| name.to_string_lossy().starts_with("reference-");
        let files: Vec<_> = files.map(name).filter(is_reference).collect();
        files
    };
    let mut of = recipe(&curves()["dpo-precomputed"], folder.path());
    prepare(of.clone()).expect("training");
    let first = files();
    assert_eq!(first.len(), 1);
    let path = folder.path().join("cache").join(&first[0]);
    let written = || path.metadata().and_then(|file| file.modified()).expect("file");
    let before = written();
    prepare(of.clone()).expect("training");
    assert_eq!((files().len(), written()), (1, before));
    of["data"]["max_length"] = json!(6);
    prepare(of).expect("training");
    assert_eq!(files().len(), 2);
}

#[test]
fn what_is_wrong_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    let data = folder.path().join("data.jsonl");
    let error = |name: &str, line: &str, changes: &[(&str, &str, Value)]| {
        std::fs::write(&data, format!("\n{line}\n")).expect("data");
        let mut changes = changes.to_vec();
        changes.push(("data", "train", json!(data)));
        losses(name, &changes).expect_err(line).to_string()
    };
    let place = format!("{}: line 2: ", data.display());
    let cases = [
        (
            "dpo",
            r#"{"prompt": "w1", "rejected": "w2"}"#,
            "has no `chosen`; it has `prompt`, `rejected`",
        ),
        (
            "dpo",
            r#"{"prompt": "w1", "chosen": "", "rejected": "w2"}"#,
            "`chosen` is an empty text",
        ),
        (
            "dpo",
            r#"{"prompt": "w1", "chosen": 3, "rejected": "w2"}"#,
            "`chosen` is a number, neither a text nor a list",
        ),
        (
            "dpo",
            r#"{"prompt": "w1", "chosen": [], "rejected": []}"#,
            "`chosen` holds no message",
        ),
        (
            "dpo",
            r#"{"prompt": "w1", "chosen": ["x"], "rejected": []}"#,
            "a message is a text, not an object",
        ),
        ("orpo", r#"{"chosen": "w1", "rejected": "w2"}"#, "has no `prompt`"),
        (
            "kto",
            r#"{"prompt": "w1", "completion": "w2", "label": 1}"#,
            "`label` is a number, not true or false",
        ),
        (
            "kto",
            r#"{"prompt": "w1", "completion": "", "label": true}"#,
            "`completion` is an empty text",
        ),
        (
            "reward",
            r#"{"chosen": "w1", "rejected": "w2", "margin": "x"}"#,
            "`margin` is no number",
        ),
    ];
    for (name, line, message) in cases {
        let error = error(name, line, &[]);
        assert!(error.starts_with(&place) && error.contains(message), "{error}");
    }
    let long = r#"{"prompt": "w1 w2 w3 ", "chosen": "w4", "rejected": "w5"}"#;
    let max_length = [("data", "max_length", json!(3))];
    let behind = error("dpo", long, &max_length);
    assert!(
        behind.contains("`chosen` lies behind the first 3 tokens (max_length)"),
        "{behind}"
    );
    let cut = error("reward", long, &max_length);
    assert!(
        cut.contains("`chosen` has 5 tokens, and max_length is 3"),
        "{cut}"
    );
    let settings: [(&str, (&str, &str, Value), &str); 8] = [
        ("dpo", ("objective", "betta", json!(1)), "unknown field `betta`"),
        (
            "dpo",
            ("objective", "beta", json!(0)),
            "`objective.beta` is 0; it must be above 0",
        ),
        ("dpo", ("objective", "loss_type", json!("sigmod")), "loss_type"),
        (
            "dpo-robust",
            ("objective", "label_smoothing", json!(0.5)),
            "`objective.label_smoothing` is 0.5",
        ),
        (
            "dpo-bco_pair",
            ("objective", "f_divergence_type", json!("js_divergence")),
            "`objective.f_divergence_type` goes with differences of answers only, and not with the loss \"bco_pair\"",
        ),
        (
            "dpo-follows",
            ("objective", "ref_model_mixup_alpha", json!(1.5)),
            "`objective.ref_model_mixup_alpha` is 1.5; it must lie from 0 to 1",
        ),
        (
            "dpo-precomputed",
            ("objective", "sync_ref_model", json!(true)),
            "`objective.sync_ref_model` needs a reference that is a model of its own",
        ),
        (
            "kto",
            ("training", "per_device_train_batch_size", json!(1)),
            "must be 2 at least",
        ),
    ];
    for (name, change, message) in settings {
        let error = losses(name, &[change]).expect_err(message).to_string();
        assert!(error.contains(message), "{error}");
    }
}
