//! GPTQ, AWQ and HQQ against their libraries: see `fixtures/make_calibrated.py`.

use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, TensorView};
use oxiformers_quant::awq::Awq;
use oxiformers_quant::calibrate::{
    AffineOptions, GptqOptions, Grouped, Hessian, awq, gptq, hqq, round_to_nearest,
};
use oxiformers_quant::gptq::Gptq;
use oxiformers_quant::hqq::Hqq;
use oxiformers_quant::{Parts, Scheme, to_f32};
use serde::Deserialize;

#[derive(Deserialize)]
struct Cases {
    gptq: Vec<GptqCase>,
    hqq: Vec<HqqCase>,
}

#[derive(Deserialize)]
struct GptqCase {
    name: String,
    bits: u32,
    group_size: i64,
    desc_act: bool,
    act_group_aware: bool,
    sym: bool,
    static_groups: bool,
    damp_percent: f32,
    mse: f32,
}

#[derive(Deserialize)]
struct HqqCase {
    name: String,
    nbits: u32,
    group_size: usize,
    axis: i64,
}

struct Fixture(Checkpoint);

impl Fixture {
    fn open() -> (Self, Cases) {
        let bytes = include_bytes!("fixtures/calibrated.safetensors").to_vec();
        let files = ModelFiles::from_memory("fixture", [("model.safetensors".to_string(), bytes.into())]);
        let cases = serde_json::from_str(include_str!("fixtures/calibrated.json")).unwrap();
        (Self(Checkpoint::open(&files).unwrap()), cases)
    }

    fn get(&self, name: &str) -> TensorView {
        self.0.tensor(name).unwrap()
    }

    fn values(&self, name: &str) -> Vec<f32> {
        to_f32(&self.get(name)).unwrap()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        self.get(name).data.to_vec()
    }

    fn parts(&self, case: &str, endings: &[(&str, &str)]) -> Parts {
        let mut parts = Parts::default();
        for (ending, name) in endings {
            parts.push(ending, self.get(&format!("{case}.{name}")));
        }
        parts
    }
}

/// What is stored, and where in the fixture.
const GPTQ_PARTS: [(&str, &str); 4] = [
    (".qweight", "qweight"),
    (".qzeros", "qzeros"),
    (".scales", "scales"),
    (".g_idx", "g_idx"),
];
const V2_PARTS: [(&str, &str); 4] = [
    (".qweight", "qweight"),
    (".qzeros", "qzeros_v2"),
    (".scales", "scales"),
    (".g_idx", "g_idx"),
];

fn dequantized(scheme: &dyn Scheme, parts: &Parts, shape: [usize; 2]) -> Vec<f32> {
    let matrix = scheme.load(parts, shape).unwrap();
    assert_eq!(matrix.shape(), shape);
    let mut values = vec![0.0; shape[0] * shape[1]];
    matrix.dequantize_rows(0..shape[0], &mut values);
    // In pieces it is the same.
    let mut rows = vec![0.0; 2 * shape[1]];
    matrix.dequantize_rows(3..5, &mut rows);
    assert_eq!(rows, values[3 * shape[1]..5 * shape[1]]);
    values
}

/// Codes of a stream of bits down the columns, the slow way.
fn codes(qweight: &TensorView, bits: usize, columns: usize) -> Vec<u32> {
    let rows = qweight.shape[1];
    let bit = |row: usize, at: usize| {
        let word = 4 * (at / 32 * rows + row);
        qweight.data[word + at % 32 / 8] >> (at % 8) & 1
    };
    (0..rows * columns)
        .map(|at| (at / columns, at % columns))
        .map(|(row, column)| {
            (0..bits)
                .map(|b| u32::from(bit(row, column * bits + b)) << b)
                .sum()
        })
        .collect()
}

#[test]
fn gptq_is_that_of_gptqmodel() {
    let (fixture, cases) = Fixture::open();
    let (weight, x) = (fixture.values("weight"), fixture.values("x"));
    let shape: [usize; 2] = fixture.get("weight").shape.try_into().unwrap();
    let mut hessian = Hessian::new(shape[1]);
    hessian.add(&x);
    let mut ties = 0;
    for case in &cases.gptq {
        let group_size = usize::try_from(case.group_size).ok();
        let options = GptqOptions {
            affine: AffineOptions {
                bits: case.bits,
                sym: case.sym,
                mse: case.mse,
            },
            group_size,
            desc_act: case.desc_act,
            act_group_aware: case.act_group_aware,
            static_groups: case.static_groups,
            damp_percent: case.damp_percent,
            damp_auto_increment: 0.01,
        };
        let (found, report) = gptq::gptq(&weight, shape, &hessian, &options).unwrap();
        assert_eq!((report.damp_percent, report.dead), (case.damp_percent, 1));
        let stored = codes(
            &fixture.get(&format!("{}.qweight", case.name)),
            case.bits as usize,
            shape[1],
        );
        let other = stored
            .iter()
            .zip(&found.codes)
            .filter(|(a, b)| **a != u32::from(**b))
            .count();
        ties += other;
        println!("{}: {other} of {} codes differ", case.name, stored.len());
        // A tie that goes the other way moves what comes after it.
        assert!(other * 200 <= stored.len(), "{}: {other} codes differ", case.name);

        for (v2, parts) in [(false, GPTQ_PARTS), (true, V2_PARTS)] {
            let scheme = Gptq {
                bits: case.bits,
                group_size,
                sym: case.sym,
                v2,
                dynamic: false,
            };
            let parts = fixture.parts(&case.name, &parts);
            // What the formula says.
            let grouped = grouped(&fixture, case, shape, &stored);
            let values = dequantized(&scheme, &parts, shape);
            assert_eq!(values, grouped.dequantize(), "{}", case.name);
            // Written as it was read.
            let written = scheme.store(&grouped).unwrap();
            for (ending, view) in parts.iter() {
                let ours = written.get(ending).unwrap();
                assert_eq!(
                    (ours.dtype, &ours.shape),
                    (view.dtype, &view.shape),
                    "{} {ending}",
                    case.name
                );
                assert!(ours.data == view.data, "{} {ending}", case.name);
            }
            let plan = scheme.plan(shape, view_dtype()).unwrap();
            for info in &plan.tensors {
                let view = written.get(&info.name).unwrap();
                assert_eq!((info.dtype, &info.shape), (view.dtype, &view.shape));
            }
        }
    }
    println!("{ties} codes differ in all");
}

fn view_dtype() -> oxiformers_hub::checkpoint::DType {
    oxiformers_hub::checkpoint::DType::F16
}

/// What a case of the fixture stores, taken apart without the code under test.
fn grouped(fixture: &Fixture, case: &GptqCase, [rows, columns]: [usize; 2], codes: &[u32]) -> Grouped {
    let qzeros = fixture.get(&format!("{}.qzeros_v2", case.name));
    let scales = fixture.values(&format!("{}.scales", case.name));
    let g_idx: Vec<u32> = fixture
        .bytes(&format!("{}.g_idx", case.name))
        .chunks(4)
        .map(|bytes| u32::from(bytes[0]))
        .collect();
    let group_size = usize::try_from(case.group_size).unwrap_or(columns);
    let groups = columns.div_ceil(group_size);
    let (bits, line) = (case.bits as usize, 4 * qzeros.shape[1]);
    let zero = |row: usize, group: usize| {
        let bit = |at: usize| qzeros.data[group * line + at / 8] >> (at % 8) & 1;
        (0..bits).map(|b| bit(row * bits + b) << b).sum::<u8>()
    };
    let each = || (0..rows * groups).map(|at| (at / groups, at % groups));
    let natural = g_idx
        .iter()
        .enumerate()
        .all(|(column, group)| *group as usize == column / group_size);
    Grouped {
        shape: [rows, columns],
        bits: case.bits,
        group_size,
        codes: codes.iter().map(|code| *code as u8).collect(),
        scales: each().map(|(row, group)| scales[group * rows + row]).collect(),
        zeros: each().map(|(row, group)| zero(row, group)).collect(),
        g_idx: (!natural).then_some(g_idx),
    }
}

#[test]
fn awq_is_packed_as_in_python() {
    let (fixture, _) = Fixture::open();
    let shape = [64, 96];
    let scheme = Awq { group_size: Some(32) };
    let parts = fixture.parts(
        "awq",
        &[
            (".qweight", "qweight"),
            (".qzeros", "qzeros"),
            (".scales", "scales"),
        ],
    );
    assert_eq!(dequantized(&scheme, &parts, shape), fixture.values("awq.dense"));
    let scales = fixture.values("awq.scales");
    let matrix = Grouped {
        shape,
        bits: 4,
        group_size: 32,
        codes: fixture.bytes("awq.codes"),
        scales: (0..64 * 3).map(|at| scales[at % 3 * 64 + at / 3]).collect(),
        zeros: fixture.bytes("awq.zeros"),
        g_idx: None,
    };
    let written = scheme.store(&matrix).unwrap();
    for (ending, view) in parts.iter() {
        let ours = written.get(ending).unwrap();
        assert_eq!(
            (ours.dtype, &ours.shape, &ours.data),
            (view.dtype, &view.shape, &view.data),
            "{ending}"
        );
    }
}

#[test]
fn hqq_is_that_of_hqq() {
    let (fixture, cases) = Fixture::open();
    let weight = fixture.values("hqq.weight");
    let shape = [16, 128];
    for HqqCase {
        name,
        nbits,
        group_size,
        axis,
    } in &cases.hqq
    {
        let scheme = Hqq {
            nbits: *nbits,
            group_size: Some(*group_size),
        };
        let mut parts = Parts::default();
        for ending in scheme.endings() {
            if fixture.0.info(&format!("{name}{ending}")).is_some() {
                parts.push(ending, fixture.get(&format!("{name}{ending}")));
            }
        }
        let exact = fixture.values(&format!("{name}.dense"));
        for (ours, theirs) in dequantized(&scheme, &parts, shape).iter().zip(&exact) {
            assert!(
                (ours - theirs).abs() <= 1e-7 * theirs.abs().max(0.1),
                "{name}: {ours} {theirs}"
            );
        }
        if *axis == 0 || shape[1] % group_size != 0 {
            continue;
        }
        let codes = hqq::hqq(&weight, shape, *nbits, *group_size).unwrap();
        let written = scheme
            .store(&codes, shape, oxiformers_hub::checkpoint::DType::F32)
            .unwrap();
        let mut other = 0;
        for (ending, view) in parts.iter() {
            let ours = written.get(ending).unwrap_or_else(|| panic!("{name}{ending}"));
            assert_eq!(
                (ours.dtype, &ours.shape),
                (view.dtype, &view.shape),
                "{name}{ending}"
            );
            match ending {
                ".W_q" => other = ours.data.iter().zip(&view.data).filter(|(a, b)| a != b).count(),
                ".scale" | ".zero" => {
                    for (a, b) in to_f32(ours).unwrap().iter().zip(to_f32(view).unwrap()) {
                        assert!((a - b).abs() <= 1e-5 * b.abs(), "{name}{ending}: {a} {b}");
                    }
                }
                _ => assert_eq!(ours.data, view.data, "{name}{ending}"),
            }
        }
        println!("{name}: {other} bytes of codes differ");
        assert!(other <= 2, "{name}: {other} bytes of codes differ");
        let plan = scheme
            .plan(shape, oxiformers_hub::checkpoint::DType::F32)
            .unwrap();
        assert_eq!(plan.tensors.len(), written.iter().count());
        for info in &plan.tensors {
            let view = written.get(&info.name).unwrap();
            assert_eq!(
                (info.dtype, &info.shape),
                (view.dtype, &view.shape),
                "{}",
                info.name
            );
        }
    }
}

/// The squared error of the outputs for the inputs of the fixture.
fn error(weight: &[f32], other: &[f32], x: &[f32], columns: usize) -> f64 {
    let missed: Vec<f32> = weight.iter().zip(other).map(|(a, b)| a - b).collect();
    let outputs = x.chunks_exact(columns).flat_map(|x| {
        missed
            .chunks_exact(columns)
            .map(move |row| row.iter().zip(x).map(|(a, b)| f64::from(a * b)).sum::<f64>())
    });
    outputs.map(|output| output * output).sum()
}

#[test]
fn calibration_is_better_than_rounding() {
    let (fixture, _) = Fixture::open();
    let (weight, x) = (fixture.values("weight"), fixture.values("x"));
    let shape: [usize; 2] = fixture.get("weight").shape.try_into().unwrap();
    let (group_size, options) = (Some(96), Awq::AFFINE);
    let mut hessian = Hessian::new(shape[1]);
    hessian.add(&x);
    let rounded = round_to_nearest(&weight, shape, &options, group_size).unwrap();
    let plain = error(&weight, &rounded.dequantize(), &x, shape[1]);

    let config = GptqOptions {
        affine: options,
        group_size,
        ..GptqOptions::default()
    };
    let (codes, _) = gptq::gptq(&weight, shape, &hessian, &config).unwrap();
    let calibrated = error(&weight, &codes.dequantize(), &x, shape[1]);
    assert!(calibrated < 0.5 * plain, "{calibrated} instead of {plain}");

    let layer = awq::Layer {
        weight: &weight,
        out_features: shape[0],
    };
    let scales = awq::scales(&[layer], &hessian, &options, group_size).unwrap();
    let mut scaled = awq::scale_columns(&weight, &scales);
    hessian.divide(&scales);
    let inverse: Vec<f32> = scales.iter().map(|scale| 1.0 / scale).collect();
    let back = |scaled: &[f32]| {
        let rounded = round_to_nearest(scaled, shape, &options, group_size).unwrap();
        awq::scale_columns(&rounded.dequantize(), &inverse)
    };
    let unclipped = error(&weight, &back(&scaled), &x, shape[1]);
    awq::clip(&mut scaled, &hessian, &options, group_size).unwrap();
    let clipped = error(&weight, &back(&scaled), &x, shape[1]);
    println!("{plain} rounded, {calibrated} GPTQ, {unclipped} scaled, {clipped} clipped");
    assert!(unclipped < 0.95 * plain, "{unclipped} instead of {plain}");
    assert!(clipped < unclipped, "{clipped} instead of {unclipped}");
}
