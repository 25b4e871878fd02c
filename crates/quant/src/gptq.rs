//! GPTQ's checkpoints, as GPTQModel and AutoGPTQ write them: codes that are packed down the columns of a matrix that
//! stands on its side, zero points that are packed along its rows.
//!
//! `qweight` `[in_features · bits / 32, out_features]` and `qzeros` `[groups, out_features · bits / 32]` are words of 32
//! bits, read as one stream of bits (codes of 3 bits straddle them); `scales` `[groups, out_features]` are floats, and
//! `g_idx` `[in_features]` has the group of each input feature. A weight is `scale · (code − zero)`. The first version of
//! the format stores zero points minus 1, which is undone and done word by word, carries included, as GPTQModel does.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_kernels::PackedMatrix;
use oxiformers_kernels::int8::{CodeLayout, CodeRows, Shift};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::calibrate::affine::{AffineOptions, Grouped, round_to_nearest};
use crate::calibrate::gptq::GptqOptions;
use crate::codes::CodeMatrix;
use crate::config::Method;
use crate::float::FloatMatrix;
use crate::scheme::{Dense, Parts, Plan, Scheme};
use crate::values::to_f32;

/// The `quantization_config` of GPTQ: fields and defaults of Transformers' `GPTQConfig` and GPTQModel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GptqConfig {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u32,
    /// Columns of a group, or -1 for whole rows.
    pub group_size: i64,
    /// See [`GptqOptions::damp_percent`].
    pub damp_percent: f32,
    /// See [`GptqOptions::damp_auto_increment`].
    pub damp_auto_increment: f32,
    /// See [`GptqOptions::desc_act`].
    pub desc_act: bool,
    /// See [`GptqOptions::act_group_aware`].
    pub act_group_aware: bool,
    /// See [`GptqOptions::static_groups`].
    pub static_groups: bool,
    /// Whether the zero point is the middle of the codes.
    pub sym: bool,
    /// See [`AffineOptions::mse`].
    pub mse: f32,
    /// Whether the linear layers of a layer see what those before them make of their inputs after quantization.
    pub true_sequential: bool,
    /// `gptq` or `gptq_v2`, which differ in how zero points are stored.
    pub checkpoint_format: Option<String>,
    /// The same by another name.
    pub format: Option<String>,
    /// Patterns of modules that have other settings, or with `-:` before them are left as they are.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub dynamic: Map<String, Value>,
    /// What wrote the checkpoint.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub meta: Value,
}

impl Default for GptqConfig {
    fn default() -> Self {
        let options = GptqOptions::default();
        Self {
            bits: options.affine.bits,
            group_size: 128,
            damp_percent: options.damp_percent,
            damp_auto_increment: options.damp_auto_increment,
            desc_act: options.desc_act,
            act_group_aware: options.act_group_aware,
            static_groups: options.static_groups,
            sym: options.affine.sym,
            mse: options.affine.mse,
            true_sequential: true,
            checkpoint_format: None,
            format: None,
            dynamic: Map::new(),
            meta: Value::Null,
        }
    }
}

impl GptqConfig {
    /// How the algorithm runs.
    pub fn options(&self) -> GptqOptions {
        GptqOptions {
            affine: AffineOptions {
                bits: self.bits,
                sym: self.sym,
                mse: self.mse,
            },
            group_size: usize::try_from(self.group_size).ok(),
            desc_act: self.desc_act,
            act_group_aware: self.act_group_aware,
            static_groups: self.static_groups,
            damp_percent: self.damp_percent,
            damp_auto_increment: self.damp_auto_increment,
        }
    }

    /// How codes are stored.
    pub fn storage(&self) -> Gptq {
        let v2 = [&self.checkpoint_format, &self.format]
            .into_iter()
            .flatten()
            .any(|name| name == "gptq_v2");
        Gptq {
            bits: self.bits,
            group_size: usize::try_from(self.group_size).ok(),
            sym: self.sym,
            v2,
            dynamic: !self.dynamic.is_empty(),
        }
    }

    /// Names a setting that cannot be.
    fn wrong(&self) -> Option<String> {
        let formats = [&self.checkpoint_format, &self.format].into_iter().flatten();
        let mut unknown = formats.filter(|name| !matches!(name.as_str(), "gptq" | "gptq_v2"));
        if let Some(name) = unknown.next() {
            return Some(format!(
                "`checkpoint_format` is `{name}`; supported are gptq and gptq_v2"
            ));
        }
        if self.group_size == 0 || self.group_size < -1 {
            return Some(format!(
                "`group_size` is {}; it is -1 or above 0",
                self.group_size
            ));
        }
        if let Err(error) = self.options().check() {
            return Some(error.to_string());
        }
        None
    }
}

impl Method for GptqConfig {
    fn validate(&self) -> Result<(), String> {
        self.wrong().map_or(Ok(()), Err)
    }

    fn stored(&self) -> Vec<Arc<dyn Scheme>> {
        vec![Arc::new(self.storage())]
    }

    fn scheme(&self, module: &str) -> Result<Option<Arc<dyn Scheme>>, String> {
        for pattern in self.dynamic.keys().filter_map(|key| key.strip_prefix("-:")) {
            let regex = Regex::new(&format!("^(?:{pattern})"))
                .map_err(|error| format!("`dynamic`: `{pattern}` is no regular expression: {error}"))?;
            if regex.is_match(module) {
                return Ok(None);
            }
        }
        Ok(Some(Arc::new(self.storage())))
    }

    fn skipped(&self) -> Option<&[String]> {
        None
    }

    fn skip(&mut self, modules: Vec<String>) {
        for module in modules {
            let pattern = format!("-:.*{}$", regex::escape(&module));
            self.dynamic.insert(pattern, Value::Object(Map::new()));
        }
    }
}

/// How codes are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Gptq {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u32,
    /// Columns of a group; none for whole rows, which is written as -1.
    pub group_size: Option<usize>,
    /// Whether zero points are the middle of the codes; only for what is written.
    pub sym: bool,
    /// Whether zero points are stored as they are (`gptq_v2`), not minus 1 (`gptq`).
    pub v2: bool,
    /// Whether modules may have other bits and groups than these; their tensors say which.
    pub dynamic: bool,
}

const QWEIGHT: &str = ".qweight";
const QZEROS: &str = ".qzeros";
const SCALES: &str = ".scales";
const G_IDX: &str = ".g_idx";

/// What is added to the words of zero points of 2, 4 and 8 bits.
fn ones(bits: u32) -> u32 {
    (0..32).step_by(bits as usize).fold(0, |ones, at| ones | 1 << at)
}

impl Gptq {
    /// Checks the numbers, which come from a file or a user.
    ///
    /// # Errors
    /// Names the field.
    pub fn check(&self) -> Result<(), String> {
        if !matches!(self.bits, 2 | 3 | 4 | 8) {
            return Err(format!(
                "`bits` is {}: GPTQ stores codes of 2, 3, 4 or 8 bits",
                self.bits
            ));
        }
        if self.group_size == Some(0) {
            return Err("`group_size` is 0: it is -1 or above 0".to_string());
        }
        Ok(())
    }

    /// Checks that a matrix can be stored so that other libraries read it.
    fn check_shape(&self, [out_features, in_features]: [usize; 2]) -> Result<(), String> {
        self.check()?;
        let whole = |count: usize| (count * self.bits as usize).is_multiple_of(32);
        if !whole(out_features) || !whole(in_features) {
            return Err(format!(
                "has the shape [{out_features}, {in_features}]; GPTQ stores matrices whose rows and columns of codes \
                 fill whole words of 32 bits, so leave this one as it is"
            ));
        }
        Ok(())
    }

    /// The same for one module.
    fn of_module(&self, parts: &Parts, in_features: usize) -> Result<Self, String> {
        let mut own = self.clone();
        if self.dynamic {
            let first = |ending| Ok::<_, String>(parts.need(ending)?.shape.first().copied().unwrap_or(0));
            let (words, groups) = (first(QWEIGHT)?, first(SCALES)?);
            if let Some(bits) = [2, 3, 4, 8]
                .into_iter()
                .find(|bits| words == (in_features * bits).div_ceil(32))
            {
                own.bits = bits as u32;
            }
            if own.groups(in_features) != groups && groups > 0 {
                own.group_size = Some(in_features.div_ceil(groups)).filter(|_| groups > 1);
            }
        }
        Ok(own)
    }

    fn words(&self, count: usize) -> usize {
        (count * self.bits as usize).div_ceil(32)
    }

    fn groups(&self, in_features: usize) -> usize {
        in_features
            .div_ceil(self.group_size.unwrap_or(in_features).max(1))
            .max(1)
    }

    /// Zero points of a group as they are stored, as one stream of bits.
    fn zeros(&self, stored: &[u32], out_features: usize) -> Vec<u8> {
        let add = if self.v2 || self.bits == 3 {
            0
        } else {
            ones(self.bits)
        };
        let words: Vec<u32> = stored.iter().map(|word| word.wrapping_add(add)).collect();
        let mask = (1u32 << self.bits) - 1;
        let after = u32::from(!self.v2 && self.bits == 3);
        (0..out_features)
            .map(|at| ((field(|at| words[at], at, self.bits) + after) & mask) as u8)
            .collect()
    }

    /// The tensors of a module.
    ///
    /// # Errors
    /// Where the shape is none that can be stored, or a zero point cannot be.
    pub fn store(&self, matrix: &Grouped) -> Result<Parts, String> {
        let [out_features, in_features] = matrix.shape;
        self.check_shape(matrix.shape)?;
        let groups = matrix.groups();
        let same = matrix.bits == self.bits && groups == self.groups(in_features);
        if !same {
            return Err(format!(
                "has {groups} groups of {}-bit codes, which is not what was asked",
                matrix.bits
            ));
        }
        let mut qweight = vec![0u32; self.words(in_features) * out_features];
        for column in 0..in_features {
            for row in 0..out_features {
                let code = matrix.codes[row * in_features + column];
                put(
                    |at, part| qweight[at * out_features + row] |= part,
                    column,
                    self.bits,
                    code,
                );
            }
        }
        let width = self.words(out_features);
        let mut qzeros = vec![0u32; groups * width];
        let mut scales = vec![0.0f32; groups * out_features];
        let before = u8::from(!self.v2 && self.bits == 3);
        let mask = ((1u32 << self.bits) - 1) as u8;
        for group in 0..groups {
            let words = &mut qzeros[group * width..][..width];
            for row in 0..out_features {
                let from = row * groups + group;
                let zero = matrix.zeros[from].wrapping_sub(before) & mask;
                put(|at, part| words[at] |= part, row, self.bits, zero);
                scales[group * out_features + row] = matrix.scales[from];
            }
            if !self.v2 && self.bits != 3 {
                words
                    .iter_mut()
                    .for_each(|word| *word = word.wrapping_sub(ones(self.bits)));
            }
        }
        let g_idx: Vec<u32> = (0..in_features)
            .map(|column| matrix.group(column) as u32)
            .collect();
        let mut parts = Parts::default();
        parts.push_values(
            QWEIGHT,
            DType::I32,
            &[self.words(in_features), out_features],
            &qweight,
            u32::to_le_bytes,
        );
        parts.push_values(QZEROS, DType::I32, &[groups, width], &qzeros, u32::to_le_bytes);
        parts.push_values(SCALES, DType::F16, &[groups, out_features], &scales, |scale| {
            half::f16::from_f32(scale).to_le_bytes()
        });
        parts.push_values(G_IDX, DType::I32, &[in_features], &g_idx, u32::to_le_bytes);
        Ok(parts)
    }
}

impl Scheme for Gptq {
    fn name(&self) -> &str {
        "gptq"
    }

    fn endings(&self) -> &[&str] {
        &[QWEIGHT, QZEROS, SCALES, G_IDX]
    }

    fn is_stored(&self, parts: &Parts) -> bool {
        parts.get(QWEIGHT).is_some()
    }

    fn load(&self, parts: &Parts, shape: [usize; 2]) -> Result<Arc<dyn PackedMatrix>, String> {
        let rows = GptqRows::new(self, parts, shape)?;
        let (bytes, name) = (parts.num_bytes(), NAMES[rows.bits as usize]);
        if rows.apart {
            // Groups of other sizes than one: nothing multiplies with such codes.
            let values = rows.values();
            let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let matrix = FloatMatrix::new(DType::F32, shape, data.into());
            return matrix
                .map(|matrix| Arc::new(matrix) as _)
                .ok_or_else(|| "is too large".to_string());
        }
        Ok(Arc::new(CodeMatrix::new(rows, name, bytes)))
    }

    fn plan(&self, shape: [usize; 2], _dtype: DType) -> Result<Plan, String> {
        self.check_shape(shape)?;
        let [out_features, in_features] = shape;
        let groups = self.groups(in_features);
        Ok(Plan::default()
            .with(QWEIGHT, DType::I32, &[self.words(in_features), out_features])
            .with(QZEROS, DType::I32, &[groups, self.words(out_features)])
            .with(SCALES, DType::F16, &[groups, out_features])
            .with(G_IDX, DType::I32, &[in_features]))
    }

    /// Rounds to nearest; better codes need calibration.
    fn quantize(&self, matrix: &Dense) -> Result<Parts, String> {
        let shape = matrix.shape();
        self.check_shape(shape)?;
        let options = AffineOptions {
            bits: self.bits,
            sym: self.sym,
            mse: 0.0,
        };
        let mut all: Option<Grouped> = None;
        matrix.for_rows(|rows, values| {
            let part = round_to_nearest(values, [rows.len(), shape[1]], &options, self.group_size);
            let part = part.map_err(|error| error.to_string())?;
            match &mut all {
                Some(all) => {
                    all.shape[0] += rows.len();
                    all.codes.extend(part.codes);
                    all.scales.extend(part.scales);
                    all.zeros.extend(part.zeros);
                }
                None => all = Some(part),
            }
            Ok(())
        })?;
        all.map_or_else(|| Err("has no rows".to_string()), |all| self.store(&all))
    }
}

/// What the scheme is called, by bits.
const NAMES: [&str; 9] = ["", "", "GPTQ-2", "GPTQ-3", "GPTQ-4", "", "", "", "GPTQ-8"];

/// The `at`-th field of `bits` bits in a stream of words.
#[inline(always)]
fn field(word: impl Fn(usize) -> u32, at: usize, bits: u32) -> u32 {
    let bit = at * bits as usize;
    let (index, shift) = (bit / 32, (bit % 32) as u32);
    let low = word(index) >> shift;
    let both = if shift + bits > 32 {
        low | word(index + 1) << (32 - shift)
    } else {
        low
    };
    both & ((1 << bits) - 1)
}

/// Puts a field into zeroed words: `or` adds bits to a word.
fn put(mut or: impl FnMut(usize, u32), at: usize, bits: u32, code: u8) {
    let bit = at * bits as usize;
    let (index, shift) = (bit / 32, (bit % 32) as u32);
    or(index, u32::from(code) << shift);
    if shift + bits > 32 {
        or(index + 1, u32::from(code) >> (32 - shift));
    }
}

/// The tensors of a module, checked.
struct GptqRows {
    shape: [usize; 2],
    bits: u32,
    group: usize,
    groups: usize,
    qweight: Bytes,
    /// Both `[groups, out_features]`.
    scales: Vec<f32>,
    zeros: Vec<u8>,
    /// The group of each column, where groups are not side by side.
    g_idx: Vec<u32>,
    /// Columns by groups, where that is not their own order.
    order: Vec<u32>,
    /// Whether groups have other numbers of columns than [`CodeLayout`] can say.
    apart: bool,
}

impl std::fmt::Debug for GptqRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "GptqRows({:?}, {} bits, groups of {})",
            self.shape, self.bits, self.group
        )
    }
}

impl GptqRows {
    fn new(config: &Gptq, parts: &Parts, shape: [usize; 2]) -> Result<Self, String> {
        let [out_features, in_features] = shape;
        let config = &config.of_module(parts, in_features)?;
        config.check()?;
        if out_features == 0 || in_features == 0 {
            return Err(format!("has the shape {shape:?}: there is nothing to store"));
        }
        let groups = config.groups(in_features);
        let group = config
            .group_size
            .unwrap_or(in_features)
            .clamp(1, in_features.max(1));
        let qweight = parts.expect(QWEIGHT, WORDS, &[config.words(in_features), out_features])?;
        let width = config.words(out_features);
        let qzeros = parts.expect(QZEROS, WORDS, &[groups, width])?;
        let scales = to_f32(parts.expect(SCALES, FLOATS, &[groups, out_features])?)?;
        let words: Vec<u32> = qzeros
            .data
            .as_chunks()
            .0
            .iter()
            .map(|b| u32::from_le_bytes(*b))
            .collect();
        let zeros = words
            .chunks(width.max(1))
            .flat_map(|words| config.zeros(words, out_features))
            .collect();
        let mut rows = Self {
            shape,
            bits: config.bits,
            group,
            groups,
            qweight: qweight.data.clone(),
            scales,
            zeros,
            g_idx: Vec::new(),
            order: Vec::new(),
            apart: false,
        };
        if let Some(view) = parts.get(G_IDX) {
            rows.set_groups(view)?;
        }
        Ok(rows)
    }

    fn set_groups(&mut self, view: &TensorView) -> Result<(), String> {
        let [_, in_features] = self.shape;
        if view.shape != [in_features] || view.dtype != DType::I32 {
            let found = format!("{} {:?}", view.dtype.name(), view.shape);
            return Err(format!("`{G_IDX}` is {found}, expected I32 [{in_features}]"));
        }
        let mut g_idx = Vec::with_capacity(in_features);
        for (column, bytes) in view.data.as_chunks().0.iter().enumerate() {
            let group = i32::from_le_bytes(*bytes);
            match u32::try_from(group)
                .ok()
                .filter(|group| (*group as usize) < self.groups)
            {
                Some(group) => g_idx.push(group),
                None => {
                    return Err(format!(
                        "`{G_IDX}` puts column {column} into group {group} of {}; is `group_size` right?",
                        self.groups
                    ));
                }
            }
        }
        if g_idx
            .iter()
            .enumerate()
            .all(|(column, group)| *group as usize == column / self.group)
        {
            return Ok(());
        }
        let mut order: Vec<u32> = (0..in_features as u32).collect();
        order.sort_by_key(|column| g_idx[*column as usize]);
        let expected =
            |(place, column): (usize, &u32)| g_idx[*column as usize] as usize == place / self.group;
        self.apart = !order.iter().enumerate().all(expected);
        (self.g_idx, self.order) = (g_idx, order);
        Ok(())
    }

    #[inline(always)]
    fn code(&self, row: usize, column: usize) -> u8 {
        let word = |index: usize| {
            let at = 4 * (index * self.shape[0] + row);
            self.qweight
                .get(at..at + 4)
                .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        };
        field(word, column, self.bits) as u8
    }

    fn values(&self) -> Vec<f32> {
        let [out_features, in_features] = self.shape;
        let mut values = Vec::with_capacity(out_features * in_features);
        for row in 0..out_features {
            for column in 0..in_features {
                let at = self.g_idx[column] as usize * out_features + row;
                values
                    .push(self.scales[at] * (f32::from(self.code(row, column)) - f32::from(self.zeros[at])));
            }
        }
        values
    }
}

/// Words are stored as signed numbers.
const WORDS: &[DType] = &[DType::I32, DType::U32];
const FLOATS: &[DType] = &[DType::F16, DType::BF16, DType::F32];

impl CodeRows for GptqRows {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn layout(&self) -> CodeLayout {
        CodeLayout {
            bits: self.bits as usize,
            group: self.group,
            shift: Shift::Zeros,
            table: None,
        }
    }

    fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], shifts: &mut [f32]) {
        let [out_features, in_features] = self.shape;
        // Rows lie side by side: a column at a time is read from beginning to end.
        for place in 0..in_features {
            let column = self.order.get(place).map_or(place, |column| *column as usize);
            for (index, row) in rows.clone().enumerate() {
                codes[index * in_features + place] = self.code(row, column);
            }
        }
        for (index, row) in rows.enumerate() {
            for group in 0..self.groups {
                let (to, from) = (index * self.groups + group, group * out_features + row);
                scales[to] = self.scales[from];
                shifts[to] = f32::from(self.zeros[from]);
            }
        }
    }

    fn permutation(&self) -> Option<&[u32]> {
        (!self.order.is_empty()).then_some(&self.order)
    }
}
