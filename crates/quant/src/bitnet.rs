//! BitNet b1.58 (Ma et al., "The era of 1-bit LLMs", 2024): weights are -1, 0 or 1 times one scale for the matrix, and
//! activations whole numbers of 8 bits times one scale for the token.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_kernels::PackedMatrix;
use oxiformers_kernels::int8::{CodeLayout, CodeRows, Shift};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::codes::CodeMatrix;
use crate::config::Method;
use crate::scheme::{Dense, Input, Parts, Plan, Scheme};
use crate::sum::sum;
use crate::to_f32;
use crate::values::from_f32;

/// `BitNetQuantConfig`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct BitNetQuantConfig {
    pub modules_to_not_convert: Option<Vec<String>>,
    pub linear_class: String,
    pub quantization_mode: String,
    pub use_rms_norm: bool,
    pub rms_norm_eps: f64,
    /// Fields that nothing is known of.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Default for BitNetQuantConfig {
    fn default() -> Self {
        Self {
            modules_to_not_convert: None,
            linear_class: "bitlinear".to_string(),
            quantization_mode: "offline".to_string(),
            use_rms_norm: false,
            rms_norm_eps: 1e-6,
            rest: Map::new(),
        }
    }
}

impl BitNetQuantConfig {
    fn bitnet(&self) -> BitNet {
        BitNet {
            scale: match self.linear_class.as_str() {
                "autobitlinear" => Scale::Factor,
                _ => Scale::Divisor,
            },
            norm: self.use_rms_norm.then_some(self.rms_norm_eps),
        }
    }
}

impl Method for BitNetQuantConfig {
    fn validate(&self) -> Result<(), String> {
        if !matches!(self.linear_class.as_str(), "bitlinear" | "autobitlinear") {
            return Err(format!(
                "`linear_class` is {:?}; it is bitlinear or autobitlinear",
                self.linear_class
            ));
        }
        if !matches!(self.quantization_mode.as_str(), "offline" | "online") {
            return Err(format!(
                "`quantization_mode` is {:?}; it is offline or online",
                self.quantization_mode
            ));
        }
        Ok(())
    }

    fn stored(&self) -> Vec<Arc<dyn Scheme>> {
        vec![Arc::new(self.bitnet())]
    }

    fn scheme(&self, _module: &str) -> Result<Option<Arc<dyn Scheme>>, String> {
        Ok(Some(Arc::new(self.bitnet())))
    }

    fn on_load(&self) -> bool {
        (self.linear_class.as_str(), self.quantization_mode.as_str()) == ("autobitlinear", "online")
    }

    fn skipped(&self) -> Option<&[String]> {
        self.modules_to_not_convert.as_deref()
    }

    fn skip(&mut self, modules: Vec<String>) {
        self.modules_to_not_convert = Some(modules);
    }
}

/// What products of the stored numbers are to be changed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Divided by the stored scale: `BitLinear`.
    Divisor,
    /// Multiplied with it: `AutoBitLinear`.
    Factor,
}

/// Ternary weights, four rows' two bits in a byte.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BitNet {
    /// What the stored scale is.
    pub scale: Scale,
    /// The epsilon of a norm of the activations, where there is one.
    pub norm: Option<f64>,
}

/// Rows that share a byte.
const VALUES_PER_ITEM: usize = 4;

impl Scheme for BitNet {
    fn name(&self) -> &str {
        "bitnet"
    }

    fn endings(&self) -> &[&str] {
        &[".weight", ".weight_scale"]
    }

    fn is_stored(&self, parts: &Parts) -> bool {
        parts.get(".weight_scale").is_some()
    }

    fn input(&self) -> Input {
        Input {
            int8: true,
            norm: self.norm,
        }
    }

    fn load(&self, parts: &Parts, shape: [usize; 2]) -> Result<Arc<dyn PackedMatrix>, String> {
        let [rows, cols] = shape;
        let scale = parts.need(".weight_scale")?;
        let stored = to_f32(scale).map_err(|reason| format!("`.weight_scale` {reason}"))?;
        let [stored] = stored[..] else {
            return Err(format!(
                "`.weight_scale` has the shape {:?}, 1 value expected",
                scale.shape
            ));
        };
        let scale = match self.scale {
            Scale::Divisor => 1.0 / stored,
            Scale::Factor => stored,
        };
        let weight = parts.need(".weight")?;
        let codes = match weight.dtype {
            DType::U8 => {
                packed_rows(shape)?;
                parts
                    .expect(".weight", &[DType::U8], &[rows / VALUES_PER_ITEM, cols])?
                    .data
                    .clone()
            }
            // Not packed yet: -1, 0 and 1 as floats.
            _ => {
                if weight.shape != shape {
                    return Err(format!(
                        "`.weight` has the shape {:?}, expected {shape:?}",
                        weight.shape
                    ));
                }
                let values = to_f32(weight).map_err(|reason| format!("`.weight` {reason}"))?;
                if values.iter().any(|value| ![-1.0, 0.0, 1.0].contains(value)) {
                    return Err("`.weight` has values that are not -1, 0 or 1".to_string());
                }
                pack_rows(shape, |at| values[at])?.into()
            }
        };
        // Codes of 3 stand for 2, as the original unpacks them.
        let rows = Rows { shape, codes, scale };
        let num_bytes = rows.codes.len() + 4;
        Ok(Arc::new(CodeMatrix::new(rows, "bitnet", num_bytes)))
    }

    fn plan(&self, shape: [usize; 2], dtype: DType) -> Result<Plan, String> {
        Ok(Plan::default()
            .with(".weight", DType::U8, &[packed_rows(shape)?, shape[1]])
            .with(".weight_scale", scale_dtype(dtype), &[1]))
    }

    fn quantize(&self, matrix: &Dense) -> Result<Parts, String> {
        let shape = matrix.shape();
        let [rows, cols] = shape;
        let packed = packed_rows(shape)?;
        let mut values = Vec::with_capacity(rows * cols);
        matrix.for_rows(|_, row| {
            values.extend_from_slice(row);
            Ok(())
        })?;
        let sizes: Vec<f32> = values.iter().map(|value| value.abs()).collect();
        let scale = 1.0 / (sum(&sizes) / sizes.len() as f32).max(1e-5);
        drop(sizes);
        let codes = pack_rows(shape, |at| {
            (values[at] * scale).round_ties_even().clamp(-1.0, 1.0)
        })?;
        let mut parts = Parts::default();
        let weight = TensorView {
            dtype: DType::U8,
            shape: vec![packed, cols],
            data: codes.into(),
        };
        parts.push(".weight", weight);
        let stored = match self.scale {
            Scale::Divisor => scale,
            Scale::Factor => 1.0 / scale,
        };
        let dtype = scale_dtype(matrix.dtype);
        let scale = TensorView {
            dtype,
            shape: vec![1],
            data: from_f32(&[stored], dtype)?.into(),
        };
        parts.push(".weight_scale", scale);
        Ok(parts)
    }
}

/// Scales are stored in the float type of the model.
fn scale_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => dtype,
        _ => DType::F32,
    }
}

fn packed_rows([rows, _]: [usize; 2]) -> Result<usize, String> {
    if rows > 0 && rows.is_multiple_of(VALUES_PER_ITEM) {
        return Ok(rows / VALUES_PER_ITEM);
    }
    Err(format!(
        "{rows} rows are no multiple of {VALUES_PER_ITEM}, which share a byte"
    ))
}

/// Rows of -1, 0 and 1: the first quarter in the lowest bits.
fn pack_rows(shape: [usize; 2], value: impl Fn(usize) -> f32) -> Result<Vec<u8>, String> {
    let size = packed_rows(shape)? * shape[1];
    let byte = |at: usize| {
        let code = |part: usize| ((value(part * size + at) + 1.0) as u8) << (2 * part);
        code(0) | code(1) | code(2) | code(3)
    };
    Ok((0..size).map(byte).collect())
}

/// Ternary codes as checkpoints have them.
#[derive(Debug, Clone)]
pub struct Rows {
    shape: [usize; 2],
    codes: Bytes,
    scale: f32,
}

impl CodeRows for Rows {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn layout(&self) -> CodeLayout {
        CodeLayout {
            bits: 2,
            group: usize::MAX,
            shift: Shift::Offset(1),
            table: None,
        }
    }

    fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], _shifts: &mut [f32]) {
        let [all, cols] = self.shape;
        let quarter = (all / VALUES_PER_ITEM).max(1);
        for (row, codes) in rows.zip(codes.chunks_exact_mut(cols.max(1))) {
            let stored = &self.codes[row % quarter * cols..][..cols];
            let shift = 2 * (row / quarter);
            codes
                .iter_mut()
                .zip(stored)
                .for_each(|(code, byte)| *code = byte >> shift & 3);
        }
        scales.fill(self.scale);
    }
}
