//! Tables and questions about them against Transformers (`fixtures/tokenizers/make_tables.py`).

use std::path::Path;

use oxiformers_hub::ModelFiles;
use oxiformers_processors::{Table, Tokenizer};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Golden {
    settings: Map<String, Value>,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
    question: String,
    max_length: Option<usize>,
    input_ids: Option<Vec<u32>>,
    #[serde(default)]
    token_type_ids: Vec<u32>,
    logits: Option<Vec<f32>>,
    #[serde(default)]
    answer: Vec<(usize, usize)>,
}

fn tokenizer(settings: &Map<String, Value>) -> Tokenizer {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers");
    let vocab = std::fs::read(fixtures.join("families/bert_uncased/vocab.txt")).unwrap();
    let mut config = settings.clone();
    config.insert("tokenizer_class".to_owned(), "TapasTokenizer".into());
    let config = Value::Object(config).to_string().into_bytes();
    let files = [("vocab.txt", vocab), ("tokenizer_config.json", config)];
    let files = files.map(|(name, content)| (name.to_owned(), content.into()));
    Tokenizer::from_files(&ModelFiles::from_memory("tapas", files)).unwrap()
}

#[test]
fn tables_equal_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers/tables.json");
    let all: Vec<Golden> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut wrong = Vec::new();
    for golden in &all {
        let table = Table::new(golden.header.clone(), golden.rows.clone()).unwrap();
        let what = format!(
            "{:?} {:?} {:?} {:?}",
            golden.header, golden.question, golden.max_length, golden.settings
        );
        let ours = tokenizer(&golden.settings).encode_table(&golden.question, &table, golden.max_length);
        let Some(ids) = &golden.input_ids else {
            if ours.is_ok() {
                wrong.push(format!("{what}: fits"));
            }
            continue;
        };
        let ours = ours.unwrap_or_else(|error| panic!("{what}: {error}"));
        if ours.input_ids != *ids {
            wrong.push(format!(
                "{what}: ids\n  ours   {:?}\n  theirs {ids:?}",
                ours.input_ids
            ));
            continue;
        }
        let expected = golden.token_type_ids.as_chunks::<7>().0;
        let differ = ours.token_type_ids.iter().zip(expected).zip(ids);
        for ((ours, theirs), id) in differ.filter(|((ours, theirs), _)| ours != theirs) {
            wrong.push(format!("{what}: types of {id}: {ours:?}, theirs {theirs:?}"));
        }
        if let Some(logits) = &golden.logits {
            let answer = ours.answer(logits, 0.5);
            if answer != golden.answer {
                wrong.push(format!("{what}: {answer:?}, theirs {:?}", golden.answer));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(all.len() > 200, "only {} tables", all.len());
}

proptest! {
    /// Whatever texts there are, the table is read and is not longer than it may be.
    #[test]
    fn any_table_is_read(
        cells in prop::collection::vec("(\\PC{0,12}|[0-9a-z.,+ -]{0,12})", 6),
        question in "\\PC{0,30}",
        max_length in prop::option::of(0usize..80),
    ) {
        let (header, rows) = cells.split_at(2);
        let rows = rows.chunks(2).map(<[String]>::to_vec).collect();
        let table = Table::new(header.to_vec(), rows).unwrap();
        if let Ok(encoding) = tokenizer(&Map::new()).encode_table(&question, &table, max_length) {
            prop_assert_eq!(encoding.input_ids.len(), encoding.token_type_ids.len());
            prop_assert!(encoding.input_ids.len() <= max_length.unwrap_or(usize::MAX));
        } else {
            prop_assert!(max_length.is_some());
        }
    }
}

#[test]
fn tables_that_do_not_fit_are_errors() {
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let error = Table::new(texts(&["a", "b"]), vec![texts(&["1"])])
        .unwrap_err()
        .to_string();
    assert!(error.contains("row 0 has 1"), "{error}");
    assert!(Table::new(Vec::new(), Vec::new()).is_err());
    let table = Table::new(texts(&["a"; 600]), Vec::new()).unwrap();
    let error = tokenizer(&Map::new())
        .encode_table("a", &table, None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("600 columns"), "{error}");
    let rows = Table::new(texts(&["a"]), vec![texts(&["1"]); 600]).unwrap();
    let error = tokenizer(&Map::new())
        .encode_table("a", &rows, None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("600 rows"), "{error}");
    let error = tokenizer(&Map::new())
        .encode_table("a", &rows, Some(3))
        .unwrap_err()
        .to_string();
    assert!(error.contains("max_length"), "{error}");
}
