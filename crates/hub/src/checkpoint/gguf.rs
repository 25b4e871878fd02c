//! GGUF files, versions 2 and 3, little-endian; version 3 is written.
//!
//! Source: the format's specification, `docs/gguf.md` of the ggml project.

use std::sync::Arc;

use bytes::Bytes;
use indexmap::IndexMap;

use super::{DType, TensorInfo};
use crate::{Error, ModelFiles, Result};

mod write;

pub use write::{Encode, Pairs, write};

/// Where tensors begin: at multiples of this, unless the metadata say otherwise.
const DEFAULT_ALIGNMENT: u32 = 32;

macro_rules! ggml_types {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $text:literal, $block:literal, $size:literal;)+) => {
        /// The block formats of ggml.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(missing_docs, non_camel_case_types)]
        pub enum GgmlType { $($(#[$doc])* $name,)+ }

        impl GgmlType {
            /// All block formats.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Number of values in a block.
            pub const fn block_size(self) -> usize {
                match self { $(Self::$name => $block,)+ }
            }

            /// Number of bytes in a block.
            pub const fn type_size(self) -> usize {
                match self { $(Self::$name => $size,)+ }
            }

            /// The name that ggml gives it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// The number by which files name it.
            pub const fn id(self) -> u32 {
                match self { $(Self::$name => $id,)+ }
            }

            /// The type of that number.
            pub const fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

ggml_types! {
    Q4_0 = 2, "Q4_0", 32, 18;
    Q4_1 = 3, "Q4_1", 32, 20;
    Q5_0 = 6, "Q5_0", 32, 22;
    Q5_1 = 7, "Q5_1", 32, 24;
    Q8_0 = 8, "Q8_0", 32, 34;
    Q2_K = 10, "Q2_K", 256, 84;
    Q3_K = 11, "Q3_K", 256, 110;
    Q4_K = 12, "Q4_K", 256, 144;
    Q5_K = 13, "Q5_K", 256, 176;
    Q6_K = 14, "Q6_K", 256, 210;
    IQ4_NL = 20, "IQ4_NL", 32, 18;
    IQ4_XS = 23, "IQ4_XS", 256, 136;
    TQ1_0 = 34, "TQ1_0", 256, 54;
    TQ2_0 = 35, "TQ2_0", 256, 66;
    MXFP4 = 39, "MXFP4", 32, 17;
}

/// The plain types and their numbers.
const PLAIN: [(u32, DType); 8] = [
    (0, DType::F32),
    (1, DType::F16),
    (24, DType::I8),
    (25, DType::I16),
    (26, DType::I32),
    (27, DType::I64),
    (28, DType::F64),
    (30, DType::BF16),
];

/// The type of a number; else the name of one that is known and not read.
fn dtype(id: u32) -> std::result::Result<DType, String> {
    if let Some((_, plain)) = PLAIN.iter().find(|(number, _)| *number == id) {
        return Ok(*plain);
    }
    GgmlType::from_id(id).map(DType::Ggml).ok_or_else(|| {
        let name = match id {
            9 => "Q8_1",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            21 => "IQ3_S",
            22 => "IQ2_S",
            29 => "IQ1_M",
            40 => "NVFP4",
            _ => return format!("the tensor type {id}"),
        };
        format!("the tensor type {name}")
    })
}

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U64(u64),
    I64(i64),
    F64(f64),
    Bool(bool),
    String(String),
    /// An array of numbers, `f32` ones among them widened.
    Numbers(Vec<f64>),
    Integers(Vec<i64>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
    /// An array of arrays.
    Arrays(Vec<Value>),
}

/// The key/value pairs of a file, in its order.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    values: IndexMap<String, Value>,
    /// Types and values as the file has them.
    encoded: IndexMap<String, Bytes>,
}

impl Metadata {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All pairs.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A text.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number that is not negative; of an array, the first.
    pub fn get_u64(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::U64(n) => Some(*n),
            Value::I64(n) => u64::try_from(*n).ok(),
            Value::Integers(all) => u64::try_from(*all.first()?).ok(),
            _ => None,
        }
    }

    /// A number.
    pub fn get_f64(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Value::F64(x) => Some(*x),
            Value::U64(n) => Some(*n as f64),
            Value::I64(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// A truth value.
    pub fn get_bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// An array of texts.
    pub fn get_strings(&self, key: &str) -> Option<&[String]> {
        match self.get(key)? {
            Value::Strings(all) => Some(all),
            _ => None,
        }
    }

    /// An array of whole numbers.
    pub fn get_integers(&self, key: &str) -> Option<&[i64]> {
        match self.get(key)? {
            Value::Integers(all) => Some(all),
            _ => None,
        }
    }

    /// An array of floating-point numbers.
    pub fn get_numbers(&self, key: &str) -> Option<&[f64]> {
        match self.get(key)? {
            Value::Numbers(all) => Some(all),
            _ => None,
        }
    }

    /// An array of truth values.
    pub fn get_bools(&self, key: &str) -> Option<&[bool]> {
        match self.get(key)? {
            Value::Bools(all) => Some(all),
            _ => None,
        }
    }
}

/// The files of a model that is split as `NAME-00001-of-000NN.gguf`, or the one file.
pub(super) fn parts(files: &ModelFiles, first: &str) -> Result<Vec<String>> {
    let Some((stem, total)) = first
        .strip_suffix(".gguf")
        .and_then(|stem| stem.rsplit_once("-of-"))
    else {
        return Ok(vec![first.to_string()]);
    };
    let (Some((base, "00001")), Ok(total)) = (stem.rsplit_once('-'), total.parse::<u32>()) else {
        return Ok(vec![first.to_string()]);
    };
    if !(1..=9999).contains(&total) {
        return Err(Error::format(
            files.describe(first),
            format!("a model in {total} files is not plausible"),
        ));
    }
    Ok((1..=total)
        .map(|part| format!("{base}-{part:05}-of-{total:05}.gguf"))
        .collect())
}

/// One parsed file.
#[derive(Debug)]
pub(crate) struct GgufFile {
    pub(crate) metadata: Arc<Metadata>,
    pub(super) tensors: Vec<(TensorInfo, Bytes)>,
}

impl GgufFile {
    /// Parses header, metadata and tensor table; the tensors are slices of `bytes`.
    pub(crate) fn parse(bytes: &Bytes, file: &str) -> Result<Self> {
        let mut reader = Reader { bytes, at: 0, file };
        if reader.take(4, "magic")? != b"GGUF" {
            return Err(Error::format(
                file,
                "does not begin with GGUF: this is no GGUF file",
            ));
        }
        let version = reader.u32("version")?;
        match version {
            2 | 3 => {}
            1 => {
                return Err(Error::unsupported(
                    file,
                    "GGUF version 1",
                    "convert the model again",
                ));
            }
            _ if matches!(version.swap_bytes(), 1..=3) => {
                return Err(Error::unsupported(
                    file,
                    "big-endian GGUF",
                    "convert the model for little-endian",
                ));
            }
            _ => {
                return Err(Error::format(
                    file,
                    format!("GGUF version {version} is unknown; 2 and 3 are read"),
                ));
            }
        }
        let tensor_count = reader.u64("tensor_count")?;
        let pair_count = reader.u64("metadata_kv_count")?;
        let mut metadata = Metadata::default();
        for _ in 0..pair_count {
            let key = reader.string("metadata key")?;
            let start = reader.at;
            let ty = reader.u32(&key)?;
            let value = reader.value(ty, &key, 0)?;
            metadata
                .encoded
                .insert(key.clone(), bytes.slice(start..reader.at));
            if metadata.values.insert(key.clone(), value).is_some() {
                return Err(Error::format(file, format!("the key `{key}` appears twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT as usize,
            Some(Value::U64(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n as usize,
            Some(other) => {
                return Err(Error::format(
                    file,
                    format!("general.alignment is {other:?}, no power of two"),
                ));
            }
        };
        // A table entry takes at least 25 bytes, which bounds what a wrong count can make us reserve.
        let mut table = Vec::with_capacity((tensor_count as usize).min(reader.rest() / 25 + 1));
        for _ in 0..tensor_count {
            let name = reader.string("tensor name")?;
            let dims = reader.u32(&name)?;
            if dims > 8 {
                return Err(Error::format(file, format!("`{name}` has {dims} dimensions")));
            }
            let mut shape = Vec::with_capacity(dims as usize);
            for _ in 0..dims {
                let dim = reader.u64(&name)?;
                let dim = usize::try_from(dim)
                    .map_err(|_| Error::format(file, format!("`{name}` has a dimension of {dim}")))?;
                shape.push(dim);
            }
            // The file lists the fastest dimension first.
            shape.reverse();
            let dtype = dtype(reader.u32(&name)?).map_err(|what| {
                Error::unsupported(
                    file,
                    format!("`{name}`: {what}"),
                    "use a file quantized to another type",
                )
            })?;
            let offset = reader.u64(&name)?;
            table.push((TensorInfo { name, dtype, shape }, offset));
        }
        let start = reader
            .at
            .checked_next_multiple_of(alignment)
            .unwrap_or(usize::MAX);
        let mut taken: Vec<(usize, usize)> = Vec::with_capacity(table.len());
        let tensors = table
            .into_iter()
            .map(|(info, offset)| {
                let bad = |what: &str| Error::format(file, format!("`{}` {what}", info.name));
                let len = info.dtype.num_bytes(&info.shape).ok_or_else(|| {
                    bad(&format!(
                        "has the shape {:?}, which {} cannot hold",
                        info.shape,
                        info.dtype.name()
                    ))
                })?;
                if !offset.is_multiple_of(alignment as u64) {
                    return Err(bad(&format!("begins at {offset}, no multiple of {alignment}")));
                }
                let from = usize::try_from(offset)
                    .ok()
                    .and_then(|offset| start.checked_add(offset));
                let range = from.and_then(|from| Some(from..from.checked_add(len)?));
                match range {
                    Some(range) if range.end <= bytes.len() => {
                        taken.push((range.start, range.end));
                        Ok((info, bytes.slice(range)))
                    }
                    _ => Err(bad("lies outside of the file; it was cut short")),
                }
            })
            .collect::<Result<Vec<_>>>()?;
        taken.retain(|(from, to)| from < to);
        taken.sort_unstable();
        if let Some(pair) = taken.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            return Err(Error::format(
                file,
                format!("two tensors overlap at byte {}", pair[1].0),
            ));
        }
        Ok(Self {
            metadata: Arc::new(metadata),
            tensors,
        })
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    file: &'a str,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        if len > self.rest() {
            let message = format!(
                "ends at byte {} within `{what}`, which takes {len} more",
                self.bytes.len()
            );
            return Err(Error::format(self.file, message));
        }
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn len(&mut self, what: &str) -> Result<usize> {
        let len = self.u64(what)?;
        usize::try_from(len).map_err(|_| Error::format(self.file, format!("`{what}` is {len} long")))
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.len(what)?;
        let bytes = self.take(len, what)?;
        // Some tokenizers' pieces are no UTF-8 on their own.
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn value(&mut self, ty: u32, key: &str, depth: usize) -> Result<Value> {
        Ok(match ty {
            0 => Value::U64(self.array::<1>(key)?[0].into()),
            1 => Value::I64(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::U64(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::I64(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::U64(self.u32(key)?.into()),
            5 => Value::I64(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::F64(f32::from_le_bytes(self.array(key)?).into()),
            7 => Value::Bool(self.array::<1>(key)?[0] != 0),
            8 => Value::String(self.string(key)?),
            9 => self.array_value(key, depth)?,
            10 => Value::U64(self.u64(key)?),
            11 => Value::I64(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            _ => {
                return Err(Error::format(
                    self.file,
                    format!("`{key}` has the unknown type {ty}"),
                ));
            }
        })
    }

    fn array_value(&mut self, key: &str, depth: usize) -> Result<Value> {
        let ty = self.u32(key)?;
        let len = self.len(key)?;
        fn numbers<const N: usize, T>(
            reader: &mut Reader,
            len: usize,
            key: &str,
            read: impl Fn([u8; N]) -> T,
        ) -> Result<Vec<T>> {
            let bytes = reader.take(len.saturating_mul(N), key)?;
            Ok(bytes.as_chunks::<N>().0.iter().map(|b| read(*b)).collect())
        }
        Ok(match ty {
            0 => Value::Integers(numbers(self, len, key, |b: [u8; 1]| b[0].into())?),
            1 => Value::Integers(numbers(self, len, key, |b| i8::from_le_bytes(b).into())?),
            2 => Value::Integers(numbers(self, len, key, |b| u16::from_le_bytes(b).into())?),
            3 => Value::Integers(numbers(self, len, key, |b| i16::from_le_bytes(b).into())?),
            4 => Value::Integers(numbers(self, len, key, |b| u32::from_le_bytes(b).into())?),
            5 => Value::Integers(numbers(self, len, key, |b| i32::from_le_bytes(b).into())?),
            6 => Value::Numbers(numbers(self, len, key, |b| f32::from_le_bytes(b).into())?),
            7 => Value::Bools(numbers(self, len, key, |b: [u8; 1]| b[0] != 0)?),
            8 => {
                // A string takes at least its 8-byte length.
                let mut all = Vec::with_capacity(len.min(self.rest() / 8 + 1));
                for _ in 0..len {
                    all.push(self.string(key)?);
                }
                Value::Strings(all)
            }
            9 if depth < 4 => {
                let mut all = Vec::new();
                for _ in 0..len {
                    all.push(self.array_value(key, depth + 1)?);
                }
                Value::Arrays(all)
            }
            10 => Value::Integers(numbers(self, len, key, |b| u64::from_le_bytes(b) as i64)?),
            11 => Value::Integers(numbers(self, len, key, i64::from_le_bytes)?),
            12 => Value::Numbers(numbers(self, len, key, f64::from_le_bytes)?),
            _ => {
                return Err(Error::format(
                    self.file,
                    format!("`{key}` is an array of the unknown type {ty}"),
                ));
            }
        })
    }
}
