//! An optimizer's memory to and from named tensors.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{Shapes, State};
use crate::{Error, Result};

/// How the values of a tensor are held, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DType {
    F32,
    I64,
    U8,
}

impl DType {
    /// Bytes that `shape` takes; `None` where that is more than memory can hold.
    fn num_bytes(self, shape: &[usize]) -> Option<usize> {
        let size = match self {
            Self::F32 => 4,
            Self::I64 => 8,
            Self::U8 => 1,
        };
        shape
            .iter()
            .try_fold(size, |bytes: usize, dim| bytes.checked_mul(*dim))
    }
}

/// A tensor of a state, as a safetensors file holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorView {
    /// The type of its values.
    pub dtype: DType,
    /// Row-major, outermost dimension first.
    pub shape: Vec<usize>,
    /// The values.
    pub data: Bytes,
}

/// f32 values as a tensor.
pub fn floats(values: &[f32], shape: &[usize]) -> TensorView {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    TensorView {
        dtype: DType::F32,
        shape: shape.to_vec(),
        data: Bytes::from(data),
    }
}

/// The values of a tensor of f32.
pub fn to_floats(tensor: &TensorView) -> Vec<f32> {
    let values = tensor.data.as_chunks::<4>().0.iter();
    values.map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Bytes as a tensor.
pub fn bytes(values: &[u8], shape: &[usize]) -> TensorView {
    TensorView {
        dtype: DType::U8,
        shape: shape.to_vec(),
        data: Bytes::copy_from_slice(values),
    }
}

/// A count as a tensor without dimensions.
pub fn count(value: u64) -> TensorView {
    TensorView {
        dtype: DType::I64,
        shape: Vec::new(),
        data: Bytes::copy_from_slice(&(value as i64).to_le_bytes()),
    }
}

/// The moments of one parameter, by their names.
pub struct Moments<'a> {
    parameter: &'a str,
    /// The shape of the parameter.
    pub shape: &'a [usize],
    tensors: BTreeMap<&'a str, &'a TensorView>,
}

/// What `load` makes of the moments of each parameter.
///
/// # Errors
/// [`Error::State`] names a tensor that is none of the `known` moments of a parameter.
pub fn load<T>(
    state: &State,
    shapes: &Shapes,
    known: &[&str],
    load: impl Fn(&Moments) -> Result<T>,
) -> Result<BTreeMap<String, T>> {
    let mut all: BTreeMap<&str, Moments> = BTreeMap::new();
    for (name, tensor) in state {
        let Some((parameter, moment)) = name.rsplit_once('.').filter(|(_, moment)| known.contains(moment))
        else {
            let expected = known.join(", ");
            return Err(Error::state(
                name,
                format!("is none of this optimizer's tensors ({expected})"),
            ));
        };
        let shape = shapes.get(parameter);
        let shape = shape.ok_or_else(|| Error::state(name, "is of no parameter of this model"))?;
        let entry = all.entry(parameter).or_insert_with(|| Moments {
            parameter,
            shape,
            tensors: BTreeMap::new(),
        });
        entry.tensors.insert(moment, tensor);
    }
    all.into_iter()
        .map(|(name, moments)| Ok((name.to_string(), load(&moments)?)))
        .collect()
}

impl Moments<'_> {
    /// Whether there is such a tensor.
    pub fn contains(&self, moment: &str) -> bool {
        self.tensors.contains_key(moment)
    }

    fn tensor(&self, moment: &str, dtype: DType, shape: &[usize]) -> Result<&TensorView> {
        let full = || format!("{}.{moment}", self.parameter);
        let tensor = self.tensors.get(moment);
        let tensor = tensor.ok_or_else(|| Error::state(&full(), "is missing"))?;
        let size = dtype.num_bytes(shape);
        if tensor.dtype != dtype || tensor.shape != shape || size != Some(tensor.data.len()) {
            let found = format!("{:?} {:?}", tensor.dtype, tensor.shape);
            return Err(Error::state(
                &full(),
                format!("is {found}, not {dtype:?} {shape:?}"),
            ));
        }
        Ok(tensor)
    }

    /// The values of an f32 tensor of the parameter's shape.
    ///
    /// # Errors
    /// [`Error::State`] where there is none.
    pub fn floats(&self, moment: &str) -> Result<Vec<f32>> {
        self.floats_of(moment, self.shape)
    }

    /// The values of an f32 tensor of another shape.
    ///
    /// # Errors
    /// As [`floats`](Self::floats).
    pub fn floats_of(&self, moment: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.tensor(moment, DType::F32, shape)?;
        let values = tensor
            .data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b));
        Ok(values.collect())
    }

    /// The bytes of a tensor of the parameter's shape.
    ///
    /// # Errors
    /// As [`floats`](Self::floats).
    pub fn bytes(&self, moment: &str) -> Result<Vec<u8>> {
        Ok(self.tensor(moment, DType::U8, self.shape)?.data.to_vec())
    }

    /// A count.
    ///
    /// # Errors
    /// As [`floats`](Self::floats).
    pub fn count(&self, moment: &str) -> Result<u64> {
        let tensor = self.tensor(moment, DType::I64, &[])?;
        let value = tensor
            .data
            .as_chunks::<8>()
            .0
            .first()
            .map(|b| i64::from_le_bytes(*b));
        let count = value.and_then(|value| u64::try_from(value).ok());
        count.ok_or_else(|| Error::state(&format!("{}.{moment}", self.parameter), "is no count"))
    }
}
