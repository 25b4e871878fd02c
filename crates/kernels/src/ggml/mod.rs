//! The block formats of ggml: how values are packed, and how they are widened.
//!
//! A block holds a fixed number of values, packed to a few bits each, and the scales they share. Source of the
//! layouts and of the arithmetic: `ggml-common.h` and `ggml-quants.c` of the ggml project.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use half::f16;
use oxiformers_hub::checkpoint::gguf::GgmlType;

use crate::int8::{CodeLayout, CodeRows, Shift};
use crate::threads;

mod fit;
#[allow(non_camel_case_types)]
mod k_quants;
#[allow(non_camel_case_types)]
mod legacy;
#[allow(non_camel_case_types)]
mod others;

/// Bytes and values do not fit together.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{bytes} bytes of {} do not hold {values} values", ty.name())]
pub struct SizeError {
    ty: GgmlType,
    bytes: usize,
    values: usize,
}

/// Why values cannot be stored as blocks.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QuantizeError {
    /// Rows are no whole number of blocks, or the lengths do not fit each other.
    #[error(
        "{values} values in rows of {columns} with {importance} weights do not become {bytes} bytes of {}",
        ty.name()
    )]
    Size {
        /// Type.
        ty: GgmlType,
        /// Length of the source.
        values: usize,
        /// Length of a row.
        columns: usize,
        /// Length of the importance weights; 0 for none.
        importance: usize,
        /// Length of the target.
        bytes: usize,
    },
    /// A value is infinite or no number.
    #[error("row {row}, column {column} is {value}: only finite values can be quantized")]
    NotFinite {
        /// Row of the source.
        row: usize,
        /// Column of the source.
        column: usize,
        /// The value.
        value: f32,
    },
    /// An importance weight is negative, infinite or no number.
    #[error("the importance of column {column} is {value}: it must be finite and not negative")]
    Importance {
        /// Column.
        column: usize,
        /// The weight.
        value: f32,
    },
    /// Values are too large for the half floats that hold the scales.
    #[error("row {row} has values that are too large for the scales of {}", ty.name())]
    TooLarge {
        /// Type.
        ty: GgmlType,
        /// Row of the source.
        row: usize,
    },
}

impl QuantizeError {
    /// The same error where the source was rows from `first` on of something larger.
    #[must_use]
    pub fn below(self, first: usize) -> Self {
        match self {
            Self::NotFinite { row, column, value } => Self::NotFinite {
                row: first + row,
                column,
                value,
            },
            Self::TooLarge { ty, row } => Self::TooLarge { ty, row: first + row },
            other => other,
        }
    }
}

/// A format of blocks of `B` bytes and `N` values: a value is `scale · (code − OFFSET) + min`, or
/// `scale · TABLE[code]`, with the scale and minimum of its group.
pub(crate) trait Format<const B: usize, const N: usize> {
    /// Bits of a code.
    const BITS: usize;
    /// Values that share a scale: 16 or 32.
    const GROUP: usize = 32;
    /// What is taken from a code.
    const OFFSET: i32 = 0;
    /// Whether groups have a minimum.
    const MIN: bool = false;
    /// What codes stand for, where they are no numbers.
    const TABLE: Option<[i8; 16]> = None;

    /// The codes, scales and minimums of a block.
    fn unpack(block: &[u8; B], codes: &mut [u8; N], groups: &mut Groups);

    /// The block that comes close to `x`.
    fn pack(x: &[f32; N], importance: Option<Importance<N>>, block: &mut [u8; B]);
}

/// How much errors in a block's values count.
#[derive(Clone, Copy)]
pub(crate) struct Importance<'a, const N: usize> {
    /// The mean squared activation of each column.
    columns: &'a [f32; N],
    /// The mean square of the row's values.
    mean_square: f32,
}

/// Scales and minimums of a block's groups, as many as there are.
#[derive(Default)]
pub(crate) struct Groups {
    pub(crate) scales: [f32; 16],
    pub(crate) mins: [f32; 16],
}

/// What is done with a format that is only known at run time.
pub(crate) trait Visitor {
    type Output;

    fn visit<F: Format<B, N>, const B: usize, const N: usize>(self) -> Self::Output;
}

/// Calls `visitor` with the format of a type.
#[inline(always)]
pub(crate) fn with_format<V: Visitor>(ty: GgmlType, visitor: V) -> V::Output {
    match ty {
        GgmlType::Q4_0 => visitor.visit::<legacy::Q4_0, 18, 32>(),
        GgmlType::Q4_1 => visitor.visit::<legacy::Q4_1, 20, 32>(),
        GgmlType::Q5_0 => visitor.visit::<legacy::Q5_0, 22, 32>(),
        GgmlType::Q5_1 => visitor.visit::<legacy::Q5_1, 24, 32>(),
        GgmlType::Q8_0 => visitor.visit::<legacy::Q8_0, 34, 32>(),
        GgmlType::Q2_K => visitor.visit::<k_quants::Q2_K, 84, 256>(),
        GgmlType::Q3_K => visitor.visit::<k_quants::Q3_K, 110, 256>(),
        GgmlType::Q4_K => visitor.visit::<k_quants::Q4_K, 144, 256>(),
        GgmlType::Q5_K => visitor.visit::<k_quants::Q5_K, 176, 256>(),
        GgmlType::Q6_K => visitor.visit::<k_quants::Q6_K, 210, 256>(),
        GgmlType::IQ4_NL => visitor.visit::<others::IQ4_NL, 18, 32>(),
        GgmlType::IQ4_XS => visitor.visit::<others::IQ4_XS, 136, 256>(),
        GgmlType::TQ1_0 => visitor.visit::<others::TQ1_0, 54, 256>(),
        GgmlType::TQ2_0 => visitor.visit::<others::TQ2_0, 66, 256>(),
        GgmlType::MXFP4 => visitor.visit::<others::MXFP4, 17, 32>(),
    }
}

/// Widens whole blocks to f32.
///
/// # Errors
/// Where `src` and `dst` are not the same whole number of blocks.
pub fn dequantize(ty: GgmlType, src: &[u8], dst: &mut [f32]) -> Result<(), SizeError> {
    let blocks = src.len() / ty.type_size();
    if blocks * ty.type_size() != src.len() || blocks.checked_mul(ty.block_size()) != Some(dst.len()) {
        return Err(SizeError {
            ty,
            bytes: src.len(),
            values: dst.len(),
        });
    }
    // Compiled once per instruction set; the widest that this processor has is chosen at run time.
    pulp::Arch::new().dispatch(Dequantize { ty, src, dst });
    Ok(())
}

struct Dequantize<'a> {
    ty: GgmlType,
    src: &'a [u8],
    dst: &'a mut [f32],
}

impl pulp::NullaryFnOnce for Dequantize<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        with_format(self.ty, self);
    }
}

impl Visitor for Dequantize<'_> {
    type Output = ();

    #[inline(always)]
    fn visit<F: Format<B, N>, const B: usize, const N: usize>(self) {
        let blocks = self.src.as_chunks::<B>().0.iter();
        let (mut codes, mut groups) = ([0; N], Groups::default());
        for (block, values) in blocks.zip(self.dst.as_chunks_mut::<N>().0) {
            F::unpack(block, &mut codes, &mut groups);
            let codes = codes.chunks_exact(F::GROUP);
            for (index, (codes, values)) in codes.zip(values.chunks_exact_mut(F::GROUP)).enumerate() {
                let (scale, min) = (groups.scales[index], groups.mins[index]);
                for (code, value) in codes.iter().zip(values) {
                    *value = match F::TABLE {
                        Some(table) => f32::from(table[usize::from(*code & 0xF)]) * scale,
                        None if F::MIN => f32::from(*code) * scale + min,
                        None => (i32::from(*code) - F::OFFSET) as f32 * scale,
                    };
                }
            }
        }
    }
}

/// Rows of blocks, as codes.
#[derive(Clone, Copy)]
pub struct GgmlRows<'a> {
    ty: GgmlType,
    shape: [usize; 2],
    bytes: &'a [u8],
}

impl std::fmt::Debug for GgmlRows<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GgmlRows({}, {:?})", self.ty.name(), self.shape)
    }
}

impl<'a> GgmlRows<'a> {
    /// `shape[0]` rows of whole blocks, `shape[1]` values each, whose number the caller has checked.
    pub fn new(ty: GgmlType, shape: [usize; 2], bytes: &'a [u8]) -> Self {
        Self { ty, shape, bytes }
    }

    fn bytes_of(&self, rows: Range<usize>) -> &'a [u8] {
        let row_bytes = self.shape[1] / self.ty.block_size() * self.ty.type_size();
        &self.bytes[rows.start * row_bytes..rows.end * row_bytes]
    }
}

impl CodeRows for GgmlRows<'_> {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn layout(&self) -> CodeLayout {
        struct Table<F, const B: usize, const N: usize>(std::marker::PhantomData<F>);
        impl<F: Format<B, N>, const B: usize, const N: usize> Table<F, B, N> {
            const VALUES: Option<[f32; 16]> = match F::TABLE {
                Some(table) => {
                    let (mut values, mut code) = ([0.0; 16], 0);
                    while code < 16 {
                        values[code] = table[code] as f32;
                        code += 1;
                    }
                    Some(values)
                }
                None => None,
            };
            const SHARED: Option<&'static [f32; 16]> = Self::VALUES.as_ref();
        }
        struct Layout;
        impl Visitor for Layout {
            type Output = CodeLayout;

            fn visit<F: Format<B, N>, const B: usize, const N: usize>(self) -> CodeLayout {
                CodeLayout {
                    bits: F::BITS,
                    group: F::GROUP,
                    shift: if F::MIN {
                        Shift::Mins
                    } else {
                        Shift::Offset(F::OFFSET)
                    },
                    table: Table::<F, B, N>::SHARED,
                }
            }
        }
        with_format(self.ty, Layout)
    }

    fn unpack(&self, rows: Range<usize>, codes: &mut [u8], scales: &mut [f32], shifts: &mut [f32]) {
        let blocks = self.bytes_of(rows);
        pulp::Arch::new().dispatch(Unpack {
            ty: self.ty,
            blocks,
            codes,
            scales,
            shifts,
        });
    }

    fn release(&self, rows: Range<usize>) {
        oxiformers_hub::release(self.bytes_of(rows));
    }
}

struct Unpack<'a> {
    ty: GgmlType,
    blocks: &'a [u8],
    codes: &'a mut [u8],
    scales: &'a mut [f32],
    shifts: &'a mut [f32],
}

impl pulp::NullaryFnOnce for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        with_format(self.ty, self);
    }
}

impl Visitor for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn visit<F: Format<B, N>, const B: usize, const N: usize>(self) {
        let blocks = self.blocks.as_chunks::<B>().0.iter();
        let scales = self.scales.chunks_exact_mut(N / F::GROUP);
        let mut mins = self.shifts.chunks_exact_mut(N / F::GROUP);
        let mut groups = Groups::default();
        for ((block, codes), scales) in blocks.zip(self.codes.as_chunks_mut::<N>().0).zip(scales) {
            F::unpack(block, codes, &mut groups);
            scales.copy_from_slice(&groups.scales[..N / F::GROUP]);
            if let Some(mins) = mins.next() {
                mins.copy_from_slice(&groups.mins[..N / F::GROUP]);
            }
        }
    }
}

/// Narrows rows of `columns` values to blocks, on all threads. Where `importance` has a weight for each column (the
/// mean square of what the column is multiplied with), errors there count by it.
///
/// The bytes are those that ggml's own quantizers write.
///
/// # Errors
/// [`QuantizeError`]: values that are not finite or too large, or lengths that do not fit.
pub fn quantize(
    ty: GgmlType,
    src: &[f32],
    columns: usize,
    importance: Option<&[f32]>,
    dst: &mut [u8],
) -> Result<(), QuantizeError> {
    let row_bytes = columns / ty.block_size() * ty.type_size();
    let fits = columns > 0
        && columns.is_multiple_of(ty.block_size())
        && src.len().is_multiple_of(columns)
        && (src.len() / columns).checked_mul(row_bytes) == Some(dst.len())
        && importance.is_none_or(|importance| importance.len() == columns);
    if !fits {
        return Err(QuantizeError::Size {
            ty,
            values: src.len(),
            columns,
            importance: importance.map_or(0, <[f32]>::len),
            bytes: dst.len(),
        });
    }
    let bad = |value: &f32| !value.is_finite() || *value < 0.0;
    if let Some(column) = importance.and_then(|weights| weights.iter().position(bad)) {
        let value = importance.map_or(0.0, |weights| weights[column]);
        return Err(QuantizeError::Importance { column, value });
    }
    // The error of the first row that has one.
    let failed = Mutex::new(None::<(usize, QuantizeError)>);
    let arch = pulp::Arch::new();
    // Some thousand values a task, so that handing over does not count.
    let rows = (1usize << 13).div_ceil(columns);
    threads::for_each_chunk(dst, rows * row_bytes, |index, dst| {
        for (row, dst) in (index * rows..).zip(dst.chunks_exact_mut(row_bytes)) {
            let src = &src[row * columns..(row + 1) * columns];
            let result = match src.iter().position(|value| !value.is_finite()) {
                Some(column) => Err(QuantizeError::NotFinite {
                    row,
                    column,
                    value: src[column],
                }),
                None if arch.dispatch(Quantize {
                    ty,
                    src,
                    importance,
                    dst,
                }) =>
                {
                    Ok(())
                }
                None => Err(QuantizeError::TooLarge { ty, row }),
            };
            if let Err(error) = result {
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                if failed.as_ref().is_none_or(|(first, _)| row < *first) {
                    *failed = Some((row, error));
                }
            }
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.map_or(Ok(()), |(_, error)| Err(error))
}

/// Narrows one row; returns whether its scales are finite.
struct Quantize<'a> {
    ty: GgmlType,
    src: &'a [f32],
    importance: Option<&'a [f32]>,
    dst: &'a mut [u8],
}

impl pulp::NullaryFnOnce for Quantize<'_> {
    type Output = bool;

    #[inline(always)]
    fn call(self) -> bool {
        with_format(self.ty, self)
    }
}

impl Visitor for Quantize<'_> {
    type Output = bool;

    #[inline(always)]
    fn visit<F: Format<B, N>, const B: usize, const N: usize>(self) -> bool {
        let mean_square = match self.importance {
            Some(_) => fit::square_sum(self.src) / self.src.len() as f32,
            None => 0.0,
        };
        let (mut codes, mut groups) = ([0; N], Groups::default());
        let blocks = self
            .src
            .as_chunks::<N>()
            .0
            .iter()
            .zip(self.dst.as_chunks_mut::<B>().0);
        let mut finite = true;
        for (index, (x, block)) in blocks.enumerate() {
            let columns = self.importance.and_then(|all| all.as_chunks::<N>().0.get(index));
            let importance = columns.map(|columns| Importance { columns, mean_square });
            F::pack(x, importance, block);
            F::unpack(block, &mut codes, &mut groups);
            finite &= groups
                .scales
                .iter()
                .chain(&groups.mins)
                .all(|value| value.is_finite());
        }
        finite
    }
}

/// The half float at `at`.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Stores a half float at `at`.
#[inline(always)]
fn put_half(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}
