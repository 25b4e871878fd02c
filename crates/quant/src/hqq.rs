//! HQQ's checkpoints, as `HQQLinear.state_dict` writes them: groups of weights as rows of a matrix, and all that says how
//! they are packed as little tensors beside it.
//!
//! `W_q` holds the codes of several rows in a byte: of 4 bits, those of the first half of the rows in the upper half of
//! bytes; of 3 bits, ten in a word of 32 bits; `scale` and `zero` have one value for each group. A weight is
//! `scale · (code − zero)`, which is computed in f32 here, whatever `compute_dtype` says.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_kernels::PackedMatrix;
use oxiformers_kernels::int8::{CodeLayout, CodeRows, Shift};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::calibrate::hqq::{HqqCodes, ROUNDED_ZERO, hqq};
use crate::codes::CodeMatrix;
use crate::config::Method;
use crate::float::FloatMatrix;
use crate::scheme::{Dense, Parts, Plan, Scheme};
use crate::values::{from_f32, to_f32};

/// The `quantization_config` of HQQ: fields and defaults of Transformers' `HqqConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HqqConfig {
    /// hqq's `BaseQuantizeConfig`, for all modules or by parts of their names.
    pub quant_config: Value,
    /// Modules that are left as they are.
    pub skip_modules: Vec<String>,
}

impl Default for HqqConfig {
    fn default() -> Self {
        Self::new(4, Some(64))
    }
}

impl HqqConfig {
    /// Codes of `nbits` bits, in groups of `group_size` values of a row, or whole rows.
    pub fn new(nbits: u32, group_size: Option<usize>) -> Self {
        Self {
            quant_config: json!({
                "offload_meta": false,
                "scale_quant_params": null,
                "weight_quant_params": {
                    "axis": 1,
                    "channel_wise": true,
                    "group_size": group_size,
                    "nbits": nbits,
                    "optimize": true,
                    "round_zero": nbits == ROUNDED_ZERO,
                    "view_as_float": false,
                },
                "zero_quant_params": null,
            }),
            skip_modules: vec!["lm_head".to_string()],
        }
    }

    /// How a module is stored; `None` where it is not quantized.
    fn of_module(&self, module: &str) -> Result<Option<Hqq>, String> {
        let Value::Object(fields) = &self.quant_config else {
            return Err("`quant_config` is no object".to_string());
        };
        let params = if let Some(all) = fields.get("weight_quant_params") {
            all
        } else {
            let own = fields.iter().find(|(tag, _)| module.ends_with(tag.as_str()));
            match own.map(|(_, config)| config.get("weight_quant_params")) {
                Some(Some(own)) => own,
                _ => return Ok(None),
            }
        };
        let get = |name: &str| params.get(name).filter(|value| !value.is_null());
        let whole = |name: &str, value: &Value| {
            value
                .as_u64()
                .ok_or_else(|| format!("`quant_config`: `{name}` is {value}, expected a whole number"))
        };
        let nbits = get("nbits").map_or(Ok(4), |value| whole("nbits", value))?;
        let nbits = u32::try_from(nbits).map_err(|_| format!("`quant_config`: `nbits` is {nbits}"))?;
        let group_size = get("group_size")
            .map(|value| whole("group_size", value))
            .transpose()?;
        let group_size = group_size.map(|size| usize::try_from(size).unwrap_or(usize::MAX));
        Ok(Some(Hqq { nbits, group_size }))
    }
}

impl Method for HqqConfig {
    fn validate(&self) -> Result<(), String> {
        match self.of_module("")? {
            Some(Hqq { nbits, .. }) if !matches!(nbits, 1..=4 | 8) => Err(format!(
                "`nbits` is {nbits}: HQQ stores codes of 8, 4, 3, 2 or 1 bits"
            )),
            _ => Ok(()),
        }
    }

    fn stored(&self) -> Vec<Arc<dyn Scheme>> {
        // Each module says itself how it is stored.
        vec![Arc::new(Hqq {
            nbits: 4,
            group_size: None,
        })]
    }

    fn scheme(&self, module: &str) -> Result<Option<Arc<dyn Scheme>>, String> {
        Ok(self.of_module(module)?.map(|hqq| Arc::new(hqq) as _))
    }

    fn skipped(&self) -> Option<&[String]> {
        Some(&self.skip_modules)
    }

    fn skip(&mut self, modules: Vec<String>) {
        self.skip_modules = modules;
    }
}

/// How codes are made and written; of a checkpoint, each module says its own.
#[derive(Debug, Clone, PartialEq)]
pub struct Hqq {
    /// Bits of a code: 8, 4, 3, 2 or 1.
    pub nbits: u32,
    /// Values of a group, side by side in a row; none for whole rows.
    pub group_size: Option<usize>,
}

const W_Q: &str = ".W_q";
const SCALE: &str = ".scale";
const ZERO: &str = ".zero";
const SHAPE: &str = ".shape";
const NBITS: &str = ".nbits";
const GROUP_SIZE: &str = ".group_size";
const AXIS: &str = ".axis";
const PACKING: &str = ".packing";
const VIEW_AS_FLOAT: &str = ".view_as_float";
const ROUND_ZERO: &str = ".round_zero";
/// What else is written: a number of one byte each, or a word.
const UNPACK_VIEW_DTYPE: &str = ".unpack_view_dtype";
const COMPUTE_DTYPE: &str = ".compute_dtype";
const FLAGS: [(&str, u8); 7] = [
    (".channel_wise", 1),
    (".optimize", 1),
    (".offload_meta", 0),
    (".encoded_state_dict", 1),
    (".stores_quant_config", 1),
    (".quant_scale", 0),
    (".quant_zero", 0),
];
const ENDINGS: [&str; 19] = [
    W_Q,
    SCALE,
    ZERO,
    SHAPE,
    NBITS,
    GROUP_SIZE,
    AXIS,
    PACKING,
    VIEW_AS_FLOAT,
    UNPACK_VIEW_DTYPE,
    COMPUTE_DTYPE,
    ".channel_wise",
    ".optimize",
    ROUND_ZERO,
    ".offload_meta",
    ".encoded_state_dict",
    ".stores_quant_config",
    ".quant_scale",
    ".quant_zero",
];

/// How codes lie in `W_q`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    /// This many codes in a byte.
    Bytes(usize),
    /// Ten codes of 3 bits in a word of 32.
    Tens,
}

impl Packing {
    fn of(nbits: u32) -> Option<Self> {
        Some(match nbits {
            5 | 6 | 8 => Self::Bytes(1),
            4 => Self::Bytes(2),
            3 => Self::Tens,
            2 => Self::Bytes(4),
            1 => Self::Bytes(8),
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Bytes(1) => "8bit_u8",
            Self::Bytes(2) => "4bit_u8",
            Self::Bytes(4) => "2bit_u8",
            Self::Bytes(_) => "1bit_u8",
            Self::Tens => "3bit_32",
        }
    }

    /// Rows that share the bytes of one, and the bytes of a value.
    fn sizes(self) -> (usize, usize) {
        match self {
            Self::Bytes(count) => (count, 1),
            Self::Tens => (10, 4),
        }
    }
}

impl Hqq {
    fn check(&self, [out_features, in_features]: [usize; 2]) -> Result<(Packing, usize, usize), String> {
        let packing = Packing::of(self.nbits).filter(|_| !matches!(self.nbits, 5 | 6));
        let packing = packing.ok_or_else(|| {
            format!(
                "`nbits` is {}: HQQ stores codes of 8, 4, 3, 2 or 1 bits",
                self.nbits
            )
        })?;
        let group = self.group_size.unwrap_or(in_features);
        if group == 0 || !in_features.is_multiple_of(group) {
            return Err(format!(
                "`group_size` is {group}, which does not divide the {in_features} columns"
            ));
        }
        let rows = out_features * (in_features / group);
        let (shared, _) = packing.sizes();
        if packing != Packing::Tens && !rows.is_multiple_of(shared) {
            return Err(format!(
                "has {rows} groups, of which HQQ stores {shared} side by side; leave it as it is"
            ));
        }
        Ok((packing, group, rows))
    }

    /// The tensors of a module whose values are stored as `dtype`.
    ///
    /// # Errors
    /// Where the shape is none that can be stored.
    pub fn store(&self, codes: &HqqCodes, shape: [usize; 2], dtype: DType) -> Result<Parts, String> {
        let (packing, group, rows) = self.check(shape)?;
        let (shared, bytes) = packing.sizes();
        let lines = rows.div_ceil(shared);
        let mut words = vec![0u32; lines * group];
        for (row, codes) in codes.codes.chunks_exact(group).enumerate() {
            let shift = shift(packing, self.nbits, row / lines);
            let words = &mut words[row % lines * group..][..group];
            words
                .iter_mut()
                .zip(codes)
                .for_each(|(word, code)| *word |= u32::from(*code) << shift);
        }
        let (dtype, float) = compute(dtype);
        let mut parts = Parts::default();
        if bytes == 1 {
            parts.push_values(W_Q, DType::U8, &[lines, group], &words, |word| [word as u8]);
        } else {
            parts.push_values(W_Q, DType::I32, &[lines, group], &words, u32::to_le_bytes);
        }
        for (ending, values) in [(SCALE, &codes.scales), (ZERO, &codes.zeros)] {
            let data = from_f32(values, dtype)?.into();
            parts.push(
                ending,
                TensorView {
                    dtype,
                    shape: vec![rows, 1],
                    data,
                },
            );
        }
        parts.push_values(SHAPE, DType::I64, &[2], &shape, |size| {
            (size as i64).to_le_bytes()
        });
        for (ending, number) in [(NBITS, self.nbits as usize), (GROUP_SIZE, group), (AXIS, 1)] {
            parts.push_values(ending, DType::I32, &[], &[number], |number| {
                (number as i32).to_le_bytes()
            });
        }
        let unpacked = if packing == Packing::Tens {
            "torch.int32"
        } else {
            "torch.uint8"
        };
        for (ending, text) in [
            (PACKING, packing.name()),
            (UNPACK_VIEW_DTYPE, unpacked),
            (COMPUTE_DTYPE, float),
        ] {
            parts.push_values(ending, DType::U8, &[text.len()], text.as_bytes(), |byte| [byte]);
        }
        let rounded = u8::from(self.nbits == ROUNDED_ZERO);
        for (ending, flag) in FLAGS
            .into_iter()
            .chain([(VIEW_AS_FLOAT, 0), (ROUND_ZERO, rounded)])
        {
            parts.push_values(ending, DType::U8, &[], &[flag], |flag| [flag]);
        }
        Ok(parts)
    }
}

/// Where the codes of a part of the rows lie; the first part lies highest.
fn shift(packing: Packing, nbits: u32, part: usize) -> u32 {
    match packing {
        Packing::Bytes(1) => 0,
        Packing::Bytes(count) => nbits * (count - 1).saturating_sub(part) as u32,
        Packing::Tens => 3 * 9usize.saturating_sub(part) as u32,
    }
}

/// The float type of scales, and its name.
fn compute(dtype: DType) -> (DType, &'static str) {
    match dtype {
        DType::F32 => (DType::F32, "torch.float32"),
        DType::BF16 => (DType::BF16, "torch.bfloat16"),
        _ => (DType::F16, "torch.float16"),
    }
}

/// A number that is stored as a tensor.
fn number(parts: &Parts, ending: &str) -> Result<i64, String> {
    let view = parts.need(ending)?;
    let bad = || {
        format!(
            "`{ending}` is {} {:?}, expected one whole number",
            view.dtype.name(),
            view.shape
        )
    };
    if view.shape.iter().product::<usize>() != 1 {
        return Err(bad());
    }
    let bytes = view.data.as_ref();
    let float = |value: f32| (value.fract() == 0.0).then_some(value as i64);
    let found = match view.dtype {
        DType::I32 => bytes
            .try_into()
            .ok()
            .map(|bytes| i32::from_le_bytes(bytes).into()),
        DType::I64 => bytes.try_into().ok().map(i64::from_le_bytes),
        DType::F32 => bytes
            .try_into()
            .ok()
            .and_then(|bytes| float(f32::from_le_bytes(bytes))),
        DType::U8 | DType::Bool => bytes.first().map(|byte| i64::from(*byte)),
        _ => None,
    };
    found.ok_or_else(bad)
}

impl Scheme for Hqq {
    fn name(&self) -> &str {
        "hqq"
    }

    fn endings(&self) -> &[&str] {
        &ENDINGS
    }

    fn is_stored(&self, parts: &Parts) -> bool {
        parts.get(W_Q).is_some()
    }

    fn load(&self, parts: &Parts, shape: [usize; 2]) -> Result<Arc<dyn PackedMatrix>, String> {
        let rows = HqqRows::new(parts, shape)?;
        if !rows.by_rows {
            // Groups that run across rows: nothing multiplies with such codes.
            let data: Vec<u8> = rows
                .values()
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect();
            let matrix = FloatMatrix::new(DType::F32, shape, data.into());
            return matrix
                .map(|matrix| Arc::new(matrix) as _)
                .ok_or_else(|| "is too large".to_string());
        }
        Ok(Arc::new(CodeMatrix::new(rows, "HQQ", parts.num_bytes())))
    }

    fn plan(&self, shape: [usize; 2], dtype: DType) -> Result<Plan, String> {
        let (packing, group, rows) = self.check(shape)?;
        let (shared, bytes) = packing.sizes();
        let (float, name) = compute(dtype);
        let (codes, unpacked) = if bytes == 1 {
            (DType::U8, 11)
        } else {
            (DType::I32, 11)
        };
        let mut plan = Plan::default()
            .with(W_Q, codes, &[rows.div_ceil(shared), group])
            .with(SCALE, float, &[rows, 1])
            .with(ZERO, float, &[rows, 1])
            .with(SHAPE, DType::I64, &[2])
            .with(PACKING, DType::U8, &[packing.name().len()])
            .with(UNPACK_VIEW_DTYPE, DType::U8, &[unpacked])
            .with(COMPUTE_DTYPE, DType::U8, &[name.len()])
            .with(VIEW_AS_FLOAT, DType::U8, &[])
            .with(ROUND_ZERO, DType::U8, &[]);
        for ending in [NBITS, GROUP_SIZE, AXIS] {
            plan = plan.with(ending, DType::I32, &[]);
        }
        Ok(FLAGS
            .into_iter()
            .fold(plan, |plan, (ending, _)| plan.with(ending, DType::U8, &[])))
    }

    fn quantize(&self, matrix: &Dense) -> Result<Parts, String> {
        let shape = matrix.shape();
        let (_, group, _) = self.check(shape)?;
        let mut values = Vec::new();
        matrix.for_rows(|_, rows| {
            values.extend_from_slice(rows);
            Ok(())
        })?;
        let codes = hqq(&values, shape, self.nbits, group).map_err(|error| error.to_string())?;
        self.store(&codes, shape, matrix.dtype)
    }
}

/// The tensors of a module, checked.
struct HqqRows {
    shape: [usize; 2],
    nbits: u32,
    packing: Packing,
    /// Columns and rows of the matrix that was packed.
    width: usize,
    height: usize,
    /// Rows of it that are stored.
    lines: usize,
    /// Whether a group is a row of it, which is a part of a row of the weight.
    by_rows: bool,
    axis: i64,
    codes: Bytes,
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

impl std::fmt::Debug for HqqRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "HqqRows({:?}, {} bits, groups of {})",
            self.shape, self.nbits, self.width
        )
    }
}

impl HqqRows {
    fn new(parts: &Parts, shape: [usize; 2]) -> Result<Self, String> {
        let [out_features, in_features] = shape;
        let stored = parts.need(SHAPE)?;
        let sizes: Vec<u64> = stored
            .data
            .as_chunks()
            .0
            .iter()
            .map(|bytes| u64::from_le_bytes(*bytes))
            .collect();
        if stored.dtype != DType::I64 || sizes != [out_features as u64, in_features as u64] {
            return Err(format!(
                "`{SHAPE}` is {sizes:?}, the configuration says {shape:?}"
            ));
        }
        let nbits = number(parts, NBITS)?;
        let packing = u32::try_from(nbits).ok().and_then(Packing::of);
        let packing =
            packing.ok_or_else(|| format!("`{NBITS}` is {nbits}, expected 8, 6, 5, 4, 3, 2 or 1"))?;
        let name = parts.need(PACKING)?;
        if name.data.as_ref() != packing.name().as_bytes() {
            let found = String::from_utf8_lossy(&name.data[..name.data.len().min(40)]).into_owned();
            return Err(format!("`{PACKING}` is `{found}`, expected `{}`", packing.name()));
        }
        let axis = number(parts, AXIS)?;
        let group = number(parts, GROUP_SIZE)?;
        let count = out_features.checked_mul(in_features).ok_or("is too large")?;
        let group = usize::try_from(group)
            .ok()
            .filter(|group| *group > 0 && count.is_multiple_of(*group));
        let group = group.ok_or_else(|| format!("`{GROUP_SIZE}` does not divide {count} weights"))?;
        let (width, height) = match axis {
            1 => (group, count / group),
            0 => (count / group, group),
            _ => return Err(format!("`{AXIS}` is {axis}, expected 0 or 1")),
        };
        let (shared, bytes) = packing.sizes();
        let lines = height.div_ceil(shared);
        if packing != Packing::Tens && !height.is_multiple_of(shared) {
            return Err(format!(
                "`{GROUP_SIZE}` gives {height} rows, which is no multiple of {shared}"
            ));
        }
        let codes = parts.need(W_Q)?;
        if lines.checked_mul(width * bytes) != Some(codes.data.len()) {
            return Err(format!(
                "`{W_Q}` has {} bytes, expected {lines} · {width} · {bytes}",
                codes.data.len()
            ));
        }
        let groups = count / group;
        let read = |ending| {
            let view = parts.need(ending)?;
            let values = to_f32(view).map_err(|reason| format!("`{ending}` {reason}"))?;
            if values.len() == groups {
                return Ok(values);
            }
            Err(format!(
                "`{ending}` has {} values, expected one for each of {groups} groups",
                values.len()
            ))
        };
        let (scales, zeros) = (read(SCALE)?, read(ZERO)?);
        Ok(Self {
            shape,
            nbits: nbits as u32,
            packing,
            width,
            height,
            lines,
            by_rows: axis == 1 && in_features.is_multiple_of(group),
            axis,
            codes: codes.data.clone(),
            scales,
            zeros,
        })
    }

    /// The codes of a row of the matrix that was packed.
    fn line(&self, row: usize, to: &mut [u8]) {
        let (part, line) = (row / self.lines.max(1), row % self.lines.max(1));
        let (shift, mask) = (
            shift(self.packing, self.nbits, part),
            (1u32 << self.nbits.min(8)) - 1,
        );
        if self.packing == Packing::Tens {
            let words = self.codes[4 * line * self.width..].as_chunks().0;
            let each = to.iter_mut().zip(words);
            each.for_each(|(to, word)| *to = (u32::from_le_bytes(*word) >> shift & mask) as u8);
        } else {
            let bytes = &self.codes[line * self.width..];
            let each = to.iter_mut().zip(bytes);
            each.for_each(|(to, byte)| *to = (u32::from(*byte) >> shift & mask) as u8);
        }
    }

    /// All weights.
    fn values(&self) -> Vec<f32> {
        let (mut values, mut codes) = (Vec::with_capacity(self.width * self.height), vec![0; self.width]);
        for row in 0..self.height {
            self.line(row, &mut codes);
            for (column, code) in codes.iter().enumerate() {
                let group = if self.axis == 1 { row } else { column };
                values.push(self.scales[group] * (f32::from(*code) - self.zeros[group]));
            }
        }
        values
    }
}

impl CodeRows for HqqRows {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn layout(&self) -> CodeLayout {
        CodeLayout {
            bits: self.nbits as usize,
            group: self.width,
            shift: Shift::Zeros,
            table: None,
        }
    }

    fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], shifts: &mut [f32]) {
        let groups = self.shape[1] / self.width.max(1);
        let all = rows.start * groups..rows.end * groups;
        scales.copy_from_slice(&self.scales[all.clone()]);
        shifts.copy_from_slice(&self.zeros[all.clone()]);
        for (row, to) in all.zip(codes.chunks_exact_mut(self.width.max(1))) {
            self.line(row, to);
        }
    }
}
