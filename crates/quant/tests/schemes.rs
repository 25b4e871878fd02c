//! fp8, BitNet and compressed-tensors against their libraries, to the last bit: `fixtures/schemes.py` made the tensors.

use std::collections::BTreeMap;
use std::path::Path;

use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, TensorView};
use oxiformers_kernels::Form;
use oxiformers_quant::values::from_f32;
use oxiformers_quant::{Dense, PackedMatrix, Parts, QuantizationConfig, Scheme, pack};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Case {
    config: Value,
    /// Whether the scheme can be written.
    written: bool,
}

fn fixture() -> (BTreeMap<String, Case>, Checkpoint) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let cases = std::fs::read(folder.join("schemes.json")).unwrap();
    let files = ModelFiles::from_file(&folder.join("schemes.safetensors")).unwrap();
    (
        serde_json::from_slice(&cases).unwrap(),
        Checkpoint::open(&files).unwrap(),
    )
}

fn stored(checkpoint: &Checkpoint, case: &str, scheme: &dyn Scheme) -> Parts {
    let mut parts = Parts::default();
    for ending in scheme.endings() {
        let name = format!("{case}{ending}");
        if checkpoint.info(&name).is_some() {
            parts.push(ending, checkpoint.tensor(&name).unwrap());
        }
    }
    parts
}

fn values(matrix: &dyn PackedMatrix) -> Vec<f32> {
    let [rows, cols] = matrix.shape();
    let mut values = vec![0.0; rows * cols];
    matrix.dequantize_rows(0..rows, &mut values);
    values
}

fn shape(view: &TensorView) -> [usize; 2] {
    <[usize; 2]>::try_from(view.shape.as_slice()).unwrap()
}

#[test]
fn tensors_and_values_are_the_librarys() {
    let (cases, checkpoint) = fixture();
    for (name, case) in &cases {
        let config = QuantizationConfig::from_json(&case.config).unwrap();
        let schemes = config.stored();
        let scheme = schemes.first().unwrap();
        let theirs = stored(&checkpoint, name, scheme.as_ref());
        assert!(scheme.is_stored(&theirs), "{name}");
        let expected = checkpoint.tensor(&format!("{name}.dequantized")).unwrap();
        let shape = shape(&expected);
        let matrix = scheme
            .load(&theirs, shape)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = from_f32(&values(matrix.as_ref()), expected.dtype).unwrap();
        assert_eq!(found, expected.data, "{name}");

        let x: Vec<f32> = (0..shape[1]).map(|i| ((i * 7) % 11) as f32 / 8.0 - 0.5).collect();
        let products = match matrix.form() {
            Form::Int8(matrix) => oxiformers_kernels::int8::matmul(&x, shape[1], &[matrix]).concat(),
            Form::Float(matrix) => {
                let layer = (oxiformers_kernels::dense::Weight::Packed(matrix), None);
                oxiformers_kernels::dense::matmul(&x, shape[1], &[layer], None).concat()
            }
        };
        for (found, row) in products.iter().zip(values(matrix.as_ref()).chunks(shape[1])) {
            let sum: f32 = row.iter().zip(&x).map(|(w, x)| w * x).sum();
            let size: f32 = row.iter().zip(&x).map(|(w, x)| (w * x).abs()).sum();
            assert!(
                (found - sum).abs() <= 1e-3 * size,
                "{name}: {found} instead of {sum}"
            );
        }

        let input = checkpoint.tensor(&format!("{name}.input")).unwrap();
        let matrix = pack(&input).unwrap();
        let dense = Dense {
            matrix: matrix.as_ref(),
            dtype: input.dtype,
        };
        let scheme = config
            .scheme("model.layers.0.up_proj", false)
            .and_then(|scheme| scheme.ok_or_else(|| panic!("{name}")));
        let ours = scheme.unwrap().quantize(&dense);
        assert_eq!(ours.is_ok(), case.written, "{name}: {:?}", ours.err());
        let Ok(ours) = ours else { continue };
        assert_eq!(ours.iter().count(), theirs.iter().count(), "{name}");
        for (ending, view) in theirs.iter() {
            let found = ours.get(ending).unwrap_or_else(|| panic!("{name}{ending}"));
            assert_eq!(
                (found.dtype, &found.shape),
                (view.dtype, &view.shape),
                "{name}{ending}"
            );
            assert_eq!(found.data, view.data, "{name}{ending}");
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let (cases, checkpoint) = fixture();
    for (name, case) in &cases {
        let config = QuantizationConfig::from_json(&case.config).unwrap();
        let scheme = config.stored().remove(0);
        let parts = stored(&checkpoint, name, scheme.as_ref());
        let [rows, cols] = shape(&checkpoint.tensor(&format!("{name}.dequantized")).unwrap());
        assert!(scheme.load(&parts, [rows + 1, cols]).is_err(), "{name}");
        assert!(scheme.load(&parts, [rows, cols + 1]).is_err(), "{name}");
        for (ending, view) in parts.iter() {
            let mut cut = Parts::default();
            for (other, view) in parts.iter().filter(|(other, _)| *other != ending) {
                cut.push(other, view.clone());
            }
            let mut view = view.clone();
            view.shape = vec![7, 1];
            let size = view.dtype.num_bytes(&[]).unwrap();
            view.data = view.data.repeat(7)[..7 * size].to_vec().into();
            cut.push(ending, view);
            assert!(scheme.load(&cut, [rows, cols]).is_err(), "{name}{ending}");
        }
        let bad = TensorView {
            dtype: oxiformers_hub::checkpoint::DType::F32,
            shape: vec![16, 32],
            data: vec![0xFF; 4 * 512].into(),
        };
        let matrix = pack(&bad).unwrap();
        let dense = Dense {
            matrix: matrix.as_ref(),
            dtype: bad.dtype,
        };
        assert!(scheme.quantize(&dense).is_err(), "{name}");
    }
}
