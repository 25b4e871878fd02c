//! Files of inputs: a text or a row at a time.

use std::path::Path;

use anyhow::{Context, anyhow};
use oxiformers_data::{DataFile, SampleBy};
use serde_json::Value;

use crate::args::Format;

/// Inputs, one after the other.
pub type Records = Box<dyn Iterator<Item = anyhow::Result<Value>>>;

impl Format {
    /// As a file's name ends.
    pub fn of(path: &Path) -> Self {
        use oxiformers_data::Format as Data;
        match Data::of(path) {
            Some(Data::Jsonl) => Self::Jsonl,
            Some(Data::Csv) => Self::Csv,
            Some(Data::Parquet) => Self::Parquet,
            Some(Data::Txt) | None => Self::Txt,
        }
    }

    fn of_data(self) -> oxiformers_data::Format {
        match self {
            Self::Txt => oxiformers_data::Format::Txt,
            Self::Jsonl => oxiformers_data::Format::Jsonl,
            Self::Csv => oxiformers_data::Format::Csv,
            Self::Parquet => oxiformers_data::Format::Parquet,
        }
    }
}

/// The records of a file.
pub fn from_file(path: &Path, format: Format) -> anyhow::Result<Records> {
    let file = DataFile::new(path, Some(format.of_data()))?;
    Ok(values(file.records(SampleBy::Line)?))
}

fn values(records: oxiformers_data::Records) -> Records {
    Box::new(records.map(|record| Ok(record?.value)))
}

/// A table: a JSON file as it is, the records of any other.
pub fn table(path: &Path) -> anyhow::Result<Value> {
    let name = || path.display().to_string();
    if path.extension().is_some_and(|end| end == "json") {
        return serde_json::from_slice(&std::fs::read(path).with_context(name)?).with_context(name);
    }
    match Format::of(path) {
        Format::Txt => Err(anyhow!(
            "{}: a table is a file whose name ends in csv, json, jsonl or parquet",
            name()
        )),
        format => from_file(path, format)?.collect(),
    }
}

/// The records of standard input.
pub fn from_stdin(format: Format) -> anyhow::Result<Records> {
    if format == Format::Parquet {
        return Err(anyhow!(
            "--format parquet: such a file cannot be read from a pipe; name it with --file"
        ));
    }
    let records = oxiformers_data::read(
        std::io::stdin(),
        format.of_data(),
        SampleBy::Line,
        "standard input",
    );
    Ok(values(records?))
}

#[cfg(all(test, feature = "parquet"))]
mod tests {
    use super::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures")
            .join(name)
    }

    #[test]
    fn parquet_has_rows_of_every_type() {
        let expected: Vec<Value> =
            serde_json::from_slice(&std::fs::read(fixture("rows.json")).unwrap()).unwrap();
        for compression in ["none", "snappy", "gzip", "zstd"] {
            let path = fixture(&format!("rows-{compression}.parquet"));
            let rows = from_file(&path, Format::of(&path)).unwrap();
            let rows: Vec<Value> = rows.collect::<anyhow::Result<_>>().unwrap();
            assert_eq!(rows, expected, "{compression}");
        }
    }
}
