//! The block formats of ggml: how values are packed, and how they are widened.
//!
//! A block holds a fixed number of values and the scales they share. Source of the layouts and of the
//! arithmetic: `ggml-common.h` and `ggml-quants.c` of the ggml project.

use half::f16;
use oxiformers_hub::checkpoint::gguf::GgmlType;

mod k_quants;
mod legacy;
mod others;

/// Bytes and values do not fit together.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{bytes} bytes of {} do not hold {values} values", ty.name())]
pub struct SizeError {
    ty: GgmlType,
    bytes: usize,
    values: usize,
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
        let Self { ty, src, dst } = self;
        match ty {
            GgmlType::Q4_0 => blocks(src, dst, legacy::q4_0),
            GgmlType::Q4_1 => blocks(src, dst, legacy::q4_1),
            GgmlType::Q5_0 => blocks(src, dst, legacy::q5_0),
            GgmlType::Q5_1 => blocks(src, dst, legacy::q5_1),
            GgmlType::Q8_0 => blocks(src, dst, legacy::q8_0),
            GgmlType::Q2_K => blocks(src, dst, k_quants::q2_k),
            GgmlType::Q3_K => blocks(src, dst, k_quants::q3_k),
            GgmlType::Q4_K => blocks(src, dst, k_quants::q4_k),
            GgmlType::Q5_K => blocks(src, dst, k_quants::q5_k),
            GgmlType::Q6_K => blocks(src, dst, k_quants::q6_k),
            GgmlType::IQ4_NL => blocks(src, dst, others::iq4_nl),
            GgmlType::IQ4_XS => blocks(src, dst, others::iq4_xs),
            GgmlType::TQ1_0 => blocks(src, dst, others::tq1_0),
            GgmlType::TQ2_0 => blocks(src, dst, others::tq2_0),
            GgmlType::MXFP4 => blocks(src, dst, others::mxfp4),
        }
    }
}

/// Applies `widen` to each block of `B` bytes and `N` values.
#[inline(always)]
fn blocks<const B: usize, const N: usize>(
    src: &[u8],
    dst: &mut [f32],
    widen: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (block, values) in src.as_chunks::<B>().0.iter().zip(dst.as_chunks_mut::<N>().0) {
        widen(block, values);
    }
}

/// The half float at `at`.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}
