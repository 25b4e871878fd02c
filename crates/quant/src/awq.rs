//! AWQ's checkpoints, in AutoAWQ's `gemm` version: eight codes of 4 bits in a word, of neighbours in a row that are
//! interleaved as its kernels want them.
//!
//! `qweight` `[in_features, out_features / 8]` and `qzeros` `[groups, out_features / 8]` are words of 32 bits, `scales`
//! `[groups, out_features]` floats; a weight is `scale · (code − zero)`.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use oxiformers_hub::checkpoint::DType;
use oxiformers_kernels::PackedMatrix;
use oxiformers_kernels::int8::{CodeLayout, CodeRows, Shift};
use serde::{Deserialize, Serialize};

use crate::calibrate::affine::{AffineOptions, Grouped, round_to_nearest};
use crate::codes::CodeMatrix;
use crate::config::Method;
use crate::scheme::{Dense, Parts, Plan, Scheme};
use crate::values::to_f32;

/// The `quantization_config` of AWQ: fields and defaults of Transformers' `AwqConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AwqConfig {
    /// Bits of a code: 4.
    pub bits: u32,
    /// Columns of a group, or -1 for whole rows.
    pub group_size: i64,
    /// Whether groups have zero points.
    pub zero_point: bool,
    /// How codes lie in words: `gemm`.
    pub version: Option<String>,
    /// The same by another name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Modules that are left as they are.
    pub modules_to_not_convert: Option<Vec<String>>,
}

impl Default for AwqConfig {
    fn default() -> Self {
        Self {
            bits: BITS,
            group_size: 128,
            zero_point: true,
            version: Some("gemm".to_string()),
            format: None,
            modules_to_not_convert: None,
        }
    }
}

impl AwqConfig {
    /// How codes are stored.
    pub fn storage(&self) -> Awq {
        Awq {
            group_size: usize::try_from(self.group_size).ok(),
        }
    }
}

impl Method for AwqConfig {
    fn validate(&self) -> Result<(), String> {
        if self.bits != BITS {
            return Err(format!("`bits` is {}; AWQ stores codes of 4 bits", self.bits));
        }
        if self.group_size == 0 || self.group_size < -1 {
            return Err(format!(
                "`group_size` is {}; it is -1 or above 0",
                self.group_size
            ));
        }
        let names = [&self.version, &self.format].into_iter().flatten();
        match names.into_iter().find(|name| !name.eq_ignore_ascii_case("gemm")) {
            Some(other) => Err(format!("`version` is `{other}`; supported is gemm")),
            None => Ok(()),
        }
    }

    fn stored(&self) -> Vec<Arc<dyn Scheme>> {
        vec![Arc::new(self.storage())]
    }

    fn scheme(&self, _module: &str) -> Result<Option<Arc<dyn Scheme>>, String> {
        if !self.zero_point {
            return Err(
                "`zero_point` is false; AWQ's gemm version is only written with zero points".to_string(),
            );
        }
        Ok(Some(Arc::new(self.storage())))
    }

    fn skipped(&self) -> Option<&[String]> {
        self.modules_to_not_convert.as_deref()
    }

    fn skip(&mut self, modules: Vec<String>) {
        self.modules_to_not_convert = Some(modules);
    }
}

/// How codes are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Awq {
    /// Columns of a group; none for whole rows, which is written as -1.
    pub group_size: Option<usize>,
}

const BITS: u32 = 4;
/// Codes in a word.
const IN_WORD: usize = 8;
/// Where the code of each of eight neighbours lies in their word.
const FIELD: [u32; IN_WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

const QWEIGHT: &str = ".qweight";
const QZEROS: &str = ".qzeros";
const SCALES: &str = ".scales";

impl Awq {
    /// How codes are chosen.
    pub const AFFINE: AffineOptions = AffineOptions {
        bits: BITS,
        sym: false,
        mse: 0.0,
    };

    /// Checks that a matrix can be stored; returns the size and number of its groups.
    fn check_shape(&self, [out_features, in_features]: [usize; 2]) -> Result<[usize; 2], String> {
        let group = self.group_size.unwrap_or(in_features);
        if group == 0 || !in_features.is_multiple_of(group) {
            return Err(format!(
                "`group_size` is {group}, which does not divide the {in_features} columns; AWQ has groups of one size"
            ));
        }
        if !out_features.is_multiple_of(IN_WORD) {
            return Err(format!(
                "has {out_features} rows, which is no multiple of 8, as AWQ needs; leave it as it is"
            ));
        }
        Ok([group, in_features / group])
    }

    /// The tensors of a module.
    ///
    /// # Errors
    /// Where the shape is none that can be stored.
    pub fn store(&self, matrix: &Grouped) -> Result<Parts, String> {
        let [out_features, in_features] = matrix.shape;
        let [group, groups] = self.check_shape(matrix.shape)?;
        if matrix.bits != BITS || matrix.group_size != group || matrix.g_idx.is_some() {
            return Err(format!(
                "has groups of {} {}-bit codes, not of {group} with 4",
                matrix.group_size, matrix.bits
            ));
        }
        let width = out_features / IN_WORD;
        let (mut qweight, mut qzeros) = (vec![0u32; in_features * width], vec![0u32; groups * width]);
        let mut scales = vec![0.0; groups * out_features];
        for row in 0..out_features {
            let (word, shift) = (row / IN_WORD, BITS * FIELD[row % IN_WORD]);
            for (column, code) in matrix.codes[row * in_features..][..in_features]
                .iter()
                .enumerate()
            {
                qweight[column * width + word] |= u32::from(*code) << shift;
            }
            for group in 0..groups {
                let from = row * groups + group;
                qzeros[group * width + word] |= u32::from(matrix.zeros[from]) << shift;
                scales[group * out_features + row] = matrix.scales[from];
            }
        }
        let mut parts = Parts::default();
        parts.push_values(
            QWEIGHT,
            DType::I32,
            &[in_features, width],
            &qweight,
            u32::to_le_bytes,
        );
        parts.push_values(QZEROS, DType::I32, &[groups, width], &qzeros, u32::to_le_bytes);
        parts.push_values(SCALES, DType::F16, &[groups, out_features], &scales, |scale| {
            half::f16::from_f32(scale).to_le_bytes()
        });
        Ok(parts)
    }
}

impl Scheme for Awq {
    fn name(&self) -> &str {
        "awq"
    }

    fn endings(&self) -> &[&str] {
        &[QWEIGHT, QZEROS, SCALES]
    }

    fn is_stored(&self, parts: &Parts) -> bool {
        parts.get(QWEIGHT).is_some()
    }

    fn load(&self, parts: &Parts, shape: [usize; 2]) -> Result<Arc<dyn PackedMatrix>, String> {
        let [out_features, in_features] = shape;
        let [group, groups] = self.check_shape(shape)?;
        let words: &[DType] = &[DType::I32, DType::U32];
        let floats: &[DType] = &[DType::F16, DType::BF16, DType::F32];
        let width = out_features / IN_WORD;
        let qweight = parts.expect(QWEIGHT, words, &[in_features, width])?;
        let qzeros = parts.expect(QZEROS, words, &[groups, width])?;
        let scales = to_f32(parts.expect(SCALES, floats, &[groups, out_features])?)?;
        let rows = AwqRows {
            shape,
            group,
            groups,
            qweight: qweight.data.clone(),
            qzeros: qzeros.data.clone(),
            scales,
        };
        Ok(Arc::new(CodeMatrix::new(rows, "AWQ-4", parts.num_bytes())))
    }

    fn plan(&self, shape: [usize; 2], _dtype: DType) -> Result<Plan, String> {
        let [_, groups] = self.check_shape(shape)?;
        let [out_features, in_features] = shape;
        Ok(Plan::default()
            .with(QWEIGHT, DType::I32, &[in_features, out_features / IN_WORD])
            .with(QZEROS, DType::I32, &[groups, out_features / IN_WORD])
            .with(SCALES, DType::F16, &[groups, out_features]))
    }

    /// Rounds to nearest; better scales need calibration.
    fn quantize(&self, matrix: &Dense) -> Result<Parts, String> {
        let shape = matrix.shape();
        self.check_shape(shape)?;
        let mut values = Vec::new();
        matrix.for_rows(|_, rows| {
            values.extend_from_slice(rows);
            Ok(())
        })?;
        let rounded = round_to_nearest(&values, shape, &Self::AFFINE, self.group_size);
        self.store(&rounded.map_err(|error| error.to_string())?)
    }
}

/// The tensors of a module, checked.
struct AwqRows {
    shape: [usize; 2],
    group: usize,
    groups: usize,
    qweight: Bytes,
    qzeros: Bytes,
    /// `[groups, out_features]`.
    scales: Vec<f32>,
}

impl std::fmt::Debug for AwqRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AwqRows({:?}, groups of {})", self.shape, self.group)
    }
}

impl AwqRows {
    /// The code of an output feature in line `line` of words.
    #[inline(always)]
    fn code(&self, words: &[u8], line: usize, row: usize) -> u8 {
        let at = 4 * (line * (self.shape[0] / IN_WORD) + row / IN_WORD);
        let word = words
            .get(at..at + 4)
            .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        (word >> (BITS * FIELD[row % IN_WORD]) & 15) as u8
    }
}

impl CodeRows for AwqRows {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn layout(&self) -> CodeLayout {
        CodeLayout {
            bits: BITS as usize,
            group: self.group,
            shift: Shift::Zeros,
            table: None,
        }
    }

    fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], shifts: &mut [f32]) {
        let [out_features, in_features] = self.shape;
        for column in 0..in_features {
            for (index, row) in rows.clone().enumerate() {
                codes[index * in_features + column] = self.code(&self.qweight, column, row);
            }
        }
        for (index, row) in rows.enumerate() {
            for group in 0..self.groups {
                let to = index * self.groups + group;
                scales[to] = self.scales[group * out_features + row];
                shifts[to] = f32::from(self.code(&self.qzeros, group, row));
            }
        }
    }
}
