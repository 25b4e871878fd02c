//! Every block format against the `gguf` Python package, bit for bit.

use std::path::Path;

use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, gguf::GgmlType};
use oxiformers_kernels::ggml::dequantize;
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
