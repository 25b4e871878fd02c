//! The loop: what it saves, how it goes on, when it stops.

mod given;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use burn::tensor::FloatDType;
use given::{Given, arguments, dataset, fixture, open};
use oxiformers_models::nn::LoadOptions;
use oxiformers_models::tasks::SequenceClassification;
use oxiformers_models::{AutoConfig, AutoModelFor, AutoModelForCausalLM};
use oxiformers_train::tasks::{CausalLanguageModeling, HeadTask, TextTask};
use oxiformers_train::{
    Callback, Error, Event, Outcome, Result, Trained, Trainer, TrainerState, TrainingArguments,
};
use serde_json::{Value, json};

const NAME: &str = "causal-lm";

/// A training of the language model; the data of the fixture is also evaluated.
fn language_model(output: &Path, changes: Value) -> Trainer<CausalLanguageModeling> {
    language_model_as(None, output, changes)
}

/// The same with weights of another float type.
fn language_model_as(
    dtype: Option<FloatDType>,
    output: &Path,
    changes: Value,
) -> Trainer<CausalLanguageModeling> {
    let (files, parameters, options, saver) = open(NAME);
    let options = LoadOptions { dtype, ..options };
    let model = AutoModelForCausalLM::from_files(&files, &options).expect("model");
    let given = Given { classes: false };
    let data = dataset(&fixture(NAME).join("data.jsonl"), &given, &output.join("cache"));
    let task = CausalLanguageModeling::new(Arc::new(given), &AutoConfig::from_files(&files).expect("config"));
    let trained = Trained {
        model,
        parameters,
        saver: Box::new(saver),
    };
    let eval = data.clone().take(9);
    Trainer::new(arguments(NAME, output, changes), task, trained, data, Some(eval)).expect("trainer")
}

fn changes(more: Value) -> Value {
    let mut changes = json!({
        "max_steps": 24, "save_steps": 5, "logging_steps": 1, "train_sampling_strategy": "random",
        "neftune_noise_alpha": 5.0, "resume_from_checkpoint": true,
    });
    changes
        .as_object_mut()
        .expect("object")
        .extend(more.as_object().expect("object").clone());
    changes
}

/// The files of a checkpoint that say how training goes on.
fn contents(folder: &Path) -> Vec<Vec<u8>> {
    let read = |name: &str| {
        std::fs::read(folder.join(name))
            .unwrap_or_else(|error| panic!("{}: {error}", folder.join(name).display()))
    };
    vec![read("model.safetensors"), read("optimizer.safetensors")]
}

fn losses(state: &TrainerState) -> Vec<f64> {
    state
        .log_history
        .iter()
        .filter_map(|log| log.get("loss")?.as_f64())
        .collect()
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
fn what_was_stopped_goes_on_with_the_same_curve_bit_for_bit() {
    let folder = tempfile::tempdir().expect("folder");
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    let mut trainer = language_model(&whole, changes(json!({})));
    let output = trainer.train_blocking().expect("training");
    assert_eq!((output.outcome, output.global_step), (Outcome::Finished, 24));
    let expected = losses(trainer.state());
    assert_eq!(expected.len(), 24);
    assert!(expected[23] < expected[0]);
    let mut seen = Vec::new();
    for stop_after in [7, 12, 13, 99] {
        let stop = Arc::new(AtomicBool::new(false));
        let trainer = language_model(&parts, changes(json!({}))).with_stop(stop.clone());
        let mut trainer = trainer.with_callback(StopAfter(stop_after, stop));
        let output = trainer.train_blocking().expect("training");
        assert_eq!(output.outcome == Outcome::Interrupted, stop_after < 24);
        seen = losses(trainer.state());
    }
    assert_eq!(seen, expected);
    assert_eq!(
        contents(&parts.join("checkpoint-24")),
        contents(&whole.join("checkpoint-24"))
    );
    // Another seed is another training.
    let other = folder.path().join("other");
    let mut trainer = language_model(&other, changes(json!({"seed": 7})));
    trainer.train_blocking().expect("training");
    assert_ne!(losses(trainer.state()), expected);
}

#[test]
fn weights_of_16_bits_learn_as_those_of_32_and_go_on_bit_for_bit() {
    let folder = tempfile::tempdir().expect("folder");
    let run = |name: &str, dtype, stop_after: &[u64]| {
        let output = folder.path().join(name);
        let mut seen = Vec::new();
        for step in stop_after {
            let stop = Arc::new(AtomicBool::new(false));
            let trainer = language_model_as(dtype, &output, changes(json!({}))).with_stop(stop.clone());
            let mut trainer = trainer.with_callback(StopAfter(*step, stop));
            trainer.train_blocking().expect("training");
            seen = losses(trainer.state());
        }
        (seen, contents(&output.join("checkpoint-24")))
    };
    let bf16 = Some(FloatDType::BF16);
    let (whole, whole_files) = run("whole", bf16, &[99]);
    let (parts, part_files) = run("parts", bf16, &[7, 12, 99]);
    assert_eq!(parts, whole);
    // What is kept is what learns: f32, of which the weights of 16 bits are made.
    assert_eq!(part_files, whole_files);
    let (plain, _) = run("plain", None, &[99]);
    assert_eq!((whole.len(), plain.len()), (24, 24));
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&whole[18..]) < 0.95 * mean(&whole[..3]), "{whole:?}");
    for (bf16, f32) in whole.iter().zip(&plain) {
        assert!((bf16 - f32).abs() < 0.02 * f32, "{bf16} instead of {f32}");
    }
}

#[test]
fn layers_that_run_again_learn_the_same() {
    let folder = tempfile::tempdir().expect("folder");
    let run = |name: &str, gradient_checkpointing: bool| {
        let settings = json!({"max_steps": 6, "gradient_checkpointing": gradient_checkpointing});
        let mut trainer = language_model(&folder.path().join(name), changes(settings));
        trainer.train_blocking().expect("training");
        losses(trainer.state())
    };
    let (kept, again) = (run("kept", false), run("again", true));
    assert_eq!(kept.len(), 6);
    for (kept, again) in kept.iter().zip(&again) {
        assert!((kept - again).abs() < 1e-5 * kept, "{kept} {again}");
    }
}

/// Where a child of [`killed_at_any_moment`] trains.
const CHILD: &str = "OXIFORMERS_TEST_CHILD";

/// Trains in the folder that the environment names; nothing else.
#[test]
fn child() {
    let Some(output) = std::env::var_os(CHILD).map(PathBuf::from) else {
        return;
    };
    let changes = changes(json!({"max_steps": 60, "save_steps": 3, "save_total_limit": 2}));
    language_model(&output, changes)
        .train_blocking()
        .expect("training");
}

fn spawn(output: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("test"));
    command
        .args(["child", "--exact", "--nocapture"])
        .env(CHILD, output);
    command
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("child")
}

#[test]
fn killed_at_any_moment_it_goes_on_and_ends_with_the_same_weights() {
    let folder = tempfile::tempdir().expect("folder");
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    let began = std::time::Instant::now();
    assert!(spawn(&whole).wait().expect("child").success());
    let took = began.elapsed();
    // Ten moments within the time that the whole takes, some of them while a checkpoint is written.
    let random = AtomicU64::new(12345);
    let moment = || {
        let next = random
            .load(Ordering::Relaxed)
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        random.store(next, Ordering::Relaxed);
        took.mul_f64(0.05 + 0.35 * (next >> 33) as f64 / (1u64 << 31) as f64)
    };
    let mut finished = false;
    for _ in 0..10 {
        let mut child = spawn(&parts);
        std::thread::sleep(moment());
        finished = child.try_wait().expect("child").is_some();
        let _ = child.kill();
        child.wait().expect("child");
        if finished {
            break;
        }
    }
    if !finished {
        assert!(spawn(&parts).wait().expect("child").success());
    }
    assert_eq!(
        contents(&parts.join("checkpoint-60")),
        contents(&whole.join("checkpoint-60"))
    );
    let left = std::fs::read_dir(&parts)
        .expect("folder")
        .map(|entry| entry.expect("entry").file_name());
    let mut left: Vec<_> = left.map(|name| name.to_string_lossy().into_owned()).collect();
    left.sort();
    assert_eq!(left, ["cache", "checkpoint-57", "checkpoint-60"]);
}

#[test]
fn the_best_model_is_kept_and_loaded() {
    let folder = tempfile::tempdir().expect("folder");
    // It first gets better, and then a learning rate that is much too high spoils it.
    let mut trainer = language_model(
        folder.path(),
        changes(json!({
            "max_steps": 40, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "save_total_limit": 1,
            "load_best_model_at_end": true, "early_stopping_patience": 2, "learning_rate": 0.08, "warmup_steps": 38,
            "max_grad_norm": 0.0, "neftune_noise_alpha": null, "lr_scheduler_type": "constant_with_warmup",
        })),
    );
    let output = trainer.train_blocking().expect("training");
    let evaluated: Vec<f64> = (trainer.state().log_history.iter())
        .filter_map(|log| log.get("eval_loss")?.as_f64())
        .collect();
    let best = evaluated.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(trainer.state().best_metric, Some(best));
    let at = evaluated.iter().position(|loss| *loss == best).expect("best");
    assert_eq!(trainer.state().best_global_step, Some(4 * (at as u64 + 1)));
    if output.outcome == Outcome::StoppedEarly {
        assert_eq!(evaluated.len(), at + 3);
    }
    let now = trainer.evaluate_blocking().expect("evaluation")["eval_loss"]
        .as_f64()
        .expect("loss");
    assert!((now - best).abs() < 1e-12 * best, "{now} {best}");
    assert!(
        folder
            .path()
            .join(format!("checkpoint-{}", 4 * (at + 1)))
            .exists()
    );
    let again = trainer.evaluate_blocking().expect("evaluation");
    let perplexity = again["eval_perplexity"].as_f64().expect("perplexity");
    assert!((perplexity - best.exp()).abs() < 1e-9);
}

#[test]
fn a_loss_that_is_no_number_is_named_or_left_out() {
    let folder = tempfile::tempdir().expect("folder");
    let wild = json!({"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0.0, "save_steps": 1});
    let error = language_model(folder.path(), changes(wild.clone()))
        .train_blocking()
        .expect_err("diverges");
    assert!(matches!(&error, Error::Diverged { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("data.jsonl: line ") && text.contains("on_nan"),
        "{text}"
    );
    // The checkpoint before it is whole.
    assert!(
        folder
            .path()
            .join("checkpoint-1")
            .join("trainer_state.json")
            .exists()
    );
    let other = tempfile::tempdir().expect("folder");
    let mut skipping = wild;
    skipping["on_nan"] = json!("skip");
    let mut trainer = language_model(other.path(), changes(skipping));
    trainer.train_blocking().expect("training");
    assert!(
        trainer.state().skipped_steps > 10,
        "{}",
        trainer.state().skipped_steps
    );
}

#[test]
fn a_checkpoint_of_another_training_is_an_error() {
    let folder = tempfile::tempdir().expect("folder");
    language_model(folder.path(), changes(json!({"max_steps": 5})))
        .train_blocking()
        .expect("training");
    let error = |more| {
        language_model(folder.path(), changes(more))
            .train_blocking()
            .expect_err("other")
            .to_string()
    };
    let text = error(json!({"per_device_train_batch_size": 2}));
    assert!(
        text.contains("per_device_train_batch_size") && text.contains("checkpoint-5"),
        "{text}"
    );
    let text = error(json!({"optim": "lion"}));
    assert!(text.contains("optimizer state"), "{text}");
    std::fs::write(folder.path().join("checkpoint-5/trainer_state.json"), "{").expect("file");
    let text = error(json!({}));
    assert!(text.contains("trainer_state.json"), "{text}");
}

#[test]
fn a_trained_model_loads_as_any_other() {
    let folder = tempfile::tempdir().expect("folder");
    let name = "text-classification";
    let (files, parameters, options, saver) = open(name);
    let model = AutoModelFor::<SequenceClassification>::from_files(&files, &options).expect("model");
    let given = Given { classes: true };
    let data = dataset(
        &fixture(name).join("data.jsonl"),
        &given,
        &folder.path().join("cache"),
    );
    let task =
        TextTask::new(Arc::new(given), &AutoConfig::from_files(&files).expect("config")).expect("task");
    let task: HeadTask<SequenceClassification> = task.with_head();
    let trained = Trained {
        model,
        parameters,
        saver: Box::new(saver),
    };
    let changes =
        json!({"max_steps": 30, "save_strategy": "no", "eval_strategy": "epoch", "learning_rate": 3e-3});
    let arguments = arguments(name, folder.path(), changes);
    let mut trainer = Trainer::new(arguments, task, trained, data.clone(), Some(data)).expect("trainer");
    trainer.train_blocking().expect("training");
    let before = trainer.evaluate_blocking().expect("evaluation");
    assert!(
        before["eval_accuracy"].as_f64().expect("accuracy") > 0.4,
        "{before:?}"
    );
    let target = folder.path().join("model");
    trainer.save_model_blocking(&target).expect("saved");
    let files = oxiformers_hub::ModelFiles::from_dir(&target).expect("saved");
    AutoModelFor::<SequenceClassification>::from_files(&files, &LoadOptions::default()).expect("saved");
}
