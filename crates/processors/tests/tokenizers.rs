//! Token ids against those of the original libraries (`fixtures/tokenizers/make.py`), and decoding token by
//! token against decoding at once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use bytes::Bytes;
use oxiformers_hub::ModelFiles;
use oxiformers_processors::Tokenizer;
use oxiformers_processors::tokenizer::{EncodeOptions, Padding, Side};
use proptest::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    loads: Vec<Vec<String>>,
    plain: Vec<Vec<u32>>,
    special: Option<Vec<Vec<u32>>>,
    text_only: Option<Vec<Vec<u32>>>,
    decoded: Vec<String>,
    skipped: Vec<String>,
    except: BTreeMap<String, BTreeMap<String, Exception>>,
}

#[derive(Deserialize)]
struct Exception {
    plain: Vec<u32>,
    special: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Sample {
    Text(String),
    Hex(String),
}

impl Sample {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Text(text) => text.clone().into_bytes(),
            Self::Hex(hex) => (0..hex.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
                .collect(),
        }
    }
}

/// Trained tokenizers, all of them with files of their own.
const NAMES: [&str; 13] = [
    "bert",
    "cohere",
    "deepseek_v3",
    "gemma",
    "gpt2",
    "gpt_oss",
    "llama",
    "llama3",
    "qwen2",
    "smollm",
    "t5",
    "tekken",
    "tiktoken",
];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers")
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn corpus() -> Vec<Vec<u8>> {
    read::<Vec<Sample>>(&fixtures().join("corpus.json"))
        .iter()
        .map(Sample::bytes)
        .collect()
}

fn golden(name: &str) -> Golden {
    read(&fixtures().join(name).join("golden.json"))
}

fn contents(name: &str, files: &[String]) -> Vec<(String, Bytes)> {
    let folder = fixtures().join(name);
    files
        .iter()
        .map(|file| (file.clone(), std::fs::read(folder.join(file)).unwrap().into()))
        .collect()
}

fn load(name: &str, files: &[String]) -> Tokenizer {
    Tokenizer::from_files(&ModelFiles::from_memory(name, contents(name, files)))
        .unwrap_or_else(|e| panic!("{name} from {files:?}: {e}"))
}

/// Every way to load every trained tokenizer.
static ALL: LazyLock<Vec<(String, Tokenizer)>> = LazyLock::new(|| {
    let mut all = Vec::new();
    for name in NAMES {
        for files in golden(name).loads {
            all.push((format!("{name} from {}", files[0]), load(name, &files)));
        }
    }
    all
});

/// Compares one tokenizer with its golden file; returns the number of comparisons and what differs.
fn compare(golden: &Golden, file: &str, tokenizer: &Tokenizer, decodes: bool) -> (usize, Vec<String>) {
    let mut count = 0;
    let mut wrong = Vec::new();
    let mut same = |what: &str, text: &[u8], ours: String, theirs: String| {
        count += 1;
        if ours != theirs {
            let text = String::from_utf8_lossy(text);
            wrong.push(format!("{what} of {text:?}\n  ours   {ours}\n  theirs {theirs}"));
        }
    };
    let corpus = corpus();
    assert_eq!(corpus.len(), golden.plain.len());
    for (at, text) in corpus.iter().enumerate() {
        let except = golden.except.get(file).and_then(|all| all.get(&at.to_string()));
        let expected = except.map_or(&golden.plain[at], |other| &other.plain);
        let ids = tokenizer.encode_bytes(text, false).unwrap();
        same("plain ids", text, format!("{ids:?}"), format!("{expected:?}"));
        if let Some(special) = &golden.special {
            let expected = except.map_or(&special[at], |other| &other.special);
            let ids = tokenizer.encode_bytes(text, true).unwrap();
            same("ids", text, format!("{ids:?}"), format!("{expected:?}"));
        }
        if let (Some(text_only), None) = (&golden.text_only, except) {
            let ids = tokenizer
                .encode_text_only(&String::from_utf8_lossy(text))
                .unwrap();
            same(
                "text-only ids",
                text,
                format!("{ids:?}"),
                format!("{:?}", text_only[at]),
            );
        }
        if decodes {
            let ids = &golden.special.as_ref().unwrap_or(&golden.plain)[at];
            let decoded = tokenizer.decode(ids, false).unwrap();
            same("decoding", text, decoded, golden.decoded[at].clone());
            let skipped = tokenizer.decode(ids, true).unwrap();
            same(
                "decoding, special tokens skipped,",
                text,
                skipped,
                golden.skipped[at].clone(),
            );
        }
    }
    (count, wrong)
}

#[test]
fn ids_and_texts_equal_the_originals() {
    let mut wrong = Vec::new();
    let mut total = 0;
    for name in NAMES {
        let golden = golden(name);
        for files in &golden.loads {
            let (count, differences) = compare(&golden, &files[0], &load(name, files), true);
            total += count;
            if !differences.is_empty() {
                wrong.push(format!("{name} from {files:?}: {}", differences.join("\n")));
            }
        }
    }
    println!("{total} comparisons");
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

/// A GGUF without tensors whose `tokenizer.ggml.pre` is another one.
fn with_pre(gguf: &[u8], name: &str) -> Vec<u8> {
    const KEY: &[u8] = b"tokenizer.ggml.pre";
    let key = gguf.windows(KEY.len()).position(|part| part == KEY).unwrap();
    // After the key: the type of the value in four bytes, its length in eight.
    let length = key + KEY.len() + 4;
    let old = u64::from_le_bytes(gguf[length..length + 8].try_into().unwrap()) as usize;
    let new = [&(name.len() as u64).to_le_bytes(), name.as_bytes()].concat();
    let mut gguf = gguf.to_vec();
    gguf.splice(length..length + 8 + old, new);
    gguf
}

#[test]
fn named_pre_tokenizers_equal_llama_cpp() {
    let folder = fixtures().join("named");
    let golden: BTreeMap<String, Vec<Vec<u32>>> = read(&folder.join("golden.json"));
    let gguf = std::fs::read(folder.join("tokenizer.gguf")).unwrap();
    let (mut count, mut wrong) = (0, Vec::new());
    for (name, expected) in &golden {
        let files = [("tokenizer.gguf".to_owned(), Bytes::from(with_pre(&gguf, name)))];
        let tokenizer = match Tokenizer::from_files(&ModelFiles::from_memory(name, files)) {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                wrong.push(error.to_string());
                continue;
            }
        };
        for (text, expected) in corpus().iter().zip(expected) {
            let text = String::from_utf8_lossy(text);
            count += 1;
            let ids = tokenizer.encode_text_only(&text).unwrap();
            if ids != *expected && !llama_cpp_is_different(name, &text) {
                wrong.push(format!(
                    "{name}: {text:?}\n  ours   {ids:?}\n  theirs {expected:?}"
                ));
            }
        }
    }
    println!("{count} comparisons");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Where llama.cpp departs from the models' own `tokenizer.json`.
fn llama_cpp_is_different(name: &str, text: &str) -> bool {
    match name {
        // It composes no characters.
        "command-r" | "mpt" | "olmo" | "qwen2" | "qwen35" => text.contains(['\u{301}', '\u{351}']),
        // It knows letters but no marks inside of a bracket expression.
        "gpt-4o" | "minimax-m2" | "tekken" => text.contains('\u{94d}'),
        // Both, and a lookahead that it cuts digits with only where a word ends for its engine.
        "tiny_aya" => text.contains(['\u{301}', '\u{351}', '\u{94d}']) || text == "\n\n  0.",
        _ => false,
    }
}

/// `OXIFORMERS_TEST_ASSETS` names a folder that holds SmolLM2-135M-Instruct.Q4_1.gguf.
fn smollm2() -> Option<Tokenizer> {
    let file = std::env::var_os("OXIFORMERS_TEST_ASSETS")
        .map(|folder| Path::new(&folder).join("SmolLM2-135M-Instruct.Q4_1.gguf"))
        .filter(|file| file.exists());
    let Some(file) = file else {
        eprintln!(
            "SKIPPED: set OXIFORMERS_TEST_ASSETS to a folder that holds SmolLM2-135M-Instruct.Q4_1.gguf"
        );
        return None;
    };
    Some(Tokenizer::from_files(&ModelFiles::from_file(&file).unwrap()).unwrap())
}

#[test]
fn the_real_smollm2_equals_llama_cpp() {
    let Some(tokenizer) = smollm2() else { return };
    let (count, wrong) = compare(&golden("smollm2_real"), "", &tokenizer, true);
    println!("{count} comparisons");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(tokenizer.bos_token(), Some("<|im_start|>"));
    assert_eq!(tokenizer.eos_token(), Some("<|im_end|>"));
    // Digits stand alone: the space, the zero and the full stop are three tokens.
    let ids = tokenizer.encode("\n\n  0.", false).unwrap();
    let tokens: Vec<_> = ids.iter().map(|id| tokenizer.id_to_token(*id).unwrap()).collect();
    assert!(tokens.contains(&"0".to_owned()), "{tokens:?}");
}

/// All rows as long as the longest.
fn padded(side: Option<Side>) -> EncodeOptions {
    EncodeOptions {
        padding: Some(Padding {
            side,
            ..Padding::default()
        }),
        ..EncodeOptions::default()
    }
}

#[test]
fn pairs_and_batches() {
    for (name, tokenizer) in ALL.iter().filter(|(name, _)| name.starts_with("bert")) {
        let (cls, sep) = (
            tokenizer.token_to_id("[CLS]").unwrap(),
            tokenizer.token_to_id("[SEP]").unwrap(),
        );
        let first = tokenizer.encode("the fox", false).unwrap();
        let second = tokenizer.encode("jumps over dogs", false).unwrap();
        let pair = tokenizer
            .encode_with(("the fox", "jumps over dogs"), &EncodeOptions::default())
            .unwrap();
        let expected = [&[cls], first.as_slice(), &[sep], second.as_slice(), &[sep]].concat();
        assert_eq!(pair.ids, expected, "{name}");
        let types = [vec![0; first.len() + 2], vec![1; second.len() + 1]].concat();
        assert_eq!(pair.token_type_ids, types, "{name}");
        // A tokenizer.json alone does not say which token fills rows.
        if name.ends_with("tokenizer.json") {
            assert_eq!(tokenizer.pad_token(), None);
            continue;
        }
        assert_eq!(tokenizer.pad_token(), Some("[PAD]"), "{name}");
        for (side, at) in [(Side::Left, 0), (Side::Right, 1)] {
            let texts = ["the fox", "the fox jumps over dogs"];
            let batch = tokenizer.encode_batch(texts, &padded(Some(side))).unwrap();
            let (ids, attention) = (batch.input_ids(), batch.attention_mask());
            let [_, width] = batch.shape();
            let short = first.len() + 2;
            let mask: &[Vec<u32>] = &[vec![0; width - short], vec![1; short]];
            let mask = if at == 0 {
                mask.concat()
            } else {
                [mask[1].clone(), mask[0].clone()].concat()
            };
            assert_eq!(attention[0], mask, "{name}");
            assert_eq!(attention[1], vec![1; width], "{name}");
            let padding = if at == 0 {
                &ids[0][..width - short]
            } else {
                &ids[0][short..]
            };
            assert!(
                padding.iter().all(|id| Some(*id) == tokenizer.pad_token_id()),
                "{name}"
            );
        }
    }
}

#[test]
fn padding_needs_a_token() {
    let tokenizer = &ALL.iter().find(|(name, _)| name.starts_with("gpt2 ")).unwrap().1;
    assert!(tokenizer.encode_batch(["a", "a"], &padded(None)).is_ok());
    let error = tokenizer.encode_batch(["a", "a b c"], &padded(None)).unwrap_err();
    assert!(error.to_string().contains("pad_token"), "{error}");
}

/// What a stream returns, piece by piece.
fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special_tokens: bool) -> Vec<String> {
    let mut stream = tokenizer.decode_stream(skip_special_tokens);
    let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    pieces.push(stream.flush().unwrap());
    pieces
}

#[test]
fn streams_put_together_are_the_text() {
    let real = smollm2().map(|tokenizer| ("SmolLM2".to_owned(), tokenizer));
    for (name, tokenizer) in ALL.iter().chain(&real) {
        for text in corpus() {
            let ids = tokenizer.encode_bytes(&text, true).unwrap();
            for skip in [false, true] {
                let whole = tokenizer.decode(&ids, skip).unwrap();
                let pieces = streamed(tokenizer, &ids, skip);
                assert_eq!(pieces.concat(), whole, "{name}: {pieces:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    #[test]
    fn streams_of_any_tokens_are_the_text(seeds in proptest::collection::vec(any::<u32>(), 0..24), skip: bool) {
        for (name, tokenizer) in ALL.iter() {
            let size = tokenizer.vocab_size() as u32;
            // A few ids lie outside of the vocabulary.
            let ids: Vec<u32> = seeds.iter().map(|seed| seed % (size + 3)).collect();
            let whole = tokenizer.decode(&ids, skip).unwrap();
            let pieces = streamed(tokenizer, &ids, skip);
            prop_assert_eq!(pieces.concat(), whole, "{}: {:?} {:?}", name, ids, pieces);
        }
    }

    #[test]
    fn streams_never_break_characters(text in "\\PC{0,24}") {
        for (name, tokenizer) in ALL.iter() {
            let ids = tokenizer.encode(&text, false).unwrap();
            if tokenizer.decode(&ids, false).unwrap().contains('\u{FFFD}') {
                continue;
            }
            let pieces = streamed(tokenizer, &ids, false);
            prop_assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{}: {:?}", name, pieces);
        }
    }

    #[test]
    fn any_text_can_be_encoded(text in any::<String>()) {
        for (name, tokenizer) in ALL.iter() {
            let encoding = tokenizer.encode_with(&text, &EncodeOptions::default()).unwrap();
            prop_assert_eq!(&encoding.ids, &tokenizer.encode(&text, true).unwrap(), "{}", name);
            let length = text.chars().count();
            prop_assert!(encoding.offsets.iter().all(|(start, end)| start <= end && *end <= length), "{}", name);
            tokenizer.encode_text_only(&text).unwrap();
        }
    }
}
