//! Broken and hostile tokenizer files: an error value or a tokenizer that works, never a panic, and never
//! memory asked for by a number in a file.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::LazyLock;

use bytes::Bytes;
use oxiformers_hub::ModelFiles;
use oxiformers_processors::Tokenizer;
use proptest::prelude::*;
use serde_json::json;

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
const FILES: [(&str, &str); 14] = [
    ("gpt2", "tokenizer.json"),
    ("t5", "tokenizer.json"),
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
                "vocab.json" => &["merges.txt", "tokenizer_config.json"],
                "merges.txt" => &["vocab.json", "tokenizer_config.json"],
                "tokenizer.json" | "tokenizer.gguf" | "tekken.json" => &[],
                _ => &["tokenizer_config.json"],
            };
            let beside = beside
                .iter()
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

/// A change to a file: at which part of it, how many bytes go, what comes in their place.
fn changes() -> impl Strategy<Value = Vec<(f64, usize, Vec<u8>)>> {
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
    proptest::collection::vec((0.0..1.0f64, 0..9usize, numbers), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(192) })]

    #[test]
    fn changed_bytes_are_an_error_or_a_tokenizer(at in 0..FILES.len(), changes in changes()) {
        let (file, content, beside) = &WHOLE[at];
        let mut content = content.clone();
        for (part, gone, new) in changes {
            let from = (content.len() as f64 * part) as usize;
            let to = (from + gone).min(content.len());
            content.splice(from..to, new);
        }
        if let Ok(tokenizer) = load(file, content, beside) {
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
    assert!(refused("vocab.txt", "a\nb\n").contains("vocab.txt"));
    assert!(refused("README.md", "").contains("tokenizer"));
}
