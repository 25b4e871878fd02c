//! Fresh parameters of every architecture against those of Transformers: how they are spread, tensor by tensor.
//!
//! `fixtures/make_initial.py` made the reference.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use oxiformers_hub::ModelFiles;
use oxiformers_models::nn::parameters;
use oxiformers_models::nn::{LoadOptions, Parameters};
use oxiformers_models::registry::Kind;
use oxiformers_models::{
    AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
};
use serde_json::Value;

/// Standard errors that a mean or a deviation of ours may be away.
const ERRORS: f64 = 5.0;

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn values<M: Module>(model: &M, parameters: &Parameters) -> Tensors {
    let ids = parameters
        .trainable()
        .iter()
        .map(|parameter| parameter.id)
        .collect();
    let read = |(id, tensor): (_, Tensor<1>)| (id, tensor.into_data().try_to_vec::<f32>().expect("f32"));
    let values: HashMap<_, _> = parameters::values(model, &ids).into_iter().map(read).collect();
    let stored = parameters.stored(|parameter| values.get(&parameter.id).map(Vec::as_slice));
    stored.expect("stored")
}

/// Fresh parameters for the fixture `name`.
fn fresh(name: &str) -> Tensors {
    let (path, task) = name.split_once('@').unwrap_or((name, ""));
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(path);
    let files = ModelFiles::from_dir(&dir).expect("fixture");
    let config = AutoConfig::from_files(&files).expect("config");
    let parameters = Arc::new(Parameters::all());
    let options = LoadOptions {
        device: Device::flex().autodiff(),
        parameters: Some(parameters.clone()),
        seed: 11,
        ..LoadOptions::default()
    };
    match (config.architecture.kind(), task) {
        (Kind::Decoder, _) => {
            let model = AutoModelForCausalLM::from_config(config, &options);
            values(&model.expect(name), &parameters)
        }
        (Kind::EncoderDecoder, _) => {
            let model = AutoModelForSeq2SeqLM::from_config(config, &options);
            values(&model.expect(name), &parameters)
        }
        (Kind::Encoder, "") => {
            let model = AutoModelForMaskedLM::from_config(config, &options);
            values(&model.expect(name), &parameters)
        }
        (Kind::Encoder, _) => {
            let model = AutoModelForSequenceClassification::from_config(config, &options);
            values(&model.expect(name), &parameters)
        }
    }
}

/// Holds a tensor to `[mean, deviation, largest, rows of zeros]`.
fn compare(name: &str, shape: &[usize], ours: &[f32], theirs: &Value) -> Result<(), String> {
    let number = |index: usize| theirs[index].as_f64().expect("number");
    let (mean, deviation, largest) = (number(0), number(1), number(2));
    let count = ours.len() as f64;
    let own_mean = ours.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let square = ours
        .iter()
        .map(|x| (f64::from(*x) - own_mean).powi(2))
        .sum::<f64>()
        / count;
    let own_deviation = square.sqrt();
    let own_largest = ours.iter().fold(0.0f64, |most, x| most.max(f64::from(x.abs())));
    // The last digits are rounded away.
    let of_mean = ERRORS * deviation / count.sqrt() + 1e-3 * (mean.abs() + deviation);
    let of_deviation = ERRORS * deviation / (2.0 * count).sqrt() + 1e-2 * deviation;
    let fits = (own_mean - mean).abs() <= of_mean
        && (own_deviation - deviation).abs() <= of_deviation
        // Where the distribution is cut off, the largest value of many tells.
        && own_largest <= 1.6 * largest + 1e-9;
    if !fits {
        return Err(format!(
            "{name}: {own_mean} ± {own_deviation}, up to {own_largest}; Transformers has {theirs}"
        ));
    }
    if let [rows, width] = shape {
        let zeros = |row: &usize| ours[row * width..(row + 1) * width].iter().all(|x| *x == 0.0);
        let own: Vec<usize> = (0..*rows).filter(zeros).collect();
        let known = theirs[3].as_array().cloned().unwrap_or_default();
        let known: Vec<usize> = known
            .iter()
            .filter_map(|row| Some(row.as_u64()? as usize))
            .collect();
        if deviation > 0.0 && own != known {
            return Err(format!(
                "{name}: rows {own:?} are zero, in Transformers {known:?}"
            ));
        }
    }
    Ok(())
}

#[test]
fn as_transformers_initializes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/initial.json");
    let reference: Value =
        serde_json::from_slice(&std::fs::read(path).expect("reference")).expect("reference");
    let mut wrong = Vec::new();
    for (name, theirs) in reference.as_object().expect("object") {
        let ours = fresh(name);
        let theirs = theirs.as_object().expect("object");
        let mut compared = 0;
        for (tensor, theirs) in theirs {
            if let Some((shape, values)) = ours.get(tensor) {
                compared += 1;
                wrong.extend(compare(&format!("{name}: {tensor}"), shape, values, theirs).err());
            }
        }
        assert!(
            compared * 10 >= theirs.len() * 7,
            "{name}: {:?}, {:?}",
            ours.keys(),
            theirs.keys()
        );
    }
    assert!(reference.as_object().expect("object").len() > 40);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
