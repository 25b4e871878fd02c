//! The tensors of one model, whatever container they are stored in.
//!
//! Opening reads headers only; a tensor is a slice of the mapped file.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use indexmap::IndexMap;
use serde::Deserialize;

use crate::{Error, ModelFiles, Result};

pub mod gguf;
mod pickle;
pub mod safetensors;
mod torch;

use gguf::GgmlType;

/// How a tensor's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    /// 8-bit float with 4 exponent bits and no infinities.
    F8E4M3,
    /// 8-bit float with 5 exponent bits.
    F8E5M2,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
    /// Blocks of quantized values.
    Ggml(GgmlType),
}

impl DType {
    /// Bytes that `shape` takes; `None` where that is no whole number of blocks, or more than memory can hold.
    pub fn num_bytes(self, shape: &[usize]) -> Option<usize> {
        let count = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim))?;
        let size = match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 | Self::Bool => 1,
            Self::Ggml(ty) => {
                let row = shape.last().copied().unwrap_or(1);
                return row
                    .is_multiple_of(ty.block_size())
                    .then(|| (count / ty.block_size()).checked_mul(ty.type_size()))?;
            }
        };
        count.checked_mul(size)
    }

    /// The usual name, such as `F32` or `Q4_K`.
    pub fn name(self) -> String {
        match self {
            Self::Ggml(ty) => ty.name().to_string(),
            other => format!("{other:?}"),
        }
    }
}

/// Name, type and shape of a stored tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Storage type.
    pub dtype: DType,
    /// Row-major, outermost dimension first.
    pub shape: Vec<usize>,
}

/// A stored tensor: contiguous, row-major, little-endian.
#[derive(Debug, Clone)]
pub struct TensorView {
    /// Storage type.
    pub dtype: DType,
    /// Row-major, outermost dimension first.
    pub shape: Vec<usize>,
    /// The bytes: a slice of the file, but for PyTorch tensors that do not lie contiguously in it.
    pub data: Bytes,
}

/// Where a tensor lies.
#[derive(Debug, Clone)]
struct Entry {
    info: TensorInfo,
    data: Data,
}

/// The bytes of a tensor, checked to lie in the file.
#[derive(Debug, Clone)]
enum Data {
    Contiguous(Bytes),
    /// From the first value to the last. The strides are in elements, 0 where the dimension is 1, and no
    /// dimension is 0.
    Strided {
        data: Bytes,
        strides: Vec<usize>,
    },
}

/// The tensors of a model. Cheap to clone.
#[derive(Clone)]
pub struct Checkpoint(Arc<Inner>);

struct Inner {
    name: String,
    entries: IndexMap<String, Entry>,
    gguf: Option<Arc<gguf::Metadata>>,
}

impl Checkpoint {
    /// Opens whichever checkpoint the files hold: a GGUF, safetensors, or PyTorch files, in that order.
    ///
    /// # Errors
    /// Where there is none, or its headers break the rules of the format.
    pub fn open(files: &ModelFiles) -> Result<Self> {
        let mut entries = Entries { map: IndexMap::new() };
        let mut metadata = None;
        if let Some(first) = files.gguf() {
            for name in gguf::parts(files, first)? {
                let parsed;
                let file = match files.gguf_file()?.filter(|_| name == first) {
                    Some(file) => file,
                    None => {
                        parsed = gguf::GgufFile::parse(&require(files, &name)?, &files.describe(&name))?;
                        &parsed
                    }
                };
                for (info, data) in &file.tensors {
                    entries.insert(
                        &files.describe(&name),
                        info.clone(),
                        Data::Contiguous(data.clone()),
                    )?;
                }
                metadata.get_or_insert_with(|| file.metadata.clone());
            }
        } else if let Some(names) = safetensors::files(files)? {
            for name in names {
                let bytes = require(files, &name)?;
                for (info, data) in safetensors::parse(&bytes, &files.describe(&name))? {
                    entries.insert(&files.describe(&name), info, Data::Contiguous(data))?;
                }
            }
        } else if let Some(names) = torch::files(files)? {
            for name in names {
                let bytes = require(files, &name)?;
                for (info, data) in torch::parse(&bytes, &files.describe(&name))? {
                    entries.insert(&files.describe(&name), info, data)?;
                }
            }
        } else {
            return Err(Error::NotFound {
                what: "a checkpoint (.safetensors, .gguf or pytorch_model.bin)".to_string(),
                place: files.name().to_string(),
                hint: String::new(),
            });
        }
        Ok(Self(Arc::new(Inner {
            name: files.name().to_string(),
            entries: entries.map,
            gguf: metadata,
        })))
    }

    /// What to call it in messages.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// All tensors, in the order of the files.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.0.entries.values().map(|entry| &entry.info)
    }

    /// Type and shape of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.0.entries.get(name).map(|entry| &entry.info)
    }

    /// A tensor; only a PyTorch tensor that is not contiguous is copied.
    ///
    /// # Errors
    /// Where there is none of that name.
    pub fn tensor(&self, name: &str) -> Result<TensorView> {
        match self.0.entries.get(name) {
            Some(Entry { info, data }) => Ok(TensorView {
                dtype: info.dtype,
                shape: info.shape.clone(),
                data: match data {
                    Data::Contiguous(data) => data.clone(),
                    Data::Strided { data, strides } => contiguous(data, info, strides),
                },
            }),
            None => Err(Error::NotFound {
                what: format!("the tensor `{name}`"),
                place: self.name().to_string(),
                hint: String::new(),
            }),
        }
    }

    /// The metadata, if this is a GGUF.
    pub fn gguf(&self) -> Option<&gguf::Metadata> {
        self.0.gguf.as_deref()
    }
}

struct Entries {
    map: IndexMap<String, Entry>,
}

impl Entries {
    fn insert(&mut self, file: &str, info: TensorInfo, data: Data) -> Result<()> {
        match self.map.entry(info.name.clone()) {
            indexmap::map::Entry::Occupied(_) => Err(Error::format(
                file,
                format!("the tensor `{}` is stored twice", info.name),
            )),
            indexmap::map::Entry::Vacant(slot) => {
                slot.insert(Entry { info, data });
                Ok(())
            }
        }
    }
}

/// The values of a strided tensor one after the other.
fn contiguous(data: &[u8], info: &TensorInfo, strides: &[usize]) -> Bytes {
    let size = info.dtype.num_bytes(&[]).unwrap_or(1);
    // Inner dimensions that lie together are copied as one run.
    let mut run = size;
    let mut outer = info.shape.len();
    while outer > 0 && (info.shape[outer - 1] == 1 || strides[outer - 1] * size == run) {
        outer -= 1;
        run *= info.shape[outer];
    }
    let mut out = Vec::with_capacity(info.dtype.num_bytes(&info.shape).unwrap_or(0));
    let mut index = vec![0; outer];
    let mut from = 0;
    loop {
        out.extend_from_slice(&data[from * size..from * size + run]);
        let mut dim = outer;
        loop {
            if dim == 0 {
                return out.into();
            }
            dim -= 1;
            index[dim] += 1;
            from += strides[dim];
            if index[dim] < info.shape[dim] {
                break;
            }
            from -= strides[dim] * info.shape[dim];
            index[dim] = 0;
        }
    }
}

/// The shards that an index names, if there is such an index.
fn shards(files: &ModelFiles, index: &str) -> Result<Option<Vec<String>>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Some(Index { weight_map }) = files.json(index)? else {
        return Ok(None);
    };
    let shards: BTreeSet<String> = weight_map.into_values().collect();
    for shard in &shards {
        let plain = !shard.is_empty() && !shard.contains(['/', '\\']) && shard != "." && shard != "..";
        if !plain {
            return Err(Error::UnsafePath {
                place: files.describe(index),
                name: shard.clone(),
            });
        }
    }
    Ok(Some(shards.into_iter().collect()))
}

fn require(files: &ModelFiles, name: &str) -> Result<Bytes> {
    files.get(name)?.ok_or_else(|| Error::NotFound {
        what: format!("the file {name}"),
        place: files.name().to_string(),
        hint: "the checkpoint's index names it; download the model again".to_string(),
    })
}
