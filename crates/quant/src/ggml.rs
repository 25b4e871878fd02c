//! The block formats of ggml, as GGUF files store them.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use oxiformers_hub::checkpoint::gguf::GgmlType;
use oxiformers_kernels::ggml::{self, GgmlRows, QuantizeError};
use oxiformers_kernels::int8::{CodeRows, Int8Matrix};
use oxiformers_kernels::{Form, PackedMatrix};

use crate::codes::RegroupedMatrix;

/// A matrix whose rows are runs of ggml blocks.
#[derive(Debug, Clone)]
pub struct GgmlMatrix {
    ty: GgmlType,
    shape: [usize; 2],
    row_bytes: usize,
    data: Bytes,
    /// Made when the first product needs it: tables of embeddings are only looked up.
    int8: Arc<OnceLock<Int8Matrix>>,
}

impl GgmlMatrix {
    /// `data` holds `shape[0]` rows of `shape[1]` values; `None` where its length does not fit that, or a
    /// row is no whole number of blocks.
    pub fn new(ty: GgmlType, shape: [usize; 2], data: Bytes) -> Option<Self> {
        if !shape[1].is_multiple_of(ty.block_size()) {
            return None;
        }
        let row_bytes = shape[1] / ty.block_size() * ty.type_size();
        (row_bytes.checked_mul(shape[0])? == data.len()).then_some(Self {
            ty,
            shape,
            row_bytes,
            data,
            int8: Arc::default(),
        })
    }

    /// The values of another matrix in blocks of `ty`; `None` where its rows are no whole number of blocks.
    ///
    /// # Errors
    /// A value that blocks have no place for; its row is counted from a multiple of 256 on.
    pub fn narrowed(ty: GgmlType, from: &dyn PackedMatrix) -> Result<Option<Self>, QuantizeError> {
        let [rows, columns] = from.shape();
        if columns == 0 || !columns.is_multiple_of(ty.block_size()) {
            return Ok(None);
        }
        let row_bytes = columns / ty.block_size() * ty.type_size();
        let mut data = vec![0; rows * row_bytes];
        // So many at a time that their floats take little memory.
        let mut values = vec![0.0; rows.min(256) * columns];
        for (index, data) in data.chunks_mut(256 * row_bytes).enumerate() {
            let (first, count) = (256 * index, data.len() / row_bytes);
            let values = &mut values[..count * columns];
            from.dequantize_rows(first..first + count, values);
            ggml::quantize(ty, values, columns, None, data)?;
        }
        Ok(Self::new(ty, [rows, columns], data.into()))
    }
}

impl PackedMatrix for GgmlMatrix {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn scheme(&self) -> &str {
        self.ty.name()
    }

    fn num_bytes(&self) -> usize {
        self.data.len()
    }

    fn held_bytes(&self) -> usize {
        Int8Matrix::bytes_of(
            self.shape,
            GgmlRows::new(self.ty, self.shape, &self.data).layout(),
        )
    }

    fn dequantize_rows(&self, rows: Range<usize>, dst: &mut [f32]) {
        let bytes = &self.data[rows.start * self.row_bytes..rows.end * self.row_bytes];
        let done = ggml::dequantize(self.ty, bytes, dst);
        debug_assert!(done.is_ok(), "the constructor checked the sizes");
    }

    fn regrouped(&self) -> Option<Arc<dyn PackedMatrix>> {
        let rows = GgmlRows::new(self.ty, self.shape, &self.data);
        Some(Arc::new(RegroupedMatrix::new(&rows, self.ty.name())))
    }

    fn form(&self) -> Form<'_> {
        // From then on a few rows are looked up at most.
        let pack = || Int8Matrix::from_codes(&GgmlRows::new(self.ty, self.shape, &self.data));
        Form::Int8(self.int8.get_or_init(pack))
    }
}
