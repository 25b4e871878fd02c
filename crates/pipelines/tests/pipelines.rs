//! Every task against what Python answers on tiny models (`fixtures/make*.py`).

mod common;

use common::{cases, difference, files, load, run};
use futures::executor::block_on;
use oxiformers_nn::LoadOptions;
use oxiformers_pipelines::{AnyPipeline, Task};
use serde_json::{Value, json};

fn golden(task: Task) {
    let cases = cases(task.name());
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
    table_question_answering: TableQuestionAnswering;
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
    let of_table = |input, options, message: &str| {
        fails(
            "table-question-answering",
            "tapas",
            "tapas",
            json!([input]),
            options,
            message,
        );
    };
    let table = json!({"a": ["b", "c"]});
    of_table(
        json!({"table": table, "query": ""}),
        Value::Null,
        "`query` is empty",
    );
    of_table(json!({"table": table, "query": []}), Value::Null, "`query` is");
    of_table(
        json!({"table": {"a": []}, "query": "x"}),
        Value::Null,
        "`table` is empty",
    );
    of_table(json!({"table": [["a"]], "query": "x"}), Value::Null, "a table is");
    of_table(
        json!({"table": {"a": ["b"], "c": []}, "query": "x"}),
        Value::Null,
        "\"c\"",
    );
    of_table(json!({"query": "x"}), Value::Null, "table");
    of_table(
        json!({"table": {"a": vec!["b"; 200]}, "query": "x"}),
        Value::Null,
        "fewer than 160",
    );
    of_table(
        json!({"table": {"a": vec!["b c d"; 60]}, "query": "x"}),
        Value::Null,
        "`truncation`",
    );
    of_table(
        json!({"table": {"a": vec!["b"; 40]}, "query": "x"}),
        Value::Null,
        "the row 40 in its table",
    );
    of_table(
        json!({"table": table, "query": "x"}),
        json!({"truncation": "rows"}),
        "drop_rows_to_fit",
    );
    of_table(
        json!({"table": table, "query": long}),
        json!({"truncation": true}),
        "the question and the header",
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
    refuses("table-question-answering", "bert", "wordpiece", "bert");
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
