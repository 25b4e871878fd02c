//! Every block format against the `gguf` Python package, and its quantizer against ggml's, bit for bit.

use std::path::{Path, PathBuf};

use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, gguf::GgmlType};
use oxiformers_kernels::ggml::{QuantizeError, dequantize, quantize};
use proptest::prelude::*;

#[test]
fn values_equal_the_reference() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ggml.safetensors");
    let reference = Checkpoint::open(&ModelFiles::from_file(&path).expect("fixture")).expect("fixture");
    for ty in GgmlType::ALL {
        let bytes = reference
            .tensor(&format!("{}.bytes", ty.name()))
            .expect("every type has a fixture")
            .data;
        let expected = reference
            .tensor(&format!("{}.values", ty.name()))
            .expect("values")
            .data;
        let mut values = vec![0.0; expected.len() / 4];
        dequantize(*ty, &bytes, &mut values).expect("whole blocks");
        for (i, (ours, reference)) in values.iter().zip(expected.as_chunks().0).enumerate() {
            let reference = f32::from_le_bytes(*reference);
            assert!(
                ours == &reference,
                "{} value {i}: {ours} instead of {reference}",
                ty.name()
            );
        }
    }
}

fn floats(reference: &Checkpoint, name: &str) -> Vec<f32> {
    let bytes = reference.tensor(name).expect("fixture").data;
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

#[test]
fn blocks_equal_the_reference() {
    // A larger one can be made by the script.
    let path = std::env::var_os("OXIFORMERS_GGML_FIXTURE").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ggml_quantize.safetensors"),
        PathBuf::from,
    );
    let reference = Checkpoint::open(&ModelFiles::from_file(&path).expect("fixture")).expect("fixture");
    let (values, importance) = (floats(&reference, "values"), floats(&reference, "importance"));
    let mut different = Vec::new();
    for ty in GgmlType::ALL {
        for (suffix, importance) in [("", None), (".importance", Some(&importance[..]))] {
            let name = format!("{}{suffix}", ty.name());
            let expected = reference.tensor(&name).expect("every type has a fixture").data;
            let mut blocks = vec![0; expected.len()];
            quantize(*ty, &values, 512, importance, &mut blocks).expect("finite values");
            let pairs = blocks.chunks(ty.type_size()).zip(expected.chunks(ty.type_size()));
            let wrong: Vec<_> = pairs
                .enumerate()
                .filter(|(_, (a, b))| a != b)
                .map(|(i, _)| i)
                .collect();
            if !wrong.is_empty() {
                different.push((name, wrong.len(), wrong[0], blocks.len() / ty.type_size()));
            }
        }
    }
    assert!(
        different.is_empty(),
        "type, blocks that differ, the first of them, all: {different:?}"
    );
}

#[test]
fn what_cannot_be_quantized_is_named() {
    let mut values = vec![0.5; 3 * 256];
    let mut blocks = vec![0; 3 * 144];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        values[256 + 17] = bad;
        let error = quantize(GgmlType::Q4_K, &values, 256, None, &mut blocks).unwrap_err();
        assert!(
            matches!(
                error,
                QuantizeError::NotFinite {
                    row: 1,
                    column: 17,
                    ..
                }
            ),
            "{error}"
        );
    }
    values[256 + 17] = 1e30;
    let error = quantize(GgmlType::Q4_K, &values, 256, None, &mut blocks).unwrap_err();
    assert_eq!(
        error,
        QuantizeError::TooLarge {
            ty: GgmlType::Q4_K,
            row: 1
        }
    );
    values[256 + 17] = 0.5;
    let weights = [vec![1.0; 255], vec![-1.0]].concat();
    let error = quantize(GgmlType::Q4_K, &values, 256, Some(&weights), &mut blocks).unwrap_err();
    assert!(
        matches!(error, QuantizeError::Importance { column: 255, .. }),
        "{error}"
    );
    for (columns, bytes) in [(128, 3 * 144), (256, 2 * 144), (0, 0)] {
        let error = quantize(GgmlType::Q4_K, &values, columns, None, &mut blocks[..bytes]).unwrap_err();
        assert!(matches!(error, QuantizeError::Size { .. }), "{error}");
    }
}

proptest! {
    #[test]
    fn any_bytes_give_values_or_an_error(
        which in 0..GgmlType::ALL.len(),
        bytes in proptest::collection::vec(any::<u8>(), 0..1200),
        extra in 0usize..3,
    ) {
        let ty = GgmlType::ALL[which];
        let whole = bytes.len() / ty.type_size();
        let mut values = vec![0.0; whole * ty.block_size() + extra];
        let fits = bytes.len() == whole * ty.type_size() && extra == 0;
        prop_assert_eq!(dequantize(ty, &bytes, &mut values).is_ok(), fits);
    }
}
