//! LLM.int8() of bitsandbytes (Dettmers et al., 2022): rows of bytes that share their largest value.
//!
//! The original quantizes activations to 8 bits for each token, and so has to multiply columns with outliers, those above
//! `llm_int8_threshold`, in higher precision. Products here take activations of 15 bits with a scale for every 32 columns,
//! outliers or not: what an outlier costs its 31 neighbours is a rounding error of 1/32512 of it, where the original's
//! half floats round the outlier itself by up to 1/2048. So the threshold is read and written, and changes nothing.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_kernels::int8::{CodeLayout, CodeRows, Int8Matrix, Shift};
use oxiformers_kernels::{Form, PackedMatrix};

use crate::scheme::{Dense, Parts, Plan, Scheme};
use crate::to_f32;

/// LLM.int8().
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LlmInt8;

impl Scheme for LlmInt8 {
    fn name(&self) -> &str {
        "int8"
    }

    fn endings(&self) -> &[&str] {
        &[".weight", ".SCB", ".weight_format"]
    }

    fn is_stored(&self, parts: &Parts) -> bool {
        parts.get(".SCB").is_some()
    }

    fn load(&self, parts: &Parts, shape: [usize; 2]) -> Result<Arc<dyn PackedMatrix>, String> {
        let weight = parts.expect(".weight", &[DType::I8], &shape)?;
        let scales = parts.expect(".SCB", &[DType::F32, DType::F16, DType::BF16], &[shape[0]])?;
        // 0 stands for rows; others are of GPUs that nobody stores for any more.
        let format = parts.get(".weight_format").and_then(|view| view.data.first());
        if let Some(format) = format.filter(|format| **format != 0) {
            return Err(format!(
                "`.weight_format` is {format}; only 0, rows, is supported"
            ));
        }
        Ok(Arc::new(Int8Rows {
            shape,
            codes: weight.data.clone(),
            largest: to_f32(scales)?,
            int8: Arc::default(),
        }))
    }

    fn plan(&self, [rows, cols]: [usize; 2], _dtype: DType) -> Result<Plan, String> {
        Ok(Plan::default()
            .with(".weight", DType::I8, &[rows, cols])
            .with(".SCB", DType::F32, &[rows])
            .with(".weight_format", DType::U8, &[]))
    }

    /// Values are rounded to half floats first, as the original does.
    fn quantize(&self, matrix: &Dense) -> Result<Parts, String> {
        let [rows, cols] = matrix.shape();
        let mut codes = Vec::with_capacity(rows * cols);
        let mut largest = Vec::with_capacity(rows);
        matrix.for_rows(|part, values| {
            for (row, values) in part.zip(values.chunks_exact(cols.max(1))) {
                let half = |value: &f32| half::f16::from_f32(*value).to_f32();
                let most = values
                    .iter()
                    .map(half)
                    .fold(0.0f32, |most, value| most.max(value.abs()));
                if most.is_infinite() {
                    return Err(format!(
                        "row {row} has values above 65504, the largest half float"
                    ));
                }
                let scale = if most > 0.0 { 127.0 / most } else { 0.0 };
                codes.extend(
                    values
                        .iter()
                        .map(|value| (half(value) * scale).round_ties_even() as i8 as u8),
                );
                largest.push(most);
            }
            Ok(())
        })?;
        let mut parts = Parts::default();
        let weight = TensorView {
            dtype: DType::I8,
            shape: vec![rows, cols],
            data: codes.into(),
        };
        parts.push(".weight", weight);
        parts.push_values(".SCB", DType::F32, &[rows], &largest, f32::to_le_bytes);
        parts.push_values(".weight_format", DType::U8, &[], &[0u8], |byte| [byte]);
        Ok(parts)
    }
}

/// Signed bytes, and the largest value of each row.
#[derive(Debug, Clone)]
pub struct Int8Rows {
    shape: [usize; 2],
    codes: Bytes,
    largest: Vec<f32>,
    int8: Arc<OnceLock<Int8Matrix>>,
}

/// 1/127, as the original has it.
const INVERSE: f32 = 7.874_016e-3;

impl CodeRows for Int8Rows {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn layout(&self) -> CodeLayout {
        CodeLayout {
            bits: 8,
            group: usize::MAX,
            shift: Shift::Offset(128),
            table: None,
        }
    }

    fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], _shifts: &mut [f32]) {
        let cols = self.shape[1];
        let stored = &self.codes[rows.start * cols..rows.end * cols];
        codes
            .iter_mut()
            .zip(stored)
            .for_each(|(code, stored)| *code = stored ^ 0x80);
        let largest = &self.largest[rows];
        scales
            .iter_mut()
            .zip(largest)
            .for_each(|(scale, largest)| *scale = largest * INVERSE);
    }

    fn release(&self, rows: Range<usize>) {
        let cols = self.shape[1];
        oxiformers_hub::release(&self.codes[rows.start * cols..rows.end * cols]);
    }
}

impl PackedMatrix for Int8Rows {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn scheme(&self) -> &str {
        "int8"
    }

    fn num_bytes(&self) -> usize {
        self.codes.len() + 4 * self.largest.len()
    }

    fn dequantize_rows(&self, rows: Range<usize>, dst: &mut [f32]) {
        let cols = self.shape[1];
        let codes = &self.codes[rows.start * cols..rows.end * cols];
        let each = codes
            .chunks_exact(cols.max(1))
            .zip(dst.chunks_exact_mut(cols.max(1)));
        for ((codes, dst), largest) in each.zip(&self.largest[rows]) {
            for (code, dst) in codes.iter().zip(dst) {
                *dst = f32::from(code.cast_signed()) * largest * INVERSE;
            }
        }
    }

    fn form(&self) -> Form<'_> {
        // From then on a few rows are looked up at most.
        Form::Int8(self.int8.get_or_init(|| Int8Matrix::from_codes(self)))
    }
}
