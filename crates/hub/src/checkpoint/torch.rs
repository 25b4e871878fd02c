//! Files of `torch.save`: zip archives and the older sequence of pickles, single or sharded.
//!
//! Sources: `torch/serialization.py`, and `pickle` beside this module for what is understood of a pickle.

use std::collections::HashMap;
use std::io::Cursor;

use bytes::Bytes;
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{Node, Pickle, Storage, Tensor, Value};
use super::{Data, TensorInfo, shards};
use crate::{Error, ModelFiles, Result};

/// What the older format begins with, as a number of a pickle.
const MAGIC: &[u8] = &[0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// Bytes of all names of a file's tensors, and as many for each item looked at: a container that is met in many
/// places could make them explode.
const MAX_WALK: usize = 64 << 20;

/// A tensor that repeats its values by strides of 0 may take this much more than its storage.
const MAX_REPEATED: usize = 64 << 20;

const AGAIN: &str = "save it again with torch.save, or convert it to safetensors";

/// The PyTorch files of a model, if it has any.
pub(super) fn files(files: &ModelFiles) -> Result<Option<Vec<String>>> {
    if files.contains("pytorch_model.bin") {
        return Ok(Some(vec!["pytorch_model.bin".to_string()]));
    }
    if let Some(shards) = shards(files, "pytorch_model.bin.index.json")? {
        return Ok(Some(shards));
    }
    // A single file of any name, as people pass on the command line.
    let named: Vec<_> = files.names().filter(|name| is_weights(name)).collect();
    match named.as_slice() {
        [] => Ok(None),
        [only] => Ok(Some(vec![only.to_string()])),
        several => Err(Error::NotFound {
            what: "pytorch_model.bin".to_string(),
            place: files.name().to_string(),
            hint: format!(
                "it holds {} PyTorch files, such as {} and {}: name one of them",
                several.len(),
                several[0],
                several[1]
            ),
        }),
    }
}

/// True for what may hold weights, unlike the state of a training run.
fn is_weights(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    let state = ["training_args", "optimizer", "scheduler", "rng_state", "scaler"];
    [".bin", ".pt", ".pth", ".ckpt"]
        .iter()
        .any(|end| file.ends_with(end))
        && !state.iter().any(|start| file.starts_with(start))
}

/// The tensors of one file.
pub(super) fn parse(bytes: &Bytes, file: &str) -> Result<Vec<(TensorInfo, Data)>> {
    if bytes.starts_with(b"PK") {
        parse_zip(bytes, file)
    } else {
        parse_legacy(bytes, file)
    }
}

/// An archive: the pickle, and a stored member for each storage.
struct Archive<'a> {
    zip: ZipArchive<Cursor<&'a [u8]>>,
    bytes: &'a Bytes,
    file: &'a str,
}

impl Archive<'_> {
    /// A member's bytes, which are a slice of the archive.
    fn member(&mut self, name: &str) -> Result<Option<Bytes>> {
        let bad = |what: String| Error::format(self.file, what);
        let Some(index) = self.zip.index_for_name(name) else {
            return Ok(None);
        };
        let member = self
            .zip
            .by_index_raw(index)
            .map_err(|error| bad(format!("`{name}`: {error}")))?;
        if member.compression() != CompressionMethod::Stored || member.encrypted() {
            return Err(Error::unsupported(
                self.file,
                format!("`{name}`: a compressed or encrypted member"),
                AGAIN,
            ));
        }
        let start = member.data_start().and_then(|start| usize::try_from(start).ok());
        let len = usize::try_from(member.size()).ok();
        let range = start
            .zip(len)
            .and_then(|(start, len)| Some(start..start.checked_add(len)?));
        match range {
            Some(range) if range.end <= self.bytes.len() => Ok(Some(self.bytes.slice(range))),
            _ => Err(bad(format!(
                "`{name}` lies outside of the file; it was cut short"
            ))),
        }
    }
}

fn parse_zip(bytes: &Bytes, file: &str) -> Result<Vec<(TensorInfo, Data)>> {
    let broken = |error: zip::result::ZipError| Error::format(file, format!("broken zip archive: {error}"));
    let mut zip = ZipArchive::new(Cursor::new(&bytes[..])).map_err(broken)?;
    if zip.has_duplicate_names() {
        return Err(Error::format(
            file,
            "two members of the zip archive have the same name",
        ));
    }
    if zip.has_overlapping_entries().map_err(broken)? {
        return Err(Error::format(file, "members of the zip archive overlap"));
    }
    // All members lie in one folder of any name.
    let prefix = zip
        .file_names()
        .filter_map(|name| Some(name.ok()?.strip_suffix("data.pkl")?.to_string()))
        .filter(|prefix| prefix.is_empty() || prefix.ends_with('/'))
        .min_by_key(String::len);
    let Some(prefix) = prefix else {
        return Err(Error::format(
            file,
            "a zip archive without `data.pkl` is no PyTorch file",
        ));
    };
    let mut archive = Archive { zip, bytes, file };
    if archive
        .zip
        .index_for_name(&format!("{prefix}constants.pkl"))
        .is_some()
    {
        return Err(Error::unsupported(
            file,
            "a TorchScript program",
            "save the state dict of the model instead",
        ));
    }
    if let Some(order) = archive.member(&format!("{prefix}byteorder"))?
        && &order[..] != b"little"
    {
        return Err(Error::unsupported(
            file,
            "another byte order than little-endian",
            AGAIN,
        ));
    }
    let Some(pickled) = archive.member(&format!("{prefix}data.pkl"))? else {
        return Err(Error::format(file, "`data.pkl` is missing"));
    };
    let pickle = Pickle::read(&pickled, &mut 0, file)?;
    let mut storages = HashMap::new();
    for Storage { key, .. } in &pickle.storages {
        if storages.contains_key(key) {
            continue;
        }
        let name = format!("{prefix}data/{key}");
        match archive.member(&name)? {
            Some(data) => storages.insert(*key, data),
            None => return Err(Error::format(file, format!("the storage `{name}` is missing"))),
        };
    }
    tensors(&pickle, &storages, file)
}

/// Four pickles (the magic number, the version, the platform, the object), the keys of the storages, and
/// behind them each storage with its length in front.
fn parse_legacy(bytes: &Bytes, file: &str) -> Result<Vec<(TensorInfo, Data)>> {
    let mut at = 0;
    match Pickle::read(bytes, &mut at, file).map(|pickle| pickle.root) {
        Ok(Value::Long(MAGIC)) => {}
        _ => {
            return Err(Error::format(
                file,
                "is neither a zip archive nor an older file of torch.save: this is no PyTorch file",
            ));
        }
    }
    match Pickle::read(bytes, &mut at, file)?.root {
        Value::Int(1001) => {}
        other => {
            return Err(Error::unsupported(
                file,
                format!("version {other:?} of the format"),
                AGAIN,
            ));
        }
    }
    let platform = Pickle::read(bytes, &mut at, file)?;
    let little = entries(&platform, platform.root)
        .iter()
        .any(|pair| matches!(pair, (Value::Text("little_endian"), Value::Bool(true))));
    if !little {
        return Err(Error::unsupported(
            file,
            "another byte order than little-endian",
            AGAIN,
        ));
    }
    let pickle = Pickle::read(bytes, &mut at, file)?;
    let keys = Pickle::read(bytes, &mut at, file)?;
    let sizes: HashMap<&str, usize> = pickle
        .storages
        .iter()
        .map(|storage| {
            (
                storage.key,
                storage.dtype.map_or(1, |dtype| dtype.num_bytes(&[]).unwrap_or(1)),
            )
        })
        .collect();
    let mut storages = HashMap::new();
    for (_, key) in entries(&keys, keys.root) {
        let Value::Text(key) = key else {
            return Err(Error::format(
                file,
                "the list of storages holds something else than texts",
            ));
        };
        let cut = || {
            Error::format(
                file,
                format!("the storage `{key}` lies outside of the file; it was cut short"),
            )
        };
        let len = bytes
            .get(at..at + 8)
            .and_then(|len| len.try_into().ok())
            .ok_or_else(cut)?;
        at += 8;
        let size = sizes.get(key).copied().ok_or_else(|| {
            Error::format(
                file,
                format!("the storage `{key}` is listed, and belongs to no tensor"),
            )
        })?;
        let end = usize::try_from(u64::from_le_bytes(len))
            .ok()
            .and_then(|len| at.checked_add(len.checked_mul(size)?))
            .filter(|end| *end <= bytes.len())
            .ok_or_else(cut)?;
        if storages.insert(key, bytes.slice(at..end)).is_some() {
            return Err(Error::format(
                file,
                format!("the storage `{key}` is stored twice"),
            ));
        }
        at = end;
    }
    tensors(&pickle, &storages, file)
}

/// Keys and values of a dict, numbers and items of a list; nothing for another value.
fn entries<'a>(pickle: &Pickle<'a>, value: Value) -> Vec<(Value<'a>, Value<'a>)> {
    let Value::Node(node) = value else {
        return Vec::new();
    };
    match &pickle.nodes[node] {
        Node::Dict(pairs) => pairs.clone(),
        Node::Tuple(items) | Node::List(items) | Node::Set(items) => {
            let numbers = (0..).map(Value::Int);
            numbers.zip(items.iter().copied()).collect()
        }
    }
}

/// All tensors of the object, by their dotted names.
fn tensors(pickle: &Pickle, storages: &HashMap<&str, Bytes>, file: &str) -> Result<Vec<(TensorInfo, Data)>> {
    let mut out = Vec::new();
    let mut walked = 0;
    // The latest found is the next to be looked at, so what is in it is put down in reverse.
    let mut todo = vec![(String::new(), state_dict(pickle))];
    while let Some((name, value)) = todo.pop() {
        if let Value::Tensor(tensor) = value {
            let name = if name.is_empty() {
                "tensor".to_string()
            } else {
                name
            };
            out.push(locate(name, &pickle.tensors[tensor], pickle, storages, file)?);
            continue;
        }
        let inside = entries(pickle, value);
        walked += 16 * inside.len();
        for (key, value) in inside.into_iter().rev() {
            if !pickle.holds_tensors(value) {
                continue;
            }
            let key = match key {
                Value::Text(key) => key.to_string(),
                Value::Int(key) => key.to_string(),
                _ => {
                    return Err(Error::unsupported(
                        file,
                        format!("a tensor in `{name}` under a key that is neither text nor number"),
                        AGAIN,
                    ));
                }
            };
            let name = if name.is_empty() {
                key
            } else {
                format!("{name}.{key}")
            };
            // The fixed part is what a tensor takes beside its name.
            walked += name.len() + 256;
            if walked > MAX_WALK {
                return Err(Error::format(
                    file,
                    "the names of the tensors take too much memory: this is no state dict",
                ));
            }
            todo.push((name, value));
        }
    }
    Ok(out)
}

/// The state dict in what training scripts save around it.
fn state_dict<'a>(pickle: &Pickle<'a>) -> Value<'a> {
    let mut root = pickle.root;
    loop {
        let mut pairs = match root {
            Value::Node(node) if matches!(pickle.nodes[node], Node::Dict(_)) => entries(pickle, root),
            _ => return root,
        };
        pairs.retain(|(_, value)| pickle.holds_tensors(*value));
        let named = |wanted: &str| {
            let found = pairs
                .iter()
                .find(|(key, _)| matches!(key, Value::Text(key) if *key == wanted));
            found
                .map(|(_, value)| *value)
                .filter(|value| matches!(value, Value::Node(_)))
        };
        // Beside "model" there may be the optimizer; anything else may be another part of the model.
        let alone = pairs.iter().all(|(key, _)| match key {
            Value::Text(key) => {
                let training = ["optim", "sched", "ema", "rng", "scaler", "amp"];
                ["model", "module"].contains(key) || training.iter().any(|part| key.contains(part))
            }
            _ => false,
        });
        let inner = named("state_dict").or_else(|| named("model_state_dict"));
        let inner = inner.or_else(|| named("model").or_else(|| named("module")).filter(|_| alone));
        match inner {
            Some(inner) => root = inner,
            None => return root,
        }
    }
}

/// Checks a tensor against its storage.
fn locate(
    name: String,
    tensor: &Tensor,
    pickle: &Pickle,
    storages: &HashMap<&str, Bytes>,
    file: &str,
) -> Result<(TensorInfo, Data)> {
    let Storage {
        key,
        dtype: stored,
        len,
        offset,
    } = &pickle.storages[tensor.storage];
    let bad = |what: String| Error::format(file, format!("`{name}`: {what}"));
    let data = storages
        .get(key)
        .ok_or_else(|| bad(format!("the storage `{key}` is missing")))?;
    let (from, to) = stored
        .map_or(Some(1), |dtype| dtype.num_bytes(&[]))
        .and_then(|size| {
            let from = offset.checked_mul(size)?;
            Some((from, from.checked_add(len.checked_mul(size)?)?))
        })
        .filter(|(_, to)| *to <= data.len())
        .ok_or_else(|| {
            bad(format!(
                "the storage `{key}` has {} bytes, less than its {len} elements; the file was cut short",
                data.len()
            ))
        })?;
    let data = data.slice(from..to);

    let dtype = tensor.dtype;
    let size = dtype.num_bytes(&[]).unwrap_or(1);
    let shape = &tensor.shape;
    let outside = || {
        bad(format!(
            "the shape {shape:?} with the strides {:?} lies outside of its storage",
            tensor.strides
        ))
    };
    let total = dtype.num_bytes(shape).ok_or_else(outside)?;
    // A dimension of size 1 is never walked along, whatever its stride.
    let strides: Vec<_> = shape
        .iter()
        .zip(&tensor.strides)
        .map(|(dim, stride)| if *dim == 1 { 0 } else { *stride })
        .collect();
    let range = if total == 0 {
        Some(0..0)
    } else {
        let last = shape
            .iter()
            .zip(&strides)
            .try_fold(0usize, |last, (dim, stride)| {
                last.checked_add(stride.checked_mul(dim - 1)?)
            });
        last.and_then(|last| {
            let from = tensor.offset.checked_mul(size)?;
            Some(from..from.checked_add(last.checked_add(1)?.checked_mul(size)?)?)
        })
    };
    let range = range
        .filter(|range| range.end <= data.len())
        .ok_or_else(outside)?;
    if total > data.len().saturating_add(MAX_REPEATED) {
        return Err(Error::unsupported(
            file,
            format!(
                "`{name}`: a tensor that repeats a storage of {} bytes up to {total}",
                data.len()
            ),
            "save a contiguous copy of it",
        ));
    }
    let mut run = 1;
    let contiguous = shape.iter().zip(&strides).rev().all(|(dim, stride)| {
        let fits = *dim == 1 || *stride == run;
        run *= dim;
        fits
    });
    let data = data.slice(range);
    let data = if contiguous || total == 0 {
        Data::Contiguous(data)
    } else {
        Data::Strided { data, strides }
    };
    let info = TensorInfo {
        name,
        dtype,
        shape: tensor.shape.clone(),
    };
    Ok((info, data))
}
