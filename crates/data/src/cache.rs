//! Examples on the disk: made once, mapped into memory.
//!
//! A cache is a folder named by the SHA-256 of everything that its examples depend on. Its parts are safetensors files:
//! of each column the values of all examples one after the other (`NAME`, I32 or F32), and where each example begins
//! (`NAME.offsets`, U64, one more than there are examples). A part comes into being whole or not at all and says which
//! records it was made of, so work that was interrupted goes on after the last part. `dataset.json` says that all are
//! there.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use oxiformers_hub::OutputFile;
use rayon::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::example::{Example, Values};
use crate::records::{DataFile, Record, SampleBy};
use crate::{Error, Result};

/// Changes where the same data would give another cache.
const VERSION: u32 = 1;

/// Records that are worked on at a time.
const RECORDS: usize = 512;

/// A part is written once it has this many values.
const PART_VALUES: usize = 16 << 20;

/// How many bad records are named in the end; all are counted.
const NAMED: usize = 20;

/// Turns records into examples.
pub trait Preprocessor: Sync {
    /// Everything that the examples depend on besides the records: the tokenizer, names of columns, lengths.
    fn settings(&self) -> Value;

    /// The examples of a record; several where it is read in windows, none where there is nothing to learn.
    ///
    /// # Errors
    /// What is wrong with the record: the field, what was found and what was expected.
    fn examples(&self, record: &Value) -> Result<Vec<Example>, String>;
}

/// What to do with a record that nothing can be made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BadData {
    /// Stop and name it.
    #[default]
    Stop,
    /// Leave it out, count it and name it.
    Skip,
}

impl std::str::FromStr for BadData {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "stop" => Ok(Self::Stop),
            "skip" => Ok(Self::Skip),
            _ => Err(Error::config(
                "bad_data",
                format!("is `{text}`; it must be stop or skip"),
            )),
        }
    }
}

/// How a cache is made.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// The folder in which caches lie.
    pub folder: PathBuf,
    /// What one record of a text file is.
    pub sample_by: SampleBy,
    /// What to do with bad records.
    pub bad_data: BadData,
    /// At most this many records are read.
    pub max_records: Option<u64>,
}

/// How far the work is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Records that were read.
    pub records: u64,
    /// Examples that were made.
    pub examples: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Records that were left out.
    pub skipped: u64,
}

/// What is known of a whole cache.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Prepared {
    /// Records that were read.
    pub records: u64,
    /// Records that were left out.
    pub skipped: u64,
    /// The first of these, named.
    pub bad: Vec<String>,
    /// Files of examples.
    pub parts: usize,
    /// The files that the records stand in.
    pub files: Vec<String>,
}

/// Which records a part was made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Origin {
    first: u64,
    next: u64,
    skipped: u64,
    bad: Vec<String>,
}

/// The examples of `files`, made unless the cache has them. `report` hears how far it is and may stop it; what was made
/// is kept, and the next call goes on from there.
///
/// # Errors
/// A file that cannot be read or written, a bad record if these are to stop, [`Error::Interrupted`] where `report` says so.
pub fn prepare(
    files: &[DataFile],
    preprocessor: &dyn Preprocessor,
    options: &CacheOptions,
    report: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<TokenCache> {
    let root = options.folder.as_path();
    std::fs::create_dir_all(root).map_err(Error::io(root))?;
    let mut contents = Vec::new();
    for file in files {
        contents.push(json!([file.format.name(), content(root, &file.path)?]));
    }
    let key = json!({
        "version": VERSION,
        "files": contents,
        "sample_by": format!("{:?}", options.sample_by),
        "bad_data": options.bad_data,
        "max_records": options.max_records,
        "settings": preprocessor.settings(),
    });
    let folder = root.join(hex(&Sha256::digest(key.to_string())));
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    // Another process that makes the same is waited for.
    let lock = folder.join(".lock");
    let lock = File::create(&lock).map_err(Error::io(&lock))?;
    lock.lock().map_err(Error::io(&folder))?;
    if !folder.join(DATASET).is_file() {
        let mut work = Work::resume(&folder)?;
        work.run(files, preprocessor, options, report)?;
    }
    TokenCache::open(&folder)
}

/// Says that a cache is whole.
const DATASET: &str = "dataset.json";

fn part_name(index: usize) -> String {
    format!("part-{index:05}.safetensors")
}

/// A cache that is being made.
struct Work<'a> {
    folder: &'a Path,
    parts: usize,
    /// Records that are done.
    next: u64,
    skipped: u64,
    bad: Vec<String>,
    progress: Progress,
    buffer: Buffer,
}

impl<'a> Work<'a> {
    /// Goes on after the parts that are there.
    fn resume(folder: &'a Path) -> Result<Self> {
        let mut work = Self {
            folder,
            parts: 0,
            next: 0,
            skipped: 0,
            bad: Vec::new(),
            progress: Progress::default(),
            buffer: Buffer::default(),
        };
        // Left by a process that was killed.
        for entry in std::fs::read_dir(folder).map_err(Error::io(folder))?.flatten() {
            if entry.file_name().to_string_lossy().ends_with(".part") {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        loop {
            let path = folder.join(part_name(work.parts));
            if !path.is_file() {
                return Ok(work);
            }
            let part = Part::open(&path)?;
            if part.origin.first != work.next {
                let message = "does not follow the part before it; remove this folder, and it is made anew";
                return Err(Error::format(path.display().to_string(), message));
            }
            work.next = part.origin.next;
            work.skipped += part.origin.skipped;
            work.bad.extend(part.origin.bad);
            work.progress.examples += part.examples as u64;
            work.parts += 1;
        }
    }

    fn run(
        &mut self,
        files: &[DataFile],
        preprocessor: &dyn Preprocessor,
        options: &CacheOptions,
        report: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<()> {
        let (mut first, mut skipped_before, mut bad_before) = (self.next, self.skipped, self.bad.len());
        let mut read = 0;
        let numbers: HashMap<&str, i32> = files.iter().map(|file| file.name.as_str()).zip(0..).collect();
        let mut records = files
            .iter()
            .map(|file| file.records(options.sample_by))
            .flat_map(|records| -> Box<dyn Iterator<Item = Result<Record>>> {
                match records {
                    Ok(records) => records,
                    Err(error) => Box::new(std::iter::once(Err(error))),
                }
            })
            .take(
                options
                    .max_records
                    .map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX)),
            );
        loop {
            let chunk: Vec<_> = records.by_ref().take(RECORDS).collect();
            let ended = chunk.len() < RECORDS;
            let made: Vec<_> = (chunk.into_par_iter().enumerate())
                // Records that a part was made of before.
                .filter(|(index, _)| read + *index as u64 >= self.next)
                .map(|(index, record)| {
                    (
                        index,
                        record.and_then(|record| examples(preprocessor, &record, &numbers)),
                    )
                })
                .collect();
            let begin = read;
            for (index, made) in made {
                read = begin + index as u64 + 1;
                self.take(made, options.bad_data)?;
            }
            read = read.max(begin + if ended { 0 } else { RECORDS as u64 });
            self.next = self.next.max(read);
            self.progress.records = self.next;
            self.progress.skipped = self.skipped;
            let stop = report(self.progress).is_break();
            if self.buffer.values >= PART_VALUES || ended || stop {
                let origin = Origin {
                    first,
                    next: self.next,
                    skipped: self.skipped - skipped_before,
                    bad: self.bad.split_off(bad_before),
                };
                if self.buffer.examples > 0 || origin.skipped > 0 {
                    self.buffer
                        .write(&self.folder.join(part_name(self.parts)), &origin)?;
                    self.parts += 1;
                    first = self.next;
                }
                self.bad.extend(origin.bad);
                (skipped_before, bad_before) = (self.skipped, self.bad.len());
            }
            if ended {
                break;
            }
            if stop {
                return Err(Error::Interrupted);
            }
        }
        let dataset = Prepared {
            records: self.next,
            skipped: self.skipped,
            bad: std::mem::take(&mut self.bad),
            parts: self.parts,
            files: files.iter().map(|file| file.name.clone()).collect(),
        };
        let path = self.folder.join(DATASET);
        let text = serde_json::to_vec_pretty(&dataset).map_err(json_error(&path))?;
        let mut file = OutputFile::create(&path)?;
        file.write_all(&text).map_err(Error::io(&path))?;
        Ok(file.finish()?)
    }

    fn take(&mut self, made: Result<Vec<Example>>, bad_data: BadData) -> Result<()> {
        match made {
            Ok(examples) => {
                for example in &examples {
                    self.progress.examples += 1;
                    self.progress.tokens += example.tokens() as u64;
                    self.buffer.push(example)?;
                }
                Ok(())
            }
            Err(error @ Error::Data { .. }) if bad_data == BadData::Skip => {
                tracing::warn!("left out: {error}");
                self.skipped += 1;
                if self.bad.len() < NAMED {
                    self.bad.push(error.to_string());
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// The column that says where an example comes from: the number of the file, and the line or row.
const SOURCE: &str = "source";

fn examples(
    preprocessor: &dyn Preprocessor,
    record: &Record,
    numbers: &HashMap<&str, i32>,
) -> Result<Vec<Example>> {
    let made = preprocessor.examples(&record.value);
    let made = made.map_err(|message| record.place.bad(message))?;
    let file = numbers.get(&*record.place.file).copied().unwrap_or(-1);
    let line = i32::try_from(record.place.line).unwrap_or(i32::MAX);
    Ok(made
        .into_iter()
        .map(|example| example.with(SOURCE, vec![file, line]))
        .collect())
}

/// Examples that are not yet on the disk, column by column.
#[derive(Default)]
struct Buffer {
    examples: usize,
    values: usize,
    columns: BTreeMap<String, (Values, Vec<u64>)>,
}

impl Buffer {
    fn push(&mut self, example: &Example) -> Result<()> {
        for (name, values) in example.columns() {
            let empty = || match values {
                Values::Ints(_) => (Values::Ints(Vec::new()), vec![0]),
                Values::Floats(_) => (Values::Floats(Vec::new()), vec![0]),
            };
            let (column, offsets) = self.columns.entry(name.to_string()).or_insert_with(empty);
            // Examples before had no such column.
            offsets.resize(self.examples + 1, column.len() as u64);
            match (&mut *column, values) {
                (Values::Ints(column), Values::Ints(values)) => column.extend(values),
                (Values::Floats(column), Values::Floats(values)) => column.extend(values),
                _ => {
                    return Err(Error::format(
                        name,
                        "is a whole number here and another number there",
                    ));
                }
            }
            offsets.push(column.len() as u64);
            self.values += values.len();
        }
        self.examples += 1;
        Ok(())
    }

    fn write(&mut self, path: &Path, origin: &Origin) -> Result<()> {
        let examples = self.examples;
        for (values, offsets) in self.columns.values_mut() {
            offsets.resize(examples + 1, values.len() as u64);
        }
        let broken = |error: safetensors::SafeTensorError| {
            Error::format(path.display().to_string(), error.to_string())
        };
        let mut views = Vec::new();
        for (name, (values, offsets)) in &self.columns {
            let (dtype, bytes) = match values {
                Values::Ints(values) => (Dtype::I32, bytemuck::cast_slice::<i32, u8>(values)),
                Values::Floats(values) => (Dtype::F32, bytemuck::cast_slice::<f32, u8>(values)),
            };
            let view = TensorView::new(dtype, vec![values.len()], bytes).map_err(broken)?;
            views.push((name.clone(), view));
            let bytes = bytemuck::cast_slice::<u64, u8>(offsets);
            let view = TensorView::new(Dtype::U64, vec![offsets.len()], bytes).map_err(broken)?;
            views.push((format!("{name}.offsets"), view));
        }
        let origin = serde_json::to_string(origin).map_err(json_error(path))?;
        let metadata = [
            ("origin".to_string(), origin),
            ("examples".to_string(), examples.to_string()),
        ];
        let bytes = safetensors::serialize(views, Some(metadata.into())).map_err(broken)?;
        let mut file = OutputFile::create(path)?;
        file.write_all(&bytes).map_err(Error::io(path))?;
        file.finish()?;
        *self = Self::default();
        Ok(())
    }
}

/// A part, mapped into memory.
struct Part {
    map: Mmap,
    path: PathBuf,
    origin: Origin,
    examples: usize,
    columns: Vec<Column>,
}

/// Where a column lies in the file.
struct Column {
    name: String,
    dtype: Dtype,
    values: Range<usize>,
    offsets: Range<usize>,
}

impl Part {
    fn open(path: &Path) -> Result<Self> {
        let broken = |message: &str| {
            let message = format!("{message}; remove its folder, and it is made anew");
            Error::format(path.display().to_string(), message)
        };
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the file is never changed after it has taken its place; one that somebody cuts short while it is read
        // ends the process, as with every mapped file.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let (_, header) = SafeTensors::read_metadata(&map).map_err(|error| broken(&error.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let field = |name: &str| {
            metadata
                .get(name)
                .ok_or_else(|| broken(&format!("has no `{name}`")))
        };
        let origin = serde_json::from_str(field("origin")?).map_err(|error| broken(&error.to_string()))?;
        let examples: usize = field("examples")?
            .parse()
            .map_err(|_| broken("has no number of `examples`"))?;
        let tensors = SafeTensors::deserialize(&map).map_err(|error| broken(&error.to_string()))?;
        let range = |bytes: &[u8]| {
            let begin = bytes.as_ptr() as usize - map.as_ptr() as usize;
            begin..begin + bytes.len()
        };
        let mut columns = Vec::new();
        for (name, view) in tensors.tensors() {
            if name.ends_with(".offsets") {
                continue;
            }
            let offsets = tensors
                .tensor(&format!("{name}.offsets"))
                .map_err(|error| broken(&error.to_string()))?;
            let fits = matches!(view.dtype(), Dtype::I32 | Dtype::F32)
                && offsets.dtype() == Dtype::U64
                && examples.checked_add(1) == offsets.shape().first().copied();
            if !fits {
                return Err(broken(&format!("the column `{name}` is not what it should be")));
            }
            columns.push(Column {
                name,
                dtype: view.dtype(),
                values: range(view.data()),
                offsets: range(offsets.data()),
            });
        }
        Ok(Self {
            path: path.to_path_buf(),
            origin,
            examples,
            columns,
            map,
        })
    }

    /// The values of a column in one example.
    fn slice(&self, column: &Column, index: usize) -> Result<&[u8]> {
        let offset = |index: usize| {
            let at = column.offsets.start + index * size_of::<u64>();
            let bytes = self.map.get(at..at + size_of::<u64>())?;
            usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
        };
        let bytes = || {
            let (begin, end) = (offset(index)?.checked_mul(4)?, offset(index + 1)?.checked_mul(4)?);
            self.map.get(column.values.clone())?.get(begin..end)
        };
        bytes().ok_or_else(|| {
            let message = format!(
                "example {index} lies outside of `{}`; remove its folder, and it is made anew",
                column.name
            );
            Error::format(self.path.display().to_string(), message)
        })
    }
}

/// Examples on the disk.
pub struct TokenCache {
    parts: Vec<Part>,
    /// Where the examples of each part begin, and where the last one's end.
    starts: Vec<u64>,
    /// What is known of it.
    pub prepared: Prepared,
    /// What it is called: the same for the same data, tokenizer and settings.
    pub key: String,
}

impl TokenCache {
    /// Opens a whole cache.
    ///
    /// # Errors
    /// Where a file is missing or not what it should be.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(DATASET);
        let text = std::fs::read(&path).map_err(Error::io(&path))?;
        let prepared: Prepared = serde_json::from_slice(&text).map_err(json_error(&path))?;
        let mut parts = Vec::new();
        let mut starts = vec![0];
        for index in 0..prepared.parts {
            let part = Part::open(&folder.join(part_name(index)))?;
            starts.push(starts[index] + part.examples as u64);
            parts.push(part);
        }
        let key = folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok(Self {
            parts,
            starts,
            prepared,
            key,
        })
    }

    /// Number of examples.
    pub fn len(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The example in place `index`.
    ///
    /// # Errors
    /// Where there is none, or the file is damaged.
    pub fn get(&self, index: u64) -> Result<Example> {
        let (part, index) = self.find(index)?;
        let mut example = Example::default();
        for column in &part.columns {
            let bytes = part.slice(column, index)?;
            let words = bytes.as_chunks::<4>().0.iter();
            let values = match column.dtype {
                Dtype::F32 => Values::Floats(words.map(|word| f32::from_le_bytes(*word)).collect()),
                _ => Values::Ints(words.map(|word| i32::from_le_bytes(*word)).collect()),
            };
            example = example.with_values(column.name.clone(), values);
        }
        Ok(example)
    }

    /// Where an example comes from, in words: file and line.
    pub fn source(&self, example: &Example) -> Option<String> {
        let [file, line] = example.ints(SOURCE)? else {
            return None;
        };
        let file = self.prepared.files.get(usize::try_from(*file).ok()?)?;
        Some(format!("{file}: line {line}"))
    }

    /// Number of values that a column has in an example; 0 where there is no such column.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn count(&self, column: &str, index: u64) -> Result<usize> {
        let (part, index) = self.find(index)?;
        match part.columns.iter().find(|found| found.name == column) {
            Some(column) => Ok(part.slice(column, index)?.len() / 4),
            None => Ok(0),
        }
    }

    /// Number of values that a column has in all examples.
    pub fn total(&self, column: &str) -> u64 {
        self.columns(column)
            .map(|(_, column)| column.values.len() as u64 / 4)
            .sum()
    }

    /// `len` values of a column, whatever examples they are of.
    ///
    /// # Errors
    /// Where there are less.
    pub fn stream(&self, column: &str, begin: u64, len: usize) -> Result<Vec<i32>> {
        let (mut skip, mut values) = (begin, Vec::with_capacity(len.min(1 << 20)));
        for (part, column) in self.columns(column) {
            let count = (column.values.len() / 4) as u64;
            if skip < count && values.len() < len {
                let words = part
                    .map
                    .get(column.values.clone())
                    .unwrap_or_default()
                    .as_chunks::<4>()
                    .0;
                let words = words.iter().skip(skip as usize).take(len - values.len());
                values.extend(words.map(|word| i32::from_le_bytes(*word)));
            }
            skip = skip.saturating_sub(count);
        }
        match values.len() == len {
            true => Ok(values),
            false => Err(Error::format(
                "the data",
                format!("there are no {len} tokens from token {begin} on"),
            )),
        }
    }

    /// The example that one of the values of a column is of, by its place among those of all examples.
    pub fn example_of(&self, column: &str, value: u64) -> Option<u64> {
        let (mut skip, mut before) = (value, 0);
        for (part, column) in self.columns(column) {
            let count = (column.values.len() / 4) as u64;
            if skip < count {
                let offsets = part.map.get(column.offsets.clone())?.as_chunks::<8>().0;
                let end = offsets.partition_point(|bytes| u64::from_le_bytes(*bytes) <= skip);
                return Some(before + (end as u64).checked_sub(1)?);
            }
            skip -= count;
            before += part.examples as u64;
        }
        None
    }

    /// Which example each of these values is of, counted from that of the first one.
    ///
    /// # Errors
    /// As [`stream`](Self::stream).
    pub fn segments(&self, column: &str, begin: u64, len: usize) -> Result<Vec<i32>> {
        let (mut skip, mut segments, mut segment) = (begin, Vec::with_capacity(len.min(1 << 20)), 0);
        for (part, column) in self.columns(column) {
            let count = (column.values.len() / 4) as u64;
            if skip < count && segments.len() < len {
                let offsets = part
                    .map
                    .get(column.offsets.clone())
                    .unwrap_or_default()
                    .as_chunks::<8>()
                    .0;
                let offset = |index: usize| offsets.get(index).map(|bytes| u64::from_le_bytes(*bytes));
                // The first example that ends behind the place.
                let mut example = offsets.partition_point(|bytes| u64::from_le_bytes(*bytes) <= skip);
                let mut at = skip;
                while let Some(end) = offset(example).filter(|_| segments.len() < len) {
                    let count = (end.saturating_sub(at) as usize).min(len - segments.len());
                    segments.extend(std::iter::repeat_n(segment, count));
                    segment += i32::from(count > 0);
                    (at, example) = (end, example + 1);
                }
            }
            skip = skip.saturating_sub(count);
        }
        match segments.len() == len {
            true => Ok(segments),
            false => Err(Error::format(
                "the data",
                format!("there are no {len} tokens from token {begin} on"),
            )),
        }
    }

    fn columns<'a>(&'a self, name: &str) -> impl Iterator<Item = (&'a Part, &'a Column)> {
        let of = move |part: &'a Part| Some((part, part.columns.iter().find(|column| column.name == name)?));
        self.parts.iter().filter_map(of)
    }

    fn find(&self, index: u64) -> Result<(&Part, usize)> {
        let part = self.starts.partition_point(|start| *start <= index);
        let found = part
            .checked_sub(1)
            .and_then(|part| Some((self.parts.get(part)?, self.starts[part])));
        let (part, start) = found.ok_or_else(|| {
            Error::format(
                "the data",
                format!("there is no example {index} among {}", self.len()),
            )
        })?;
        Ok((part, (index - start) as usize))
    }
}

/// The SHA-256 of a file's content. It is kept, so that a large file is read for it only once as long as it keeps its
/// size and time.
fn content(root: &Path, path: &Path) -> Result<String> {
    let about = path.metadata().map_err(Error::io(path))?;
    let time = about
        .modified()
        .ok()
        .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    let full = path.canonicalize().map_err(Error::io(path))?;
    let name = format!("{}\n{}\n{:?}", full.display(), about.len(), time);
    let known = root.join("contents").join(hex(&Sha256::digest(name)));
    if time.is_some()
        && let Ok(hash) = std::fs::read_to_string(&known)
        && hash.len() == 64
    {
        return Ok(hash);
    }
    let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(Error::io(path))?);
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(Error::io(path))? {
            0 => break,
            read => hash.update(&buffer[..read]),
        }
    }
    let hash = hex(&hash.finalize());
    let folder = root.join("contents");
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    let mut file = OutputFile::create(&known)?;
    file.write_all(hash.as_bytes()).map_err(Error::io(&known))?;
    file.finish()?;
    Ok(hash)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn json_error(path: &Path) -> impl FnOnce(serde_json::Error) -> Error {
    move |error| Error::format(path.display().to_string(), error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Format;

    /// A letter is a token, `!` is bad.
    struct Letters;

    impl Preprocessor for Letters {
        fn settings(&self) -> Value {
            json!("letters")
        }

        fn examples(&self, record: &Value) -> Result<Vec<Example>, String> {
            let text = record.as_str().unwrap_or_default();
            if text.contains('!') {
                return Err("shouts".to_string());
            }
            let ids: Vec<i32> = text.bytes().map(i32::from).collect();
            let example = Example::default().with("input_ids", ids);
            Ok(vec![match text.len() {
                3 => example.with_values("labels", Values::Floats(vec![0.5])),
                _ => example,
            }])
        }
    }

    fn options(folder: &Path, bad_data: BadData) -> CacheOptions {
        CacheOptions {
            folder: folder.join("cache"),
            sample_by: SampleBy::Line,
            bad_data,
            max_records: None,
        }
    }

    fn lines(folder: &Path, lines: impl Iterator<Item = String>) -> Vec<DataFile> {
        let path = folder.join("data.txt");
        std::fs::write(&path, lines.map(|line| line + "\n").collect::<String>()).expect("file");
        vec![DataFile::new(&path, Some(Format::Txt)).expect("file")]
    }

    #[test]
    fn work_goes_on_where_it_was_interrupted() {
        let folder = tempfile::tempdir().expect("folder");
        let files = lines(folder.path(), (0..5000).map(|i| format!("{i}")));
        let options = options(folder.path(), BadData::Stop);
        let mut calls = 0;
        let stopped = prepare(&files, &Letters, &options, &mut |_| {
            calls += 1;
            if calls == 4 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        assert!(matches!(stopped, Err(Error::Interrupted)));
        let mut first = None;
        let cache = prepare(&files, &Letters, &options, &mut |progress| {
            first.get_or_insert(progress.records);
            ControlFlow::Continue(())
        });
        let cache = cache.expect("cache");
        assert_eq!(first, Some(2048));
        assert_eq!(
            (cache.len(), cache.prepared.parts, cache.prepared.records),
            (5000, 2, 5000)
        );
        for index in [0, 9, 2047, 2048, 4999] {
            let text: Vec<u8> = format!("{index}").into_bytes();
            let example = cache.get(index).expect("example");
            let ids: Vec<i32> = text.iter().copied().map(i32::from).collect();
            assert_eq!(example.ints("input_ids"), Some(ids.as_slice()));
            assert_eq!(cache.count("input_ids", index).expect("count"), text.len());
            let labels = example.floats("labels").unwrap_or_default();
            assert_eq!(labels.len(), usize::from(text.len() == 3));
        }
        assert!(cache.get(5000).is_err());
        assert_eq!(cache.total("input_ids"), 10 + 90 * 2 + 900 * 3 + 4000 * 4);
        // It is there now: nothing is made.
        let again = prepare(&files, &Letters, &options, &mut |_| panic!("made again"));
        assert_eq!(again.expect("cache").len(), 5000);
    }

    #[test]
    fn bad_records_stop_or_are_left_out() {
        let folder = tempfile::tempdir().expect("folder");
        let text = |i: u32| {
            if i % 1000 == 7 {
                "oh!".to_string()
            } else {
                i.to_string()
            }
        };
        let files = lines(folder.path(), (1..=3000).map(text));
        let mut quiet = |_| ControlFlow::Continue(());
        let stop = prepare(
            &files,
            &Letters,
            &options(folder.path(), BadData::Stop),
            &mut quiet,
        );
        let Err(error) = stop else { panic!("no error") };
        assert!(error.to_string().ends_with("data.txt: line 7: shouts"), "{error}");
        let skip = prepare(
            &files,
            &Letters,
            &options(folder.path(), BadData::Skip),
            &mut quiet,
        );
        let cache = skip.expect("cache");
        assert_eq!((cache.len(), cache.prepared.skipped), (2997, 3));
        assert!(cache.prepared.bad[2].ends_with("line 2007: shouts"));
    }

    #[test]
    fn a_damaged_part_is_named() {
        let folder = tempfile::tempdir().expect("folder");
        let files = lines(folder.path(), (0..10).map(|i| i.to_string()));
        let options = options(folder.path(), BadData::Stop);
        let mut quiet = |_| ControlFlow::Continue(());
        drop(prepare(&files, &Letters, &options, &mut quiet).expect("cache"));
        let cache = std::fs::read_dir(&options.folder).expect("folder").flatten();
        let cache = cache
            .map(|entry| entry.path())
            .find(|path| path.join(DATASET).exists())
            .expect("cache");
        let part = cache.join(part_name(0));
        let bytes = std::fs::read(&part).expect("part");
        std::fs::write(&part, &bytes[..bytes.len() - 3]).expect("part");
        let Err(error) = TokenCache::open(&cache) else {
            panic!("no error")
        };
        assert!(error.to_string().contains("part-00000.safetensors"), "{error}");
    }
}
