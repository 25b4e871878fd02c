//! 100 steps as Transformers' Trainer makes them: the same data in the same order, the same first weights and arguments.
//!
//! `fixtures/make_curves.py` made the reference.

mod given;

use std::sync::{Arc, Mutex};

use given::{Given, arguments, dataset, fixture, open};
use oxiformers_models::tasks::{MaskedLM, SequenceClassification};
use oxiformers_models::{AutoConfig, AutoModelFor, AutoModelForCausalLM, AutoModelForSeq2SeqLM};
use oxiformers_train::tasks::{CausalLanguageModeling, Seq2SeqLanguageModeling, TextTask, TrainedHead};
use oxiformers_train::{Callback, Event, Result, Task, Trained, Trainer, TrainerState, TrainingArguments};
use serde_json::{Value, json};

/// `[loss, grad_norm, learning_rate]` of every step.
#[derive(Clone, Default)]
struct Curve(Arc<Mutex<Vec<[f64; 3]>>>);

impl Callback for Curve {
    fn on_event(&mut self, event: &Event, _: &TrainerState, _: &TrainingArguments) -> Result<()> {
        if let Event::Step {
            loss,
            grad_norm,
            learning_rate,
            ..
        } = event
        {
            self.0
                .lock()
                .expect("curve")
                .push([*loss, *grad_norm, *learning_rate]);
        }
        Ok(())
    }
}

/// Trains as the fixture `name` says and compares every step.
fn compare<T: Task>(
    name: &str,
    classes: bool,
    build: impl FnOnce(Arc<Given>, &AutoConfig) -> (T, Trained<T::Model>),
) {
    let folder = tempfile::tempdir().expect("folder");
    let given = Given { classes };
    let data = dataset(
        &fixture(name).join("data.jsonl"),
        &given,
        &folder.path().join("cache"),
    );
    let (files, ..) = open(name);
    let config = AutoConfig::from_files(&files).expect("config");
    let (task, trained) = build(Arc::new(given), &config);
    let changes = json!({ "save_strategy": "no" });
    let curve = Curve::default();
    let trainer =
        Trainer::new(arguments(name, folder.path(), changes), task, trained, data, None).expect("trainer");
    let mut trainer = trainer.with_callback(curve.clone());
    trainer
        .train_blocking()
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let ours = curve.0.lock().expect("curve").clone();
    let text = std::fs::read(fixture(name).join("curve.json")).expect("curve");
    let theirs: Value = serde_json::from_slice(&text).expect("curve");
    let theirs = |key: &str, step: usize| {
        theirs[key][step]
            .as_f64()
            .unwrap_or_else(|| panic!("{name}: {key} {step}"))
    };
    assert_eq!(ours.len(), 100);
    let mut worst = [0.0f64; 3];
    for (step, ours) in ours.iter().enumerate() {
        for ((key, ours), worst) in ["loss", "grad_norm", "learning_rate"]
            .iter()
            .zip(ours)
            .zip(&mut worst)
        {
            let expected = theirs(key, step);
            let difference = (ours - expected).abs() / expected.abs().max(1e-9);
            *worst = worst.max(difference);
            let tolerance = if *key == "learning_rate" { 1e-6 } else { 1e-3 };
            // The norm of gradients is a difference of what the losses agree in.
            let tolerance = if *key == "grad_norm" { 1e-2 } else { tolerance };
            assert!(
                difference < tolerance,
                "{name}: step {step}: {key} {ours}, Transformers has {expected}"
            );
        }
    }
    println!("{name}: largest relative differences of loss, norm, rate: {worst:?}");
}

fn causal(name: &str) {
    compare(name, false, |objective, config| {
        let (files, parameters, options, saver) = open(name);
        let model = AutoModelForCausalLM::from_files(&files, &options).expect("model");
        let trained = Trained {
            model,
            parameters,
            saver: Box::new(saver),
        };
        (CausalLanguageModeling::new(objective, config), trained)
    });
}

fn seq2seq(name: &str) {
    compare(name, false, |objective, config| {
        let (files, parameters, options, saver) = open(name);
        let model = AutoModelForSeq2SeqLM::from_files(&files, &options).expect("model");
        let trained = Trained {
            model,
            parameters,
            saver: Box::new(saver),
        };
        (
            Seq2SeqLanguageModeling::new(objective, config).expect("task"),
            trained,
        )
    });
}

#[test]
fn causal_lm() {
    causal("causal-lm");
}

#[test]
fn smoothed_labels_and_noise_on_embeddings() {
    causal("causal-lm-noise");
}

/// What Transformers leaves out of embeddings, of the weights of attention, of what blocks add, and within heads, in its
/// order: the same draws make the same losses.
#[test]
fn dropout_of_a_decoder() {
    causal("causal-lm-dropout");
}

#[test]
fn dropout_of_an_encoder() {
    with_head::<SequenceClassification>("text-classification-dropout", true);
}

#[test]
fn dropout_of_an_encoder_decoder() {
    seq2seq("seq2seq-lm-dropout");
}

#[test]
fn seq2seq_lm() {
    seq2seq("seq2seq-lm");
}

fn with_head<T: TrainedHead>(name: &str, classes: bool) {
    compare(name, classes, |objective, config| {
        let (files, parameters, options, saver) = open(name);
        let model = AutoModelFor::<T>::from_files(&files, &options).expect("model");
        let trained = Trained {
            model,
            parameters,
            saver: Box::new(saver),
        };
        (
            TextTask::new(objective, config).expect("task").with_head::<T>(),
            trained,
        )
    });
}

#[test]
fn masked_lm() {
    with_head::<MaskedLM>("masked-lm", false);
}

#[test]
fn text_classification() {
    with_head::<SequenceClassification>("text-classification", true);
}

#[test]
fn text_classification_by_a_decoder() {
    with_head::<SequenceClassification>("text-classification-decoder", true);
}
