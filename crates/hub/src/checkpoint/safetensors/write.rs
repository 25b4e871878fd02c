//! Writing of safetensors files, tensor by tensor.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::checkpoint::{DType, TensorInfo};
use crate::{Error, OutputFile, Result};

/// Bytes of tensors in a file, after which Transformers begins the next one.
pub const MAX_SHARD_SIZE: u64 = 50_000_000_000;

/// Writes the safetensors of a model: one file, or several with an index, named as Transformers names them.
///
/// Names, types and shapes are known first; then tensors are written one at a time, in any order. Nothing takes its place
/// before [`finish`](Self::finish), and dropped before, nothing is left.
#[derive(Debug)]
pub struct Writer {
    folder: PathBuf,
    shards: Vec<Shard>,
    /// The shard of a tensor, and its number there.
    places: HashMap<String, (usize, usize)>,
}

/// A file.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: OutputFile,
    /// Where the file's pointer stands.
    at: u64,
    /// Bytes before the tensors.
    header: u64,
    /// In the order of the file.
    tensors: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    info: TensorInfo,
    /// From the end of the header.
    offset: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    Missing,
    Written,
    /// Shorter than was planned, perhaps; such tensors go to the end of the file when it is finished.
    Late(Option<Vec<u8>>),
}

impl Writer {
    /// Begins the files in `folder`, which is made if need be. A file takes `max_shard_size` bytes of tensors, or one
    /// tensor that is larger. Tensors in `late` are vectors of bytes that may become shorter than their shape says
    /// here, as texts do whose content is known at the end only.
    ///
    /// # Errors
    /// A name that appears twice, a type that safetensors lacks; [`Error::Io`] where the folder cannot be written to.
    pub fn create(
        folder: &Path,
        tensors: &[TensorInfo],
        late: &[TensorInfo],
        max_shard_size: u64,
    ) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let origin = folder.display().to_string();
        let each = tensors.iter().map(|info| (info, false));
        let mut groups: Vec<Vec<Entry>> = vec![Vec::new()];
        let mut room = max_shard_size;
        for (info, late) in each.chain(late.iter().map(|info| (info, true))) {
            let size = size(info, &origin)?;
            let full = groups.last().is_none_or(|group| !group.is_empty());
            if size > room && full && !late {
                groups.push(Vec::new());
                room = max_shard_size;
            }
            room = room.saturating_sub(size);
            let state = if late { State::Late(None) } else { State::Missing };
            if let Some(group) = groups.last_mut() {
                group.push(Entry {
                    info: info.clone(),
                    offset: 0,
                    state,
                });
            }
        }
        let count = groups.len();
        let mut places = HashMap::new();
        let mut shards = Vec::with_capacity(count);
        for (index, mut tensors) in groups.into_iter().enumerate() {
            // Readers view bytes as numbers where they lie: each at a multiple of its size.
            let align = |info: &TensorInfo| info.dtype.num_bytes(&[]).unwrap_or(1);
            tensors.sort_by_key(|entry| {
                (
                    matches!(entry.state, State::Late(_)),
                    usize::MAX - align(&entry.info),
                )
            });
            let mut offset = 0;
            for (at, entry) in tensors.iter_mut().enumerate() {
                entry.offset = offset;
                offset += size(&entry.info, &origin)?;
                if places.insert(entry.info.name.clone(), (index, at)).is_some() {
                    let what = format!("the tensor `{}` would be stored twice", entry.info.name);
                    return Err(Error::format(origin, what));
                }
            }
            let path = folder.join(file_name(index, count));
            let header = 8 + header(&tensors).len().next_multiple_of(8) as u64;
            shards.push(Shard {
                file: OutputFile::create(&path)?,
                path,
                at: 0,
                header,
                tensors,
            });
        }
        Ok(Self {
            folder: folder.to_path_buf(),
            shards,
            places,
        })
    }

    /// Bytes of all tensors.
    pub fn num_bytes(&self) -> u64 {
        self.shards.iter().map(Shard::num_bytes).sum()
    }

    /// Writes a tensor: `data` writes exactly as many bytes as its type and shape say.
    ///
    /// # Errors
    /// Where there is no such tensor, or it became another number of bytes; those of `data`, and [`Error::Io`].
    pub fn write<E: From<Error>>(
        &mut self,
        name: &str,
        data: impl FnOnce(&mut dyn Write) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let (shard, index) = self.place(name)?;
        shard.write(index, data)
    }

    /// Writes a tensor that is in memory.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let file = self.folder.clone();
        self.write(name, |out| out.write_all(bytes).map_err(Error::io(file)))
    }

    fn place(&mut self, name: &str) -> Result<(&mut Shard, usize)> {
        let place = self.places.get(name).copied();
        let shard = place.and_then(|(shard, index)| Some((self.shards.get_mut(shard)?, index)));
        shard.ok_or_else(|| {
            Error::format(
                self.folder.display().to_string(),
                format!("the tensor `{name}` was not planned"),
            )
        })
    }

    /// Writes the headers and puts all files into their places. Other safetensors of a model that are there are removed:
    /// readers would take them for a part of this one. Returns the names of the files.
    ///
    /// # Errors
    /// Where a tensor was not written; [`Error::Io`].
    pub fn finish(mut self) -> Result<Vec<String>> {
        let mut map = BTreeMap::new();
        let mut names = Vec::with_capacity(self.shards.len());
        for shard in &mut self.shards {
            shard.complete()?;
            let file = shard.path.file_name().unwrap_or_default().to_string_lossy();
            map.extend(
                shard
                    .tensors
                    .iter()
                    .map(|entry| (entry.info.name.clone(), file.to_string())),
            );
            names.push(file.into_owned());
        }
        let total: u64 = self.num_bytes();
        for shard in self.shards {
            shard.file.finish()?;
        }
        if names.len() > 1 {
            let index = json!({"metadata": {"total_size": total}, "weight_map": map});
            let mut file = OutputFile::create(&self.folder.join(INDEX))?;
            writeln!(file, "{index:#}").map_err(Error::io(self.folder.join(INDEX)))?;
            file.finish()?;
        }
        remove_others(&self.folder, &names)?;
        if names.len() > 1 {
            names.push(INDEX.to_string());
        }
        Ok(names)
    }
}

const INDEX: &str = "model.safetensors.index.json";

fn file_name(index: usize, count: usize) -> String {
    if count == 1 {
        "model.safetensors".to_string()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", index + 1)
    }
}

/// Removes the files of an earlier model in the folder.
fn remove_others(folder: &Path, names: &[String]) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let shard = name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors");
        let ours = name == "model.safetensors" || name == INDEX || shard;
        let kept = names.iter().any(|kept| kept == name) || (name == INDEX && names.len() > 1);
        if ours && !kept {
            fs::remove_file(entry.path()).map_err(Error::io(entry.path()))?;
        }
    }
    Ok(())
}

impl Shard {
    fn num_bytes(&self) -> u64 {
        let size = |entry: &Entry| entry.info.dtype.num_bytes(&entry.info.shape).unwrap_or(0) as u64;
        self.tensors.iter().map(size).sum()
    }

    fn write<E: From<Error>>(
        &mut self,
        index: usize,
        data: impl FnOnce(&mut dyn Write) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let origin = self.path.display().to_string();
        let entry = &mut self.tensors[index];
        let planned = size(&entry.info, &origin)?;
        let wrong = |bytes: u64| {
            let what = format!("`{}` became {bytes} bytes instead of {planned}", entry.info.name);
            Error::format(origin.clone(), what)
        };
        if let State::Late(bytes) = &mut entry.state {
            let mut all = Vec::new();
            data(&mut all)?;
            if all.len() as u64 > planned {
                return Err(wrong(all.len() as u64).into());
            }
            entry.info.shape = vec![all.len()];
            *bytes = Some(all);
            return Ok(());
        }
        let start = self.header + entry.offset;
        if self.at != start {
            self.file
                .seek(SeekFrom::Start(start))
                .map_err(Error::io(&self.path))?;
        }
        let mut counted = Counted {
            out: &mut self.file,
            bytes: 0,
        };
        data(&mut counted)?;
        self.at = start + counted.bytes;
        if counted.bytes != planned {
            return Err(wrong(counted.bytes).into());
        }
        entry.state = State::Written;
        Ok(())
    }

    /// Writes late tensors and the header.
    fn complete(&mut self) -> Result<()> {
        let origin = || self.path.display().to_string();
        let mut offset = 0;
        let mut late = Vec::new();
        for entry in &mut self.tensors {
            entry.offset = offset;
            offset += size(&entry.info, &origin())?;
            match &entry.state {
                State::Written => {}
                State::Late(Some(bytes)) => late.extend_from_slice(bytes),
                State::Missing | State::Late(None) => {
                    let what = format!("the tensor `{}` was not written", entry.info.name);
                    return Err(Error::format(origin(), what));
                }
            }
        }
        // No longer than the room left for it: offsets and lengths only became smaller.
        let mut header = header(&self.tensors);
        header.resize((self.header - 8) as usize, b' ');
        let file = &mut self.file;
        let mut put = |at: u64, bytes: &[u8]| {
            file.seek(SeekFrom::Start(at))?;
            file.write_all(bytes)
        };
        put(self.header + offset - late.len() as u64, &late)
            .and_then(|()| put(0, &(header.len() as u64).to_le_bytes()))
            .and_then(|()| put(8, &header))
            .map_err(Error::io(&self.path))
    }
}

/// The header, as JSON.
fn header(tensors: &[Entry]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".to_string(), json!({"format": "pt"}));
    for Entry { info, offset, .. } in tensors {
        let end = offset + info.dtype.num_bytes(&info.shape).unwrap_or(0) as u64;
        let entry = json!({
            "dtype": dtype_name(info.dtype),
            "shape": info.shape,
            "data_offsets": [offset, end],
        });
        map.insert(info.name.clone(), entry);
    }
    Value::Object(map).to_string().into_bytes()
}

/// What files call a type.
fn dtype_name(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::F64 => "F64",
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::F8E4M3 => "F8_E4M3",
        DType::F8E5M2 => "F8_E5M2",
        DType::I64 => "I64",
        DType::I32 => "I32",
        DType::I16 => "I16",
        DType::I8 => "I8",
        DType::U64 => "U64",
        DType::U32 => "U32",
        DType::U16 => "U16",
        DType::U8 => "U8",
        DType::Bool => "BOOL",
        DType::Ggml(_) => return None,
    })
}

/// Bytes that a tensor takes.
fn size(info: &TensorInfo, origin: &str) -> Result<u64> {
    let bytes = info.dtype.num_bytes(&info.shape);
    let bytes = bytes.filter(|_| dtype_name(info.dtype).is_some());
    bytes.map(|bytes| bytes as u64).ok_or_else(|| {
        let what = format!(
            "`{}` of shape {:?} cannot be stored as {}",
            info.name,
            info.shape,
            info.dtype.name()
        );
        Error::format(origin, what)
    })
}

/// Counts what is written.
struct Counted<'a, W> {
    out: &'a mut W,
    bytes: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelFiles;
    use crate::checkpoint::Checkpoint;

    fn info(name: &str, dtype: DType, shape: &[usize]) -> TensorInfo {
        TensorInfo {
            name: name.to_string(),
            dtype,
            shape: shape.to_vec(),
        }
    }

    /// What was written is read again, in one file and in several; late tensors may be shorter, and numbers are aligned.
    #[test]
    fn written_and_read() {
        let tensors = [
            info("a", DType::U8, &[3]),
            info("b", DType::F32, &[2, 2]),
            info("c", DType::BF16, &[3]),
            info("d", DType::I64, &[1]),
            info("e", DType::F16, &[0, 4]),
            info("f", DType::U8, &[]),
        ];
        let late = [
            info("a.text", DType::U8, &[1000]),
            info("b.text", DType::U8, &[9]),
        ];
        let bytes = |info: &TensorInfo| -> Vec<u8> {
            let len = info.dtype.num_bytes(&info.shape).unwrap();
            (0..len).map(|i| i as u8 ^ info.name.as_bytes()[0]).collect()
        };
        // `b` is larger than a file, `c` and `d` do not fit into one together.
        for (limit, files) in [(MAX_SHARD_SIZE, 1), (10, 4)] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("new");
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("model-00001-of-00009.safetensors"), "old").unwrap();
            let mut writer = Writer::create(&path, &tensors, &late, limit).unwrap();
            assert!(writer.write_bytes("none", &[]).is_err());
            for info in tensors.iter().rev() {
                writer.write_bytes(&info.name, &bytes(info)).unwrap();
            }
            writer.write_bytes("b.text", b"text").unwrap();
            writer.write_bytes("a.text", b"").unwrap();
            let names = writer.finish().unwrap();
            assert_eq!(names.len(), if files == 1 { 1 } else { files + 1 }, "{names:?}");
            assert_eq!(std::fs::read_dir(&path).unwrap().count(), names.len());
            let checkpoint = Checkpoint::open(&ModelFiles::from_dir(&path).unwrap()).unwrap();
            assert_eq!(checkpoint.tensors().count(), 8);
            for expected in &tensors {
                assert_eq!(checkpoint.info(&expected.name).unwrap(), expected);
                let view = checkpoint.tensor(&expected.name).unwrap();
                assert_eq!(view.data, bytes(expected));
            }
            assert_eq!(&checkpoint.tensor("b.text").unwrap().data[..], b"text");
            assert_eq!(checkpoint.tensor("a.text").unwrap().shape, [0]);
            for name in names.iter().filter(|name| name.ends_with(".safetensors")) {
                let file = std::fs::read(path.join(name)).unwrap();
                let (start, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
                assert_eq!(start % 8, 0);
                assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
                for info in metadata.tensors().values() {
                    assert_eq!(info.data_offsets.0 % (info.dtype.bitsize() / 8), 0);
                }
            }
        }
    }

    #[test]
    fn what_is_not_whole_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = [info("a", DType::U8, &[3]), info("b", DType::U8, &[3])];
        let mut writer = Writer::create(folder.path(), &tensors, &[], MAX_SHARD_SIZE).unwrap();
        writer.write_bytes("a", &[1, 2, 3]).unwrap();
        assert!(
            writer
                .write_bytes("b", &[1, 2])
                .unwrap_err()
                .to_string()
                .contains("`b` became 2")
        );
        let error = writer.finish().unwrap_err().to_string();
        assert!(error.contains("`b` was not written"), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let twice = [tensors[0].clone(), tensors[0].clone()];
        assert!(Writer::create(folder.path(), &twice, &[], 10).is_err());
    }
}
