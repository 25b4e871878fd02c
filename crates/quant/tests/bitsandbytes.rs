//! NF4, FP4 and LLM.int8() against bitsandbytes, to the last bit: `fixtures/bitsandbytes.py` made the tensors.

use std::collections::BTreeMap;
use std::path::Path;

use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, DType, TensorInfo, TensorView};
use oxiformers_quant::bnb_4bit::{Bnb4bit, QuantType};
use oxiformers_quant::llm_int8::LlmInt8;
use oxiformers_quant::values::from_f32;
use oxiformers_quant::{Dense, PackedMatrix, Parts, Scheme, pack, to_f32};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    quant_type: String,
    #[serde(default)]
    blocksize: usize,
    #[serde(default)]
    double_quant: bool,
    #[serde(default)]
    storage: String,
}

impl Case {
    fn scheme(&self) -> Box<dyn Scheme> {
        let Ok(quant_type) = QuantType::from_name(&self.quant_type) else {
            return Box::new(LlmInt8);
        };
        Box::new(Bnb4bit {
            quant_type,
            blocksize: self.blocksize,
            double_quant: self.double_quant,
            storage: match self.storage.as_str() {
                "uint8" => DType::U8,
                "int8" => DType::I8,
                "float16" => DType::F16,
                "bfloat16" => DType::BF16,
                "float32" => DType::F32,
                other => panic!("{other}"),
            },
        })
    }
}

fn fixture() -> (BTreeMap<String, Case>, Checkpoint) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let cases = std::fs::read(folder.join("bitsandbytes.json")).unwrap();
    let files = ModelFiles::from_file(&folder.join("bitsandbytes.safetensors")).unwrap();
    (
        serde_json::from_slice(&cases).unwrap(),
        Checkpoint::open(&files).unwrap(),
    )
}

/// The tensors that the library stored.
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

#[test]
fn codes_and_statistics_are_the_librarys() {
    let (cases, checkpoint) = fixture();
    for (name, case) in &cases {
        let scheme = case.scheme();
        let input = checkpoint.tensor(&format!("{name}.input")).unwrap();
        let dtype = input.dtype;
        let matrix = pack(&input).unwrap();
        let ours = scheme
            .quantize(&Dense {
                matrix: matrix.as_ref(),
                dtype,
            })
            .unwrap();
        let theirs = stored(&checkpoint, name, scheme.as_ref());
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
        // What was planned is what became of it.
        let plan = scheme.plan(matrix.shape(), dtype).unwrap();
        let find = |ending: &str| -> &TensorInfo {
            let mut all = plan.tensors.iter().chain(&plan.late);
            all.find(|info| info.name == ending).unwrap()
        };
        for (ending, view) in ours.iter() {
            let info = find(ending);
            assert_eq!(info.dtype, view.dtype, "{name}{ending}");
            if plan.late.contains(info) {
                assert!(view.shape[0] <= info.shape[0]);
            } else {
                assert_eq!(info.shape, view.shape, "{name}{ending}");
            }
        }
    }
}

#[test]
fn values_are_the_librarys() {
    let (cases, checkpoint) = fixture();
    for (name, case) in &cases {
        let scheme = case.scheme();
        let expected = checkpoint.tensor(&format!("{name}.dequantized")).unwrap();
        let parts = stored(&checkpoint, name, scheme.as_ref());
        assert!(scheme.is_stored(&parts));
        let shape = <[usize; 2]>::try_from(expected.shape.as_slice()).unwrap();
        let matrix = scheme.load(&parts, shape).unwrap();
        let found = from_f32(&values(matrix.as_ref()), expected.dtype).unwrap();
        let found = to_f32(&TensorView {
            data: found.into(),
            ..expected.clone()
        });
        // Zeros are equal whatever their sign.
        assert!(found.unwrap() == to_f32(&expected).unwrap(), "{name}");
        // Products see the same values.
        let x = vec![1.0; shape[1]];
        let oxiformers_kernels::Form::Int8(int8) = matrix.form() else {
            panic!("{name}")
        };
        let products = oxiformers_kernels::int8::matmul(&x, shape[1], &[int8]).concat();
        let rows = values(matrix.as_ref());
        for (found, row) in products.iter().zip(rows.chunks(shape[1])) {
            let sum: f32 = row.iter().sum();
            let size: f32 = row.iter().map(|value| value.abs()).sum();
            assert!(
                (found - sum).abs() <= 1e-3 * size,
                "{name}: {found} instead of {sum}"
            );
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let (cases, checkpoint) = fixture();
    for (name, case) in &cases {
        let scheme = case.scheme();
        let parts = stored(&checkpoint, name, scheme.as_ref());
        let expected = checkpoint.info(&format!("{name}.dequantized")).unwrap();
        let shape = <[usize; 2]>::try_from(expected.shape.as_slice()).unwrap();
        assert!(scheme.load(&parts, [shape[0] + 1, shape[1]]).is_err());
        for (missing, _) in parts.iter() {
            let mut rest = Parts::default();
            let others = parts.iter().filter(|(ending, _)| *ending != missing);
            others.for_each(|(ending, view)| rest.push(ending, view.clone()));
            let optional = missing == ".weight_format";
            assert_eq!(
                scheme.load(&rest, shape).is_ok(),
                optional,
                "{name} without {missing}"
            );
            // Cut short.
            let mut cut = rest;
            let mut view = parts.get(missing).unwrap().clone();
            view.data = view.data.slice(..view.data.len() / 2);
            view.shape = vec![view.data.len() / view.dtype.num_bytes(&[]).unwrap()];
            cut.push(missing, view);
            assert_eq!(
                scheme.load(&cut, shape).is_ok(),
                optional,
                "{name}, {missing} cut"
            );
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = vec![0.5f32; 96];
            values[70] = bad;
            let view = TensorView {
                dtype: DType::F32,
                shape: vec![3, 32],
                data: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            };
            let matrix = pack(&view).unwrap();
            let dense = Dense {
                matrix: matrix.as_ref(),
                dtype: DType::F32,
            };
            let error = scheme.quantize(&dense).unwrap_err();
            assert!(error.contains("row 2, column 6"), "{error}");
        }
    }
}
