//! How long products take with each scheme, against GGUF's Q4_0, in alternation:
//!
//! ```sh
//! cargo run --release -p oxiformers-quant --example products -- 2048 5632 [TOKENS]
//! ```
//!
//! The numbers are those of columns and rows. There are matrices enough that no cache holds them; the median of rounds
//! counts.

use std::time::Instant;

use oxiformers_hub::checkpoint::DType;
use oxiformers_hub::checkpoint::gguf::GgmlType;
use oxiformers_kernels::int8::{matmul, matmul_whole};
use oxiformers_kernels::{Form, PackedMatrix, ggml};
use oxiformers_quant::float::FloatMatrix;
use oxiformers_quant::ggml::GgmlMatrix;
use oxiformers_quant::{Dense, MethodOptions, QuantizationConfig};
use std::sync::Arc;

type Error = Box<dyn std::error::Error>;

/// Numbers that look random.
fn noise(len: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn with_scheme(name: &str, dense: &dyn PackedMatrix) -> Result<Arc<dyn PackedMatrix>, Error> {
    let config = QuantizationConfig::named(name, &MethodOptions::default())?;
    let scheme = config.scheme("fc", false)?.ok_or("no scheme")?;
    let parts = scheme.quantize(&Dense {
        matrix: dense,
        dtype: DType::F32,
    })?;
    Ok(scheme.load(&parts, dense.shape())?)
}

fn with_type(ty: GgmlType, values: &[f32], shape: [usize; 2]) -> Result<Arc<dyn PackedMatrix>, Error> {
    let mut bytes = vec![0; values.len() / ty.block_size() * ty.type_size()];
    ggml::quantize(ty, values, shape[1], None, &mut bytes)?;
    let matrix = GgmlMatrix::new(ty, shape, bytes.into()).ok_or("no whole blocks")?;
    Ok(Arc::new(matrix))
}

fn main() -> Result<(), Error> {
    let numbers: Vec<usize> = std::env::args()
        .skip(1)
        .map(|arg| arg.parse())
        .collect::<Result<_, _>>()?;
    let [columns, rows, tokens] = match numbers[..] {
        [columns, rows] => [columns, rows, 1],
        [columns, rows, tokens] => [columns, rows, tokens],
        _ => return Err("usage: products COLUMNS ROWS [TOKENS]".into()),
    };
    let values = noise(rows * columns);
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let dense = FloatMatrix::new(DType::F32, [rows, columns], bytes.into()).ok_or("no matrix")?;
    let mut matrices = Vec::new();
    for ty in [GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::MXFP4, GgmlType::TQ2_0] {
        matrices.push((ty.name(), with_type(ty, &values, [rows, columns])?));
    }
    for name in ["nf4", "fp4", "hqq", "w4a16", "bitnet"] {
        matrices.push((name, with_scheme(name, &dense)?));
    }
    // GPTQ's and AWQ's codes are hqq's, with 128 columns and a zero point.
    let x = noise(tokens * columns);
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); matrices.len()];
    // As many copies as a quarter of a gigabyte has room for.
    let copies = ((256 << 20) / (rows * columns / 2)).clamp(1, 64);
    let copied: Vec<Vec<_>> = matrices
        .iter()
        .map(|(_, matrix)| {
            (0..copies)
                .map(|_| matrix.regrouped().unwrap_or_else(|| matrix.clone()))
                .collect()
        })
        .collect();
    for round in 0..9 {
        for (copies, times) in copied.iter().zip(&mut times) {
            let begin = Instant::now();
            for matrix in copies {
                let Form::Int8(int8) = matrix.form() else {
                    return Err("no integers".into());
                };
                let product = if matrix.takes_int8() { matmul_whole } else { matmul };
                std::hint::black_box(product(&x, columns, &[int8]));
            }
            if round > 0 {
                times.push(begin.elapsed().as_secs_f64() / copies.len() as f64);
            }
        }
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let medians: Vec<f64> = times.iter_mut().map(median).collect();
    println!("{:<8} {:>10} {:>8} {:>8}", "", "us", "GB/s", "x Q4_0");
    for ((name, matrix), seconds) in matrices.iter().zip(&medians) {
        println!(
            "{name:<8} {:>10.1} {:>8.1} {:>8.2}",
            seconds * 1e6,
            matrix.held_bytes() as f64 / seconds / 1e9,
            medians[0] / seconds
        );
    }
    Ok(())
}
