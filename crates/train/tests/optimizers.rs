//! Optimizers against PyTorch's, Transformers' and bitsandbytes', over 32 steps of the same gradients.
//!
//! `fixtures/make.py` made the reference.

mod common;

use common::{Reference, noise};
use oxiformers_train::clip::{clip_coefficient, norm};
use oxiformers_train::decay::decays;
use oxiformers_train::optim::{Optimizer, OptimizerConfig, Parameter, Shapes, Step};
use serde_json::json;

const SHAPES: [(&str, &[usize]); 5] = [
    ("model.embed_tokens.weight", &[70, 64]),
    ("model.layers.0.mlp.up_proj.weight", &[66, 65]),
    ("model.layers.0.mlp.up_proj.bias", &[66]),
    ("model.layers.0.input_layernorm.weight", &[64]),
    ("model.stack.weight", &[2, 3, 5]),
];

fn shapes() -> Shapes {
    SHAPES
        .iter()
        .map(|(name, shape)| (name.to_string(), shape.to_vec()))
        .collect()
}

fn parameter(index: usize) -> Parameter<'static> {
    let (name, shape) = SHAPES[index];
    Parameter {
        name,
        shape,
        decays: decays(name),
        embedding: name.contains("embed"),
    }
}

fn gradient(step: usize, index: usize) -> Vec<f32> {
    let factor = 2f32.powi(-((3 * index + step % 4) as i32));
    let values = noise((1000 * step + index) as u32, SHAPES[index].1.iter().product());
    values.into_iter().map(|x| x * factor).collect()
}

fn initial() -> Vec<Vec<f32>> {
    let values = SHAPES.iter().enumerate();
    values
        .map(|(seed, (_, shape))| noise(seed as u32, shape.iter().product()))
        .collect()
}

/// One step over all parameters, and the norm of the gradients.
fn step(optimizer: &mut dyn Optimizer, values: &mut [Vec<f32>], step: usize, clip: bool) -> f64 {
    let gradients: Vec<Vec<f32>> = (0..values.len()).map(|index| gradient(step, index)).collect();
    let norm = norm(gradients.iter().map(Vec::as_slice));
    let numbers = Step {
        lr: 1e-2 * (1.0 - step as f64 / 64.0),
        grad_scale: if clip {
            clip_coefficient(norm, 1.0) as f32
        } else {
            1.0
        },
    };
    for (index, (values, gradient)) in values.iter_mut().zip(&gradients).enumerate() {
        optimizer.update(parameter(index), values, gradient, numbers);
    }
    norm
}

/// The largest difference of the parameters after some steps.
fn difference(reference: &Reference, values: &[Vec<f32>], step: usize) -> f32 {
    let mut worst = 0.0f32;
    for ((name, shape), values) in SHAPES.iter().zip(values) {
        let expected = reference.floats(&format!("{name}@{step}"));
        let row: usize = shape[1..].iter().product();
        let every = if values.len() > 1000 { 7 } else { 1 };
        let ours = values.chunks(row).step_by(every).flatten();
        assert_eq!(ours.clone().count(), expected.len());
        worst = ours
            .zip(&expected)
            .map(|(a, b)| (a - b).abs())
            .fold(
                worst,
                |worst, x| {
                    if x.is_nan() { f32::INFINITY } else { worst.max(x) }
                },
            );
    }
    worst
}

fn config(name: &str) -> OptimizerConfig {
    let mut fields = json!({"optim": name.split('-').next(), "weight_decay": 0.1, "adam_beta2": 0.95});
    let more = match name {
        "lion_32bit" => json!({"adam_beta2": 0.99}),
        "adafactor-relative" => json!({"scale_parameter": true, "relative_step": true}),
        "adafactor-warmup" => {
            json!({"scale_parameter": true, "relative_step": true, "warmup_init": true, "weight_decay": 0.0})
        }
        "sgd-momentum" => json!({"momentum": 0.9}),
        "sgd-nesterov" => json!({"momentum": 0.9, "nesterov": true}),
        _ => json!({}),
    };
    let (Some(fields_of), Some(more)) = (fields.as_object_mut(), more.as_object()) else {
        panic!("objects");
    };
    fields_of.extend(more.clone());
    serde_json::from_value(fields).expect(name)
}

#[test]
fn like_the_originals() {
    for (name, tolerance) in [
        ("adamw_torch", 2e-6),
        ("adamw_torch-clipped", 2e-6),
        ("adamw_bnb_8bit", 1e-4),
        ("lion_32bit", 2e-6),
        ("adafactor", 5e-6),
        ("adafactor-relative", 5e-6),
        ("adafactor-warmup", 2e-6),
        ("sgd", 2e-6),
        ("sgd-momentum", 5e-6),
        ("sgd-nesterov", 5e-6),
    ] {
        let reference = Reference::open(&format!("optimizers/{name}.safetensors"));
        let mut optimizer = config(name).build().expect(name);
        let mut values = initial();
        let mut norms = Vec::new();
        let mut worst = 0f32;
        for i in 1..=32 {
            norms.push(step(&mut *optimizer, &mut values, i, name.ends_with("clipped")));
            if [1, 8, 32].contains(&i) {
                worst = worst.max(difference(&reference, &values, i));
            }
        }
        println!("{name:<24} {worst:.1e}");
        assert!(worst < tolerance, "{name}: {worst}");
        if name.ends_with("clipped") {
            for (ours, expected) in norms.iter().zip(reference.floats("norms")) {
                assert!((ours - f64::from(expected)).abs() < 1e-5 * ours);
            }
        }
    }
}

#[test]
fn a_saved_state_goes_on_bit_for_bit() {
    for name in [
        "adamw_torch",
        "adamw_bnb_8bit",
        "lion_32bit",
        "adafactor",
        "sgd-momentum",
    ] {
        let mut optimizer = config(name).build().expect(name);
        let mut values = initial();
        (1..5).for_each(|i| {
            step(&mut *optimizer, &mut values, i, false);
        });
        let mut resumed = config(name).build().expect(name);
        let state = optimizer.state();
        resumed.load_state(&state, &shapes()).expect("state");
        assert_eq!(resumed.state().len(), state.len());
        let mut again = values.clone();
        (5..8).for_each(|i| {
            step(&mut *optimizer, &mut values, i, false);
            step(&mut *resumed, &mut again, i, false);
        });
        assert_eq!(values, again, "{name}");

        // What does not fit is named, and changes nothing.
        let expect_error = |change: &dyn Fn(&mut oxiformers_train::optim::State) -> String| {
            let mut state = state.clone();
            let tensor = change(&mut state);
            let mut other = config(name).build().expect(name);
            let error = other.load_state(&state, &shapes()).expect_err(name).to_string();
            assert!(error.contains(&tensor), "{name}: {error}");
            assert!(other.state().is_empty());
        };
        let first = state
            .keys()
            .find(|name| !name.ends_with("step"))
            .expect("a moment")
            .clone();
        expect_error(&|state| {
            let mut tensor = state.get(&first).expect("moment").clone();
            tensor.shape.push(1);
            state.insert(first.clone(), tensor);
            first.clone()
        });
        expect_error(&|state| {
            let tensor = state.remove(&first).expect("moment");
            state.insert(format!("{first}_other"), tensor);
            "_other".to_string()
        });
        expect_error(&|state| {
            let tensor = state.remove(&first).expect("moment");
            let moment = first.rsplit('.').next().expect("moment");
            state.insert(format!("model.unknown.{moment}"), tensor);
            "model.unknown".to_string()
        });
    }
}

#[test]
fn settings_that_make_no_sense() {
    let build = |fields: serde_json::Value| {
        let config: OptimizerConfig = serde_json::from_value(fields).expect("fields");
        config.build().map(|_| ()).expect_err("an error").to_string()
    };
    assert!(build(json!({"adam_beta1": 1.0})).contains("adam_beta1"));
    assert!(build(json!({"weight_decay": -1.0})).contains("weight_decay"));
    assert!(build(json!({"optim": "sgd", "nesterov": true})).contains("momentum"));
    assert!(build(json!({"optim": "adafactor", "warmup_init": true})).contains("relative_step"));
    assert!(serde_json::from_value::<OptimizerConfig>(json!({"optim": "magic"})).is_err());
}
