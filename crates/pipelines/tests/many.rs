//! Many texts of mixed lengths: each is answered as Python answers it, and in any batch and order as alone.

mod common;

use common::{cases, difference, load, run};
use serde_json::{Value, json};

const WORDS: [&str; 12] = [
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

/// Texts of 0 to 40 words, none like the other but for those of no words; `fixtures/common.py` makes the same.
fn texts(count: usize) -> Vec<String> {
    let text = |index: usize| {
        let word = |place: usize| WORDS[(index * 7 + place * place * 3 + place) % WORDS.len()];
        let mut words: Vec<String> = (0..index * 13 % 41)
            .map(|place| word(place).to_string())
            .collect();
        if !words.is_empty() {
            words.push(index.to_string());
        }
        words.join(" ")
    };
    (0..count).map(text).collect()
}

/// Inputs of a kind.
fn inputs(kind: &str) -> Vec<Value> {
    let some = |text: String| if text.is_empty() { "x".to_string() } else { text };
    let all = texts(1002);
    let groups = all.windows(3);
    let few = texts(200)
        .into_iter()
        .map(|text| text.chars().take(60).collect::<String>());
    let all = all.clone().into_iter().take(1000);
    match kind {
        "text" => all.map(Value::from).collect(),
        "few" => few.map(Value::from).collect(),
        "some" => all.map(|text| some(text).into()).collect(),
        "mask" => all.map(|text| format!("[MASK] {text}").into()).collect(),
        "question" => all
            .map(|text| json!({"question": "Where does Wolfgang live?", "context": some(text)}))
            .collect(),
        "sentences" => groups
            .map(|group| json!({"source_sentence": group[0], "sentences": group[1..]}))
            .collect(),
        "documents" => groups
            .map(|group| json!({"query": group[0], "documents": group[1..]}))
            .collect(),
        kind => panic!("{kind}"),
    }
}

/// `fingerprint` of `fixtures/common.py`.
fn fingerprint(answer: &Value) -> (u32, usize, f64) {
    fn walk(x: &Value, strings: &mut Vec<String>, numbers: &mut Vec<f64>) {
        match x {
            Value::Object(fields) => fields.iter().for_each(|(key, value)| {
                strings.push(key.clone());
                walk(value, strings, numbers);
            }),
            Value::Array(values) => values.iter().for_each(|value| walk(value, strings, numbers)),
            Value::String(text) => strings.push(text.clone()),
            Value::Number(number) => numbers.extend(number.as_f64()),
            Value::Null | Value::Bool(_) => {}
        }
    }
    let (mut strings, mut numbers) = (Vec::new(), Vec::new());
    walk(answer, &mut strings, &mut numbers);
    let hash = |digest: u32, byte: u8| (digest ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    let digest = strings.join("\n").bytes().fold(0x811C_9DC5, hash);
    let weighted = numbers.iter().enumerate().map(|(i, x)| x * (1 + i % 5) as f64);
    (
        digest,
        numbers.len(),
        weighted.sum::<f64>() / numbers.len().max(1) as f64,
    )
}

fn as_python(name: &str) {
    for case in cases(name) {
        let text = |field: &str| case[field].as_str().unwrap();
        let inputs = inputs(text("inputs"));
        let pipeline = load(text("task"), text("model"), text("tokenizer"));
        let alone = run(&pipeline, &inputs, &case["options"], 1);
        let theirs = case["outputs"].as_array().unwrap();
        assert_eq!(alone.len(), theirs.len());
        let mut wrong = Vec::new();
        for (index, (ours, theirs)) in alone.iter().zip(theirs).enumerate() {
            let (digest, count, mean) = fingerprint(ours);
            let expected = theirs[2].as_f64().unwrap();
            let near = (mean - expected).abs() <= 1e-4 * expected.abs().max(1.0);
            if !near || json!([digest, count]) != json!([theirs[0], theirs[1]]) {
                wrong.push(format!("{index}: {:?} is {ours}, theirs {theirs}", inputs[index]));
            }
        }
        let few = wrong[..wrong.len().min(5)].join("\n");
        assert!(
            wrong.is_empty(),
            "{}: {} differ:\n{few}",
            text("task"),
            wrong.len()
        );

        let backwards: Vec<Value> = inputs.iter().rev().cloned().collect();
        for (inputs, batch_size) in [(&inputs, 7), (&inputs, 64), (&backwards, 33), (&inputs, 2000)] {
            let mut together = run(&pipeline, inputs, &case["options"], batch_size);
            if std::ptr::eq(inputs, &backwards) {
                together.reverse();
            }
            for (index, (a, b)) in together.iter().zip(&alone).enumerate() {
                let place = format!("{}, input {index}, batch {batch_size}", text("task"));
                assert_eq!(difference(a, b, 1e-5, &place), None);
            }
        }
    }
}

#[test]
fn of_transformers() {
    as_python("many");
}

#[test]
fn of_tasks_that_transformers_had() {
    as_python("many_v4");
}

#[test]
fn of_sentence_transformers() {
    as_python("many_sentences");
}
