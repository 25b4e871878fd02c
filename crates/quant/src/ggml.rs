//! The block formats of ggml, as GGUF files store them.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use oxiformers_hub::checkpoint::gguf::GgmlType;
use oxiformers_kernels::ggml::{self, GgmlRows};
use oxiformers_kernels::int8::Int8Matrix;
use oxiformers_kernels::{Form, PackedMatrix};

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

    fn dequantize_rows(&self, rows: Range<usize>, dst: &mut [f32]) {
        let bytes = &self.data[rows.start * self.row_bytes..rows.end * self.row_bytes];
        let done = ggml::dequantize(self.ty, bytes, dst);
        debug_assert!(done.is_ok(), "the constructor checked the sizes");
    }

    fn form(&self) -> Form<'_> {
        // From then on a few rows are looked up at most.
        let pack = || Int8Matrix::from_codes(&GgmlRows::new(self.ty, self.shape, &self.data));
        Form::Int8(self.int8.get_or_init(pack))
    }
}
