//! File names from outside, and the choice of the files that make a model.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::{Error, Result};

/// Quantizations in the order in which one is chosen when a repository has several and none was named: the
/// usual balance of size and quality first.
const QUANTS: [&str; 12] = [
    "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q4_0", "Q4_1", "Q6_K", "Q8_0", "IQ4_XS", "IQ4_NL", "MXFP4", "BF16", "F16",
];

/// Folders of a repository that hold the same model for other programs, or the state of its training.
const FOREIGN: [&str; 9] = [
    "onnx",
    "openvino",
    "coreml",
    "original",
    "runs",
    "metal",
    "tf",
    "flax",
    "gguf-metadata",
];

/// Refuses names that could lead outside of the folder they are to be put in, on any system.
pub(crate) fn safe<'a>(name: &'a str, place: &str) -> Result<&'a str> {
    let unsafe_part =
        |part: &str| part.is_empty() || part == "." || part == ".." || part.contains([':', '\\', '\0']);
    if name.is_empty() || name.len() > 1024 || name.split('/').any(unsafe_part) {
        return Err(Error::UnsafePath {
            place: place.into(),
            name: name.into(),
        });
    }
    Ok(name)
}

/// The last component of a name with `/`.
pub(crate) fn base(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

pub(crate) fn is_gguf(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".gguf")
}

/// True for files that hold weights in any container known here.
pub(crate) fn is_weights(name: &str) -> bool {
    let file = base(name);
    is_gguf(file)
        || file.ends_with(".safetensors")
        || file.ends_with(".onnx")
        || (file.ends_with(".bin") && (file.starts_with("pytorch_model") || file == "model.bin"))
}

/// The files of a model among those of a repository.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Selection {
    /// Configuration, tokenizer, templates.
    pub small: Vec<String>,
    pub weights: Weights,
}

/// The files that hold the weights.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Weights {
    /// These.
    Files(Vec<String>),
    /// Those that this index (one of the small files) names.
    Index(String),
}

/// Chooses the files to fetch from `names`. With `wanted`, that file (or the GGUF of that quantization) is
/// the weights. Safetensors come before PyTorch files, and these before GGUF.
pub(crate) fn select(names: &[String], wanted: Option<&str>, place: &str) -> Result<Selection> {
    let has = |name: &str| names.iter().any(|other| other == name);
    if let Some(wanted) = wanted {
        let file = find(names, wanted, place)?;
        let small = if is_gguf(&file) {
            Vec::new()
        } else {
            small(names, "")
        };
        let small = small.into_iter().filter(|name| *name != file).collect();
        return Ok(Selection {
            small,
            weights: Weights::Files(parts(names, &file)),
        });
    }
    let root = |end: &str| -> Vec<String> {
        names
            .iter()
            .filter(|name| !name.contains('/') && name.ends_with(end))
            .cloned()
            .collect()
    };
    let mut kept_index = "";
    let weights = if has("model.safetensors") {
        Weights::Files(vec!["model.safetensors".into()])
    } else if has("model.safetensors.index.json") {
        kept_index = "model.safetensors.index.json";
        Weights::Index(kept_index.into())
    } else if !root(".safetensors").is_empty() {
        Weights::Files(root(".safetensors"))
    } else if has("pytorch_model.bin") {
        Weights::Files(vec!["pytorch_model.bin".into()])
    } else if has("pytorch_model.bin.index.json") {
        kept_index = "pytorch_model.bin.index.json";
        Weights::Index(kept_index.into())
    } else if let Some(file) = preferred_gguf(names) {
        return Ok(Selection {
            small: Vec::new(),
            weights: Weights::Files(parts(names, &file)),
        });
    } else {
        let hint = format!("it holds {}", listed(names));
        return Err(Error::not_found(
            "a weight file (safetensors, pytorch_model.bin or GGUF)",
            place,
            hint,
        ));
    };
    let mut selection = Selection {
        small: small(names, kept_index),
        weights,
    };
    // Modules of sentence-transformers bring weights of their own, in folders such as `2_Dense`.
    if let Weights::Files(files) = &mut selection.weights {
        let module = |name: &&String| {
            name.split_once('/').is_some_and(|(folder, file)| {
                let old = || file == "pytorch_model.bin" && !has(&format!("{folder}/model.safetensors"));
                folder.starts_with(|first: char| first.is_ascii_digit())
                    && (file == "model.safetensors" || old())
            })
        };
        files.extend(names.iter().filter(module).cloned());
    }
    Ok(selection)
}

/// The shards that an index names; each must be one of the repository's files.
pub(crate) fn shards(index: &[u8], file: &str, names: &[String]) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|source| Error::Json {
        file: file.into(),
        source,
    })?;
    let mut shards: Vec<String> = index.weight_map.into_values().collect();
    shards.sort();
    shards.dedup();
    if let Some(missing) = shards.iter().find(|shard| !names.contains(shard)) {
        return Err(Error::not_found(
            missing.clone(),
            format!("the model, though {file} names it"),
            "",
        ));
    }
    Ok(shards)
}

/// Configuration, tokenizer, templates: everything small that a model may be made of. Of the indexes of
/// shards, only `index`.
fn small(names: &[String], index: &str) -> Vec<String> {
    const ENDS: [&str; 8] = [
        ".json",
        ".jinja",
        ".txt",
        ".model",
        ".tiktoken",
        ".yaml",
        ".vocab",
        ".npz",
    ];
    let wanted = |name: &&String| {
        let file = base(name);
        let folder = name.split('/').next().filter(|first| *first != file);
        let foreign = folder.is_some_and(|folder| {
            FOREIGN.contains(&folder) || folder.starts_with("checkpoint-") || folder.starts_with('.')
        });
        let other_index = name.ends_with(".index.json") && *name != index;
        !foreign
            && !other_index
            && ENDS.iter().any(|end| file.ends_with(end))
            && !file.starts_with('.')
            && !file.to_ascii_lowercase().starts_with("readme")
    };
    names.iter().filter(wanted).cloned().collect()
}

/// The file called `wanted`, or the one GGUF whose name contains it (`Q4_K_M`).
fn find(names: &[String], wanted: &str, place: &str) -> Result<String> {
    if let Some(name) = names.iter().find(|name| *name == wanted) {
        return Ok(name.clone());
    }
    let label = wanted.to_ascii_lowercase();
    let fits = |name: &&String| is_gguf(name) && is_first(name) && name.to_ascii_lowercase().contains(&label);
    let found: Vec<&String> = names
        .iter()
        .filter(fits)
        .filter(|name| !name.contains("mmproj"))
        .collect();
    match found.as_slice() {
        [one] => Ok((*one).clone()),
        [] => Err(Error::not_found(
            format!("the file {wanted:?}"),
            place,
            format!("it holds {}", listed(names)),
        )),
        many => {
            let many: Vec<String> = many.iter().map(|name| (*name).clone()).collect();
            Err(Error::not_found(
                format!("one single file {wanted:?}"),
                place,
                format!("name one of {}", listed(&many)),
            ))
        }
    }
}

fn preferred_gguf(names: &[String]) -> Option<String> {
    let all = || {
        names
            .iter()
            .filter(|name| is_gguf(name) && is_first(name) && !name.contains("mmproj"))
    };
    let quant = |name: &&String| {
        let name = name.to_ascii_uppercase();
        QUANTS
            .iter()
            .position(|quant| name.contains(quant))
            .unwrap_or(QUANTS.len())
    };
    all().min_by_key(quant).cloned()
}

/// `NAME-00001-of-00003.gguf` as prefix, number and rest.
fn split(name: &str) -> Option<(&str, &str, &str)> {
    let (head, count) = name.rsplit_once("-of-")?;
    let (prefix, number) = head.rsplit_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (digits(number) && digits(count.split('.').next()?)).then_some((prefix, number, count))
}

fn is_first(name: &str) -> bool {
    split(name).is_none_or(|(_, number, _)| number.parse() == Ok(1))
}

/// All parts of a split file, or the file itself.
fn parts(names: &[String], file: &str) -> Vec<String> {
    match split(file) {
        None => vec![file.to_owned()],
        Some((prefix, _, count)) => {
            let same = |name: &&String| split(name).is_some_and(|(p, _, c)| p == prefix && c == count);
            names.iter().filter(same).cloned().collect()
        }
    }
}

/// The first names of a list, for messages.
pub(crate) fn listed(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(String::as_str).collect();
    match names.len().checked_sub(SHOWN) {
        _ if names.is_empty() => "nothing".into(),
        None | Some(0) => shown.join(", "),
        Some(more) => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn names_that_lead_outside() {
        for bad in [
            "",
            "..",
            "../a",
            "a/../b",
            "/etc/passwd",
            "a//b",
            "a/./b",
            "C:/x",
            "a\\b",
            "a\0",
            "a/",
        ] {
            assert!(
                matches!(safe(bad, "archive"), Err(Error::UnsafePath { .. })),
                "{bad:?}"
            );
        }
        for good in ["a", "a/b.json", "..a/b..", "1_Pooling/config.json"] {
            assert_eq!(safe(good, "archive").unwrap(), good);
        }
    }

    #[test]
    fn safetensors_come_first() {
        let all = names(&[
            ".gitattributes",
            "README.md",
            "config.json",
            "tokenizer.json",
            "merges.txt",
            "model.safetensors",
            "pytorch_model.bin",
            "onnx/config.json",
            "onnx/model.onnx",
            "1_Pooling/config.json",
            "2_Dense/model.safetensors",
            "2_Dense/pytorch_model.bin",
            "3_Dense/pytorch_model.bin",
            "chat_template.jinja",
            "checkpoint-100/config.json",
            "model.gguf",
        ]);
        let selection = select(&all, None, "m").unwrap();
        let small = [
            "config.json",
            "tokenizer.json",
            "merges.txt",
            "1_Pooling/config.json",
            "chat_template.jinja",
        ];
        assert_eq!(selection.small, names(&small));
        assert_eq!(
            selection.weights,
            Weights::Files(names(&[
                "model.safetensors",
                "2_Dense/model.safetensors",
                "3_Dense/pytorch_model.bin",
            ]))
        );
    }

    #[test]
    fn shards_by_the_index() {
        let all = names(&[
            "config.json",
            "model.safetensors.index.json",
            "a.safetensors",
            "b.safetensors",
            "consolidated.safetensors",
            "pytorch_model.bin.index.json",
        ]);
        let selection = select(&all, None, "m").unwrap();
        assert_eq!(
            selection.weights,
            Weights::Index("model.safetensors.index.json".into())
        );
        assert_eq!(
            selection.small,
            names(&["config.json", "model.safetensors.index.json"])
        );
        let index = br#"{"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}"#;
        assert_eq!(
            shards(index, "i", &all).unwrap(),
            names(&["a.safetensors", "b.safetensors"])
        );
        let index = br#"{"weight_map": {"x": "../../etc/passwd"}}"#;
        assert!(
            shards(index, "i", &all)
                .unwrap_err()
                .to_string()
                .contains("was not found")
        );
        assert!(matches!(shards(b"{}", "i", &all), Err(Error::Json { .. })));
    }

    #[test]
    fn one_gguf_of_many() {
        let all = names(&[
            "m.Q2_K.gguf",
            "m.Q4_K_M.gguf",
            "m.Q8_0-00001-of-00002.gguf",
            "m.Q8_0-00002-of-00002.gguf",
            "mmproj-f16.gguf",
        ]);
        let weights = |wanted: Option<&str>| select(&all, wanted, "m").map(|selection| selection.weights);
        assert_eq!(weights(None).unwrap(), Weights::Files(names(&["m.Q4_K_M.gguf"])));
        let parts = names(&["m.Q8_0-00001-of-00002.gguf", "m.Q8_0-00002-of-00002.gguf"]);
        assert_eq!(weights(Some("q8_0")).unwrap(), Weights::Files(parts));
        assert_eq!(
            weights(Some("m.Q2_K.gguf")).unwrap(),
            Weights::Files(names(&["m.Q2_K.gguf"]))
        );
        assert!(
            weights(Some("Q3"))
                .unwrap_err()
                .to_string()
                .contains("m.Q2_K.gguf")
        );
        assert!(
            weights(Some("m.Q"))
                .unwrap_err()
                .to_string()
                .contains("name one of")
        );
        assert!(
            select(&names(&["config.json"]), None, "m")
                .unwrap_err()
                .to_string()
                .contains("weight file")
        );
    }
}
