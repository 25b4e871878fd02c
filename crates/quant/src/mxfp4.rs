//! MXFP4 (OCP Microscaling Formats, 2023): blocks of 32 floats of 4 bits that share a power of two, as gpt-oss stores its
//! experts.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use oxiformers_hub::checkpoint::gguf::GgmlType;
use oxiformers_hub::checkpoint::{DType, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Scheme;
use crate::config::Method;

/// `Mxfp4Config`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Mxfp4Config {
    pub modules_to_not_convert: Option<Vec<String>>,
    pub dequantize: bool,
    /// Fields that nothing is known of.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Method for Mxfp4Config {
    fn validate(&self) -> Result<(), String> {
        Ok(())
    }

    fn stored(&self) -> Vec<Arc<dyn Scheme>> {
        Vec::new()
    }

    fn scheme(&self, _module: &str) -> Result<Option<Arc<dyn Scheme>>, String> {
        Err("only experts of gpt-oss are stored in mxfp4, and they are published so".to_string())
    }

    fn skipped(&self) -> Option<&[String]> {
        self.modules_to_not_convert.as_deref()
    }

    fn skip(&mut self, modules: Vec<String>) {
        self.modules_to_not_convert = Some(modules);
    }
}

/// Rows of one of many matrices `[rows, columns]`.
#[derive(Debug, Clone, Copy)]
pub struct Slice {
    /// Which matrix.
    pub index: usize,
    /// The first row.
    pub first: usize,
    /// From a row to the next.
    pub step: usize,
}

/// Stacked matrices `[count, rows, columns]`: `blocks` `[count, rows, columns / 32, 16]` with two values a byte, the
/// first in the low half, and the exponents `scales` `[count, rows, columns / 32]`.
#[derive(Debug, Clone)]
pub struct Mxfp4Stack {
    shape: [usize; 3],
    blocks: Bytes,
    scales: Bytes,
}

impl Mxfp4Stack {
    /// # Errors
    /// Where types and shapes do not fit.
    pub fn new(shape: [usize; 3], blocks: &TensorView, scales: &TensorView) -> Result<Self, String> {
        let [count, rows, columns] = shape;
        if !columns.is_multiple_of(32) {
            return Err(format!(
                "{columns} is no multiple of 32, the size of an MXFP4 block"
            ));
        }
        for (view, expected) in [
            (blocks, &[count, rows, columns / 32, 16][..]),
            (scales, &[count, rows, columns / 32]),
        ] {
            if view.dtype != DType::U8 || view.shape != expected {
                return Err(format!(
                    "is stored as {} {:?}; MXFP4 is stored as U8 {expected:?}",
                    view.dtype.name(),
                    view.shape
                ));
            }
        }
        Ok(Self {
            shape,
            blocks: blocks.data.clone(),
            scales: scales.data.clone(),
        })
    }

    /// Some rows of a matrix as ggml's blocks: the exponent, then values 0 to 16 in the low and 16 to 32 in the high
    /// halves of bytes.
    pub fn rows(&self, slice: Slice) -> TensorView {
        let [_, rows, columns] = self.shape;
        let runs = columns / 32;
        let mut data = BytesMut::with_capacity(17 * runs * rows.div_ceil(slice.step.max(1)));
        for row in (slice.first..rows).step_by(slice.step.max(1)) {
            let first = (slice.index * rows + row) * runs;
            let blocks = self
                .blocks
                .get(16 * first..16 * (first + runs))
                .unwrap_or_default();
            let scales = self.scales.get(first..first + runs).unwrap_or_default();
            for (block, scale) in blocks.as_chunks::<16>().0.iter().zip(scales) {
                let value = |i: usize| (block[i / 2] >> (4 * (i % 2))) & 0xF;
                data.extend_from_slice(&[*scale]);
                data.extend((0..16).map(|i| value(i) | value(i + 16) << 4));
            }
        }
        TensorView {
            dtype: DType::Ggml(GgmlType::MXFP4),
            shape: vec![data.len() / 17 / runs.max(1), columns],
            data: data.freeze(),
        }
    }
}
