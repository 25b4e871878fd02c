//! Placeholder until the readers land: in a merge, take the other side.
#![allow(missing_docs)]
use crate::{Error, ModelFiles, Result};
use bytes::Bytes;
pub mod gguf {
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub enum GgmlType {
        F32,
    }
    impl GgmlType {
        pub fn block_size(self) -> usize {
            1
        }
        pub fn type_size(self) -> usize {
            4
        }
        pub fn name(self) -> &'static str {
            "F32"
        }
    }
    #[derive(Debug, Clone)]
    pub struct Metadata;
    impl Metadata {
        pub fn get_str(&self, _: &str) -> Option<&str> {
            None
        }
        pub fn get_u64(&self, _: &str) -> Option<u64> {
            None
        }
        pub fn get_f64(&self, _: &str) -> Option<f64> {
            None
        }
    }
}
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    F8E4M3,
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
    Ggml(gguf::GgmlType),
}
pub struct TensorInfo {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
}
pub struct TensorView {
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub data: Bytes,
}
#[derive(Clone)]
pub struct Checkpoint {
    name: String,
    infos: std::sync::Arc<indexmap::IndexMap<String, (TensorInfo, usize, usize)>>,
    data: Bytes,
}
impl Checkpoint {
    pub fn open(files: &ModelFiles) -> Result<Self> {
        let f = files
            .names()
            .find(|n| n.ends_with(".safetensors") && *n != "reference.safetensors")
            .or(files.names().find(|n| n.ends_with(".safetensors")))
            .unwrap()
            .to_string();
        let data = files.get(&f)?.unwrap();
        let (n, meta) =
            safetensors::SafeTensors::read_metadata(&data).map_err(|e| Error::format(&f, e.to_string()))?;
        let mut infos = indexmap::IndexMap::new();
        for (k, t) in meta.tensors() {
            let dtype = match t.dtype {
                safetensors::Dtype::F32 => DType::F32,
                safetensors::Dtype::I64 => DType::I64,
                safetensors::Dtype::F16 => DType::F16,
                safetensors::Dtype::BF16 => DType::BF16,
                _ => DType::U8,
            };
            infos.insert(
                k.clone(),
                (
                    TensorInfo {
                        name: k,
                        dtype,
                        shape: t.shape.clone(),
                    },
                    n + 8 + t.data_offsets.0,
                    n + 8 + t.data_offsets.1,
                ),
            );
        }
        Ok(Self {
            name: files.name().to_string(),
            infos: infos.into(),
            data,
        })
    }
    pub fn name(&self) -> &str {
        &self.name
    }
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.infos.values().map(|v| &v.0)
    }
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.infos.get(name).map(|v| &v.0)
    }
    pub fn tensor(&self, name: &str) -> Result<TensorView> {
        let v = &self.infos[name];
        Ok(TensorView {
            dtype: v.0.dtype,
            shape: v.0.shape.clone(),
            data: self.data.slice(v.1..v.2),
        })
    }
    pub fn gguf(&self) -> Option<&gguf::Metadata> {
        None
    }
}
