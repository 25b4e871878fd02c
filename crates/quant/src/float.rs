//! Plain floats, of 32 bits or of 16 that are widened as they are read.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use oxiformers_hub::checkpoint::DType;
use oxiformers_kernels::dense::{DenseMatrix, Float};
use oxiformers_kernels::{Form, PackedMatrix};

use crate::fp8;

/// A matrix of `F32`, `F16` or `BF16` values, row-major, little-endian.
#[derive(Debug, Clone)]
pub struct FloatMatrix {
    float: Float,
    shape: [usize; 2],
    data: Bytes,
    /// Made when the first product needs it: tables of embeddings are only looked up.
    dense: Arc<OnceLock<DenseMatrix>>,
}

impl FloatMatrix {
    /// `None` where the length of `data` does not fit `shape`, or `dtype` is none of the three.
    pub fn new(dtype: DType, shape: [usize; 2], data: Bytes) -> Option<Self> {
        let float = match dtype {
            DType::F32 => Float::F32,
            DType::F16 => Float::F16,
            DType::BF16 => Float::Bf16,
            _ => return None,
        };
        let values = shape[0].checked_mul(shape[1])?;
        (values.checked_mul(float.bytes())? == data.len()).then(|| Self {
            float,
            shape,
            data,
            dense: Arc::default(),
        })
    }
}

impl PackedMatrix for FloatMatrix {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn scheme(&self) -> &str {
        match self.float {
            Float::F32 => "F32",
            Float::F16 => "F16",
            Float::Bf16 => "BF16",
            Float::F8E4M3 => "F8_E4M3",
        }
    }

    fn num_bytes(&self) -> usize {
        self.data.len()
    }

    fn dequantize_rows(&self, rows: Range<usize>, dst: &mut [f32]) {
        let row_bytes = self.float.bytes() * self.shape[1];
        let bytes = &self.data[rows.start * row_bytes..rows.end * row_bytes];
        fn each<const N: usize>(bytes: &[u8], dst: &mut [f32], widen: impl Fn([u8; N]) -> f32) {
            for (dst, bytes) in dst.iter_mut().zip(bytes.as_chunks().0) {
                *dst = widen(*bytes);
            }
        }
        match self.float {
            Float::F32 => each(bytes, dst, f32::from_le_bytes),
            Float::F16 => each(bytes, dst, |b| half::f16::from_le_bytes(b).to_f32()),
            Float::Bf16 => each(bytes, dst, |b| half::bf16::from_le_bytes(b).to_f32()),
            Float::F8E4M3 => each(bytes, dst, |[code]| fp8::decode(code)),
        }
    }

    fn form(&self) -> Form<'_> {
        let [rows, cols] = self.shape;
        // From then on a few rows are looked up at most.
        let done = oxiformers_hub::release;
        let pack = || DenseMatrix::pack(self.float, rows, cols, &self.data, &done);
        Form::Float(self.dense.get_or_init(pack))
    }
}
