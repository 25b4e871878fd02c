//! NF4 and FP4 of bitsandbytes (Dettmers et al., "QLoRA", 2023): blocks of values share their largest one, and codes of
//! 4 bits choose from a table. With double quantization the largest values are codes of 8 bits themselves.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_kernels::PackedMatrix;
use oxiformers_kernels::int8::{CodeLayout, CodeRows, Shift};
use oxiformers_kernels::threads::for_each_chunk;
use serde::Deserialize;
use serde_json::json;

use crate::codes::CodeMatrix;
use crate::scheme::{Dense, Parts, Plan, Scheme};
use crate::sum::sum;
use crate::to_f32;

/// What codes stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantType {
    /// Quantiles of a normal distribution.
    Nf4,
    /// Floats of 4 bits.
    Fp4,
}

impl QuantType {
    /// `nf4` or `fp4`.
    ///
    /// # Errors
    /// Where it is neither.
    pub fn from_name(name: &str) -> Result<Self, String> {
        match name {
            "nf4" => Ok(Self::Nf4),
            "fp4" => Ok(Self::Fp4),
            _ => Err(format!(
                "the type {name:?} is none that 4 bits have; it is nf4 or fp4"
            )),
        }
    }

    /// `nf4` or `fp4`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    fn table(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    fn state(self) -> &'static str {
        match self {
            Self::Nf4 => ".weight.quant_state.bitsandbytes__nf4",
            Self::Fp4 => ".weight.quant_state.bitsandbytes__fp4",
        }
    }
}

#[allow(clippy::excessive_precision)]
static NF4: [f32; 16] = [
    -1.0,
    -0.696_192_800_998_687_7,
    -0.525_073_051_452_636_7,
    -0.394_917_488_098_144_53,
    -0.284_441_381_692_886_35,
    -0.184_773_430_228_233_34,
    -0.091_050_036_251_544_95,
    0.0,
    0.079_580_299_556_255_34,
    0.160_930_201_411_247_25,
    0.246_112_301_945_686_34,
    0.337_915_241_718_292_24,
    0.440_709_829_330_444_34,
    0.562_617_003_917_694_1,
    0.722_956_836_223_602_3,
    1.0,
];

static FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    6.0 / 12.0,
    2.0 / 12.0,
    3.0 / 12.0,
    0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -6.0 / 12.0,
    -2.0 / 12.0,
    -3.0 / 12.0,
];

/// Block sizes that bitsandbytes has.
const BLOCKSIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];
/// Largest values that share one of their own.
const NESTED_BLOCKSIZE: usize = 256;

/// 4 bits of bitsandbytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bnb4bit {
    /// What codes stand for.
    pub quant_type: QuantType,
    /// Values that share their largest one: 32 to 4096, a power of two.
    pub blocksize: usize,
    /// Whether the largest values of blocks are quantized, too.
    pub double_quant: bool,
    /// The type that two codes a byte are stored as.
    pub storage: DType,
}

impl Bnb4bit {
    /// # Errors
    /// A block size that bitsandbytes lacks.
    pub(crate) fn validate(&self) -> Result<(), String> {
        if BLOCKSIZES.contains(&self.blocksize) {
            return Ok(());
        }
        Err(format!(
            "the block size {} is none of {BLOCKSIZES:?}",
            self.blocksize
        ))
    }
}

/// The texts stored beside a module.
#[derive(Debug, Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

impl Scheme for Bnb4bit {
    fn name(&self) -> &str {
        self.quant_type.name()
    }

    fn endings(&self) -> &[&str] {
        &[
            ".weight",
            ".weight.absmax",
            ".weight.quant_map",
            ".weight.nested_absmax",
            ".weight.nested_quant_map",
            ".weight.quant_state.bitsandbytes__nf4",
            ".weight.quant_state.bitsandbytes__fp4",
        ]
    }

    fn is_stored(&self, parts: &Parts) -> bool {
        parts.get(".weight.absmax").is_some()
    }

    fn load(&self, parts: &Parts, shape: [usize; 2]) -> Result<Arc<dyn PackedMatrix>, String> {
        let found = [QuantType::Nf4, QuantType::Fp4]
            .into_iter()
            .find_map(|ty| Some((ty, parts.get(ty.state())?)));
        let (quant_type, state) = found.ok_or("its `quant_state` is missing")?;
        let state: QuantState = serde_json::from_slice(&state.data)
            .map_err(|error| format!("`{}`: {error}", quant_type.state()))?;
        if QuantType::from_name(&state.quant_type)? != quant_type {
            return Err(format!(
                "`quant_type` is {:?} in `{}`",
                state.quant_type,
                quant_type.state()
            ));
        }
        if state.shape != shape {
            return Err(format!(
                "`quant_state` says the shape {:?}, expected {shape:?}",
                state.shape
            ));
        }
        Self {
            blocksize: state.blocksize,
            ..self.clone()
        }
        .validate()?;
        let count = count(shape)?;
        let weight = parts.need(".weight")?;
        if weight.data.len() != count.div_ceil(2) {
            return Err(format!(
                "`.weight` has {} bytes, {count} codes of 4 bits expected",
                weight.data.len()
            ));
        }
        let map = to_f32(parts.need(".weight.quant_map")?)?;
        if map != quant_type.table() {
            return Err(format!(
                "`.weight.quant_map` is not the table of {}",
                quant_type.name()
            ));
        }
        let blocks = count.div_ceil(state.blocksize);
        let absmax = parts.need(".weight.absmax")?;
        let absmax = match state.nested_offset {
            Some(offset) if absmax.dtype == DType::U8 => {
                let nested = state.nested_blocksize.filter(|size| *size > 0);
                let nested = nested.ok_or("`nested_blocksize` is missing")?;
                widen(parts, &absmax.data, nested, offset as f32)?
            }
            _ => to_f32(absmax).map_err(|reason| format!("`.weight.absmax` {reason}"))?,
        };
        if absmax.len() != blocks {
            return Err(format!(
                "`.weight.absmax` has {} values, {blocks} expected",
                absmax.len()
            ));
        }
        let rows = Rows::new(shape, quant_type, state.blocksize, weight.data.clone(), absmax);
        let num_bytes = rows.codes.len() + 4 * rows.absmax.len();
        Ok(Arc::new(CodeMatrix::new(rows, quant_type.name(), num_bytes)))
    }

    fn plan(&self, shape: [usize; 2], _dtype: DType) -> Result<Plan, String> {
        self.validate()?;
        let count = count(shape)?;
        let blocks = count.div_ceil(self.blocksize);
        let size = self.storage.num_bytes(&[]).unwrap_or(1);
        let bytes = count.div_ceil(2);
        if !bytes.is_multiple_of(size) {
            return Err(format!(
                "{bytes} bytes of codes cannot be stored as {}; choose uint8",
                self.storage.name()
            ));
        }
        let plan = Plan::default().with(".weight", self.storage, &[bytes / size, 1]);
        Ok(if self.double_quant {
            plan.with(".weight.absmax", DType::U8, &[blocks])
                .with(
                    ".weight.nested_absmax",
                    DType::F32,
                    &[blocks.div_ceil(NESTED_BLOCKSIZE)],
                )
                .with(".weight.nested_quant_map", DType::F32, &[256])
        } else {
            plan.with(".weight.absmax", DType::F32, &[blocks])
        }
        .with(".weight.quant_map", DType::F32, &[16])
        .with_late(self.quant_type.state(), 320))
    }

    fn quantize(&self, matrix: &Dense) -> Result<Parts, String> {
        let [rows, cols] = matrix.shape();
        let mut plan = self.plan([rows, cols], matrix.dtype)?.tensors;
        let count = rows * cols;
        let mut codes = Vec::with_capacity(count.div_ceil(2));
        let mut absmax = Vec::with_capacity(count.div_ceil(self.blocksize));
        let encoder = Encoder::new(self.quant_type);
        // Blocks go on from one row to the next.
        let mut begun: Vec<f32> = Vec::new();
        matrix.for_rows(|_, values| {
            let whole;
            let values = if begun.is_empty() && values.len().is_multiple_of(self.blocksize) {
                values
            } else {
                begun.extend_from_slice(values);
                let rest = begun.split_off(begun.len() / self.blocksize * self.blocksize);
                whole = std::mem::replace(&mut begun, rest);
                &whole
            };
            encoder.blocks(values, self.blocksize, &mut codes, &mut absmax);
            Ok(())
        })?;
        encoder.last(&begun, &mut codes, &mut absmax);
        let mut parts = Parts::default();
        let mut push = |data: Bytes| {
            if !plan.is_empty() {
                let info = plan.remove(0);
                parts.push(
                    &info.name,
                    TensorView {
                        dtype: info.dtype,
                        shape: info.shape,
                        data,
                    },
                );
            }
        };
        push(codes.into());
        let mut state = json!({
            "quant_type": self.quant_type.name(),
            "blocksize": self.blocksize,
            "dtype": dtype_name(matrix.dtype),
            "shape": [rows, cols],
        });
        if self.double_quant {
            let offset = sum(&absmax) / absmax.len() as f32;
            absmax.iter_mut().for_each(|value| *value -= offset);
            let (codes, nested) = dynamic::quantize(&absmax, NESTED_BLOCKSIZE);
            push(codes.into());
            push(floats(&nested));
            push(floats(&dynamic::map()));
            state["nested_blocksize"] = json!(NESTED_BLOCKSIZE);
            state["nested_dtype"] = json!("float32");
            state["nested_offset"] = json!(f64::from(offset));
        } else {
            push(floats(&absmax));
        }
        push(floats(self.quant_type.table()));
        let state = python_json(&state);
        parts.push_values(
            self.quant_type.state(),
            DType::U8,
            &[state.len()],
            state.as_bytes(),
            |byte| [byte],
        );
        Ok(parts)
    }
}

/// JSON with the spaces that Python writes.
fn python_json(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Object(fields) => {
            let fields = fields.iter().map(|(key, value)| {
                format!(
                    "{}: {}",
                    serde_json::Value::from(key.as_str()),
                    python_json(value)
                )
            });
            format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
        }
        serde_json::Value::Array(values) => {
            let values: Vec<_> = values.iter().map(python_json).collect();
            format!("[{}]", values.join(", "))
        }
        value => value.to_string(),
    }
}

/// What PyTorch calls a float type.
fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    }
}

fn floats(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn count([rows, cols]: [usize; 2]) -> Result<usize, String> {
    rows.checked_mul(cols)
        .filter(|count| *count > 0)
        .ok_or_else(|| format!("the shape [{rows}, {cols}] is none that can be quantized"))
}

/// The largest values of blocks that were quantized themselves.
fn widen(parts: &Parts, codes: &[u8], blocksize: usize, offset: f32) -> Result<Vec<f32>, String> {
    let map = to_f32(parts.need(".weight.nested_quant_map")?)?;
    let absmax = to_f32(parts.need(".weight.nested_absmax")?)?;
    let blocks = codes.len().div_ceil(blocksize);
    if map.len() != 256 || absmax.len() != blocks {
        return Err(format!(
            "`.weight.nested_quant_map` has {} values and `.weight.nested_absmax` {}; expected are 256 and {blocks}",
            map.len(),
            absmax.len()
        ));
    }
    let blocks = codes.chunks(blocksize).zip(absmax);
    Ok(blocks
        .flat_map(|(codes, absmax)| codes.iter().map(move |code| (code, absmax)))
        .map(|(code, absmax)| map[usize::from(*code)] * absmax + offset)
        .collect())
}

/// The codes of a matrix, two a byte, the first in the high half; blocks go on from one row to the next.
#[derive(Debug, Clone)]
pub struct Rows {
    shape: [usize; 2],
    quant_type: QuantType,
    blocksize: usize,
    codes: Bytes,
    absmax: Vec<f32>,
    /// Columns that lie in one block in every row.
    group: usize,
}

impl Rows {
    /// `codes` and `absmax` were checked to be as many as `shape` needs.
    fn new(
        shape: [usize; 2],
        quant_type: QuantType,
        blocksize: usize,
        codes: Bytes,
        absmax: Vec<f32>,
    ) -> Self {
        let (mut group, mut rest) = (shape[1], blocksize);
        while rest != 0 {
            (group, rest) = (rest, group % rest);
        }
        Self {
            shape,
            quant_type,
            blocksize,
            codes,
            absmax,
            group,
        }
    }
}

impl CodeRows for Rows {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn layout(&self) -> CodeLayout {
        CodeLayout {
            bits: 4,
            group: self.group,
            shift: Shift::Offset(0),
            table: Some(self.quant_type.table()),
        }
    }

    fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], _shifts: &mut [f32]) {
        let cols = self.shape[1];
        let first = rows.start * cols;
        if first.is_multiple_of(2) {
            let (pairs, last) = codes.as_chunks_mut::<2>();
            let stored = &self.codes[first / 2..];
            for (pair, byte) in pairs.iter_mut().zip(stored) {
                *pair = [byte >> 4, byte & 15];
            }
            if let (Some(code), Some(byte)) = (last.first_mut(), stored.get(pairs.len())) {
                *code = byte >> 4;
            }
        } else {
            for (code, at) in codes.iter_mut().zip(first..) {
                *code = (self.codes[at / 2] >> (4 * (1 - at % 2))) & 15;
            }
        }
        for (index, scale) in scales.iter_mut().enumerate() {
            *scale = self.absmax[(first + index * self.group) / self.blocksize];
        }
    }

    fn release(&self, rows: Range<usize>) {
        let cols = self.shape[1];
        oxiformers_hub::release(&self.codes[rows.start * cols / 2..rows.end * cols / 2]);
    }
}

/// Finds the nearest values of a table.
struct Encoder {
    /// In ascending order, halfway between neighbours.
    bounds: [f32; 15],
    /// The codes in that order.
    codes: [u8; 16],
}

impl Encoder {
    fn new(quant_type: QuantType) -> Self {
        let table = quant_type.table();
        let mut codes: [u8; 16] = std::array::from_fn(|code| code as u8);
        // FP4 has two zeros, which stay in their order.
        codes.sort_by(|a, b| {
            let [a, b] = [a, b].map(|code| table[usize::from(*code)]);
            a.partial_cmp(&b).unwrap_or(std::cmp::Ordering::Equal)
        });
        let value = |at: usize| table[usize::from(codes[at])];
        Self {
            bounds: std::array::from_fn(|at| (value(at) + value(at + 1)) / 2.0),
            codes,
        }
    }

    /// The code whose value is nearest; of two as near, the smaller value's.
    #[inline(always)]
    fn code(&self, value: f32) -> u8 {
        let above: usize = self.bounds.iter().map(|bound| usize::from(value > *bound)).sum();
        self.codes[above]
    }

    /// Whole blocks.
    fn blocks(&self, values: &[f32], blocksize: usize, codes: &mut Vec<u8>, absmax: &mut Vec<f32>) {
        let (from, first) = (codes.len(), absmax.len());
        codes.resize(from + values.len() / 2, 0);
        absmax.resize(first + values.len() / blocksize, 0.0);
        // So many values a task that handing over does not count.
        let size = (1usize << 16).div_ceil(blocksize);
        for_each_chunk(&mut absmax[first..], size, |piece, absmax| {
            let blocks = values[piece * size * blocksize..].chunks_exact(blocksize);
            for (absmax, block) in absmax.iter_mut().zip(blocks) {
                *absmax = block.iter().fold(0.0, |most, value| most.max(value.abs()));
            }
        });
        let absmax = &absmax[first..];
        for_each_chunk(&mut codes[from..], size * blocksize / 2, |piece, codes| {
            let first = piece * size;
            let blocks = values[first * blocksize..].chunks_exact(blocksize);
            let blocks = blocks.zip(&absmax[first..]);
            for (codes, (block, absmax)) in codes.chunks_exact_mut(blocksize / 2).zip(blocks) {
                let inverse = 1.0 / absmax.max(1e-38);
                self.pairs(block, |value| (value * inverse).clamp(-1.0, 1.0), codes);
            }
        });
    }

    /// The block at the end, if there is one that is not whole.
    fn last(&self, values: &[f32], codes: &mut Vec<u8>, absmax: &mut Vec<f32>) {
        if values.is_empty() {
            return;
        }
        let most = values.iter().fold(1e-38f32, |most, value| most.max(value.abs()));
        absmax.push(most);
        let from = codes.len();
        codes.resize(from + values.len().div_ceil(2), 0);
        self.pairs(
            values,
            |value| (value / most).clamp(-1.0, 1.0),
            &mut codes[from..],
        );
    }

    #[inline(always)]
    fn pairs(&self, values: &[f32], scale: impl Fn(f32) -> f32, codes: &mut [u8]) {
        for (pair, byte) in values.chunks(2).zip(codes) {
            let code = |at: usize| self.code(scale(pair.get(at).copied().unwrap_or(0.0)));
            *byte = code(0) << 4 | code(1);
        }
    }
}

/// The dynamic type of 8 bits (Dettmers et al., "8-bit optimizers via block-wise quantization", 2021).
mod dynamic {
    /// Its values, in ascending order.
    pub(super) fn map() -> Vec<f32> {
        let mut values = vec![0.0f32, 1.0];
        for exponent in 0..7 {
            let count = 1usize << exponent;
            let scale = 10f64.powi(exponent - 6);
            let bounds = linspace(0.1, 1.0, count + 1);
            for pair in bounds.windows(2) {
                let mean = (pair[0] + pair[1]) / 2.0;
                let value = scale as f32 * mean;
                values.extend([value, -value]);
            }
        }
        values.sort_by(f32::total_cmp);
        values
    }

    /// As PyTorch computes it: from both ends to the middle, in one rounding each.
    fn linspace(from: f32, to: f32, count: usize) -> Vec<f32> {
        let step = (to - from) / (count - 1) as f32;
        let value = |at: usize| {
            if at < count / 2 {
                step.mul_add(at as f32, from)
            } else {
                (-step).mul_add((count - at - 1) as f32, to)
            }
        };
        (0..count).map(value).collect()
    }

    /// Codes, and the largest value of each block.
    pub(super) fn quantize(values: &[f32], blocksize: usize) -> (Vec<u8>, Vec<f32>) {
        let map = map();
        let mut codes = Vec::with_capacity(values.len());
        let mut absmax = Vec::with_capacity(values.len().div_ceil(blocksize));
        for block in values.chunks(blocksize) {
            let most = block.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            absmax.push(most);
            let inverse = 1.0 / most;
            codes.extend(block.iter().map(|value| {
                if most == 0.0 {
                    0
                } else {
                    nearest(&map, value * inverse)
                }
            }));
        }
        (codes, absmax)
    }

    /// The nearest value's code; of two as near, the smaller one's.
    fn nearest(map: &[f32], value: f32) -> u8 {
        let value = value.clamp(-1.0, 1.0);
        let right = map.partition_point(|entry| *entry < value);
        let code = match right {
            0 => 0,
            256 => 255,
            right if map[right] - value < value - map[right - 1] => right,
            right => right - 1,
        };
        code as u8
    }
}
