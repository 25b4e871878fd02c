//! Checkpoints of every container against what Python wrote into them, and broken ones against nothing at all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use oxiformers_hub::checkpoint::Checkpoint;
use oxiformers_hub::checkpoint::gguf::Value;
use oxiformers_hub::{Error, ModelFiles, Result};
use serde::Deserialize;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints")
}

fn fixture(name: &str) -> Bytes {
    std::fs::read(fixtures().join(name)).unwrap().into()
}

/// All fixtures whose name passes.
fn names(wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(fixtures())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| wanted(name))
        .collect();
    names.sort();
    names
}

fn files<'a>(files: impl IntoIterator<Item = (&'a str, Bytes)>) -> ModelFiles {
    ModelFiles::from_memory(
        "model",
        files.into_iter().map(|(name, bytes)| (name.to_string(), bytes)),
    )
}

/// Opens a file alone, and reads every tensor: what is checked of hostile files.
fn read_all(name: &str, bytes: Bytes) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(&files([(name, bytes)]))?;
    for info in checkpoint.tensors() {
        let view = checkpoint.tensor(&info.name)?;
        assert_eq!(
            Some(view.data.len()),
            view.dtype.num_bytes(&view.shape),
            "{name}: {}",
            info.name
        );
    }
    Ok(checkpoint)
}

#[derive(Deserialize)]
struct Expected {
    dtype: String,
    shape: Vec<usize>,
    data: String,
}

type Tensors = BTreeMap<String, Expected>;

fn expected() -> BTreeMap<String, Tensors> {
    serde_json::from_slice(&fixture("expected.json")).unwrap()
}

fn compare(checkpoint: &Checkpoint, expected: &Tensors, place: &str) {
    let mut found: Vec<_> = checkpoint.tensors().map(|info| info.name.as_str()).collect();
    found.sort_unstable();
    assert_eq!(found, expected.keys().collect::<Vec<_>>(), "{place}");
    for (name, expected) in expected {
        let info = checkpoint.info(name).unwrap();
        let view = checkpoint.tensor(name).unwrap();
        assert_eq!((view.dtype, &view.shape), (info.dtype, &info.shape));
        assert_eq!(view.dtype.name(), expected.dtype, "{place}: {name}");
        assert_eq!(view.shape, expected.shape, "{place}: {name}");
        let hex: String = view.data.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected.data, "{place}: {name}");
    }
}

#[test]
fn single_files_hold_what_python_wrote() {
    let mut compared = 0;
    for (name, tensors) in expected() {
        if !name.starts_with("split-") {
            compare(&read_all(&name, fixture(&name)).unwrap(), &tensors, &name);
            compared += 1;
        }
    }
    assert!(compared >= 29, "{compared} files were compared");
}

#[test]
fn shards_are_one_checkpoint() {
    let all = expected();
    for (shards, index, whole) in [
        (
            [
                "pytorch_model-00001-of-00002.bin",
                "pytorch_model-00002-of-00002.bin",
            ],
            "pytorch_model.bin.index.json",
            "dtypes.zip.bin",
        ),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ],
            "model.safetensors.index.json",
            "dtypes.safetensors",
        ),
    ] {
        let present = shards
            .into_iter()
            .chain([index])
            .map(|name| (name, fixture(name)));
        let checkpoint = Checkpoint::open(&files(present)).unwrap();
        compare(&checkpoint, &all[whole], index);
        let missing = files([(index, fixture(index)), (shards[0], fixture(shards[0]))]);
        let error = Checkpoint::open(&missing).err().unwrap().to_string();
        assert!(error.contains(shards[1]) && error.contains("model"), "{error}");
    }
    let parts = ["split-00001-of-00002.gguf", "split-00002-of-00002.gguf"];
    let checkpoint = Checkpoint::open(&files(parts.map(|name| (name, fixture(name))))).unwrap();
    compare(&checkpoint, &all["v3.gguf"], "split");
    assert_eq!(checkpoint.gguf().unwrap().get_u64("test.u8"), Some(200));
    let error = Checkpoint::open(&files([(parts[0], fixture(parts[0]))]))
        .err()
        .unwrap();
    assert!(error.to_string().contains(parts[1]), "{error}");
}

#[test]
fn the_same_from_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    // Large enough to be mapped.
    let padded = {
        let mut json = br#"{"w":{"dtype":"F32","shape":[30000],"data_offsets":[0,120000]}}"#.to_vec();
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json);
        bytes.extend((0..30000u32).flat_map(|n| (n as f32).to_le_bytes()));
        bytes
    };
    std::fs::write(folder.path().join("model.safetensors"), padded).unwrap();
    let checkpoint = Checkpoint::open(&ModelFiles::from_dir(folder.path()).unwrap()).unwrap();
    let view = checkpoint.tensor("w").unwrap();
    assert_eq!(view.data[4 * 29999..], 29999f32.to_le_bytes());
    let error = checkpoint.tensor("v").unwrap_err().to_string();
    assert!(error.contains("`v`"), "{error}");
    let single = ModelFiles::from_file(&fixtures().join("strided.zip.bin")).unwrap();
    compare(
        &Checkpoint::open(&single).unwrap(),
        &expected()["strided.zip.bin"],
        "from_file",
    );
}

#[test]
fn metadata_of_gguf() {
    for name in ["v2.gguf", "v3.gguf"] {
        let checkpoint = read_all(name, fixture(name)).unwrap();
        let metadata = checkpoint.gguf().unwrap();
        assert_eq!(metadata.get_str("general.architecture"), Some("llama"));
        assert_eq!(metadata.get_u64("test.u8"), Some(200));
        assert_eq!(metadata.get("test.i8"), Some(&Value::I64(-100)));
        assert_eq!(metadata.get_u64("test.u16"), Some(60000));
        assert_eq!(metadata.get("test.i16"), Some(&Value::I64(-30000)));
        assert_eq!(metadata.get_u64("test.u32"), Some(4_000_000_000));
        assert_eq!(metadata.get("test.i32"), Some(&Value::I64(-2_000_000_000)));
        assert_eq!(metadata.get_u64("test.u64"), Some((1 << 63) + 1));
        assert_eq!(metadata.get("test.i64"), Some(&Value::I64(-(1 << 62))));
        assert_eq!(metadata.get_f64("test.f32"), Some(0.25));
        assert_eq!(metadata.get_f64("test.f64"), Some(0.1));
        assert_eq!(metadata.get_bool("test.bool"), Some(true));
        assert_eq!(metadata.get_str("test.string"), Some("Grüße, 世界"));
        assert_eq!(metadata.get_strings("test.strings").unwrap(), ["a", "", "ü"]);
        assert_eq!(metadata.get_integers("test.ints").unwrap(), [1, -2, 3]);
        assert_eq!(metadata.get_numbers("test.floats").unwrap(), [0.5, -1.5]);
        assert_eq!(metadata.get_bools("test.bools").unwrap(), [true, false, true]);
        let nested = Value::Arrays(vec![Value::Integers(vec![1, 2]), Value::Integers(vec![3])]);
        assert_eq!(metadata.get("test.nested"), Some(&nested));
    }
}

/// What each of the hostile PyTorch files is refused for.
const HOSTILE: &[(&str, &str)] = &[
    ("bytes", "18446744073709551615 bytes are wanted"),
    ("cycle", "contains itself"),
    ("itself", "contains itself"),
    ("big", "byte order"),
    ("deep", "nests more than"),
    ("deflated", "compressed"),
    ("dims", "other arguments"),
    ("empty", "0 are left"),
    ("eval", "`__builtin__.eval`"),
    ("inst", "`os.system`"),
    ("laughs", "too much memory"),
    ("legacy", "`posix.system`"),
    ("length", "less than its 4611686018427387904 elements"),
    ("load", "`torch.storage._load_from_bytes`"),
    ("marks", "too few values"),
    ("memo", "too few values"),
    ("missing", "`archive/data/7` is missing"),
    ("negative", "other arguments"),
    ("offset", "outside of its storage"),
    ("popen", "`subprocess.Popen`"),
    ("repeat", "repeats a storage"),
    ("script", "TorchScript"),
    ("shape", "outside of its storage"),
    ("shapes", "outside of its storage"),
    ("short", "cut short"),
    ("stride", "outside of its storage"),
    ("system", "`posix.system`"),
    ("system4", "`posix.system`"),
    ("text", "9223372036854775808 bytes are wanted"),
    ("twice", "stored twice"),
];

#[test]
fn hostile_pickles_are_refused_by_name() {
    assert_eq!(names(|name| name.starts_with("hostile.")).len(), HOSTILE.len());
    for (name, reason) in HOSTILE {
        let name = format!("hostile.{name}.bin");
        let error = read_all(&name, fixture(&name))
            .err()
            .unwrap_or_else(|| panic!("{name} was opened"));
        let message = error.to_string();
        assert!(
            message.contains(&name) && message.contains(reason),
            "{name}: {message}"
        );
        if reason.contains("system") {
            assert!(matches!(error, Error::Unsupported { .. }));
            assert!(
                message.contains("safetensors") && message.contains("nothing of it was run"),
                "{message}"
            );
        }
    }
}

#[test]
fn several_pytorch_files_need_a_name() {
    let several = files(["a.pt", "b.pt", "optimizer.pt"].map(|name| (name, fixture("fine.bin"))));
    let error = Checkpoint::open(&several).err().unwrap().to_string();
    assert!(error.contains("a.pt") && error.contains("b.pt"), "{error}");
    let only = files(["a.pt", "optimizer.pt", "training_args.bin"].map(|name| (name, fixture("fine.bin"))));
    assert_eq!(Checkpoint::open(&only).unwrap().tensors().count(), 1);
    assert!(matches!(
        Checkpoint::open(&files([("config.json", Bytes::new())])),
        Err(Error::NotFound { .. })
    ));
}

#[test]
fn shards_cannot_lead_outside() {
    for index in ["pytorch_model.bin.index.json", "model.safetensors.index.json"] {
        for name in [
            "../x",
            "/etc/passwd",
            "a/../../x",
            "..",
            ".",
            "",
            "a\\\\b",
            "C:\\\\x",
        ] {
            let json = format!(r#"{{"weight_map":{{"w":"{name}"}}}}"#);
            let error = Checkpoint::open(&files([(index, json.into())])).err().unwrap();
            assert!(matches!(error, Error::UnsafePath { .. }), "{index}: {error}");
            assert!(error.to_string().contains(index), "{error}");
        }
        for json in [
            "{}".to_string(),
            "[]".to_string(),
            r#"{"weight_map":{"w":3}}"#.to_string(),
            "[".repeat(1 << 20),
            r#"{"weight_map":"#.to_string() + &r#"{"a":"#.repeat(1 << 18),
        ] {
            let error = Checkpoint::open(&files([(index, json.into())]))
                .err()
                .unwrap()
                .to_string();
            assert!(error.contains(index), "{error}");
        }
    }
}
