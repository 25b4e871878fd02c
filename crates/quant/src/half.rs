//! 16-bit floats, widened as they are read.

use std::ops::Range;

use bytes::Bytes;
use oxiformers_hub::checkpoint::DType;
use oxiformers_kernels::PackedMatrix;

/// A matrix of `F16` or `BF16` values, row-major, little-endian.
#[derive(Debug, Clone)]
pub struct HalfMatrix {
    dtype: DType,
    shape: [usize; 2],
    data: Bytes,
}

impl HalfMatrix {
    /// `None` where the length of `data` does not fit `shape`, or `dtype` is no 16-bit float.
    pub fn new(dtype: DType, shape: [usize; 2], data: Bytes) -> Option<Self> {
        let fits = shape[0].checked_mul(shape[1])?.checked_mul(2)? == data.len();
        (fits && matches!(dtype, DType::F16 | DType::BF16)).then_some(Self { dtype, shape, data })
    }
}

impl PackedMatrix for HalfMatrix {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn scheme(&self) -> &str {
        if self.dtype == DType::F16 { "F16" } else { "BF16" }
    }

    fn num_bytes(&self) -> usize {
        self.data.len()
    }

    fn dequantize_rows(&self, rows: Range<usize>, dst: &mut [f32]) {
        let row_bytes = 2 * self.shape[1];
        let bytes = &self.data[rows.start * row_bytes..rows.end * row_bytes];
        let values = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        if self.dtype == DType::BF16 {
            dst.iter_mut()
                .zip(values)
                .for_each(|(d, bits)| *d = f32::from_bits(u32::from(bits) << 16));
        } else {
            dst.iter_mut()
                .zip(values)
                .for_each(|(d, bits)| *d = half::f16::from_bits(bits).to_f32());
        }
    }
}
