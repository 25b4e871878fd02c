//! The block formats of ggml: how values are packed, and how they are widened.
//!
//! A block holds a fixed number of values, packed to a few bits each, and the scales they share. Source of the
//! layouts and of the arithmetic: `ggml-common.h` and `ggml-quants.c` of the ggml project.

use half::f16;
use oxiformers_hub::checkpoint::gguf::GgmlType;

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

/// The half float at `at`.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}
