//! Floats of 8 bits with 4 exponent bits (e4m3), whose blocks of rows and columns share a scale, as DeepSeek-V3 is
//! published ("DeepSeek-V3 Technical Report", 2024), or whole matrices. They are multiplied as they are.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_kernels::dense::DenseMatrix;
use oxiformers_kernels::{Form, PackedMatrix};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::Method;
use crate::scheme::{Dense, Parts, Plan, Scheme};
use crate::to_f32;

/// `FineGrainedFP8Config`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct FineGrainedFP8Config {
    pub activation_scheme: String,
    /// Rows and columns that share a scale; none where there is one scale for all.
    #[serde(deserialize_with = "present")]
    pub weight_block_size: Option<[usize; 2]>,
    #[serde(alias = "ignored_layers")]
    pub modules_to_not_convert: Option<Vec<String>>,
    pub scale_fmt: String,
    /// Fields that nothing is known of.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// A field that is there: null, too, means something.
fn present<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<[usize; 2]>, D::Error> {
    Option::deserialize(from)
}

impl Default for FineGrainedFP8Config {
    fn default() -> Self {
        Self {
            activation_scheme: "dynamic".to_string(),
            weight_block_size: Some([128, 128]),
            modules_to_not_convert: None,
            scale_fmt: "float".to_string(),
            rest: Map::new(),
        }
    }
}

impl FineGrainedFP8Config {
    fn scheme(&self) -> Fp8 {
        Fp8 {
            block: self.weight_block_size,
        }
    }
}

impl Method for FineGrainedFP8Config {
    fn validate(&self) -> Result<(), String> {
        if self.weight_block_size.is_some_and(|block| block.contains(&0)) {
            return Err("`weight_block_size` has a zero".to_string());
        }
        if !matches!(self.scale_fmt.as_str(), "float" | "ue8m0") {
            return Err(format!(
                "`scale_fmt` is {:?}; it is float or ue8m0",
                self.scale_fmt
            ));
        }
        Ok(())
    }

    fn stored(&self) -> Vec<Arc<dyn Scheme>> {
        vec![Arc::new(self.scheme())]
    }

    fn scheme(&self, _module: &str) -> Result<Option<Arc<dyn Scheme>>, String> {
        if self.scale_fmt != "float" {
            return Err("scales are written as floats only; `scale_fmt` must be float".to_string());
        }
        Ok(Some(Arc::new(self.scheme())))
    }

    fn skipped(&self) -> Option<&[String]> {
        self.modules_to_not_convert.as_deref()
    }

    fn skip(&mut self, modules: Vec<String>) {
        self.modules_to_not_convert = Some(modules);
    }
}

/// Floats of 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fp8 {
    /// Rows and columns that share a scale; without, all do.
    pub block: Option<[usize; 2]>,
}

impl Fp8 {
    /// Rows and columns of the blocks that a grid of scales stands for.
    fn block_of(&self, shape: [usize; 2], grid: [usize; 2]) -> Result<[usize; 2], String> {
        if let Some(block) = self.block
            && [0, 1].map(|axis| shape[axis].div_ceil(block[axis])) == grid
        {
            return Ok(block);
        }
        let fits = |axis: usize| grid[axis] > 0 && shape[axis].is_multiple_of(grid[axis]);
        if fits(0) && fits(1) {
            return Ok([shape[0] / grid[0], shape[1] / grid[1]]);
        }
        Err(format!("{grid:?} scales do not divide the shape {shape:?}"))
    }
}

impl Scheme for Fp8 {
    fn name(&self) -> &str {
        "fp8"
    }

    fn endings(&self) -> &[&str] {
        &[".weight", ".weight_scale_inv", ".activation_scale"]
    }

    fn stacked_endings(&self) -> &[(&str, &str)] {
        &[("", ".weight"), ("_scale_inv", ".weight_scale_inv")]
    }

    fn is_stored(&self, parts: &Parts) -> bool {
        parts.get(".weight_scale_inv").is_some()
    }

    fn load(&self, parts: &Parts, shape: [usize; 2]) -> Result<Arc<dyn PackedMatrix>, String> {
        let weight = parts.expect(".weight", &[DType::F8E4M3], &shape)?;
        let scales = parts.need(".weight_scale_inv")?;
        let grid = match scales.shape[..] {
            [] | [1] => [1, 1],
            [rows, cols] => [rows, cols],
            _ => return Err(format!("`.weight_scale_inv` has the shape {:?}", scales.shape)),
        };
        let block = self.block_of(shape, grid)?;
        let scales = match scales.dtype {
            // Exponents.
            DType::U8 => scales
                .data
                .iter()
                .map(|bits| (f32::from(*bits) - 127.0).exp2())
                .collect(),
            _ => to_f32(scales).map_err(|reason| format!("`.weight_scale_inv` {reason}"))?,
        };
        Ok(Arc::new(Fp8Matrix::new(
            shape,
            weight.data.clone(),
            scales,
            block,
        )))
    }

    fn takes(&self, shape: [usize; 2]) -> bool {
        let block = self.block.unwrap_or(shape);
        [0, 1]
            .iter()
            .all(|axis| block[*axis] > 0 && shape[*axis].is_multiple_of(block[*axis]))
    }

    fn plan(&self, shape: [usize; 2], _dtype: DType) -> Result<Plan, String> {
        let block = self.block.unwrap_or(shape);
        if !self.takes(shape) {
            return Err(format!(
                "the shape {shape:?} is no whole number of blocks of {block:?}; leave the module out, or choose other blocks"
            ));
        }
        Ok(Plan::default().with(".weight", DType::F8E4M3, &shape).with(
            ".weight_scale_inv",
            DType::F32,
            &[shape[0] / block[0], shape[1] / block[1]],
        ))
    }

    fn quantize(&self, matrix: &Dense) -> Result<Parts, String> {
        let shape = matrix.shape();
        let plan = self.plan(shape, matrix.dtype)?;
        let [rows, cols] = shape;
        let [block_rows, block_cols] = self.block.unwrap_or(shape);
        let grid = [rows / block_rows, cols / block_cols];
        let mut most = vec![0.0f32; grid[0] * grid[1]];
        matrix.for_rows(|part, values| {
            for (row, values) in part.zip(values.chunks_exact(cols)) {
                let most = &mut most[row / block_rows * grid[1]..][..grid[1]];
                for (most, values) in most.iter_mut().zip(values.chunks_exact(block_cols)) {
                    *most = values.iter().fold(*most, |most, value| most.max(value.abs()));
                }
            }
            Ok(())
        })?;
        let scales: Vec<f32> = most
            .iter()
            .map(|most| if *most > 0.0 { 1.0 / most * 448.0 } else { 1.0 })
            .collect();
        let mut codes = Vec::with_capacity(rows * cols);
        matrix.for_rows(|part, values| {
            for (row, values) in part.zip(values.chunks_exact(cols)) {
                let scales = &scales[row / block_rows * grid[1]..];
                for (scale, values) in scales.iter().zip(values.chunks_exact(block_cols)) {
                    codes.extend(
                        values
                            .iter()
                            .map(|value| encode((value * scale).clamp(-448.0, 448.0))),
                    );
                }
            }
            Ok(())
        })?;
        let inverse: Vec<f32> = scales.iter().map(|scale| 1.0 / scale).collect();
        let mut parts = Parts::default();
        let weight = TensorView {
            dtype: DType::F8E4M3,
            shape: shape.to_vec(),
            data: codes.into(),
        };
        parts.push(".weight", weight);
        let shape = &plan.tensors[1].shape;
        parts.push_values(".weight_scale_inv", DType::F32, shape, &inverse, f32::to_le_bytes);
        Ok(parts)
    }
}

/// The value of a float of 8 bits, without infinities.
pub fn decode(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * ((exponent - 7) as f32).exp2(),
    };
    if code & 0x80 != 0 { -size } else { size }
}

/// The nearest float of 8 bits, the even one of two as near, of a value from -448 to 448.
pub fn encode(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    let size = value.abs();
    if size < 1.0 / 64.0 {
        // The next larger one is the first that is normal.
        return sign | (size * 512.0).round_ties_even() as u8;
    }
    let bits = size.to_bits();
    let rounded = bits + 0x7_FFFF + (bits >> 20 & 1);
    let code = (rounded >> 20).saturating_sub((127 - 7) << 3).min(0x7E);
    sign | code as u8
}

/// A matrix of floats of 8 bits, with a scale for each block.
#[derive(Debug, Clone)]
pub struct Fp8Matrix {
    shape: [usize; 2],
    codes: Bytes,
    /// Row by row of blocks.
    scales: Vec<f32>,
    block: [usize; 2],
    /// Made when the first product needs it.
    dense: Arc<OnceLock<DenseMatrix>>,
}

impl Fp8Matrix {
    /// `codes` and `scales` were checked to be as many as `shape` and `block` need.
    pub(crate) fn new(shape: [usize; 2], codes: Bytes, scales: Vec<f32>, block: [usize; 2]) -> Self {
        Self {
            shape,
            codes,
            scales,
            // Zeros come with shapes that have some.
            block: block.map(|len| len.max(1)),
            dense: Arc::default(),
        }
    }

    fn pack(&self) -> DenseMatrix {
        // From then on a few rows are looked up at most.
        let done = oxiformers_hub::release;
        DenseMatrix::pack_scaled(self.shape, &self.codes, &self.scales, self.block, &done)
    }
}

impl PackedMatrix for Fp8Matrix {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn scheme(&self) -> &str {
        "fp8"
    }

    fn num_bytes(&self) -> usize {
        self.codes.len() + 4 * self.scales.len()
    }

    fn dequantize_rows(&self, rows: Range<usize>, dst: &mut [f32]) {
        let cols = self.shape[1];
        let [block_rows, block_cols] = self.block;
        let across = cols.div_ceil(block_cols);
        for (row, dst) in rows.zip(dst.chunks_exact_mut(cols.max(1))) {
            let scales = &self.scales[row / block_rows * across..];
            let codes = self.codes[row * cols..(row + 1) * cols].chunks(block_cols);
            for ((codes, dst), scale) in codes.zip(dst.chunks_mut(block_cols)).zip(scales) {
                for (code, dst) in codes.iter().zip(dst) {
                    *dst = VALUES[usize::from(*code)] * scale;
                }
            }
        }
    }

    fn form(&self) -> Form<'_> {
        Form::Float(self.dense.get_or_init(|| self.pack()))
    }
}

static VALUES: std::sync::LazyLock<[f32; 256]> =
    std::sync::LazyLock::new(|| std::array::from_fn(|code| decode(code as u8)));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_comes_back() {
        for code in 0..=255u8 {
            if code & 0x7F != 0x7F {
                assert_eq!(encode(decode(code)), code, "{code:#x}");
            }
        }
        // The nearest one, and the even one of two.
        let all: Vec<f32> = (0..0x7F).map(decode).collect();
        for (code, pair) in all.windows(2).enumerate() {
            let (low, high) = (code as u8, code as u8 + 1);
            let middle = (pair[0] + pair[1]) / 2.0;
            assert_eq!(encode(middle), if low.is_multiple_of(2) { low } else { high });
            assert_eq!(encode(middle.next_down()), low);
            assert_eq!(encode(-middle.next_up()), 0x80 | high);
        }
        assert_eq!(encode(448.0), 0x7E);
        assert!(decode(0x7F).is_nan());
    }
}
