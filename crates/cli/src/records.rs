//! Files of inputs: a text or a row at a time.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, anyhow};
use csv_core::ReadRecordResult;
use serde_json::{Map, Value};

use crate::args::Format;

/// Inputs, one after the other.
pub type Records = Box<dyn Iterator<Item = anyhow::Result<Value>>>;

impl Format {
    /// As a file's name ends.
    pub fn of(path: &Path) -> Self {
        match path.extension().and_then(|end| end.to_str()) {
            Some("jsonl" | "ndjson" | "json") => Self::Jsonl,
            Some("csv") => Self::Csv,
            Some("parquet") => Self::Parquet,
            _ => Self::Txt,
        }
    }
}

/// The records of a file.
pub fn from_file(path: &Path, format: Format) -> anyhow::Result<Records> {
    let name = path.display().to_string();
    let file = File::open(path).with_context(|| name.clone())?;
    match format {
        Format::Txt | Format::Jsonl => from_lines(BufReader::new(file), format, name),
        Format::Csv => from_csv(file, name),
        Format::Parquet => from_parquet(file, name),
    }
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
    let (stdin, name) = (std::io::stdin(), "standard input".to_string());
    match format {
        Format::Txt | Format::Jsonl => from_lines(BufReader::new(stdin), format, name),
        Format::Csv => from_csv(stdin, name),
        Format::Parquet => Err(anyhow!(
            "--format parquet: such a file cannot be read from a pipe; name it with --file"
        )),
    }
}

fn from_lines(lines: impl BufRead + 'static, format: Format, name: String) -> anyhow::Result<Records> {
    let record = move |(index, line): (usize, std::io::Result<String>)| {
        let place = || format!("{name}: line {}", index + 1);
        let line = line.with_context(place)?;
        match format {
            Format::Jsonl => serde_json::from_str(&line).with_context(place),
            _ => Ok(line.into()),
        }
    };
    Ok(Box::new(lines.lines().enumerate().map(record)))
}

#[cfg(feature = "parquet")]
fn from_parquet(file: File, name: String) -> anyhow::Result<Records> {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// The reader panics at some files that are broken.
    fn read<T>(read: impl FnOnce() -> parquet::errors::Result<T>) -> anyhow::Result<T> {
        match catch_unwind(AssertUnwindSafe(read)) {
            Ok(read) => Ok(read?),
            Err(_) => Err(anyhow!("the file is broken")),
        }
    }

    let open = || parquet::file::reader::SerializedFileReader::new(file);
    let mut rows = read(open).with_context(|| name.clone())?.into_iter();
    let (mut number, mut broken) = (0, false);
    Ok(Box::new(std::iter::from_fn(move || {
        if broken {
            return None;
        }
        number += 1;
        let row = read(|| rows.next().map(|row| Ok(row?.to_json_value())).transpose());
        broken = row.is_err();
        row.with_context(|| format!("{name}: row {number}")).transpose()
    })))
}

#[cfg(not(feature = "parquet"))]
fn from_parquet(_: File, name: String) -> anyhow::Result<Records> {
    Err(anyhow!(
        "{name}: this program was built without Parquet; build it with --features parquet"
    ))
}

fn from_csv(rows: impl Read + 'static, name: String) -> anyhow::Result<Records> {
    let mut rows = Rows {
        reader: csv_core::Reader::new(),
        input: BufReader::new(rows),
    };
    let Some(names) = rows.next().with_context(|| name.clone())? else {
        return Err(anyhow!("{name}: has no line of names"));
    };
    let mut number = 0;
    Ok(Box::new(std::iter::from_fn(move || {
        number += 1;
        let place = || format!("{name}: row {number}");
        let row = match rows.next().with_context(place) {
            Ok(row) => row?,
            Err(error) => return Some(Err(error)),
        };
        if row.len() != names.len() {
            let message = format!(
                "{}: has {} columns, and the first line names {}",
                place(),
                row.len(),
                names.len()
            );
            return Some(Err(anyhow!(message)));
        }
        let columns = names.iter().cloned().zip(row.into_iter().map(Value::from));
        Some(Ok(Value::Object(columns.collect::<Map<_, _>>())))
    })))
}

/// Rows of a CSV file.
struct Rows<R> {
    reader: csv_core::Reader,
    input: BufReader<R>,
}

impl<R: Read> Rows<R> {
    /// The next row, if there is one.
    fn next(&mut self) -> anyhow::Result<Option<Vec<String>>> {
        let (mut text, mut ends) = (vec![0; 1 << 10], vec![0; 16]);
        let (mut written, mut fields) = (0, 0);
        loop {
            let input = self.input.fill_buf()?;
            let (result, read, wrote, ended) =
                self.reader
                    .read_record(input, &mut text[written..], &mut ends[fields..]);
            self.input.consume(read);
            (written, fields) = (written + wrote, fields + ended);
            match result {
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull => text.resize(text.len() * 2, 0),
                ReadRecordResult::OutputEndsFull => ends.resize(ends.len() * 2, 0),
                ReadRecordResult::Record => break,
                ReadRecordResult::End => return Ok(None),
            }
        }
        let begins = std::iter::once(&0).chain(&ends);
        let field =
            |(begin, end): (&usize, &usize)| Ok(std::str::from_utf8(&text[*begin..*end])?.to_string());
        Ok(Some(
            begins
                .zip(&ends)
                .take(fields)
                .map(field)
                .collect::<anyhow::Result<_>>()?,
        ))
    }
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
