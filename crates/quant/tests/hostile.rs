//! Tensors of GPTQ, AWQ and HQQ that nobody meant: an error or a matrix, never a panic.

use oxiformers_hub::checkpoint::{DType, TensorView};
use oxiformers_quant::awq::Awq;
use oxiformers_quant::calibrate::{Error, GptqOptions, Hessian, gptq, round_to_nearest};
use oxiformers_quant::gptq::Gptq;
use oxiformers_quant::hqq::Hqq;
use oxiformers_quant::{Parts, Scheme};
use proptest::prelude::*;

fn view(dtype: DType, shape: &[usize], byte: impl Fn(usize) -> u8) -> TensorView {
    let count = dtype.num_bytes(shape).unwrap();
    TensorView {
        dtype,
        shape: shape.to_vec(),
        data: (0..count).map(byte).collect::<Vec<_>>().into(),
    }
}

/// Loads, and reads what was loaded.
fn read(scheme: &dyn Scheme, parts: &Parts, shape: [usize; 2]) -> Result<Vec<f32>, String> {
    let matrix = scheme.load(parts, shape)?;
    let mut values = vec![0.0; shape[0] * shape[1]];
    matrix.dequantize_rows(0..shape[0], &mut values);
    let _ = matrix.form();
    Ok(values)
}

const DTYPES: [DType; 7] = [
    DType::I32,
    DType::F16,
    DType::F32,
    DType::U8,
    DType::I64,
    DType::BF16,
    DType::Bool,
];

prop_compose! {
    fn shapes()(rows in 0usize..20, columns in 0usize..20, dims in 0usize..4) -> Vec<usize> {
        [rows, columns, 2][..dims.min(3)].to_vec()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn gptq_of_anything(
        bits in 0u32..10,
        group in prop::option::of(0usize..80),
        v2: bool,
        shape in (0usize..40, 0usize..70),
        given in prop::collection::vec((0usize..7, shapes()), 4),
        right in prop::array::uniform4(prop::bool::weighted(0.9)),
        seed: u8,
    ) {
        let scheme = Gptq { bits, group_size: group, sym: false, v2, dynamic: seed % 2 == 0 };
        let (rows, columns) = shape;
        let words = |count: usize| (count * bits as usize).div_ceil(32);
        let groups = columns.div_ceil(group.unwrap_or(columns).max(1)).max(1);
        let expected: [(&str, DType, Vec<usize>); 4] = [
            (".qweight", DType::I32, vec![words(columns), rows]),
            (".qzeros", DType::I32, vec![groups, words(rows)]),
            (".scales", DType::F16, vec![groups, rows]),
            (".g_idx", DType::I32, vec![columns]),
        ];
        let mut parts = Parts::default();
        for (at, (ending, dtype, shape)) in expected.into_iter().enumerate() {
            let (dtype, shape) = if right[at] { (dtype, shape) } else { (DTYPES[given[at].0], given[at].1.clone()) };
            // Groups that are often there, in any order.
            let byte = |i: usize| match ending {
                ".g_idx" if i.is_multiple_of(4) => (i as u8 / 4).wrapping_mul(seed | 1) % (groups as u8).max(1),
                ".g_idx" => 0,
                _ => (i as u8).wrapping_mul(31).wrapping_add(seed),
            };
            parts.push(ending, view(dtype, &shape, byte));
        }
        if let Err(reason) = read(&scheme, &parts, [rows, columns]) {
            prop_assert!(!reason.is_empty());
        }
    }

    #[test]
    fn awq_of_anything(
        group in prop::option::of(0usize..40),
        shape in (0usize..5, 0usize..70),
        given in prop::collection::vec((0usize..7, shapes()), 3),
        right in prop::array::uniform3(prop::bool::weighted(0.9)),
    ) {
        let scheme = Awq { group_size: group };
        let (rows, columns) = (8 * shape.0, shape.1);
        let groups = columns / group.unwrap_or(columns).max(1);
        let expected = [
            (".qweight", DType::I32, vec![columns, rows / 8]),
            (".qzeros", DType::I32, vec![groups, rows / 8]),
            (".scales", DType::F16, vec![groups, rows]),
        ];
        let mut parts = Parts::default();
        for (at, (ending, dtype, shape)) in expected.into_iter().enumerate() {
            let (dtype, shape) = if right[at] { (dtype, shape) } else { (DTYPES[given[at].0], given[at].1.clone()) };
            parts.push(ending, view(dtype, &shape, |i| (i as u8).wrapping_mul(37)));
        }
        if let Err(reason) = read(&scheme, &parts, [rows, columns]) {
            prop_assert!(!reason.is_empty());
        }
    }

    #[test]
    fn hqq_of_anything(
        shape in (0usize..12, 0usize..40),
        said in (0i32..10, -2i32..80, -1i32..3),
        packing in 0usize..5,
        codes in shapes(),
        right: bool,
        count in 0usize..40,
    ) {
        let (rows, columns) = shape;
        let (nbits, group, axis) = said;
        let names = ["8bit_u8", "4bit_u8", "3bit_32", "2bit_u8", "1bit_u8"];
        let fitting = match nbits { 4 => 1, 3 => 2, 2 => 3, 1 => 4, _ => 0 };
        let packing = names[if right { fitting } else { packing }];
        let mut parts = Parts::default();
        let size = usize::try_from(group).unwrap_or(1).max(1);
        let groups = if right { rows * columns / size } else { count };
        let shared = [1, 2, 10, 4, 8][fitting];
        let (dtype, codes) = if right {
            let dtype = if nbits == 3 { DType::I32 } else { DType::U8 };
            let (height, width) = if axis == 0 { (size, groups) } else { (groups, size) };
            (dtype, vec![height.div_ceil(shared), width])
        } else {
            (DType::U8, codes)
        };
        parts.push(".W_q", view(dtype, &codes, |i| (i as u8).wrapping_mul(41)));
        for ending in [".scale", ".zero"] {
            parts.push(ending, view(DType::F16, &[groups, 1], |i| i as u8));
        }
        parts.push_values(".shape", DType::I64, &[2], &[rows, columns], |n| (n as u64).to_le_bytes());
        for (ending, number) in [(".nbits", nbits), (".group_size", group), (".axis", axis)] {
            parts.push_values(ending, DType::I32, &[], &[number], i32::to_le_bytes);
        }
        parts.push_values(".packing", DType::U8, &[packing.len()], packing.as_bytes(), |byte| [byte]);
        if let Err(reason) = read(&Hqq { nbits: 4, group_size: None }, &parts, [rows, columns]) {
            prop_assert!(!reason.is_empty());
        }
    }

    /// Any matrix and any inputs: codes, or an error that says why.
    #[test]
    fn gptq_quantizes_anything(
        rows in 1usize..4,
        columns in 1usize..40,
        values in prop::collection::vec(prop_oneof![4 => -1.0f32..1.0, 1 => Just(0.0), 1 => any::<f32>()], 160),
        seen in 0usize..6,
        group in prop::option::of(1usize..50),
        desc_act: bool,
        static_groups: bool,
        sym: bool,
    ) {
        let mut options = GptqOptions { group_size: group, desc_act, static_groups, ..GptqOptions::default() };
        options.affine.sym = sym;
        let mut hessian = Hessian::new(columns);
        let inputs: Vec<f32> = values.iter().cycle().take(seen * columns).copied().collect();
        hessian.add(&inputs);
        let weight: Vec<f32> = values.iter().rev().cycle().take(rows * columns).copied().collect();
        match gptq::gptq(&weight, [rows, columns], &hessian, &options) {
            Ok((codes, _)) => {
                prop_assert!(codes.codes.iter().all(|code| *code < 16));
                prop_assert!(codes.dequantize().iter().all(|value| value.is_finite()));
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let nothing = Hessian::new(4);
    let options = GptqOptions::default();
    let weight = [0.5, f32::NAN, 1.0, 1.0];
    let error = gptq::gptq(&weight, [1, 4], &nothing, &options).unwrap_err();
    assert!(
        matches!(
            error,
            Error::NotFinite {
                row: 0,
                column: 1,
                ..
            }
        ),
        "{error}"
    );
    let error = gptq::gptq(&[1.0; 5], [1, 5], &nothing, &options).unwrap_err();
    assert_eq!(
        error,
        Error::Features {
            found: 4,
            expected: 5
        }
    );
    let bad = GptqOptions {
        damp_percent: 1.5,
        ..options
    };
    assert!(
        gptq::gptq(&[1.0; 4], [1, 4], &nothing, &bad)
            .unwrap_err()
            .to_string()
            .contains("damp_percent")
    );
    let mut infinite = Hessian::new(4);
    infinite.add(&[1.0, f32::INFINITY, 0.0, 0.0]);
    assert_eq!(
        gptq::gptq(&[1.0; 4], [1, 4], &infinite, &options).unwrap_err(),
        Error::Inputs
    );
    let error = round_to_nearest(&[1e10; 4], [1, 4], &options.affine, None).unwrap_err();
    assert!(matches!(error, Error::Scale { row: 0, .. }), "{error}");
    // What was never seen is rounded to 0, as the original does.
    let (codes, report) = gptq::gptq(&[1.0; 4], [1, 4], &nothing, &options).unwrap();
    assert_eq!((codes.dequantize(), report.dead), (vec![0.0; 4], 4));

    let parts = |g_idx: i32| {
        let mut parts = Parts::default();
        parts.push(".qweight", view(DType::I32, &[8, 32], |_| 0));
        parts.push(".qzeros", view(DType::I32, &[2, 4], |_| 0));
        parts.push(".scales", view(DType::F16, &[2, 32], |_| 0));
        parts.push_values(".g_idx", DType::I32, &[64], &[g_idx; 64], i32::to_le_bytes);
        parts
    };
    let scheme = Gptq {
        bits: 4,
        group_size: Some(32),
        sym: true,
        v2: false,
        dynamic: false,
    };
    for bad in [2, -1, i32::MAX, i32::MIN] {
        let error = scheme.load(&parts(bad), [32, 64]).unwrap_err();
        assert!(
            error.contains("g_idx") && error.contains(&bad.to_string()),
            "{error}"
        );
    }
    // All columns in one group: no order of groups, yet exact values.
    assert_eq!(scheme.load(&parts(1), [32, 64]).unwrap().scheme(), "F32");
    let error = Awq { group_size: Some(48) }
        .load(&parts(0), [32, 64])
        .unwrap_err();
    assert!(error.contains("group_size") && error.contains("48"), "{error}");
    assert!(
        scheme
            .plan([30, 64], DType::F16)
            .unwrap_err()
            .contains("whole words of 32 bits")
    );
}

/// Features that always come together: only damping keeps them apart.
#[test]
fn more_damping_where_it_takes_more() {
    let mut hessian = Hessian::new(3);
    // A difference of two large numbers in f32 is what is left of the smallest feature.
    hessian.add(&[1e6, 1e6, 1e-3]);
    let options = GptqOptions {
        damp_percent: 1e-9,
        group_size: None,
        ..GptqOptions::default()
    };
    let (_, report) = gptq::gptq(&[0.3, -0.2, 0.1], [1, 3], &hessian, &options).unwrap();
    assert!(report.damp_percent > 1e-9, "{report:?}");
    let stubborn = GptqOptions {
        damp_auto_increment: 0.0,
        ..options
    };
    let error = gptq::gptq(&[0.3, -0.2, 0.1], [1, 3], &hessian, &stubborn).unwrap_err();
    assert!(matches!(error, Error::NotPositiveDefinite { .. }), "{error}");
}
