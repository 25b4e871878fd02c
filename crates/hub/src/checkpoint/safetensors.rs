//! Safetensors files, single or sharded.

use std::collections::HashSet;

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::{DType, TensorInfo, shards};
use crate::{Error, ModelFiles, Result};

#[cfg(not(target_arch = "wasm32"))]
mod write;

#[cfg(not(target_arch = "wasm32"))]
pub use write::{MAX_SHARD_SIZE, Writer};

/// The safetensors files of a model, if it has any.
pub(super) fn files(files: &ModelFiles) -> Result<Option<Vec<String>>> {
    if files.contains("model.safetensors") {
        return Ok(Some(vec!["model.safetensors".to_string()]));
    }
    if let Some(shards) = shards(files, "model.safetensors.index.json")? {
        return Ok(Some(shards));
    }
    // A single file of any name, as people pass on the command line.
    let mut named = files.names().filter(|name| name.ends_with(".safetensors"));
    Ok(match (named.next(), named.next()) {
        (Some(only), None) => Some(vec![only.to_string()]),
        _ => None,
    })
}

/// A header in which no name appears twice: of such, readers keep one or the other.
struct Distinct;

impl<'de> Deserialize<'de> for Distinct {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Distinct;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Distinct, A::Error> {
                let mut seen = HashSet::new();
                while let Some((name, IgnoredAny)) = map.next_entry::<String, _>()? {
                    if seen.contains(&name) {
                        return Err(A::Error::custom(format!("the tensor `{name}` is stored twice")));
                    }
                    seen.insert(name);
                }
                Ok(Distinct)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

/// The tensors of one file.
pub(super) fn parse(bytes: &Bytes, file: &str) -> Result<Vec<(TensorInfo, Bytes)>> {
    let bad = |what: String| Error::format(file, what);
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| bad(error.to_string()))?;
    let start = header + 8;
    serde_json::from_slice::<Distinct>(&bytes[8..start]).map_err(|error| bad(error.to_string()))?;
    let mut tensors: Vec<_> = metadata.tensors().into_iter().collect();
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut out = Vec::with_capacity(tensors.len());
    for (name, info) in tensors {
        let dtype = match info.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F8_E4M3 => DType::F8E4M3,
            Dtype::F8_E5M2 => DType::F8E5M2,
            Dtype::I64 => DType::I64,
            Dtype::I32 => DType::I32,
            Dtype::I16 => DType::I16,
            Dtype::I8 => DType::I8,
            Dtype::U64 => DType::U64,
            Dtype::U32 => DType::U32,
            Dtype::U16 => DType::U16,
            Dtype::U8 => DType::U8,
            Dtype::BOOL => DType::Bool,
            other => {
                return Err(Error::unsupported(
                    file,
                    format!("`{name}`: the type {other:?}"),
                    "",
                ));
            }
        };
        let (from, to) = info.data_offsets;
        let range = (start.checked_add(from), start.checked_add(to));
        let (Some(from), Some(to)) = range else {
            return Err(bad(format!("`{name}`: its offsets overflow")));
        };
        if from > to || to > bytes.len() {
            return Err(bad(format!(
                "`{name}`: bytes {from} to {to} lie outside of the file; it was cut short"
            )));
        }
        let expected = dtype.num_bytes(&info.shape);
        if expected != Some(to - from) {
            return Err(bad(format!(
                "`{name}`: {} bytes do not hold the shape {:?}",
                to - from,
                info.shape
            )));
        }
        let info = TensorInfo {
            name,
            dtype,
            shape: info.shape.clone(),
        };
        out.push((info, bytes.slice(from..to)));
    }
    Ok(out)
}
