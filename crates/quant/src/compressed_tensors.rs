//! compressed-tensors, the format of llm-compressor and vLLM: whole numbers of 1 to 8 bits, packed or as bytes, and
//! floats of 8 bits, with scales for groups of columns, rows, blocks or whole matrices.
//!
//! Activations that such checkpoints want quantized are not: what a model computes is at least as close to the original.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_kernels::PackedMatrix;
use oxiformers_kernels::int8::{CodeLayout, CodeRows, Shift};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::codes::CodeMatrix;
use crate::config::Method;
use crate::fp8::Fp8Matrix;
use crate::scheme::{Dense, Parts, Plan, Scheme};
use crate::to_f32;
use crate::values::{from_f32, rounded};

/// `CompressedTensorsConfig`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct CompressedTensorsConfig {
    pub config_groups: BTreeMap<String, Group>,
    pub format: String,
    pub quantization_status: String,
    /// Names of modules, or regular expressions after `re:`.
    pub ignore: Option<Vec<String>>,
    /// Fields that nothing is known of.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Default for CompressedTensorsConfig {
    fn default() -> Self {
        Self {
            config_groups: BTreeMap::new(),
            format: "dense".to_string(),
            quantization_status: "initialized".to_string(),
            ignore: None,
            rest: Map::new(),
        }
    }
}

/// Modules that are quantized alike: `QuantizationScheme`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Group {
    /// Names of classes or modules, or regular expressions after `re:`.
    pub targets: Vec<String>,
    pub weights: Option<QuantizationArgs>,
    pub format: Option<String>,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// `QuantizationArgs`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct QuantizationArgs {
    pub num_bits: usize,
    #[serde(rename = "type")]
    pub ty: String,
    pub symmetric: bool,
    pub group_size: Option<i64>,
    pub strategy: Option<String>,
    pub block_structure: Option<[usize; 2]>,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Default for QuantizationArgs {
    fn default() -> Self {
        Self {
            num_bits: 8,
            ty: "int".to_string(),
            symmetric: true,
            group_size: None,
            strategy: None,
            block_structure: None,
            rest: Map::new(),
        }
    }
}

/// The formats that can be read.
const FORMATS: [&str; 5] = [
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
];

impl CompressedTensorsConfig {
    /// Packed whole numbers of so many bits, with a scale for `group_size` columns or for rows.
    pub fn packed(num_bits: usize, group_size: Option<usize>) -> Self {
        let weights = QuantizationArgs {
            num_bits,
            group_size: group_size.map(|size| size as i64),
            strategy: Some(if group_size.is_some() { "group" } else { "channel" }.to_string()),
            ..QuantizationArgs::default()
        };
        let group = Group {
            targets: vec!["Linear".to_string()],
            weights: Some(weights),
            format: Some("pack-quantized".to_string()),
            rest: Map::new(),
        };
        Self {
            config_groups: BTreeMap::from([("group_0".to_string(), group)]),
            format: "pack-quantized".to_string(),
            quantization_status: "compressed".to_string(),
            ..Self::default()
        }
    }

    fn scheme_of(&self, group: &Group) -> Option<CompressedTensors> {
        Some(CompressedTensors {
            format: group.format.clone().unwrap_or_else(|| self.format.clone()),
            args: group.weights.clone()?,
        })
    }
}

impl Method for CompressedTensorsConfig {
    fn validate(&self) -> Result<(), String> {
        for (name, group) in &self.config_groups {
            let Some(CompressedTensors { format, args }) = self.scheme_of(group) else {
                continue;
            };
            if !FORMATS.contains(&format.as_str()) {
                return Err(format!(
                    "the format {format:?} is not supported; supported are {}",
                    FORMATS.join(", ")
                ));
            }
            let known = match args.ty.as_str() {
                "int" => (1..=8).contains(&args.num_bits),
                "float" => args.num_bits == 8,
                _ => false,
            };
            if !known {
                return Err(format!(
                    "`{name}`: weights of the type {} and {} bits are not supported; supported are int of 1 to 8 bits \
                     and float of 8",
                    args.ty, args.num_bits
                ));
            }
        }
        Ok(())
    }

    fn stored(&self) -> Vec<Arc<dyn Scheme>> {
        let schemes = self
            .config_groups
            .values()
            .filter_map(|group| self.scheme_of(group));
        schemes.map(|scheme| Arc::new(scheme) as _).collect()
    }

    fn scheme(&self, module: &str) -> Result<Option<Arc<dyn Scheme>>, String> {
        for group in self.config_groups.values() {
            for target in &group.targets {
                if target == "Linear" || matches(target, module)? {
                    return Ok(self.scheme_of(group).map(|scheme| Arc::new(scheme) as _));
                }
            }
        }
        Ok(None)
    }

    fn skipped(&self) -> Option<&[String]> {
        self.ignore.as_deref()
    }

    /// Patterns of Transformers become those of compressed-tensors.
    fn skip(&mut self, modules: Vec<String>) {
        let pattern = |name: String| match name.starts_with("re:") {
            true => vec![name],
            false => vec![
                format!("re:(?:{name})(\\.|$)"),
                format!("re:.*{}$", regex::escape(&name)),
            ],
        };
        self.ignore = Some(modules.into_iter().flat_map(pattern).collect());
    }

    fn keep_outputs(&mut self, modules: Vec<String>) {
        self.ignore.get_or_insert_default().extend(modules);
    }

    fn skips(&self, module: &str) -> Result<bool, String> {
        let ignored = self.ignore.iter().flatten();
        ignored
            .into_iter()
            .try_fold(false, |found, pattern| Ok(found || matches(pattern, module)?))
    }
}

/// Whether a target or an ignored name is meant for a module.
fn matches(pattern: &str, module: &str) -> Result<bool, String> {
    let Some(pattern) = pattern.strip_prefix("re:") else {
        return Ok(pattern == module);
    };
    let regex = Regex::new(&format!("^(?:{pattern})"))
        .map_err(|error| format!("`{pattern}` is no regular expression: {error}"))?;
    Ok(regex.is_match(module))
}

/// How a group of modules is stored.
#[derive(Debug, Clone)]
pub struct CompressedTensors {
    format: String,
    args: QuantizationArgs,
}

impl CompressedTensors {
    fn is_float(&self) -> bool {
        self.args.ty == "float"
    }

    /// Columns that share a scale.
    fn group(&self, columns: usize) -> usize {
        match (self.args.strategy.as_deref(), self.args.group_size) {
            (Some("group") | None, Some(size)) if size > 0 => size as usize,
            _ => columns.max(1),
        }
    }
}

impl Scheme for CompressedTensors {
    fn name(&self) -> &str {
        match (self.is_float(), self.args.num_bits) {
            (true, _) => "fp8",
            (false, 4) => "int4",
            (false, 8) => "int8",
            _ => "int",
        }
    }

    fn endings(&self) -> &[&str] {
        &[
            ".weight",
            ".weight_packed",
            ".weight_scale",
            ".weight_zero_point",
            ".weight_shape",
            ".weight_g_idx",
            ".input_scale",
            ".input_zero_point",
            ".output_scale",
            ".output_zero_point",
        ]
    }

    fn is_stored(&self, parts: &Parts) -> bool {
        let Some(scale) = parts.get(".weight_scale") else {
            return false;
        };
        match (parts.get(".weight_packed"), parts.get(".weight")) {
            // Groups of other sizes are other schemes'.
            (Some(packed), _) => {
                !self.is_float() && {
                    let shape = parts.get(".weight_shape").and_then(|view| integers(view).ok());
                    let columns = shape.and_then(|shape| usize::try_from(*shape.last()?).ok());
                    columns.is_none_or(|columns| {
                        packed.shape.last() == Some(&words(columns, self.args.num_bits))
                            && scale.shape.last() == Some(&columns.div_ceil(self.group(columns)))
                    })
                }
            }
            (None, Some(weight)) => match weight.dtype {
                DType::I8 => !self.is_float(),
                DType::F8E4M3 => self.is_float(),
                _ => false,
            },
            (None, None) => false,
        }
    }

    fn load(&self, parts: &Parts, shape: [usize; 2]) -> Result<Arc<dyn PackedMatrix>, String> {
        let [rows, cols] = shape;
        let scale = parts.need(".weight_scale")?;
        let scales = to_f32(scale).map_err(|reason| format!("`.weight_scale` {reason}"))?;
        let grid = match scale.shape[..] {
            [] | [1] => [1, 1],
            [rows] => [rows, 1],
            [rows, cols] => [rows, cols],
            _ => return Err(format!("`.weight_scale` has the shape {:?}", scale.shape)),
        };
        let block = block_of(shape, grid, self.args.block_structure)?;
        if self.is_float() {
            let weight = parts.expect(".weight", &[DType::F8E4M3], &shape)?;
            return Ok(Arc::new(Fp8Matrix::new(
                shape,
                weight.data.clone(),
                scales,
                block,
            )));
        }
        let bits = self.args.num_bits;
        let codes = if let Some(packed) = parts.get(".weight_packed") {
            if let Some(stored) = parts.get(".weight_shape") {
                let stored = integers(stored).map_err(|reason| format!("`.weight_shape` {reason}"))?;
                if stored != [rows as i64, cols as i64] {
                    return Err(format!("`.weight_shape` is {stored:?}, expected {shape:?}"));
                }
            }
            let words = words(cols, bits);
            if packed.dtype != DType::I32 || packed.shape != [rows, words] {
                return Err(format!(
                    "`.weight_packed` is {} {:?}, expected I32 {:?} for {bits} bits",
                    packed.dtype.name(),
                    packed.shape,
                    [rows, words]
                ));
            }
            Codes::Words(packed.data.clone(), 4 * words)
        } else {
            let weight = parts.expect(".weight", &[DType::I8], &shape)?;
            Codes::Bytes(weight.data.clone())
        };
        let across = grid[1];
        let zeros = match parts.get(".weight_zero_point") {
            None => None,
            Some(view) => Some(zero_points(view, grid, bits)?),
        };
        let permutation = match parts.get(".weight_g_idx") {
            None => None,
            Some(view) => permutation(view, cols, across, block[1])?,
        };
        let rows = IntRows {
            shape,
            bits: if matches!(codes, Codes::Bytes(_)) { 8 } else { bits },
            codes,
            scales,
            zeros,
            block,
            across,
            permutation,
        };
        let num_bytes = rows.num_bytes();
        Ok(Arc::new(CodeMatrix::new(
            rows,
            if bits == 4 { "int4" } else { "int8" },
            num_bytes,
        )))
    }

    fn plan(&self, [rows, cols]: [usize; 2], dtype: DType) -> Result<Plan, String> {
        let group = self.group(cols);
        if self.format != "pack-quantized" || self.is_float() || !self.args.symmetric {
            return Err("only symmetric whole numbers are written, as pack-quantized".to_string());
        }
        if !cols.is_multiple_of(group) || cols == 0 {
            return Err(format!("{cols} columns are no whole number of groups of {group}"));
        }
        Ok(Plan::default()
            .with(
                ".weight_packed",
                DType::I32,
                &[rows, words(cols, self.args.num_bits)],
            )
            .with(".weight_scale", scale_dtype(dtype), &[rows, cols / group])
            .with(".weight_shape", DType::I64, &[2]))
    }

    /// Scales are the largest values' of groups, as the observer `minmax` finds them, in the arithmetic of the type that
    /// the values are stored in.
    fn quantize(&self, matrix: &Dense) -> Result<Parts, String> {
        let [rows, cols] = matrix.shape();
        let bits = self.args.num_bits;
        let plan = self.plan([rows, cols], matrix.dtype)?;
        let (group, dtype) = (self.group(cols), scale_dtype(matrix.dtype));
        let half = 1i32 << (bits - 1);
        let halved = rounded((2 * half - 1) as f32 / 2.0, dtype);
        let words = words(cols, bits);
        let mut packed = Vec::with_capacity(4 * rows * words);
        let mut scales = Vec::with_capacity(rows * (cols / group));
        matrix.for_rows(|_, values| {
            for row in values.chunks_exact(cols) {
                let mut writer = BitWriter::new(words);
                for group in row.chunks_exact(group) {
                    let most = group.iter().fold(0.0f32, |most, value| most.max(value.abs()));
                    let scale = match rounded(most / halved, dtype) {
                        0.0 => epsilon(dtype),
                        scale => scale,
                    };
                    for value in group {
                        let code = rounded(value / scale, dtype).round_ties_even();
                        let code = (code as i32).clamp(-half, half - 1) + half;
                        writer.push(code as u32, bits);
                    }
                    scales.push(scale);
                }
                packed.extend(writer.bytes);
            }
            Ok(())
        })?;
        let mut parts = Parts::default();
        let view = |index: usize, data: Bytes| TensorView {
            dtype: plan.tensors[index].dtype,
            shape: plan.tensors[index].shape.clone(),
            data,
        };
        parts.push(".weight_packed", view(0, packed.into()));
        parts.push(".weight_scale", view(1, from_f32(&scales, dtype)?.into()));
        parts.push_values(
            ".weight_shape",
            DType::I64,
            &[2],
            &[rows as i64, cols as i64],
            i64::to_le_bytes,
        );
        Ok(parts)
    }
}

/// What a scale of zero becomes: the distance of 1 to the next number.
fn epsilon(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => 1.0 / 1024.0,
        DType::BF16 => 1.0 / 128.0,
        _ => f32::EPSILON,
    }
}

/// Scales are stored in the type of the values.
fn scale_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => dtype,
        _ => DType::F32,
    }
}

/// Words of 32 bits that so many codes take.
fn words(count: usize, bits: usize) -> usize {
    (count * bits).div_ceil(32)
}

/// Writes codes one after the other, from the lowest bit on.
struct BitWriter {
    bytes: Vec<u8>,
    at: usize,
}

impl BitWriter {
    fn new(words: usize) -> Self {
        Self {
            bytes: vec![0; 4 * words],
            at: 0,
        }
    }

    fn push(&mut self, code: u32, bits: usize) {
        let both = code << (self.at % 8);
        let byte = self.at / 8;
        for (at, part) in both.to_le_bytes().into_iter().enumerate().take(2) {
            if let Some(to) = self.bytes.get_mut(byte + at) {
                *to |= part;
            }
        }
        self.at += bits;
    }
}

/// The code at a place in a row of packed codes.
fn code_at(bytes: &[u8], index: usize, bits: usize) -> u8 {
    let at = index * bits;
    let low = bytes.get(at / 8).copied().unwrap_or(0);
    let high = bytes.get(at / 8 + 1).copied().unwrap_or(0);
    let both = u16::from(low) | u16::from(high) << 8;
    (both >> (at % 8)) as u8 & (0xFFu16 >> (8 - bits)) as u8
}

/// Rows and columns that a scale stands for: those that the configuration has, or what divides the matrix.
fn block_of(shape: [usize; 2], grid: [usize; 2], known: Option<[usize; 2]>) -> Result<[usize; 2], String> {
    let block = match known {
        Some(block) if !block.contains(&0) => block,
        _ => [0, 1].map(|axis: usize| (shape[axis] / grid[axis].max(1)).max(1)),
    };
    let fits = |axis: usize| {
        shape[axis].div_ceil(block[axis]) == grid[axis]
            && (known.is_some() || shape[axis].is_multiple_of(block[axis]))
    };
    (fits(0) && fits(1))
        .then_some(block)
        .ok_or_else(|| format!("scales {grid:?} do not divide the shape {shape:?}"))
}

/// Zero points for each scale, as numbers that codes from 0 on have.
fn zero_points(view: &TensorView, grid: [usize; 2], bits: usize) -> Result<Vec<f32>, String> {
    let [rows, across] = grid;
    let half = 1i32 << (bits - 1);
    let wrong = || format!("`.weight_zero_point` is {} {:?}", view.dtype.name(), view.shape);
    match view.dtype {
        // Packed along rows.
        DType::I32 if view.shape == [words(rows, bits), across] => {
            let words = view.data.as_chunks::<4>().0;
            let column = |column: usize| -> Vec<u8> {
                words
                    .iter()
                    .skip(column)
                    .step_by(across.max(1))
                    .flatten()
                    .copied()
                    .collect()
            };
            let columns: Vec<_> = (0..across).map(column).collect();
            let zero = |row: usize| {
                columns
                    .iter()
                    .map(move |bytes| f32::from(code_at(bytes, row, bits)))
            };
            Ok((0..rows).flat_map(zero).collect())
        }
        // Bytes are taken as codes of 8 bits.
        DType::I8 if view.data.len() == rows * across => Ok(view
            .data
            .iter()
            .map(|zero| f32::from(zero.cast_signed()) + 128.0)
            .collect()),
        dtype if view.shape.iter().product::<usize>() == rows * across && dtype != DType::I32 => {
            let values = to_f32(view).map_err(|_| wrong())?;
            Ok(values.into_iter().map(|zero| zero + half as f32).collect())
        }
        _ => Err(wrong()),
    }
}

/// The order in which columns of the same group are neighbours; none where they are already.
fn permutation(
    view: &TensorView,
    cols: usize,
    groups: usize,
    group: usize,
) -> Result<Option<Vec<u32>>, String> {
    let wrong = |what: String| format!("`.weight_g_idx` {what}");
    let index = integers(view).map_err(wrong)?;
    if index.len() != cols {
        return Err(wrong(format!("has {} values, {cols} expected", index.len())));
    }
    if index.iter().all(|group| *group == -1) || index.is_sorted() {
        return Ok(None);
    }
    let mut order: Vec<u32> = (0..cols as u32).collect();
    order.sort_by_key(|column| index[*column as usize]);
    let fits = order
        .iter()
        .enumerate()
        .all(|(at, column)| index[*column as usize] == (at / group) as i64);
    if !fits || groups * group < cols {
        return Err(wrong(format!("is no division into groups of {group}")));
    }
    Ok(Some(order))
}

fn integers(view: &TensorView) -> Result<Vec<i64>, String> {
    Ok(match view.dtype {
        DType::I64 => view
            .data
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect(),
        DType::I32 => view
            .data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| i32::from_le_bytes(*b).into())
            .collect(),
        other => return Err(format!("is {}, whole numbers expected", other.name())),
    })
}

#[derive(Debug, Clone)]
enum Codes {
    /// Packed, and bytes of a row.
    Words(Bytes, usize),
    /// Signed bytes.
    Bytes(Bytes),
}

/// Whole numbers as checkpoints have them.
#[derive(Debug, Clone)]
pub struct IntRows {
    shape: [usize; 2],
    bits: usize,
    codes: Codes,
    /// Row by row of blocks.
    scales: Vec<f32>,
    zeros: Option<Vec<f32>>,
    /// Rows and columns of a block.
    block: [usize; 2],
    /// Blocks side by side.
    across: usize,
    permutation: Option<Vec<u32>>,
}

impl IntRows {
    fn num_bytes(&self) -> usize {
        let codes = match &self.codes {
            Codes::Words(data, _) | Codes::Bytes(data) => data.len(),
        };
        codes + 4 * self.scales.len() + 4 * self.zeros.as_ref().map_or(0, Vec::len)
    }
}

impl CodeRows for IntRows {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn layout(&self) -> CodeLayout {
        CodeLayout {
            bits: self.bits,
            group: if self.across == 1 {
                usize::MAX
            } else {
                self.block[1]
            },
            shift: match self.zeros {
                Some(_) => Shift::Zeros,
                None => Shift::Offset(1 << (self.bits - 1)),
            },
            table: None,
        }
    }

    fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], shifts: &mut [f32]) {
        let cols = self.shape[1];
        for (index, row) in rows.enumerate() {
            let to = &mut codes[index * cols..(index + 1) * cols];
            let place = |at: usize| self.permutation.as_ref().map_or(at, |order| order[at] as usize);
            match &self.codes {
                Codes::Words(data, row_bytes) => {
                    let bytes = &data[row * row_bytes..(row + 1) * row_bytes];
                    for (at, code) in to.iter_mut().enumerate() {
                        *code = code_at(bytes, place(at), self.bits);
                    }
                }
                Codes::Bytes(data) => {
                    let bytes = &data[row * cols..(row + 1) * cols];
                    for (at, code) in to.iter_mut().enumerate() {
                        *code = bytes[place(at)] ^ 0x80;
                    }
                }
            }
            let first = row / self.block[0] * self.across;
            let range = first..first + self.across;
            scales[index * self.across..][..self.across].copy_from_slice(&self.scales[range.clone()]);
            if let Some(zeros) = &self.zeros {
                shifts[index * self.across..][..self.across].copy_from_slice(&zeros[range]);
            }
        }
    }

    fn permutation(&self) -> Option<&[u32]> {
        self.permutation.as_deref()
    }

    fn release(&self, rows: Range<usize>) {
        match &self.codes {
            Codes::Words(data, size) => oxiformers_hub::release(&data[rows.start * size..rows.end * size]),
            Codes::Bytes(data) => {
                let cols = self.shape[1];
                oxiformers_hub::release(&data[rows.start * cols..rows.end * cols]);
            }
        }
    }
}
