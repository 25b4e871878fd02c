//! `oxiformers tokenizer train`, `train` and `evaluate`, from a text to a model that generates.

use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::Command;
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use serde_json::Value;

fn oxiformers(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oxiformers"));
    command.current_dir(folder).env("OXIFORMERS_THREADS", "2");
    command
}

/// A corpus, a tokenizer and a recipe.
fn begin(folder: &Path) {
    let lines = (0..300).map(|i| {
        format!(
            "The {} fox number {} jumps over the lazy dog.\n",
            ["quick", "slow"][i % 2],
            i % 7
        )
    });
    std::fs::write(folder.join("corpus.txt"), lines.collect::<String>()).expect("corpus");
    let recipe = r#"
        task = "causal-lm"
        [model]
        tokenizer = "tokenizer"
        [model.config]
        model_type = "gpt2"
        n_embd = 32
        n_layer = 2
        n_head = 2
        n_positions = 64
        [data]
        train = "corpus.txt"
        eval_split = 0.1
        block_size = 16
        packing = true
        [training]
        output_dir = "out"
        per_device_train_batch_size = 4
        learning_rate = 1e-2
        logging_steps = 2
        eval_strategy = "steps"
        eval_steps = 4
        save_steps = 4
        report_to = ["tensorboard"]
    "#;
    std::fs::write(folder.join("recipe.toml"), recipe).expect("recipe");
    oxiformers(folder)
        .args([
            "tokenizer",
            "train",
            "corpus.txt",
            "--vocab-size",
            "300",
            "--output",
            "tokenizer",
        ])
        .assert()
        .success()
        .stdout(contains("300 texts"));
}

fn logs(folder: &Path, name: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(folder.join("out/metrics.jsonl")).unwrap_or_default();
    let line = |line: &str| serde_json::from_str::<Value>(line).ok()?.get(name)?.as_f64();
    text.lines().filter_map(line).collect()
}

#[test]
fn from_a_text_to_a_model() {
    let root = tempfile::tempdir().expect("folder");
    let folder = root.path();
    begin(folder);
    let dry = oxiformers(folder)
        .args(["train", "--dry-run", "recipe.toml"])
        .assert()
        .success();
    dry.stdout(
        contains("parameters: ")
            .and(contains("steps: "))
            .and(contains("s per step")),
    );
    assert!(!folder.join("out/model.safetensors").exists());
    oxiformers(folder)
        .args(["train", "recipe.toml", "--max-steps", "10"])
        .assert()
        .success()
        .stderr(contains("step 10"));
    let losses = logs(folder, "loss");
    assert_eq!(losses.len(), 5);
    assert!(losses[4] < losses[0], "{losses:?}");
    assert_eq!(logs(folder, "eval_perplexity").len(), 2);
    let card = std::fs::read_to_string(folder.join("out/README.md")).expect("card");
    assert!(
        card.contains("| max_steps | 10 |") && card.contains("loss.svg"),
        "{card}"
    );
    assert!(
        std::fs::read_to_string(folder.join("out/loss.svg"))
            .expect("curve")
            .contains("<polyline")
    );
    assert_eq!(
        std::fs::read_dir(folder.join("out/runs"))
            .expect("events")
            .count(),
        1
    );
    // What comes out is a model as any other.
    oxiformers(folder)
        .args([
            "generate",
            "out",
            "--prompt",
            "The quick",
            "--max-new-tokens",
            "3",
            "--greedy",
        ])
        .assert()
        .success();
    let evaluated = oxiformers(folder)
        .args(["evaluate", "--json", "recipe.toml", "--model.name", "out"])
        .assert()
        .success();
    let evaluated: Value = serde_json::from_slice(&evaluated.get_output().stdout).expect("JSON");
    let loss = evaluated["eval_loss"].as_f64().expect("loss");
    assert!(loss < losses[0], "{evaluated}");
}

#[test]
fn a_signal_saves_and_stops_and_resume_goes_on() {
    let root = tempfile::tempdir().expect("folder");
    let folder = root.path();
    begin(folder);
    let arguments = [
        "train",
        "recipe.toml",
        "--max-steps",
        "400",
        "--save-steps",
        "1000",
        "--eval-strategy",
        "no",
    ];
    let child = Process::new(env!("CARGO_BIN_EXE_oxiformers"))
        .args(arguments)
        .current_dir(folder)
        .stderr(Stdio::null())
        .spawn();
    let mut child = child.expect("child");
    let began = Instant::now();
    while logs(folder, "loss").is_empty() && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let kill = Process::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status();
    assert!(kill.expect("kill").success());
    assert!(child.wait().expect("child").success());
    let saved: Vec<_> = std::fs::read_dir(folder.join("out"))
        .expect("out")
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            Some(name.strip_prefix("checkpoint-")?.parse::<u64>().expect("step"))
        })
        .collect();
    assert_eq!(saved.len(), 1, "{saved:?}");
    let steps = (saved[0] + 3).to_string();
    oxiformers(folder)
        .args([
            "train",
            "--resume",
            "recipe.toml",
            "--max-steps",
            &steps,
            "--eval-strategy",
            "no",
        ])
        .assert()
        .success()
        .stderr(contains(format!("from step {}", saved[0])));
}

/// A recipe with this task for a model that [`begin`] has trained a tokenizer for.
fn preference(folder: &Path, task: &str, objective: &str) {
    let recipe = format!(
        r#"
        task = "{task}"
        [model]
        tokenizer = "tokenizer"
        [model.config]
        model_type = "llama"
        hidden_size = 32
        intermediate_size = 64
        num_hidden_layers = 2
        num_attention_heads = 2
        max_position_embeddings = 64
        [data]
        train = "records.jsonl"
        [objective]
        {objective}
        [training]
        output_dir = "out"
        max_steps = 4
        per_device_train_batch_size = 4
        learning_rate = 1e-2
        logging_steps = 1
        save_strategy = "no"
        "#
    );
    std::fs::write(folder.join("recipe.toml"), recipe).expect("recipe");
}

#[test]
fn preferences_and_rewards() {
    let root = tempfile::tempdir().expect("folder");
    let folder = root.path();
    begin(folder);
    let records: String = (0..8)
        .map(|i| {
            format!(
                "{{\"prompt\": \"The fox \", \"chosen\": \"jumps {i}\", \"rejected\": \"sleeps\", \"answer\": \"dog\"}}\n"
            )
        })
        .collect();
    std::fs::write(folder.join("records.jsonl"), records).expect("records");
    preference(folder, "dpo", "beta = 0.2");
    let train = |more: &[&str]| {
        oxiformers(folder)
            .args(["train", "recipe.toml"])
            .args(more)
            .assert()
    };
    train(&["--loss-type", "ipo"]).success();
    assert_eq!(logs(folder, "rewards/margins").len(), 4);
    train(&["--precompute-ref-log-probs"])
        .success()
        .stdout(contains("4 steps"));
    let margins = logs(folder, "rewards/margins");
    assert!(margins[3] > margins[0] && margins[0].abs() < 1e-5, "{margins:?}");
    assert!(folder.join("out/model.safetensors").exists());
    train(&["--num-generations", "4"])
        .failure()
        .stderr(contains("num_generations"));
    let rewards = r#"
        num_generations = 4
        max_completion_length = 6
        rewards = [{ type = "contains", column = "answer" }, { type = "length", target = 3 }]
    "#;
    preference(folder, "grpo", rewards);
    train(&["--eval-split", "0.5", "--eval-strategy", "epoch"]).success();
    for name in [
        "reward",
        "rewards/contains/mean",
        "rewards/length/std",
        "eval_reward",
    ] {
        assert!(!logs(folder, name).is_empty(), "{name}");
    }
    train(&["--per-device-train-batch-size", "6"])
        .failure()
        .stderr(contains("per_device_train_batch_size").and(contains("multiple")));
}

#[test]
fn what_is_wrong_is_named() {
    let root = tempfile::tempdir().expect("folder");
    let folder = root.path();
    begin(folder);
    let mut lines: Vec<String> = (0..50)
        .map(|i| format!("{{\"text\": \"the dog {i}\", \"label\": {}}}", i % 2))
        .collect();
    lines[41] = "{\"text\": \"the dog\", \"label\": 7}".to_string();
    std::fs::write(folder.join("labelled.jsonl"), lines.join("\n")).expect("data");
    let classify = |more: &[&str]| {
        let mut command = oxiformers(folder);
        command.args([
            "train",
            "recipe.toml",
            "--task",
            "text-classification",
            "--data.train",
            "labelled.jsonl",
        ]);
        command.args([
            "--model.labels",
            "[\"no\", \"yes\"]",
            "--max-steps",
            "2",
            "--output-dir",
            "classifier",
        ]);
        command.args(more);
        command.assert()
    };
    classify(&[])
        .failure()
        .stderr(contains("labelled.jsonl: line 42").and(contains("out of range")));
    classify(&["--bad-data", "skip", "--eval-strategy", "no"]).success();
    assert!(folder.join("classifier/model.safetensors").exists());
    oxiformers(folder)
        .args(["train", "recipe.toml", "--learning-rat", "1"])
        .assert()
        .failure()
        .stderr(contains("learning_rat"));
    oxiformers(folder)
        .args(["train", "recipe.toml", "--optim", "adagrad"])
        .assert()
        .failure()
        .stderr(contains("optim"));
}

/// `oxiformers train recipe.toml` on other data, with more arguments.
fn train_on(folder: &Path, data: &str, more: &[&str]) -> assert_cmd::assert::Assert {
    let mut command = oxiformers(folder);
    command.args([
        "train",
        "recipe.toml",
        "--data.train",
        data,
        "--eval-strategy",
        "no",
    ]);
    command
        .args(["--max-steps", "1", "--output-dir", "other"])
        .args(more);
    command.assert()
}

#[test]
fn a_broken_record_is_named_wherever_it_stands() {
    let root = tempfile::tempdir().expect("folder");
    let folder = root.path();
    begin(folder);
    let mut lines: Vec<String> = (0..70_010)
        .map(|i| format!("{{\"text\": \"the dog {}\"}}", i % 50))
        .collect();
    lines[69_999] = "{\"text\": \"the d".to_string();
    std::fs::write(folder.join("long.jsonl"), lines.join("\n")).expect("data");
    train_on(folder, "long.jsonl", &[])
        .failure()
        .stderr(contains("long.jsonl: line 70000").and(contains("JSON")));
    assert!(!folder.join("other/model.safetensors").exists());
    train_on(folder, "long.jsonl", &["--bad-data", "skip"])
        .success()
        .stderr(contains("long.jsonl: line 70000").and(contains("1 record left out")));
}

#[test]
fn a_text_without_tokens_is_named() {
    let root = tempfile::tempdir().expect("folder");
    let folder = root.path();
    begin(folder);
    let line = |i: usize| match i {
        2 | 7 => "{\"text\": \"\"}".to_string(),
        _ => format!("{{\"text\": \"the quick fox jumps over dog {i}\"}}"),
    };
    let lines: Vec<String> = (0..60).map(line).collect();
    std::fs::write(folder.join("empty.jsonl"), lines.join("\n")).expect("data");
    train_on(folder, "empty.jsonl", &[])
        .failure()
        .stderr(contains("empty.jsonl: line 3").and(contains("no tokens")));
    train_on(folder, "empty.jsonl", &["--bad-data", "skip"])
        .success()
        .stderr(contains("empty.jsonl: line 8").and(contains("2 records left out")));
}

#[test]
fn a_loss_that_is_no_number_names_its_batch() {
    let root = tempfile::tempdir().expect("folder");
    let folder = root.path();
    begin(folder);
    let wild = [
        "--learning-rate",
        "1e30",
        "--max-grad-norm",
        "0",
        "--max-steps",
        "6",
    ];
    train_on(folder, "corpus.txt", &wild)
        .failure()
        .stderr(contains("corpus.txt: line ").and(contains("on_nan")));
    let skipping = [&wild[..], &["--on-nan", "skip"]].concat();
    train_on(folder, "corpus.txt", &skipping)
        .success()
        .stderr(contains("left out: step ").and(contains("corpus.txt: line ")));
}
