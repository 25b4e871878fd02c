//! Stored floats of any type.

use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_kernels::ggml;

/// Any stored float tensor as f32 values, row-major.
///
/// # Errors
/// Says why the type does not fit.
pub fn to_f32(view: &TensorView) -> Result<Vec<f32>, String> {
    Ok(match view.dtype {
        DType::F32 => each(&view.data, f32::from_le_bytes),
        DType::F64 => each(&view.data, |b: [u8; 8]| f64::from_le_bytes(b) as f32),
        DType::F16 => each(&view.data, |b: [u8; 2]| half::f16::from_le_bytes(b).to_f32()),
        DType::BF16 => each(&view.data, |b: [u8; 2]| half::bf16::from_le_bytes(b).to_f32()),
        DType::Ggml(ty) => {
            let mut values = vec![0.0; view.shape.iter().product()];
            ggml::dequantize(ty, &view.data, &mut values).map_err(|error| error.to_string())?;
            values
        }
        _ => return Err("is no float type that parameters can have".to_string()),
    })
}

/// Little-endian values.
fn each<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect()
}

/// The nearest value that a float type of 16 or 32 bits has.
pub fn rounded(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => half::f16::from_f32(value).to_f32(),
        DType::BF16 => half::bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Values as bytes of a float type of 16 or 32 bits.
///
/// # Errors
/// Says why the type does not fit.
pub fn from_f32(values: &[f32], dtype: DType) -> Result<Vec<u8>, String> {
    Ok(match dtype {
        DType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::F16 => values
            .iter()
            .flat_map(|value| half::f16::from_f32(*value).to_le_bytes())
            .collect(),
        DType::BF16 => values
            .iter()
            .flat_map(|value| half::bf16::from_f32(*value).to_le_bytes())
            .collect(),
        other => return Err(format!("{} is no type that values are narrowed to", other.name())),
    })
}
