//! Writing of GGUF files, version 3.

use std::io::{self, Write};

use indexmap::IndexMap;

use super::{DEFAULT_ALIGNMENT, Metadata};
use crate::checkpoint::{DType, TensorInfo};
use crate::{Error, Result};

/// A value that metadata can hold; a vector of such values is an array.
pub trait Encode {
    /// The number by which files name the type.
    const TYPE: u32;
    /// Appends the value.
    fn put(&self, out: &mut Vec<u8>);
}

macro_rules! numbers {
    ($($number:ty = $id:literal;)+) => {
        $(impl Encode for $number {
            const TYPE: u32 = $id;

            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        })+
    };
}

numbers! {
    u8 = 0;
    i8 = 1;
    u16 = 2;
    i16 = 3;
    u32 = 4;
    i32 = 5;
    f32 = 6;
    u64 = 10;
    i64 = 11;
    f64 = 12;
}

impl Encode for bool {
    const TYPE: u32 = 7;

    fn put(&self, out: &mut Vec<u8>) {
        out.push((*self).into());
    }
}

impl Encode for str {
    const TYPE: u32 = 8;

    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u64).put(out);
        out.extend_from_slice(self.as_bytes());
    }
}

impl Encode for String {
    const TYPE: u32 = str::TYPE;

    fn put(&self, out: &mut Vec<u8>) {
        self.as_str().put(out);
    }
}

impl<T: Encode> Encode for Vec<T> {
    const TYPE: u32 = 9;

    fn put(&self, out: &mut Vec<u8>) {
        T::TYPE.put(out);
        (self.len() as u64).put(out);
        self.iter().for_each(|value| value.put(out));
    }
}

impl<T: Encode + ?Sized> Encode for &T {
    const TYPE: u32 = T::TYPE;

    fn put(&self, out: &mut Vec<u8>) {
        (**self).put(out);
    }
}

/// Key/value pairs to be written, in this order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pairs {
    /// Types and values as they are written.
    encoded: IndexMap<String, Vec<u8>>,
    alignment: Option<u32>,
}

impl Pairs {
    /// All pairs of a file, with their types.
    pub fn of(metadata: &Metadata) -> Self {
        let alignment = metadata.get_u64(ALIGNMENT).and_then(|n| u32::try_from(n).ok());
        let encoded = metadata.encoded.iter();
        Self {
            encoded: encoded
                .map(|(key, value)| (key.clone(), value.to_vec()))
                .collect(),
            alignment,
        }
    }

    /// Sets a key; it goes to the end, wherever it was before.
    pub fn set(&mut self, key: impl Into<String>, value: impl Encode) {
        fn encode<T: Encode>(value: T) -> Vec<u8> {
            let mut out = T::TYPE.to_le_bytes().to_vec();
            value.put(&mut out);
            out
        }
        let key = key.into();
        self.remove(&key);
        self.encoded.insert(key, encode(value));
    }

    /// Takes a key out.
    pub fn remove(&mut self, key: &str) {
        self.encoded.shift_remove(key);
    }

    /// Whether the key is set.
    pub fn contains(&self, key: &str) -> bool {
        self.encoded.contains_key(key)
    }

    /// Adds other pairs; keys that both have take the other's value.
    pub fn extend(&mut self, other: Self) {
        for (key, value) in other.encoded {
            self.remove(&key);
            self.encoded.insert(key, value);
        }
    }
}

const ALIGNMENT: &str = "general.alignment";

/// Writes a file: the header, then each tensor as `data` (told its index) writes it; one at a time, so that no two
/// need to be in memory.
///
/// # Errors
/// Where a type is none that GGUF has, or a shape none that the type can hold; those of `data` and of `out`.
pub fn write<W: Write, E: From<Error>>(
    out: &mut W,
    file: &str,
    pairs: &Pairs,
    tensors: &[TensorInfo],
    mut data: impl FnMut(usize, &mut dyn Write) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let failed = |error: io::Error| Error::io(file)(error);
    let alignment = pairs.alignment.unwrap_or(DEFAULT_ALIGNMENT) as u64;
    let mut header = b"GGUF".to_vec();
    3u32.put(&mut header);
    (tensors.len() as u64).put(&mut header);
    (pairs.encoded.len() as u64).put(&mut header);
    for (key, value) in &pairs.encoded {
        key.put(&mut header);
        header.extend_from_slice(value);
    }
    let mut offset = 0u64;
    let mut sizes = Vec::with_capacity(tensors.len());
    for info in tensors {
        let size = size(info, file)?;
        info.name.put(&mut header);
        (info.shape.len() as u32).put(&mut header);
        // The fastest dimension comes first.
        info.shape
            .iter()
            .rev()
            .for_each(|dim| (*dim as u64).put(&mut header));
        type_id(info.dtype).unwrap_or(0).put(&mut header);
        offset.put(&mut header);
        offset += size.next_multiple_of(alignment);
        sizes.push(size);
    }
    header.resize((header.len() as u64).next_multiple_of(alignment) as usize, 0);
    out.write_all(&header).map_err(failed)?;
    for (index, (info, size)) in tensors.iter().zip(sizes).enumerate() {
        let mut counted = Counted {
            out: &mut *out,
            bytes: 0,
        };
        data(index, &mut counted)?;
        if counted.bytes != size {
            let what = format!("`{}` became {} bytes instead of {size}", info.name, counted.bytes);
            return Err(Error::format(file, what).into());
        }
        let padding = size.next_multiple_of(alignment) - size;
        out.write_all(&vec![0; padding as usize]).map_err(failed)?;
    }
    Ok(())
}

/// Bytes that a tensor takes.
fn size(info: &TensorInfo, file: &str) -> Result<u64> {
    let bytes = info
        .dtype
        .num_bytes(&info.shape)
        .filter(|_| type_id(info.dtype).is_some());
    bytes.map(|bytes| bytes as u64).ok_or_else(|| {
        let (name, dtype) = (&info.name, info.dtype.name());
        Error::format(
            file,
            format!("`{name}` of shape {:?} cannot be stored as {dtype}", info.shape),
        )
    })
}

/// The number by which files name a type.
pub(super) fn type_id(dtype: DType) -> Option<u32> {
    Some(match dtype {
        DType::Ggml(ty) => ty.id(),
        _ => super::PLAIN.iter().find(|(_, plain)| *plain == dtype)?.0,
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
