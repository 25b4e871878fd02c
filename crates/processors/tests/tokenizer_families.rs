//! Tokenizers of models without a `tokenizer.json`, from the files that these models ship, against Transformers
//! (`fixtures/tokenizers/make_families.py`): ids, pairs, offsets, cutting, padding, decoding, languages.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oxiformers_hub::ModelFiles;
use oxiformers_processors::Tokenizer;
use oxiformers_processors::tokenizer::{
    EncodeOptions, Encoding, Padding, Side, TextInput, Truncation, TruncationStrategy,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    settings: Settings,
    texts: Vec<Option<Text>>,
    decoded: Vec<Option<String>>,
    skipped: Vec<Option<String>>,
    pairs: Vec<Pair>,
    cut: Vec<Cut>,
    batch: Option<Batch>,
    languages: Vec<Language>,
}

#[derive(Deserialize)]
struct Settings {
    model_input_names: Vec<String>,
    padding_side: String,
    pad_token_type_id: u32,
    special: BTreeMap<String, String>,
    vocab_size: usize,
}

#[derive(Deserialize)]
struct Text {
    ids: Vec<u32>,
    offsets: Option<Vec<usize>>,
    words: Option<Vec<Option<u32>>>,
}

#[derive(Deserialize)]
struct Pair {
    texts: [usize; 2],
    #[serde(flatten)]
    fields: Fields,
}

/// What Transformers says about an encoded text; its tokenizers that are written in Python say less.
#[derive(Deserialize)]
struct Fields {
    ids: Vec<u32>,
    types: Option<Vec<u32>>,
    special: Vec<u32>,
    mask: Option<Vec<u32>>,
    offsets: Option<Vec<usize>>,
    words: Option<Vec<Option<u32>>>,
    sequences: Option<Vec<Option<usize>>>,
}

#[derive(Deserialize)]
struct Cut {
    texts: Vec<usize>,
    max_length: usize,
    stride: usize,
    strategy: Option<String>,
    truncation_side: Option<String>,
    windows: Option<Vec<Fields>>,
}

#[derive(Deserialize)]
struct Batch {
    ids: Vec<Vec<u32>>,
    mask: Vec<Vec<u32>>,
    types: Option<Vec<Vec<u32>>>,
}

#[derive(Deserialize)]
struct Language {
    language: String,
    source: Vec<u32>,
    target: Vec<u32>,
    id: u32,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers")
}

fn corpus() -> Vec<String> {
    serde_json::from_slice(&std::fs::read(fixtures().join("family_corpus.json")).unwrap()).unwrap()
}

/// The model's files, but not what they should give.
fn load(name: &str) -> oxiformers_processors::Result<Tokenizer> {
    let files = std::fs::read_dir(fixtures().join("families").join(name)).unwrap();
    let files = files
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().is_some_and(|file| file != "golden.json"))
        .map(|path| {
            let file = path.file_name().unwrap().to_str().unwrap().to_owned();
            (file, std::fs::read(path).unwrap().into())
        });
    Tokenizer::from_files(&ModelFiles::from_memory(name, files))
}

fn flat(offsets: &[(usize, usize)]) -> Vec<usize> {
    offsets.iter().flat_map(|(start, end)| [*start, *end]).collect()
}

/// Notes what differs.
#[derive(Default)]
struct Report {
    count: usize,
    wrong: Vec<String>,
}

impl Report {
    fn same<T: std::fmt::Debug + PartialEq>(&mut self, what: &str, ours: &T, theirs: &T) {
        self.count += 1;
        if ours != theirs {
            self.wrong
                .push(format!("{what}\n  ours   {ours:?}\n  theirs {theirs:?}"));
        }
    }

    fn fields(&mut self, what: &str, ours: &Encoding, theirs: &Fields) {
        self.same(&format!("ids of {what}"), &ours.ids, &theirs.ids);
        if let Some(types) = &theirs.types {
            self.same(&format!("types of {what}"), &ours.token_type_ids, types);
        }
        self.same(
            &format!("special mask of {what}"),
            &ours.special_tokens_mask,
            &theirs.special,
        );
        if let Some(mask) = &theirs.mask {
            self.same(&format!("attention mask of {what}"), &ours.attention_mask, mask);
        }
        if let Some(offsets) = &theirs.offsets {
            self.same(&format!("offsets of {what}"), &flat(&ours.offsets), offsets);
        }
        if let Some(words) = &theirs.words {
            self.same(&format!("words of {what}"), &ours.word_ids, words);
        }
        if let Some(sequences) = &theirs.sequences {
            self.same(&format!("sequences of {what}"), &ours.sequence_ids, sequences);
        }
    }
}

fn compare(tokenizer: &Tokenizer, golden: &Golden, report: &mut Report) -> oxiformers_processors::Result<()> {
    let corpus = corpus();
    let plain = EncodeOptions::default();
    let config = tokenizer.config();
    let settings = &golden.settings;
    report.same(
        "model_input_names",
        &config.model_input_names,
        &settings.model_input_names,
    );
    let side = match config.padding_side {
        Side::Left => "left",
        Side::Right => "right",
    };
    report.same("padding_side", &side, &settings.padding_side.as_str());
    report.same(
        "pad_token_type_id",
        &config.pad_token_type_id,
        &settings.pad_token_type_id,
    );
    report.same("vocab_size", &tokenizer.vocab_size(), &settings.vocab_size);
    for (role, token) in &settings.special {
        report.same(role, &tokenizer.special_token(role), &Some(token.as_str()));
    }
    for (at, (text, expected)) in corpus.iter().zip(&golden.texts).enumerate() {
        // Where ours is another one, for a reason that the script names.
        let Some(expected) = expected else { continue };
        let encoding = tokenizer.encode_with(text, &plain)?;
        report.same(&format!("ids of {text:?}"), &encoding.ids, &expected.ids);
        report.same("ids alone", &tokenizer.encode(text, true)?, &encoding.ids);
        if let Some(offsets) = &expected.offsets {
            report.same(&format!("offsets of {text:?}"), &flat(&encoding.offsets), offsets);
        }
        if let Some(words) = &expected.words {
            report.same(&format!("words of {text:?}"), &encoding.word_ids, words);
        }
        for (what, skip, theirs) in [
            ("decoding", false, &golden.decoded),
            ("text", true, &golden.skipped),
        ] {
            if let Some(theirs) = &theirs[at] {
                let ours = tokenizer.decode(&expected.ids, skip)?;
                report.same(&format!("{what} of {text:?}"), &ours, theirs);
            }
        }
    }
    for pair in &golden.pairs {
        let [one, two] = pair.texts.map(|at| corpus[at].as_str());
        let encoding = tokenizer.encode_with((one, two), &plain)?;
        report.fields(&format!("{one:?} and {two:?}"), &encoding, &pair.fields);
    }
    for cut in &golden.cut {
        let input: TextInput<'_> = match cut.texts.as_slice() {
            [one] => corpus[*one].as_str().into(),
            [one, two] => (corpus[*one].as_str(), corpus[*two].as_str()).into(),
            _ => unreachable!("one text or two"),
        };
        let options = EncodeOptions {
            truncation: Some(Truncation {
                max_length: Some(cut.max_length),
                strategy: match cut.strategy.as_deref() {
                    None | Some("longest_first") => TruncationStrategy::LongestFirst,
                    Some("only_first") => TruncationStrategy::OnlyFirst,
                    _ => TruncationStrategy::OnlySecond,
                },
                stride: cut.stride,
                side: cut.truncation_side.as_ref().map(|_| Side::Left),
            }),
            ..EncodeOptions::default()
        };
        let ours = tokenizer.encode_with(input, &options);
        let Some(expected) = &cut.windows else {
            report.same(
                &format!("{options:?} has no room for the stride"),
                &ours.is_err(),
                &true,
            );
            continue;
        };
        let windows = ours?.into_windows();
        report.same(
            &format!("number of windows of {options:?}"),
            &windows.len(),
            &expected.len(),
        );
        for (window, expected) in windows.iter().zip(expected) {
            report.fields(&format!("a window of {options:?}"), window, expected);
        }
    }
    if let Some(batch) = &golden.batch {
        let options = EncodeOptions {
            padding: Some(Padding {
                multiple_of: Some(8),
                ..Padding::default()
            }),
            ..EncodeOptions::default()
        };
        let texts = [13, 14, 17].map(|at: usize| corpus[at].as_str());
        let ours = tokenizer.encode_batch(texts, &options)?;
        report.same("batched ids", &ours.input_ids(), &batch.ids);
        report.same("batched mask", &ours.attention_mask(), &batch.mask);
        if let Some(types) = &batch.types {
            report.same("batched types", &ours.token_type_ids(), types);
        }
    }
    for expected in &golden.languages {
        let lang = expected.language.as_str();
        report.same("id of a language", &tokenizer.lang_id(lang)?, &expected.id);
        let source = tokenizer.with_src_lang(lang)?.encode(&corpus[14], true)?;
        report.same(&format!("ids as source in {lang}"), &source, &expected.source);
        let target = tokenizer.for_target(Some(lang))?.encode(&corpus[14], true)?;
        report.same(&format!("ids as target in {lang}"), &target, &expected.target);
        let unknown = tokenizer
            .with_src_lang("qq_QQ")
            .map(|_| ())
            .map_err(|e| e.to_string());
        report.same(
            "an unknown language is an error",
            &unknown.is_err_and(|e| e.contains(lang)),
            &true,
        );
    }
    Ok(())
}

#[test]
fn families_equal_transformers() {
    let (mut count, mut wrong) = (0, Vec::new());
    let mut names: Vec<String> = std::fs::read_dir(fixtures().join("families"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let only = std::env::var("FAMILY").ok();
    for name in names
        .iter()
        .filter(|name| only.as_ref().is_none_or(|only| only == *name))
    {
        let path = fixtures().join("families").join(name).join("golden.json");
        let golden: Golden = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let mut report = Report::default();
        if let Err(error) = load(name).and_then(|tokenizer| compare(&tokenizer, &golden, &mut report)) {
            report.wrong.push(error.to_string());
        }
        println!(
            "{name}: {} comparisons, {} differ",
            report.count,
            report.wrong.len()
        );
        count += report.count;
        wrong.extend(report.wrong.into_iter().map(|what| format!("{name}: {what}")));
    }
    println!("{count} comparisons");
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}
