//! A file of answers that is written line by line, and goes on where it was stopped.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// Lines that are written, and beside them, until all are there, a note on what they answer.
pub struct Job {
    file: File,
    note: PathBuf,
    /// Whole lines that were there before.
    pub done: usize,
}

impl Job {
    /// Begins a job, or goes on with it where its note says that it is the same.
    pub fn open(path: &Path, what: &Map<String, Value>) -> anyhow::Result<Self> {
        let note = PathBuf::from(format!("{}.job", path.display()));
        let name = path.display();
        let written = match std::fs::read(&note) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error).context(note.display().to_string()),
        };
        match written {
            Some(bytes) => {
                let before: Map<String, Value> =
                    serde_json::from_slice(&bytes).with_context(|| note.display().to_string())?;
                if let Some((key, value)) = what.iter().find(|(key, value)| before.get(*key) != Some(value)) {
                    let before = before.get(key).unwrap_or(&Value::Null);
                    bail!(
                        "{name} was begun by another job: `{key}` was {before}, and is {value}; write to another file, or \
                         remove {name} and {}",
                        note.display()
                    );
                }
            }
            None if path.exists() => {
                bail!("{name} is there already, and no unfinished job; write to another file, or remove it");
            }
            None => write_whole(&note, &serde_json::to_vec_pretty(what)?)?,
        }
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let mut file = file.with_context(|| name.to_string())?;
        let (done, end) = whole_lines(&mut file).with_context(|| name.to_string())?;
        // A line that was not finished is written anew.
        file.set_len(end)?;
        file.seek(SeekFrom::Start(end))?;
        Ok(Self { file, note, done })
    }

    /// Writes whole lines.
    pub fn write(&mut self, lines: &str) -> anyhow::Result<()> {
        Ok(self.file.write_all(lines.as_bytes())?)
    }

    /// All lines are there.
    pub fn finish(self) -> anyhow::Result<()> {
        self.file.sync_all()?;
        Ok(std::fs::remove_file(&self.note)?)
    }
}

fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let beside = PathBuf::from(format!("{}.tmp", path.display()));
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    write().with_context(|| path.display().to_string())
}

/// Number of whole lines, and where they end.
fn whole_lines(file: &mut File) -> std::io::Result<(usize, u64)> {
    let mut reader = BufReader::new(file);
    let (mut lines, mut end, mut line) = (0, 0, Vec::new());
    while reader.read_until(b'\n', &mut line)? > 0 {
        if line.ends_with(b"\n") {
            lines += 1;
            end += line.len() as u64;
        }
        line.clear();
    }
    Ok((lines, end))
}

/// The SHA-256 of what a reader gives, in hexadecimal digits.
pub fn sha256(mut reader: impl Read) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}
