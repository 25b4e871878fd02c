//! Adapters begun as PEFT begins them learn as PEFT's do: the loss of twenty steps, and what is saved after them.
//!
//! `../../peft/tests/fixtures/make.py` made the reference.

mod given;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use burn::tensor::{Device, Tensor, TensorData};
use given::{Given, dataset};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::quant::to_f32;
use oxiformers_models::nn::{LoadOptions, Parameters, parameters};
use oxiformers_models::quantize::survey;
use oxiformers_models::{AutoConfig, AutoModelForCausalLM};
use oxiformers_peft::{Adapter, AdapterConfig};
use oxiformers_train::tasks::CausalLanguageModeling;
use oxiformers_train::{
    AdapterSaver, Callback, Event, Result, Trained, Trainer, TrainerState, TrainingArguments,
};
use safetensors::SafeTensors;
use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../peft/tests/fixtures")
}

/// The losses of all steps.
#[derive(Clone, Default)]
struct Losses(Arc<Mutex<Vec<f64>>>);

impl Callback for Losses {
    fn on_event(&mut self, event: &Event, _: &TrainerState, _: &TrainingArguments) -> Result<()> {
        if let Event::Step { loss, .. } = event {
            self.0.lock().expect("losses").push(*loss);
        }
        Ok(())
    }
}

struct Reference(Vec<u8>);

impl Reference {
    fn open(path: &Path) -> Self {
        Self(std::fs::read(path).expect("reference"))
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.0).expect("safetensors");
        let data = tensors.tensor(name).expect(name).data().to_vec();
        data.as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    }

    fn ids(&self) -> Vec<Vec<i64>> {
        let tensors = SafeTensors::deserialize(&self.0).expect("safetensors");
        let ids = tensors.tensor("ids").expect("ids");
        let all: Vec<i64> = ids
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect();
        all.chunks(ids.shape()[1]).map(<[i64]>::to_vec).collect()
    }

    /// What was trained, as it was before the first step, by the names that it has here.
    fn first(&self) -> HashMap<String, Vec<f32>> {
        let tensors = SafeTensors::deserialize(&self.0).expect("safetensors");
        let names: Vec<String> = tensors.names().into_iter().map(str::to_string).collect();
        let mut found: HashMap<_, _> = names
            .iter()
            .filter_map(|name| {
                let short = name.strip_prefix("first.")?;
                let short = short.strip_prefix("base_model.model.").unwrap_or(short);
                Some((short.replace(".default", ""), self.floats(name)))
            })
            .collect();
        if found.len() == 1 {
            // Without layers after it, the table is the tokens themselves.
            if let Some(values) = found.remove("prompt_encoder.embedding.weight") {
                found.insert("prompt_embeddings".to_string(), values);
            }
        }
        found
    }
}

fn compare(name: &str) {
    let folder = tempfile::tempdir().expect("folder");
    let reference = Reference::open(&fixtures().join(name).join("reference.safetensors"));
    let text = std::fs::read(fixtures().join(name).join("adapter_config.json")).expect("configuration");
    let config: Value = serde_json::from_slice(&text).expect("configuration");
    let config = AdapterConfig::from_json(config, name).expect("configuration");
    let adapter = Arc::new(Adapter::fresh(config, "default", 1).expect("adapter"));
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/fixtures/llama");
    let files = ModelFiles::from_dir(&base).expect("base");
    let parameters = Arc::new(Parameters::all());
    let options = LoadOptions {
        device: Device::flex().autodiff(),
        parameters: Some(parameters.clone()),
        adapters: vec![adapter.clone() as _],
        ..LoadOptions::default()
    };
    if adapter.begins_with_a_survey() {
        adapter
            .measure(&survey(&files).expect("survey"))
            .expect("measured");
    }
    let model = AutoModelForCausalLM::from_files(&files, &options).expect("model");
    let first = reference.first();
    let trainable = parameters.trainable();
    let values = trainable.iter().map(|parameter| {
        let short = parameter.name.strip_prefix("base_model.model.");
        let values = &first[short.expect("a parameter of the adapter")];
        assert_eq!(values.len(), parameter.len(), "{}", parameter.name);
        let data = TensorData::new(values.clone(), [values.len()]);
        (parameter.id, Tensor::from_data(data, &Device::flex()))
    });
    let values = values.collect::<parameters::Values>();
    assert_eq!(values.len(), first.len(), "{:?}", first.keys());
    let model = parameters::put(model, &trainable, &values, true);

    let row = |ids: &Vec<i64>| json!({"input_ids": ids, "labels": ids}).to_string();
    let lines: Vec<String> = reference.ids().iter().map(row).collect();
    let path = folder.path().join("data.jsonl");
    std::fs::write(&path, lines.join("\n")).expect("data");
    let given = Given { classes: false };
    let data = dataset(&path, &given, &folder.path().join("cache"));
    let arguments = json!({
        "output_dir": folder.path(), "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 2e-2,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    });
    let arguments: serde_json::Map<String, Value> = serde_json::from_value(arguments).expect("object");
    let config = AutoConfig::from_files(&files).expect("config");
    let trained = Trained {
        model,
        parameters,
        saver: Box::new(AdapterSaver {
            adapter,
            files: files.clone(),
        }),
    };
    let losses = Losses::default();
    let task = CausalLanguageModeling::new(Arc::new(given), &config);
    let arguments = TrainingArguments::from_json(arguments).expect("arguments");
    let trainer = Trainer::new(arguments, task, trained, data, None).expect("trainer");
    let mut trainer = trainer.with_callback(losses.clone());
    trainer
        .train_blocking()
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let ours = losses.0.lock().expect("losses").clone();
    let theirs = reference.floats("losses");
    assert_eq!(ours.len(), theirs.len());
    let mut worst = 0f64;
    for (step, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        let difference = (ours - f64::from(*theirs)).abs() / f64::from(*theirs);
        assert!(
            difference < 1e-3,
            "{name}: step {step}: {ours}, PEFT has {theirs}"
        );
        worst = worst.max(difference);
    }
    println!("{name}: largest relative difference {worst:.1e}");

    let saved = folder.path().join("adapter");
    trainer.save_model_blocking(&saved).expect("saved");
    let open = |path: &Path| {
        let files = ModelFiles::from_dir(path).expect("adapter");
        Adapter::from_files(&files, name).expect("adapter")
    };
    let (ours, theirs) = (open(&saved), open(&fixtures().join(name)));
    assert_eq!(
        ours.tensors().keys().collect::<Vec<_>>(),
        theirs.tensors().keys().collect::<Vec<_>>()
    );
    for (tensor, view) in ours.tensors() {
        let theirs = &theirs.tensors()[tensor];
        assert_eq!(view.shape, theirs.shape, "{name}: {tensor}");
        let (ours, theirs) = (to_f32(view).expect("floats"), to_f32(theirs).expect("floats"));
        let size = theirs.iter().fold(0f32, |size, x| size.max(x.abs()));
        let difference = ours
            .iter()
            .zip(&theirs)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(
            difference < 2e-2 * size,
            "{name}: `{tensor}`: {difference} of {size}"
        );
    }
}

#[test]
fn vera() {
    compare("training-vera");
}

#[test]
fn ia3() {
    compare("training-ia3");
}

#[test]
fn prompt_tuning() {
    compare("training-prompt");
}

#[test]
fn p_tuning() {
    compare("training-p_tuning");
}

#[test]
fn prefix_tuning() {
    compare("training-prefix");
}

#[test]
fn prefix_tuning_with_projection() {
    compare("training-prefix-projected");
}

/// The losses of eight steps of LoRA with dropout, in one run or in several that are stopped after so many steps.
fn with_dropout(output: &Path, gradient_checkpointing: bool, runs: &[u64]) -> Vec<f64> {
    let mut losses = Vec::new();
    for steps in runs {
        let config = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "lora_dropout": 0.3,
            "target_modules": "all-linear", "init_lora_weights": false,
        });
        let config = AdapterConfig::from_json(config, "test").expect("configuration");
        let adapter = Arc::new(Adapter::fresh(config, "default", 1).expect("adapter"));
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/fixtures/llama");
        let files = ModelFiles::from_dir(&base).expect("base");
        let parameters = Arc::new(Parameters::all());
        let options = LoadOptions {
            device: Device::flex().autodiff(),
            parameters: Some(parameters.clone()),
            adapters: vec![adapter.clone() as _],
            ..LoadOptions::default()
        };
        let trained = Trained {
            model: AutoModelForCausalLM::from_files(&files, &options).expect("model"),
            parameters,
            saver: Box::new(AdapterSaver {
                adapter,
                files: files.clone(),
            }),
        };
        let given = Given { classes: false };
        let data = fixtures().join("../../../train/tests/fixtures/curves/causal-lm/data.jsonl");
        let data = dataset(&data, &given, &output.join("cache"));
        let config = AutoConfig::from_files(&files).expect("config");
        let task = CausalLanguageModeling::new(Arc::new(given), &config);
        let arguments = json!({
            "output_dir": output, "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
            "lr_scheduler_type": "constant", "logging_steps": 1, "resume_from_checkpoint": true,
            "gradient_checkpointing": gradient_checkpointing,
        });
        let arguments: serde_json::Map<String, Value> = serde_json::from_value(arguments).expect("object");
        let arguments = TrainingArguments::from_json(arguments).expect("arguments");
        let stop = Arc::new(AtomicBool::new(false));
        let trainer = Trainer::new(arguments, task, trained, data, None).expect("trainer");
        let mut trainer = trainer
            .with_stop(stop.clone())
            .with_callback(StopAfter(*steps, stop));
        trainer.train_blocking().expect("training");
        let logs = trainer.state().log_history.iter();
        losses = logs.filter_map(|log| log.get("loss")?.as_f64()).collect();
    }
    losses
}

/// Asks to stop after a step.
struct StopAfter(u64, Arc<AtomicBool>);

impl Callback for StopAfter {
    fn on_event(&mut self, event: &Event, state: &TrainerState, _: &TrainingArguments) -> Result<()> {
        if matches!(event, Event::Step { .. }) && state.global_step == self.0 {
            self.1.store(true, Ordering::SeqCst);
        }
        Ok(())
    }
}

#[test]
fn dropout_of_adapters_is_drawn_again() {
    let folder = tempfile::tempdir().expect("folder");
    let whole = with_dropout(&folder.path().join("whole"), false, &[99]);
    assert_eq!(whole.len(), 8);
    assert_eq!(
        with_dropout(&folder.path().join("parts"), false, &[3, 5, 99]),
        whole
    );
    // Layers that run again leave out the same.
    let again = with_dropout(&folder.path().join("again"), true, &[99]);
    for (again, kept) in again.iter().zip(&whole) {
        assert!((again - kept).abs() < 1e-5 * kept, "{again} {kept}");
    }
}
