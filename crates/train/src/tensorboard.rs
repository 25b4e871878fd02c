//! TensorBoard's event files: records with checksums (TFRecord) of `Event` messages (`tensorflow/core/util/event.proto`).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::events::{Callback, Event};
use crate::state::TrainerState;
use crate::{Error, Result, TrainingArguments};

/// `tensorboard.Event`.
#[derive(Clone, PartialEq, Message)]
struct EventMessage {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

/// `tensorboard.Summary`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

/// `tensorboard.Summary.Value`.
#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    simple_value: f32,
}

/// The checksum of a record: CRC-32C, turned and shifted so that checksums of checksums are not weak.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A record: its length, that one's checksum, the bytes, and their checksum.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    [
        &length[..],
        &masked_crc(&length).to_le_bytes(),
        bytes,
        &masked_crc(bytes).to_le_bytes(),
    ]
    .concat()
}

/// Writes logs for TensorBoard.
pub struct TensorBoard {
    folder: PathBuf,
    file: Option<(PathBuf, File)>,
}

impl TensorBoard {
    /// Event files in this folder.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_path_buf(),
            file: None,
        }
    }

    fn write(&mut self, message: &EventMessage) -> Result<()> {
        if self.file.is_none() {
            std::fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder))?;
            let seconds = now() as u64;
            let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "localhost".to_string());
            let host: String = host
                .chars()
                .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
                .collect();
            let name = format!(
                "events.out.tfevents.{seconds:010}.{host}.{}.0",
                std::process::id()
            );
            let path = self.folder.join(name);
            let file = OpenOptions::new().create(true).append(true).open(&path);
            self.file = Some((path.clone(), file.map_err(Error::io(&path))?));
            self.write(&EventMessage {
                wall_time: now(),
                file_version: Some("brain.Event:2".to_string()),
                ..EventMessage::default()
            })?;
        }
        match &mut self.file {
            Some((path, file)) => file
                .write_all(&record(&message.encode_to_vec()))
                .map_err(Error::io(path)),
            None => Ok(()),
        }
    }
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

impl Callback for TensorBoard {
    fn on_event(&mut self, event: &Event, state: &TrainerState, _: &TrainingArguments) -> Result<()> {
        let Event::Log(log) = event else { return Ok(()) };
        let value = |(name, value): (&String, &serde_json::Value)| {
            // The names that Transformers' callback gives them.
            let tag = match name.strip_prefix("eval_") {
                Some(name) => format!("eval/{name}"),
                None => format!("train/{name}"),
            };
            Some(SummaryValue {
                tag,
                simple_value: value.as_f64()? as f32,
            })
        };
        let value = log
            .iter()
            .filter(|(name, _)| *name != "step")
            .filter_map(value)
            .collect();
        self.write(&EventMessage {
            wall_time: now(),
            step: state.global_step as i64,
            file_version: None,
            summary: Some(Summary { value }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `tensorboard.compat.tensorflow_stub.pywrap_tensorflow.masked_crc32c` of Python gives it.
    #[test]
    fn checksums() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(
            masked_crc(b"123456789"),
            0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8)
        );
        let record = record(b"abc");
        assert_eq!(record.len(), 8 + 4 + 3 + 4);
        assert_eq!(&record[..8], &3u64.to_le_bytes());
    }

    #[test]
    fn an_event_file_is_read_back() {
        let folder = tempfile::tempdir().expect("folder");
        let mut board = TensorBoard::new(folder.path());
        let log = serde_json::json!({"loss": 1.5, "eval_loss": 2.5, "epoch": 1.0, "step": 7});
        let state = TrainerState {
            global_step: 7,
            ..TrainerState::default()
        };
        let event = Event::Log(log.as_object().expect("log"));
        board
            .on_event(&event, &state, &TrainingArguments::default())
            .expect("written");
        let path = std::fs::read_dir(folder.path())
            .expect("folder")
            .next()
            .expect("file")
            .expect("entry")
            .path();
        let bytes = std::fs::read(path).expect("file");
        let (mut at, mut events) = (0, Vec::new());
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("length")) as usize;
            let checksum = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().expect("checksum"));
            assert_eq!(checksum, masked_crc(&bytes[at..at + 8]));
            let data = &bytes[at + 12..at + 12 + length];
            events.push(EventMessage::decode(data).expect("event"));
            at += length + 16;
        }
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        let values = &events[1].summary.as_ref().expect("summary").value;
        let mut tags: Vec<_> = values
            .iter()
            .map(|value| (value.tag.as_str(), value.simple_value))
            .collect();
        tags.sort_by(|a, b| a.0.cmp(b.0));
        assert_eq!(events[1].step, 7);
        assert_eq!(
            tags,
            [("eval/loss", 2.5), ("train/epoch", 1.0), ("train/loss", 1.5)]
        );
    }
}
