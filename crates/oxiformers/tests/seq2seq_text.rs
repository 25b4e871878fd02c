//! What encoder-decoders write, from text to text, against Transformers: tiny checkpoints with the tokenizer files that
//! such models ship (`fixtures/make_seq2seq_text.py`).

use std::path::{Path, PathBuf};

use oxiformers::{FromPretrained, Seq2SeqModel, block_on};
use serde::Deserialize;

#[derive(Deserialize)]
struct Row {
    text: String,
    num_beams: usize,
    src_lang: Option<String>,
    tgt_lang: Option<String>,
    input_ids: Vec<u32>,
    ids: Vec<u32>,
    output: String,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/seq2seq_text")
}

fn load(name: &str) -> Seq2SeqModel {
    let folder = fixtures().join(name);
    Seq2SeqModel::from_pretrained(folder.to_str().unwrap()).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn texts_equal_transformers() {
    let mut wrong = Vec::new();
    let mut count = 0;
    let mut folders: Vec<_> = std::fs::read_dir(fixtures())
        .unwrap()
        .map(Result::unwrap)
        .collect();
    folders.sort_by_key(std::fs::DirEntry::file_name);
    for folder in folders {
        let name = folder.file_name().into_string().unwrap();
        let rows = std::fs::read(folder.path().join("reference.json")).unwrap();
        for row in serde_json::from_slice::<Vec<Row>>(&rows).unwrap() {
            let model = load(&name)
                .with_languages(row.src_lang.as_deref(), row.tgt_lang.as_deref())
                .unwrap();
            let mut config = model.generation_config.clone();
            config.max_new_tokens = Some(20);
            config.num_beams = row.num_beams;
            let read = model.tokenizer.encode(&row.text, true).unwrap();
            let written = block_on(model.generate(&[&row.text], config)).unwrap();
            let ours = (&read, &written[0].ids, &written[0].text);
            let theirs = (&row.input_ids, &row.ids, &row.output);
            count += 1;
            if ours != theirs {
                wrong.push(format!(
                    "{name}, {:?}, {} beams, {:?} to {:?}\n  ours   {ours:?}\n  theirs {theirs:?}",
                    row.text, row.num_beams, row.src_lang, row.tgt_lang
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {count} differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(count > 50, "only {count} texts");
}

#[test]
fn unknown_languages_are_named() {
    let error = load("m2m_100")
        .with_languages(None, Some("tlh"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("tlh") && error.contains("fr"), "{error}");
    let error = load("t5")
        .with_languages(Some("de"), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("none"), "{error}");
}
