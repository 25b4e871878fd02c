//! Files of records: JSON Lines, CSV, Parquet, text; one at a time, each with the place that it comes from.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::str::{FromStr, Utf8Error};
use std::sync::Arc;

use csv_core::ReadRecordResult;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// A line longer than this is no record: somebody named the wrong file.
const MAX_LINE: u64 = 256 << 20;

/// How records stand in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A text per line.
    Txt,
    /// A JSON value per line.
    Jsonl,
    /// Rows under a line of names.
    Csv,
    /// Rows of columns.
    Parquet,
}

impl Format {
    /// As a file's name ends, `.gz` left aside; `None` for a name that says nothing.
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let name = name.strip_suffix(".gz").unwrap_or(&name);
        Some(match name.rsplit_once('.')?.1 {
            "jsonl" | "ndjson" | "json" => Self::Jsonl,
            "csv" => Self::Csv,
            "parquet" => Self::Parquet,
            "txt" | "text" => Self::Txt,
            _ => return None,
        })
    }

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Txt => "txt",
            Self::Jsonl => "jsonl",
            Self::Csv => "csv",
            Self::Parquet => "parquet",
        }
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let all = [Self::Txt, Self::Jsonl, Self::Csv, Self::Parquet];
        all.into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| {
                let message = format!("is `{text}`; it must be txt, jsonl, csv or parquet");
                Error::config("format", message)
            })
    }
}

/// What one record of a text file is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SampleBy {
    /// A line.
    #[default]
    Line,
    /// What stands between empty lines.
    Paragraph,
    /// The whole file.
    Document,
}

impl FromStr for SampleBy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "line" => Self::Line,
            "paragraph" => Self::Paragraph,
            "document" => Self::Document,
            _ => {
                let message = format!("is `{text}`; it must be line, paragraph or document");
                return Err(Error::config("sample_by", message));
            }
        })
    }
}

/// Where a record stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file, as it was named.
    pub file: Arc<str>,
    /// Line, or row of a Parquet file, counted from 1.
    pub line: u64,
    /// Whether `line` counts rows.
    pub rows: bool,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.rows { "row" } else { "line" };
        write!(f, "{}: {what} {}", self.file, self.line)
    }
}

impl Place {
    /// The error of a record that stands here.
    pub fn bad(&self, message: impl Into<String>) -> Error {
        Error::Data {
            place: self.to_string(),
            message: message.into(),
        }
    }
}

/// A record.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Where it stands.
    pub place: Place,
    /// A text, or what a JSON line holds, or a row as an object of columns.
    pub value: Value,
}

/// Records, one after the other. [`Error::Data`] is about one record, and the next ones follow; after any other error
/// there is nothing more to read.
pub type Records = Box<dyn Iterator<Item = Result<Record>> + Send>;

/// A file of records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// How it is named in messages.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// How records stand in it.
    pub format: Format,
}

impl DataFile {
    /// A file in the given format, or in the one that its name says.
    ///
    /// # Errors
    /// Where the name does not say how records stand in it.
    pub fn new(path: &Path, format: Option<Format>) -> Result<Self> {
        let name = path.display().to_string();
        let format = format.or_else(|| Format::of(path)).ok_or_else(|| {
            let message =
                "ends in none of .jsonl, .csv, .parquet, .txt (or .gz after one of these); say its format";
            Error::format(&name, message)
        })?;
        Ok(Self {
            name,
            path: path.to_path_buf(),
            format,
        })
    }

    /// Its records.
    ///
    /// # Errors
    /// Where the file cannot be opened, or is not what its format says.
    pub fn records(&self, sample_by: SampleBy) -> Result<Records> {
        let file = File::open(&self.path).map_err(Error::io(&self.path))?;
        if self.format == Format::Parquet {
            return parquet_rows(file, &self.name);
        }
        let plain: Box<dyn Read + Send> = match self.path.extension().is_some_and(|end| end == "gz") {
            true => Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(file))),
            false => Box::new(file),
        };
        read(plain, self.format, sample_by, &self.name)
    }
}

/// The records that a reader gives (a pipe, say); `name` is what messages call it.
///
/// # Errors
/// Where the format cannot be read from a pipe, or a CSV file has no line of names.
pub fn read(
    reader: impl Read + Send + 'static,
    format: Format,
    sample_by: SampleBy,
    name: &str,
) -> Result<Records> {
    let lines = Lines {
        reader: BufReader::with_capacity(1 << 18, reader),
        file: name.into(),
        line: 0,
    };
    Ok(match (format, sample_by) {
        (Format::Txt, SampleBy::Line) => Box::new(lines.map(|line| {
            let (place, text) = line?;
            Ok(Record {
                place,
                value: text.into(),
            })
        })),
        (Format::Txt, _) => Box::new(Paragraphs {
            lines,
            whole: sample_by == SampleBy::Document,
            ended: false,
        }),
        (Format::Jsonl, _) => Box::new(lines.filter_map(json_line)),
        (Format::Csv, _) => csv_rows(lines.reader, name)?,
        (Format::Parquet, _) => {
            return Err(Error::format(
                name,
                "Parquet cannot be read from a pipe; name a file",
            ));
        }
    })
}

/// Lines without their ends, and where they stand.
struct Lines<R> {
    reader: BufReader<R>,
    file: Arc<str>,
    line: u64,
}

impl<R: Read> Iterator for Lines<R> {
    type Item = Result<(Place, String)>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut bytes = Vec::new();
        self.line += 1;
        let place = Place {
            file: self.file.clone(),
            line: self.line,
            rows: false,
        };
        match (&mut self.reader).take(MAX_LINE).read_until(b'\n', &mut bytes) {
            Ok(0) => return None,
            Ok(read) if read as u64 == MAX_LINE && bytes.last() != Some(&b'\n') => {
                let message = format!("is longer than {} MiB, and no record", MAX_LINE >> 20);
                return Some(Err(Error::format(place.to_string(), message)));
            }
            Ok(_) => {}
            Err(error) => return Some(Err(Error::format(place.to_string(), error.to_string()))),
        }
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
            if bytes.last() == Some(&b'\r') {
                bytes.pop();
            }
        }
        if self.line == 1 && bytes.starts_with(b"\xef\xbb\xbf") {
            bytes.drain(..3);
        }
        Some(match String::from_utf8(bytes) {
            Ok(text) => Ok((place, text)),
            Err(error) => {
                let at = error.utf8_error().valid_up_to();
                Err(place.bad(format!("is not UTF-8 (at byte {at} of the line)")))
            }
        })
    }
}

/// Texts of several lines.
struct Paragraphs<R> {
    lines: Lines<R>,
    /// The whole file is one.
    whole: bool,
    ended: bool,
}

impl<R: Read> Iterator for Paragraphs<R> {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        let (mut text, mut begins) = (String::new(), None);
        while !self.ended {
            match self.lines.next() {
                None => self.ended = true,
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok((_, line))) if !self.whole && line.trim().is_empty() => {
                    if begins.is_some() {
                        break;
                    }
                }
                Some(Ok((place, line))) => {
                    if begins.is_none() {
                        begins = Some(place);
                    } else {
                        text.push('\n');
                    }
                    text.push_str(&line);
                }
            }
        }
        let place = begins?;
        Some(Ok(Record {
            place,
            value: text.into(),
        }))
    }
}

/// Empty lines, as at the end of many files, hold no record.
fn json_line(line: Result<(Place, String)>) -> Option<Result<Record>> {
    let (place, text) = match line {
        Ok(line) => line,
        Err(error) => return Some(Err(error)),
    };
    if text.trim().is_empty() {
        return None;
    }
    Some(match serde_json::from_str(&text) {
        Ok(value) => Ok(Record { place, value }),
        // The line within a line is always 1.
        Err(error) => Err(place.bad(format!(
            "is no JSON: {}",
            error.to_string().replace(" at line 1 column", " at column")
        ))),
    })
}

fn csv_rows(reader: impl Read + Send + 'static, name: &str) -> Result<Records> {
    let mut rows = CsvRows {
        reader: csv_core::Reader::new(),
        input: BufReader::new(reader),
    };
    let names = match rows.next() {
        Ok(Some(Ok(names))) => names,
        Ok(None) => return Err(Error::format(name, "has no line of names")),
        Ok(Some(Err(error))) => return Err(Error::format(name, format!("is not UTF-8: {error}"))),
        Err(error) => return Err(Error::format(name, error.to_string())),
    };
    let file: Arc<str> = name.into();
    Ok(Box::new(std::iter::from_fn(move || {
        let place = Place {
            file: file.clone(),
            line: rows.reader.line(),
            rows: false,
        };
        let row = match rows.next() {
            Ok(row) => row?,
            Err(error) => return Some(Err(Error::format(place.to_string(), error.to_string()))),
        };
        let row = match row {
            Ok(row) => row,
            Err(error) => return Some(Err(place.bad(format!("is not UTF-8: {error}")))),
        };
        if row.len() != names.len() {
            let message = format!(
                "has {} columns, and the first line names {}",
                row.len(),
                names.len()
            );
            return Some(Err(place.bad(message)));
        }
        let columns = names.iter().cloned().zip(row.into_iter().map(Value::from));
        Some(Ok(Record {
            place,
            value: Value::Object(columns.collect::<Map<_, _>>()),
        }))
    })))
}

/// Rows of a CSV file.
struct CsvRows<R> {
    reader: csv_core::Reader,
    input: BufReader<R>,
}

impl<R: Read> CsvRows<R> {
    /// The fields of the next row, if there is one and it is text.
    fn next(&mut self) -> io::Result<Option<Result<Vec<String>, Utf8Error>>> {
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
                ReadRecordResult::OutputFull if text.len() as u64 >= MAX_LINE => {
                    let message = format!("a row has more than {MAX_LINE} bytes; is a quote left open?");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, message));
                }
                ReadRecordResult::OutputFull => text.resize(text.len() * 2, 0),
                ReadRecordResult::OutputEndsFull => ends.resize(ends.len() * 2, 0),
                ReadRecordResult::Record => break,
                ReadRecordResult::End => return Ok(None),
            }
        }
        let begins = std::iter::once(&0).chain(&ends);
        let field =
            |(begin, end): (&usize, &usize)| std::str::from_utf8(&text[*begin..*end]).map(str::to_string);
        Ok(Some(begins.zip(&ends).take(fields).map(field).collect()))
    }
}

#[cfg(feature = "parquet")]
fn parquet_rows(file: File, name: &str) -> Result<Records> {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use parquet::file::reader::SerializedFileReader;

    /// The reader panics at some files that are broken.
    fn read<T>(read: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T, String> {
        match catch_unwind(AssertUnwindSafe(read)) {
            Ok(read) => read.map_err(|error| error.to_string()),
            Err(_) => Err("the file is broken".to_string()),
        }
    }

    let open = || SerializedFileReader::new(file);
    let mut rows = read(open)
        .map_err(|error| Error::format(name, error))?
        .into_iter();
    let file: Arc<str> = name.into();
    let (mut line, mut broken) = (0, false);
    Ok(Box::new(std::iter::from_fn(move || {
        if broken {
            return None;
        }
        line += 1;
        let place = Place {
            file: file.clone(),
            line,
            rows: true,
        };
        let row = read(|| rows.next().map(|row| Ok(row?.to_json_value())).transpose());
        broken = row.is_err();
        let row = row
            .map_err(|error| Error::format(place.to_string(), error))
            .transpose()?;
        Some(row.map(|value| Record { place, value }))
    })))
}

#[cfg(not(feature = "parquet"))]
fn parquet_rows(_: File, name: &str) -> Result<Records> {
    Err(Error::format(
        name,
        "this program was built without its feature `parquet`",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn all(text: &[u8], format: Format, sample_by: SampleBy) -> Vec<Result<(u64, Value), String>> {
        let records = read(std::io::Cursor::new(text.to_vec()), format, sample_by, "f").expect("records");
        let record = |record: Result<Record>| match record {
            Ok(record) => Ok((record.place.line, record.value)),
            Err(error) => Err(error.to_string()),
        };
        records.map(record).collect()
    }

    #[test]
    fn lines_paragraphs_documents() {
        let text = b"one\r\ntwo\n\n \nthree\nfour";
        let lines = all(text, Format::Txt, SampleBy::Line);
        assert_eq!(lines.len(), 6);
        assert_eq!(lines[1], Ok((2, json!("two"))));
        let paragraphs = all(text, Format::Txt, SampleBy::Paragraph);
        assert_eq!(
            paragraphs,
            [Ok((1, json!("one\ntwo"))), Ok((5, json!("three\nfour")))]
        );
        let document = all(text, Format::Txt, SampleBy::Document);
        assert_eq!(document, [Ok((1, json!("one\ntwo\n\n \nthree\nfour")))]);
        assert!(all(b"", Format::Txt, SampleBy::Document).is_empty());
    }

    #[test]
    fn a_bad_line_is_named_and_the_next_one_follows() {
        let mut text: Vec<u8> = Vec::new();
        for _ in 1..70_000 {
            text.extend_from_slice(b"{\"text\": \"a\"}\n");
        }
        text.extend_from_slice(b"{\"text\": \n\n\xff\n{\"text\": \"b\"}\n");
        let records = all(&text, Format::Jsonl, SampleBy::Line);
        assert_eq!(records.len(), 69_999 + 3);
        let broken = records[69_999].clone().expect_err("broken");
        assert!(broken.starts_with("f: line 70000: is no JSON: EOF"), "{broken}");
        let bytes = records[70_000].clone().expect_err("bytes");
        assert!(bytes.starts_with("f: line 70002: is not UTF-8"), "{bytes}");
        assert_eq!(records[70_001], Ok((70_003, json!({"text": "b"}))));
    }

    #[test]
    fn rows_of_csv() {
        let text = b"text,label\n\"a\nb\",1\nonly\n\"c, d\",0\n";
        let rows = all(text, Format::Csv, SampleBy::Line);
        assert_eq!(rows[0], Ok((2, json!({"text": "a\nb", "label": "1"}))));
        let bad = rows[1].clone().expect_err("columns");
        assert_eq!(bad, "f: line 4: has 1 columns, and the first line names 2");
        assert_eq!(rows[2], Ok((5, json!({"text": "c, d", "label": "0"}))));
        assert!(read(std::io::empty(), Format::Csv, SampleBy::Line, "f").is_err());
    }

    #[test]
    fn names_say_the_format() {
        let of = |name: &str| Format::of(Path::new(name));
        assert_eq!(of("a/b.JSONL"), Some(Format::Jsonl));
        assert_eq!(of("b.csv.gz"), Some(Format::Csv));
        assert_eq!(of("b.bin"), None);
        assert_eq!(of("README"), None);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_records_or_errors(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            for format in [Format::Txt, Format::Jsonl, Format::Csv] {
                if let Ok(records) = read(std::io::Cursor::new(bytes.clone()), format, SampleBy::Line, "f") {
                    proptest::prop_assert!(records.count() <= bytes.len() + 1);
                }
            }
        }
    }
}
