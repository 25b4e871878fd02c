//! Batches are those of Transformers' collators (`fixtures/make_collators.py`).

use std::path::Path;

use oxiformers_data::tasks::causal_lm::{CausalLM, Source};
use oxiformers_data::tasks::denoising::Denoising;
use oxiformers_data::tasks::masked_lm::{MaskOptions, MaskedLM};
use oxiformers_data::tasks::multiple_choice::MultipleChoice;
use oxiformers_data::tasks::question_answering::QuestionAnswering;
use oxiformers_data::tasks::seq2seq::Seq2Seq;
use oxiformers_data::tasks::text_classification::{Problem, TextClassification};
use oxiformers_data::tasks::token_classification::TokenClassification;
use oxiformers_data::tasks::{Batch, Draw, IGNORED, Objective, Row, Targets, Texts};
use oxiformers_data::{Example, Preprocessor};
use oxiformers_hub::ModelFiles;
use oxiformers_processors::{ChatTemplate, Tokenizer};
use serde_json::{Value, json};

const DRAW: Draw = Draw { seed: 42, epoch: 0 };

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/collators")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_files(&ModelFiles::from_dir(&folder()).expect("files")).expect("tokenizer")
}

fn texts(max_length: Option<usize>, multiple_of: Option<usize>) -> Texts {
    Texts::new(tokenizer(), max_length, multiple_of).expect("texts")
}

fn case(name: &str) -> Value {
    let text = std::fs::read_to_string(folder().join("cases.json")).expect("cases");
    let mut cases: Value = serde_json::from_str(&text).expect("cases");
    cases[name].take()
}

fn examples(objective: &dyn Objective, case: &Value) -> Vec<Example> {
    let records = case["records"].as_array().expect("records");
    let examples = records
        .iter()
        .flat_map(|record| objective.examples(record).expect("examples"));
    examples.collect()
}

fn rows(examples: Vec<Example>) -> Vec<Row> {
    let row = |(example, index)| Row { index, example };
    examples.into_iter().zip(0..).map(row).collect()
}

fn batch(objective: &dyn Objective, case: &Value) -> Batch {
    objective.collate(&rows(examples(objective, case)), DRAW)
}

/// The batch has what Python's has, and no types where these are all 0.
fn same(batch: &Batch, expected: &Value) {
    assert_eq!(json!(batch.input_ids), expected["input_ids"]);
    assert_eq!(json!(batch.attention_mask()), expected["attention_mask"]);
    if let Some(types) = expected.get("token_type_ids") {
        let zeros = vec![vec![0; batch.dims()[1]]; batch.dims()[0]];
        let found = if batch.token_type_ids.is_empty() {
            &zeros
        } else {
            &batch.token_type_ids
        };
        assert_eq!(json!(found), *types);
    }
    let labels = match &batch.labels {
        Targets::Tokens(labels) => json!(labels),
        Targets::Classes(labels) => json!(labels),
        Targets::Numbers(numbers) => json!(numbers.iter().map(|row| row[0]).collect::<Vec<_>>()),
        Targets::Spans { .. } => panic!("spans"),
    };
    assert_eq!(labels, expected["labels"]);
}

fn classification(
    texts: Texts,
    columns: [&str; 2],
    pair: Option<&str>,
    problem: Problem,
) -> TextClassification {
    TextClassification {
        texts,
        text_column: columns[0].into(),
        pair_column: pair.map(Into::into),
        label_column: columns[1].into(),
        problem,
    }
}

#[test]
fn text_classification() {
    let case = case("text_classification");
    let labels = ["no".to_string(), "yes".to_string()];
    let problem = Problem::SingleLabel(labels.to_vec());
    let task = classification(texts(None, None), ["text", "label"], None, problem);
    same(&batch(&task, &case), &case["batch"]);
    let error = |record: Value| task.examples(&record).expect_err("bad record");
    assert_eq!(
        error(json!({"text": "a", "label": 7})),
        "`label`: the label 7 is out of range: there are 2 labels, from 0"
    );
    assert_eq!(
        error(json!({"text": "", "label": 1})),
        "`text` is a text with no tokens"
    );
    assert_eq!(
        error(json!({"texts": "a", "label": 1})),
        "has no `text`; it has `texts`, `label`"
    );

    let problem = Problem::MultiLabel(labels.to_vec());
    let task = classification(texts(None, None), ["text", "label"], None, problem);
    let example = task
        .examples(&json!({"text": "a", "label": ["yes"]}))
        .expect("example");
    let batch = task.collate(&rows(example), DRAW);
    assert_eq!(batch.labels, Targets::Numbers(vec![vec![0.0, 1.0]]));
}

#[test]
fn numbers_of_pairs() {
    let case = case("regression_of_pairs");
    let length = case["max_length"].as_u64().map(|length| length as usize);
    let task = classification(
        texts(length, Some(8)),
        ["a", "score"],
        Some("b"),
        Problem::Regression(1),
    );
    same(&batch(&task, &case), &case["batch"]);
    let bad = task.examples(&json!({"a": "a", "b": "cat", "score": "NaN"}));
    assert!(bad.expect_err("NaN").contains("not a number"));
}

#[test]
fn token_classification() {
    let case = case("token_classification");
    let task = TokenClassification {
        texts: texts(None, None),
        tokens_column: "tokens".into(),
        tags_column: "ner_tags".into(),
        labels: ["O", "X", "Y"].map(String::from).to_vec(),
        label_all_tokens: false,
    };
    same(&batch(&task, &case), &case["batch"]);
    let bad = task.examples(&json!({"tokens": ["a", "cat"], "ner_tags": [0]}));
    assert_eq!(bad.expect_err("lengths"), "has 1 `ner_tags` for 2 `tokens`");
}

#[test]
fn seq2seq() {
    let case = case("seq2seq");
    let texts = texts(Some(10), None);
    let task = Seq2Seq {
        target: texts.tokenizer.clone(),
        texts,
        source_column: "source".into(),
        target_column: "target".into(),
        prefix: "who : ".into(),
        max_target_length: None,
    };
    let mut expected = case["batch"].clone();
    // Python's were cut to six tokens, what ends the text included; ours keep the end.
    expected["labels"][2] = json!([2, 5, 26, 27, 28, 3]);
    let task = Seq2Seq {
        max_target_length: Some(6),
        ..task
    };
    same(&batch(&task, &case), &expected);
}

#[test]
fn multiple_choice() {
    let case = case("multiple_choice");
    let task = MultipleChoice {
        texts: texts(None, None),
        question_column: "question".into(),
        choices: vec!["choices".into()],
        label_column: "label".into(),
    };
    let batch = batch(&task, &case);
    let expected = &case["batch"];
    let rows = |name: &str| -> Vec<Value> {
        let questions = expected[name].as_array().expect("questions").iter();
        questions
            .flat_map(|choices| choices.as_array().expect("choices").clone())
            .collect()
    };
    assert_eq!(batch.num_choices, 2);
    assert_eq!(json!(batch.input_ids), json!(rows("input_ids")));
    assert_eq!(json!(batch.token_type_ids), json!(rows("token_type_ids")));
    assert_eq!(json!(batch.attention_mask()), json!(rows("attention_mask")));
    assert_eq!(batch.labels, Targets::Classes(vec![1, 0]));
}

fn causal(source: Source, padding_free: bool) -> CausalLM {
    CausalLM {
        texts: texts(None, None),
        source,
        append_eos: false,
        padding_free,
    }
}

#[test]
fn causal_lm_and_flattening() {
    let case_padded = case("causal_lm");
    same(
        &batch(&causal(Source::Text("text".into()), false), &case_padded),
        &case_padded["batch"],
    );
    let case = case("flattening");
    let batch = batch(&causal(Source::Text("text".into()), true), &case);
    let expected = &case["batch"];
    assert_eq!(json!(batch.input_ids), expected["input_ids"]);
    assert_eq!(json!(batch.position_ids()), expected["position_ids"]);
    let Targets::Tokens(labels) = &batch.labels else {
        panic!("labels")
    };
    assert_eq!(json!(labels), expected["labels"]);
    assert_eq!(batch.segments[0].last(), Some(&2));
}

#[test]
fn completions() {
    let task = causal(
        Source::Completion {
            prompt: "prompt".into(),
            completion: "completion".into(),
        },
        false,
    );
    let example = task
        .examples(&json!({"prompt": "who sat ?", "completion": "the cat"}))
        .expect("example");
    let labels = example[0].ints("labels").expect("labels");
    let learned = labels.iter().filter(|label| i64::from(**label) != IGNORED);
    assert_eq!(learned.count(), 2);
    assert_eq!(labels.len(), example[0].tokens());
}

#[test]
fn conversations() {
    let case = case("chat");
    let template = case["template"].as_str().expect("template");
    let learned = |template: &str| {
        let source = Source::Chat {
            messages: "messages".into(),
            template: ChatTemplate::new(template).expect("template"),
        };
        let example = examples(&causal(source, false), &case).remove(0);
        assert_eq!(json!(example.ints("input_ids")), case["input_ids"]);
        let labels = example.ints("labels").expect("labels").iter();
        let mask: Vec<u32> = labels
            .map(|label| u32::from(i64::from(*label) != IGNORED))
            .collect();
        mask
    };
    assert_eq!(json!(learned(template)), case["assistant_masks"]);
    // A template that does not say where the assistant speaks gives the same.
    let silent = template
        .replace("{% generation %}", "")
        .replace("{% endgeneration %}", "");
    assert_eq!(json!(learned(&silent)), case["assistant_masks"]);
}

#[test]
fn masked_lm() {
    let expected = case("masked_lm");
    let options = |probability, whole_word_mask| MaskOptions {
        mlm_probability: probability,
        mask_replace_prob: 1.0,
        random_replace_prob: 0.0,
        whole_word_mask,
    };
    let task = |options| MaskedLM::new(texts(None, None), "text", options).expect("task");
    same(&batch(&task(options(1.0, false)), &expected), &expected["batch"]);
    // Whole words too, where all are hidden.
    same(&batch(&task(options(1.0, true)), &expected), &expected["batch"]);

    let words = case("whole_words");
    let task = task(options(0.4, true));
    let examples = examples(&task, &words);
    for (example, ids) in examples.iter().zip(words["word_ids"].as_array().expect("ids")) {
        let mut word = 0;
        let starts = example.ints("word_starts").expect("starts");
        let ids: Vec<i64> = ids
            .as_array()
            .expect("row")
            .iter()
            .filter_map(Value::as_i64)
            .collect();
        for (start, id) in starts.iter().zip(&ids) {
            word += i64::from(*start);
            assert!(*id == -1 || *id == word, "{starts:?} {ids:?}");
        }
    }
    // Tokens of one word are hidden together.
    let batch = task.collate(&rows(examples), DRAW);
    let Targets::Tokens(labels) = &batch.labels else {
        panic!("labels")
    };
    for (labels, ids) in labels.iter().zip(words["word_ids"].as_array().expect("ids")) {
        let ids: Vec<i64> = ids
            .as_array()
            .expect("row")
            .iter()
            .filter_map(Value::as_i64)
            .collect();
        for at in 1..ids.len() {
            let same_word = ids[at] == ids[at - 1] && ids[at] != -1;
            assert!(!same_word || (labels[at] == IGNORED) == (labels[at - 1] == IGNORED));
        }
    }
}

#[test]
fn shares_of_masked_tokens() {
    let task = MaskedLM::new(texts(None, None), "text", MaskOptions::default()).expect("task");
    let text = "the quick brown fox ".repeat(2000);
    let rows = rows(task.examples(&json!({ "text": text })).expect("example"));
    let batch = task.collate(&rows, DRAW);
    assert_eq!(batch, task.collate(&rows, DRAW));
    assert_ne!(batch, task.collate(&rows, Draw { epoch: 1, ..DRAW }));
    let Targets::Tokens(labels) = &batch.labels else {
        panic!("labels")
    };
    let hidden: Vec<_> = (labels[0].iter().zip(&batch.input_ids[0]))
        .filter(|(label, _)| **label != IGNORED)
        .collect();
    let share = |count: usize, of: usize| count as f64 / of as f64;
    let masked = hidden.iter().filter(|(_, id)| **id == 4).count();
    let kept = hidden
        .iter()
        .filter(|(label, id)| **label == i64::from(**id))
        .count();
    assert!(
        (share(hidden.len(), 8000) - 0.15).abs() < 0.012,
        "{}",
        hidden.len()
    );
    assert!((share(masked, hidden.len()) - 0.8).abs() < 0.04, "{masked}");
    // A random token may be the token itself.
    assert!(
        (share(kept, hidden.len()) - 0.1 - 0.1 / 30.0).abs() < 0.04,
        "{kept}"
    );
}

#[test]
fn question_answering() {
    let case = case("question_answering");
    let task = QuestionAnswering {
        texts: texts(Some(16), None),
        doc_stride: 4,
        question_column: "question".into(),
        context_column: "context".into(),
        answers_column: "answers".into(),
    };
    let windows = examples(&task, &case);
    let expected = case["windows"].as_array().expect("windows");
    assert_eq!(windows.len(), expected.len());
    for (window, expected) in windows.iter().zip(expected) {
        assert_eq!(json!(window.ints("input_ids")), expected["input_ids"]);
        assert_eq!(json!(window.ints("token_type_ids")), expected["token_type_ids"]);
        assert_eq!(
            json!(window.ints("start_positions")),
            json!([expected["start_positions"]])
        );
        assert_eq!(
            json!(window.ints("end_positions")),
            json!([expected["end_positions"]])
        );
    }
    let wrong =
        json!({"question": "who", "context": "a cat", "answers": {"text": ["cat"], "answer_start": [1]}});
    assert!(
        task.examples(&wrong)
            .expect_err("place")
            .contains("does not stand at character 1")
    );
}

#[test]
fn what_a_tokenizer_lacks_is_named() {
    let error = Denoising::spans(texts(None, None), "text", 0.15, 3.0).expect_err("sentinels");
    assert!(error.to_string().contains("<extra_id_0>"), "{error}");
    let wrong = MaskOptions {
        mask_replace_prob: 0.95,
        ..MaskOptions::default()
    };
    assert!(MaskedLM::new(texts(None, None), "text", wrong).is_err());
    assert!(Denoising::infilling(texts(None, None), "text", 1.5, 3.0).is_err());
    let task = Denoising::infilling(texts(None, None), "text", 0.3, 3.0).expect("task");
    let rows = rows(
        task.examples(&json!({"text": "the quick brown fox jumps over the lazy dog"}))
            .expect("row"),
    );
    let batch = task.collate(&rows, DRAW);
    let Targets::Tokens(labels) = &batch.labels else {
        panic!("labels")
    };
    assert_eq!(labels[0].len(), rows[0].example.tokens());
    assert!(batch.input_ids[0].contains(&4));
}
