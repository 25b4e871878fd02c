//! Broken and hostile tokenizer files: an error value or a tokenizer that works, never a panic, and never
//! memory asked for by a number in a file.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::LazyLock;

use bytes::Bytes;
use oxiformers_hub::ModelFiles;
use oxiformers_processors::Tokenizer;
use oxiformers_processors::tokenizer::{EncodeOptions, Padding, Truncation};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Refuses what no fixture needs, so that memory asked for by a broken length field ends the test.
struct Bounded;

const LARGEST: usize = 64 << 20;

// SAFETY: everything goes to the system's allocator; a null pointer is a permitted answer.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > LARGEST {
            return std::ptr::null_mut();
        }
        // SAFETY: as the caller has promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller has promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

/// Every kind of file with the settings beside it: folder, file.
const FILES: [(&str, &str); 27] = [
    ("gpt2", "tokenizer.json"),
    ("llama", "tokenizer.json"),
    ("bert", "tokenizer.json"),
    ("gpt2", "tokenizer.gguf"),
    ("llama", "tokenizer.gguf"),
    ("t5", "tokenizer.gguf"),
    ("bert", "tokenizer.gguf"),
    ("llama", "tokenizer.model"),
    ("t5", "spiece.model"),
    ("tiktoken", "tiny.tiktoken"),
    ("tekken", "tekken.json"),
    ("gpt2", "vocab.json"),
    ("gpt2", "merges.txt"),
    ("bert", "vocab.txt"),
    ("families/albert", "spiece.model"),
    ("families/bert_uncased", "tokenizer_config.json"),
    ("families/byt5", "tokenizer_config.json"),
    ("families/canine", "tokenizer_config.json"),
    ("families/m2m_100", "sentencepiece.bpe.model"),
    ("families/m2m_100", "vocab.json"),
    ("families/marian", "source.spm"),
    ("families/marian", "target.spm"),
    ("families/marian", "vocab.json"),
    ("families/nllb", "tokenizer_config.json"),
    ("families/pegasus", "spiece.model"),
    ("families/roberta", "merges.txt"),
    ("families/xlm_roberta", "config.json"),
];

/// A file's name, what it says when it is whole, and the files that belong to it.
type Whole = (&'static str, Vec<u8>, Vec<(String, Bytes)>);

static WHOLE: LazyLock<Vec<Whole>> = LazyLock::new(|| {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers");
    let read = |folder: &str, file: &str| std::fs::read(fixtures.join(folder).join(file)).ok();
    FILES
        .into_iter()
        .map(|(folder, file)| {
            let beside: &[&str] = match file {
                _ if folder.starts_with("families/") => &[
                    "config.json",
                    "merges.txt",
                    "sentencepiece.bpe.model",
                    "source.spm",
                    "spiece.model",
                    "target.spm",
                    "tokenizer_config.json",
                    "vocab.json",
                    "vocab.txt",
                ],
                "vocab.json" => &["merges.txt", "tokenizer_config.json"],
                "merges.txt" => &["vocab.json", "tokenizer_config.json"],
                "tokenizer.json" | "tokenizer.gguf" | "tekken.json" => &[],
                _ => &["tokenizer_config.json"],
            };
            let beside = beside
                .iter()
                .filter(|name| **name != file)
                .filter_map(|name| Some(((*name).to_owned(), Bytes::from(read(folder, name)?))))
                .collect();
            (file, read(folder, file).unwrap(), beside)
        })
        .collect()
});

fn load(
    file: &str,
    content: Vec<u8>,
    beside: &[(String, Bytes)],
) -> oxiformers_processors::Result<Tokenizer> {
    let files = beside.iter().cloned().chain([(file.to_owned(), content.into())]);
    Tokenizer::from_files(&ModelFiles::from_memory("broken", files))
}

/// Uses a tokenizer that a broken file still gave.
fn exercise(tokenizer: &Tokenizer) {
    for text in [
        "Hello, world! 123",
        "\n\n  0. \u{1F600}e\u{301} 你好 ﬁ Ａ",
        "<s>a</s> [CLS]",
    ] {
        if let Ok(ids) = tokenizer.encode(text, true) {
            let _ = tokenizer.decode(&ids, true);
        }
        for max_length in [0, 3, 9] {
            let options = EncodeOptions {
                truncation: Some(Truncation {
                    max_length: Some(max_length),
                    stride: 2,
                    ..Truncation::default()
                }),
                padding: Some(Padding::default()),
                ..EncodeOptions::default()
            };
            let _ = tokenizer.encode_batch([("a", text), (text, "a")], &options);
        }
    }
    for lang in tokenizer.languages().into_iter().take(3) {
        tokenizer.lang_id(lang).unwrap();
        let _ = tokenizer
            .with_src_lang(lang)
            .map(|tokenizer| tokenizer.encode("a", true));
    }
}

#[test]
fn every_cut_is_an_error_or_a_tokenizer() {
    for (file, content, beside) in WHOLE.iter() {
        assert!(load(file, content.clone(), beside).is_ok(), "{file}");
        let mut refused = 0;
        for part in 0..48 {
            let cut = content[..content.len() * part / 48].to_vec();
            match load(file, cut, beside) {
                Ok(tokenizer) => exercise(&tokenizer),
                Err(error) => {
                    refused += 1;
                    assert!(!error.to_string().is_empty());
                }
            }
        }
        // A list of lines is whole after any of them.
        let lines = ["tiny.tiktoken", "merges.txt", "vocab.txt"].contains(file);
        assert!(lines || refused >= 40, "{file}: {refused} of 48 refused");
    }
}

/// A change to a file: at which part of it, how many bytes go (else as many as come), what comes.
fn changes() -> impl Strategy<Value = Vec<(f64, Option<usize>, Vec<u8>)>> {
    let numbers = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..5),
        // Length fields of 2^63 and more, as the formats write them.
        Just(vec![0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F]),
        Just(vec![0xFF; 8]),
        Just(vec![0, 0, 0, 0, 0, 0, 0, 0x80]),
        Just(b"4294967295".to_vec()),
        Just(b"-1".to_vec()),
        Just(b"1e999".to_vec()),
        Just(b"\"".to_vec()),
    ];
    proptest::collection::vec((0.0..1.0f64, proptest::option::of(0..9usize), numbers), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn changed_bytes_are_an_error_or_a_tokenizer(at in 0..FILES.len(), changes in changes()) {
        let (file, content, beside) = &WHOLE[at];
        let mut content = content.clone();
        for (part, gone, new) in changes {
            let from = (content.len() as f64 * part) as usize;
            let to = (from + gone.unwrap_or(new.len())).min(content.len());
            content.splice(from..to, new);
        }
        if let Ok(tokenizer) = load(file, content, beside) {
            exercise(&tokenizer);
        }
    }

    #[test]
    fn changed_json_is_an_error_or_a_tokenizer(at in 0..FILES.len(), spots in proptest::collection::vec((0.0..1.0f64, 0..12usize), 1..4)) {
        let (file, content, beside) = &WHOLE[at];
        let Ok(mut json) = serde_json::from_slice::<Value>(content) else { return Ok(()) };
        for (spot, with) in spots {
            // Half of the spots lie outside of the long lists, where a change does more.
            let short = with % 2 == 0;
            let mut left = (count(&json, short) as f64 * spot) as usize;
            replace(&mut json, short, &mut left, &values()[with]);
        }
        if let Ok(tokenizer) = load(file, json.to_string().into_bytes(), beside) {
            exercise(&tokenizer);
        }
    }

    #[test]
    fn noise_is_an_error_or_a_tokenizer(at in 0..FILES.len(), content in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (file, _, beside) = &WHOLE[at];
        if let Ok(tokenizer) = load(file, content, beside) {
            exercise(&tokenizer);
        }
    }
}

/// What stands in the place of a value.
fn values() -> [Value; 12] {
    [
        Value::Null,
        json!(-1),
        json!(0),
        json!(u64::MAX),
        json!(u32::MAX),
        json!(1e300),
        json!(true),
        json!(""),
        json!("▁a "),
        json!([]),
        json!({}),
        json!("(?:a*)*$"),
    ]
}

/// Values inside of a value; of long lists and objects only the first few if `short`.
fn inside(json: &mut Value, short: bool) -> Vec<&mut Value> {
    let some = if short { 8 } else { usize::MAX };
    match json {
        Value::Array(values) => values.iter_mut().take(some).collect(),
        Value::Object(fields) => fields.iter_mut().take(some).map(|(_, value)| value).collect(),
        _ => Vec::new(),
    }
}

fn count(json: &Value, short: bool) -> usize {
    let mut json = json.clone();
    fn go(json: &mut Value, short: bool) -> usize {
        1 + inside(json, short)
            .into_iter()
            .map(|value| go(value, short))
            .sum::<usize>()
    }
    go(&mut json, short)
}

/// Replaces the value that `left` counts down to.
fn replace(json: &mut Value, short: bool, left: &mut usize, with: &Value) -> bool {
    if *left == 0 {
        *json = with.clone();
        return true;
    }
    *left -= 1;
    inside(json, short)
        .into_iter()
        .any(|value| replace(value, short, left, with))
}

fn refused(file: &str, content: impl Into<Vec<u8>>) -> String {
    load(file, content.into(), &[]).expect_err(file).to_string()
}

#[test]
fn errors_name_file_and_field() {
    assert!(refused("tiny.tiktoken", "not-base64! 1\n").contains("tiny.tiktoken"));
    assert!(refused("tiny.tiktoken", "YQ== many\n").contains("tiny.tiktoken"));
    // A piece that says that it is 2^63 bytes long.
    let endless = [0x0A, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F];
    assert!(refused("tokenizer.model", endless).contains("tokenizer.model"));
    assert!(refused("tokenizer.model", "").contains("tokenizer.model"));
    let tekken = |reserved: u64, token: &str| {
        let config = json!({"pattern": ".", "default_num_special_tokens": reserved});
        json!({"config": config, "vocab": [{"token_bytes": token}]}).to_string()
    };
    assert!(
        refused("tekken.json", tekken(u64::from(u32::MAX), "YQ==")).contains("default_num_special_tokens")
    );
    assert!(refused("tekken.json", tekken(3, "?")).contains("tekken.json"));
    assert!(refused("tokenizer.json", "{\"model\": 1}").contains("tokenizer.json"));
    let merges = json!({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}}).to_string();
    assert!(refused("tokenizer.json", merges).contains("merge"));
    let charsmap = json!({
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "////fw=="},
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    });
    assert!(refused("tokenizer.json", charsmap.to_string()).contains("precompiled_charsmap"));
    let template = |single: Value| {
        json!({
            "post_processor": {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}},
            "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        })
        .to_string()
    };
    let unknown = template(json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}]));
    assert!(refused("tokenizer.json", unknown).contains("special_tokens"));
    let second = template(json!([{"Sequence": {"id": "B", "type_id": 0}}]));
    assert!(refused("tokenizer.json", second).contains("single"));
    let long = "a".repeat(1 << 20);
    let piece = [&[0x0A, 0x84, 0x80, 0x40, 0x0A, 0x80, 0x80, 0x40], long.as_bytes()].concat();
    // trainer_spec.model_type = 2: BPE, for which every way to cut a piece would be tried.
    let bpe = [piece.as_slice(), &[0x12, 0x02, 0x18, 0x02]].concat();
    assert!(refused("tokenizer.model", bpe).contains("4096"));
    assert!(refused("vocab.txt", "a\nb\n").contains("vocab.txt"));
    // Files that need another one, and settings out of bounds.
    let with = |config: Value, file: &str, content: &[u8]| {
        let config = [("tokenizer_config.json".to_owned(), config.to_string().into())];
        load(file, content.to_vec(), &config).expect_err(file).to_string()
    };
    let (_, spm, _) = WHOLE.iter().find(|(file, ..)| *file == "source.spm").unwrap();
    let alone = with(json!({"tokenizer_class": "MarianTokenizer"}), "source.spm", spm);
    assert!(alone.contains("vocab.json"), "{alone}");
    let gaps = json!({"tokenizer_class": "T5Tokenizer", "extra_ids": 1_000_000_000});
    assert!(with(gaps, "spiece.model", spm).contains("extra_ids"));
    let gaps = json!({"tokenizer_class": "ByT5Tokenizer", "extra_ids": u64::MAX});
    assert!(with(gaps, "README.md", b"").contains("extra_ids"));
    let unknown = json!({"tokenizer_class": "MBartTokenizer", "src_lang": "qq_QQ"});
    assert!(with(unknown, "sentencepiece.bpe.model", spm).contains("qq_QQ"));
    assert!(refused("README.md", "").contains("tokenizer"));
}
