//! Every task against what Python answers on tiny models (`fixtures/make.py`, `make_v4.py`, `make_sentences.py`).

use std::path::{Path, PathBuf};

use futures::executor::block_on;
use oxiformers_hub::ModelFiles;
use oxiformers_nn::LoadOptions;
use oxiformers_pipelines::{AnyPipeline, Task};
use serde_json::{Value, json};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

/// A model with a tokenizer.
fn files(model: &str, tokenizer: &str) -> ModelFiles {
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

fn load(task: &str, model: &str, tokenizer: &str) -> AnyPipeline {
    AnyPipeline::from_files(task, &files(model, tokenizer), &LoadOptions::default()).unwrap()
}

fn run(pipeline: &AnyPipeline, inputs: &[Value], options: &Value, batch_size: usize) -> Vec<Value> {
    block_on(pipeline.run(inputs, options, batch_size)).unwrap()
}

/// Where two answers differ: other keys or another order of them, other texts, or numbers further apart.
fn difference(ours: &Value, theirs: &Value, tolerance: f64, place: &str) -> Option<String> {
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

fn golden(task: Task) {
    let path = format!("{FIXTURES}/golden/{task}.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 1);
    let mut wrong = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let (model, tokenizer) = (
            case["model"].as_str().unwrap(),
            case["tokenizer"].as_str().unwrap(),
        );
        let name = match (task, model) {
            (Task::Translation, "t5") => "translation_en_to_de",
            _ => task.name(),
        };
        let pipeline = load(name, model, tokenizer);
        let inputs = case["inputs"].as_array().unwrap();
        for batch_size in [1, 3, 64] {
            let outputs = block_on(pipeline.run(inputs, &case["options"], batch_size));
            let outputs = outputs.unwrap_or_else(|error| panic!("case {number}, {model}: {error}"));
            for (index, output) in outputs.iter().enumerate() {
                let place = format!(
                    "case {number}, {model}, {}, input {index}, batch {batch_size}",
                    case["options"]
                );
                wrong.extend(difference(output, &case["outputs"][index], 1e-4, &place));
            }
            assert_eq!(outputs.len(), case["outputs"].as_array().unwrap().len());
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differ:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(20)].join("\n")
    );
}

macro_rules! golden {
    ($($test:ident: $task:ident;)+) => {$(
        #[test]
        fn $test() {
            golden(Task::$task);
        }
    )+};
}

golden! {
    feature_extraction: FeatureExtraction;
    text_classification: TextClassification;
    token_classification: TokenClassification;
    question_answering: QuestionAnswering;
    fill_mask: FillMask;
    zero_shot_classification: ZeroShotClassification;
    text_generation: TextGeneration;
    text2text_generation: Text2TextGeneration;
    summarization: Summarization;
    translation: Translation;
    sentence_similarity: SentenceSimilarity;
    embeddings: Embeddings;
    reranking: Reranking;
}

/// Texts of 0 to 40 words, none like the other.
fn texts(count: usize) -> Vec<Value> {
    let words = [
        "Wolfgang",
        "lives",
        "in",
        "Berlin",
        "😀",
        "the",
        "unbelievable",
        "café",
        "fox",
        "日本語",
        "and",
        "!",
    ];
    let text = |index: usize| {
        let word = |place: usize| words[(index * 7 + place * place * 3 + place) % words.len()];
        (0..index * 13 % 41).map(word).collect::<Vec<_>>().join(" ")
    };
    (0..count).map(|index| text(index).into()).collect()
}

#[test]
fn a_batch_answers_as_each_alone() {
    let cases = [
        (
            "text-classification",
            "distilbert-moods",
            "wordpiece",
            json!({"top_k": null, "truncation": true}),
        ),
        (
            "token-classification",
            "roberta-ner",
            "bytes",
            json!({"aggregation_strategy": "average", "stride": 16}),
        ),
        ("embeddings", "bert", "wordpiece", Value::Null),
    ];
    let texts = texts(1000);
    let backwards: Vec<Value> = texts.iter().rev().cloned().collect();
    for (task, model, tokenizer, options) in cases {
        let pipeline = load(task, model, tokenizer);
        let alone = run(&pipeline, &texts, &options, 1);
        assert_eq!(alone.len(), 1000);
        for (inputs, batch_size) in [(&texts, 7), (&texts, 64), (&backwards, 33), (&texts, 2000)] {
            let mut together = run(&pipeline, inputs, &options, batch_size);
            if std::ptr::eq(inputs, &backwards) {
                together.reverse();
            }
            for (index, (a, b)) in together.iter().zip(&alone).enumerate() {
                let place = format!("{task}, text {index}, batch {batch_size}");
                assert_eq!(difference(a, b, 1e-5, &place), None);
            }
        }
    }
}

#[test]
fn offsets_are_characters_of_the_text() {
    let text = "😀 Wolfgang lebt 👨‍👩‍👧 in 🇫🇷 Berlin";
    let pipeline = load("ner", "bert-ner", "wordpiece");
    let options = json!({"aggregation_strategy": "simple", "ignore_labels": []});
    let answers = run(&pipeline, &[text.into()], &options, 1);
    let characters: Vec<char> = text.chars().collect();
    let mut seen = String::new();
    for entity in answers[0].as_array().unwrap() {
        let place = |name: &str| entity[name].as_u64().unwrap() as usize;
        seen.extend(&characters[place("start")..place("end")]);
    }
    let without_spaces = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
    assert_eq!(without_spaces(&seen), without_spaces(text));
}

#[test]
fn what_does_not_fit_is_named() {
    let fails = |task: &str, model: &str, tokenizer: &str, inputs: Value, options: Value, message: &str| {
        let pipeline = load(task, model, tokenizer);
        let error = block_on(pipeline.run(inputs.as_array().unwrap(), &options, 2))
            .unwrap_err()
            .to_string();
        assert!(error.contains(message), "{task}: {error}");
    };
    let long = "Wolfgang ".repeat(100);
    let classify = |inputs, options, message: &str| {
        fails(
            "text-classification",
            "distilbert-moods",
            "wordpiece",
            inputs,
            options,
            message,
        );
    };
    classify(json!(["short", long]), Value::Null, "input 1: has");
    classify(
        json!(["short", long]),
        Value::Null,
        "takes 64; shorten it, or have it cut with the option `truncation`",
    );
    classify(json!([5]), Value::Null, "input 0");
    classify(json!(["x"]), json!({"top_k": 0}), "top_k");
    classify(json!(["x"]), json!({"top_q": 1}), "top_q");
    classify(json!(["x"]), json!({"function_to_apply": "magic"}), "magic");
    let ner = |inputs, options, message: &str| {
        fails("ner", "bert-ner", "wordpiece", inputs, options, message);
    };
    ner(json!([long]), Value::Null, "stride");
    ner(json!(["x"]), json!({"stride": 8}), "aggregation_strategy");
    ner(
        json!([long]),
        json!({"stride": 80, "aggregation_strategy": "simple"}),
        "stride",
    );
    let ask = |input, options, message: &str| {
        fails(
            "question-answering",
            "bert-qa",
            "wordpiece",
            json!([input]),
            options,
            message,
        );
    };
    ask(
        json!({"question": "", "context": "x"}),
        Value::Null,
        "`question` is empty",
    );
    ask(
        json!({"question": "x", "context": ""}),
        Value::Null,
        "`context` is empty",
    );
    ask(json!({"question": "x"}), Value::Null, "context");
    ask(
        json!({"question": long, "context": "x y"}),
        Value::Null,
        "input 0",
    );
    ask(
        json!({"question": "x", "context": "x"}),
        json!({"max_seq_len": 4000}),
        "max_seq_len",
    );
    ask(
        json!({"question": "x", "context": "x"}),
        json!({"doc_stride": 65}),
        "doc_stride",
    );
    ask(
        json!({"question": "x", "context": "x"}),
        json!({"top_k": 0}),
        "top_k",
    );
    let fill = |input: &str, options, message: &str| {
        fails(
            "fill-mask",
            "bert-mask",
            "wordpiece",
            json!([input]),
            options,
            message,
        );
    };
    fill("nothing to fill", Value::Null, "[MASK]");
    fill("[MASK]", json!({"targets": []}), "targets");
    let judge = |options, message: &str| {
        fails(
            "zero-shot-classification",
            "bert-nli",
            "wordpiece",
            json!(["x"]),
            options,
            message,
        );
    };
    judge(Value::Null, "candidate_labels");
    judge(
        json!({"candidate_labels": ["a"], "hypothesis_template": "no place"}),
        "hypothesis_template",
    );
    fails(
        "text-generation",
        "llama",
        "chat",
        json!(["x"]),
        json!({"max_new_tokns": 1}),
        "max_new_tokns",
    );
    fails(
        "text-generation",
        "llama",
        "chat",
        json!([long.repeat(2)]),
        Value::Null,
        "takes 128",
    );
    fails(
        "summarization",
        "bart",
        "bytes",
        json!([long]),
        Value::Null,
        "truncation",
    );
    fails(
        "translation",
        "t5",
        "unigram",
        json!(["x"]),
        json!({"src_lang": "en"}),
        "tgt_lang",
    );
    fails(
        "reranking",
        "bert-rank",
        "wordpiece",
        json!([{"query": "x", "documents": ["y", long]}]),
        Value::Null,
        "document 1",
    );

    let refuses = |task: &str, model: &str, tokenizer: &str, message: &str| {
        let error =
            AnyPipeline::from_files(task, &files(model, tokenizer), &LoadOptions::default()).unwrap_err();
        assert!(error.to_string().contains(message), "{task}: {error}");
    };
    refuses("sing", "bert", "wordpiece", "sentiment-analysis");
    refuses("translation_en", "bert", "wordpiece", "translation_xx_to_yy");
    refuses("text-classification", "bert-ner", "wordpiece", "head");
    refuses("fill-mask", "bert-ner", "wordpiece", "BertForTokenClassification");
    refuses("fill-mask", "bert-mask", "unigram", "mask_token");
    refuses("reranking", "distilbert-moods", "wordpiece", "3 labels");
    refuses("summarization", "llama", "chat", "encoder-decoder");
}

#[test]
fn tasks_have_names_and_models() {
    for task in Task::ALL {
        assert_eq!(Task::parse(task.name()).unwrap(), *task);
        assert!(task.default_model().contains('/'));
    }
    assert_eq!(
        Task::parse("sentiment-analysis").unwrap(),
        Task::TextClassification
    );
    assert_eq!(Task::parse("ner").unwrap(), Task::TokenClassification);
    assert_eq!(Task::parse("translation_en_to_fr").unwrap(), Task::Translation);
}
