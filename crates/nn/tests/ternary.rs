//! Layers that are trained for ternary weights, against PyTorch: outputs and gradients. `fixtures/make_ternary.py` made
//! the reference.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use oxiformers_hub::ModelFiles;
use oxiformers_hub::checkpoint::{Checkpoint, TensorView};
use oxiformers_nn::quant::bitnet::BitNetQuantConfig;
use oxiformers_nn::quant::{QuantizationConfig, Recipe, to_f32};
use oxiformers_nn::{Lambda, Linear, LoadOptions, TensorSource, Weights};

fn reference() -> Checkpoint {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ternary.safetensors");
    Checkpoint::open(&ModelFiles::from_file(&path).unwrap()).unwrap()
}

fn tensor<const D: usize>(name: &str) -> Tensor<D> {
    let view = reference().tensor(name).unwrap();
    let shape: [usize; D] = view.shape.as_slice().try_into().unwrap();
    Tensor::from_data(TensorData::new(to_f32(&view).unwrap(), shape), &device())
}

fn device() -> Device {
    Device::flex().autodiff()
}

/// The layer of the reference under the names that a checkpoint has.
struct Layer;

impl Layer {
    fn stored(name: &str) -> Option<&'static str> {
        match name {
            "fc.weight" => Some("weight"),
            "fc.bias" => Some("bias"),
            "fc.rms_norm.weight" => Some("norm"),
            _ => None,
        }
    }
}

impl TensorSource for Layer {
    fn origin(&self) -> String {
        "ternary.safetensors".to_string()
    }

    fn names(&self) -> Vec<String> {
        ["fc.weight", "fc.bias", "fc.rms_norm.weight"]
            .map(str::to_string)
            .to_vec()
    }

    fn contains(&self, name: &str) -> bool {
        Self::stored(name).is_some()
    }

    fn tensor(&self, name: &str) -> oxiformers_hub::Result<TensorView> {
        reference().tensor(Self::stored(name).unwrap())
    }
}

fn layer(options: LoadOptions) -> Linear {
    let config: QuantizationConfig = BitNetQuantConfig {
        linear_class: "autobitlinear".to_string(),
        quantization_mode: "online".to_string(),
        use_rms_norm: true,
        ..BitNetQuantConfig::default()
    }
    .into();
    let options = LoadOptions {
        device: device(),
        dtype: Some(FloatDType::F32),
        ..options
    };
    let w = Weights::new(Layer, "", options).stored_as(Some(&Recipe::from(config)));
    let layer = Linear::load(&w.pp("fc"), 8, 8, true).unwrap();
    w.finish().unwrap();
    layer
}

/// The largest difference from the reference; `a` is not tracked.
fn worst<const D: usize>(a: Tensor<D>, name: &str) -> f32 {
    (a - tensor::<D>(name).inner()).abs().max().into_scalar()
}

#[test]
fn outputs_and_gradients_equal_pytorch() {
    let lambda = Lambda::default();
    let layer = layer(LoadOptions {
        straight_through: Some(lambda.clone()),
        ..LoadOptions::default()
    })
    .set_require_grad(true);
    for (value, name) in [(0.0, "0"), (0.3, "0.3"), (1.0, "1")] {
        lambda.set(value);
        let x = tensor::<3>("x").require_grad();
        let y = layer.forward(x.clone());
        assert!(worst(y.clone().inner(), &format!("y.{name}")) < 1e-5, "{name}");
        let gradients = (y * tensor("out")).sum().backward();
        assert!(
            worst(x.grad(&gradients).unwrap(), &format!("grad.x.{name}")) < 1e-5,
            "{name}"
        );
        let weight = layer.weight.as_dense().unwrap().val().grad(&gradients).unwrap();
        assert!(worst(weight, &format!("grad.weight.{name}")) < 1e-5, "{name}");
        let norm = layer
            .weight
            .input()
            .and_then(|input| input.norm.as_ref())
            .unwrap();
        let norm = norm.weight.as_ref().unwrap().val().grad(&gradients).unwrap();
        assert!(worst(norm, &format!("grad.norm.{name}")) < 1e-5, "{name}");
    }
}

/// What is trained with all of the difference is what is loaded then.
#[test]
fn trained_as_loaded() {
    let trained = layer(LoadOptions {
        straight_through: Some(Lambda::default()),
        ..LoadOptions::default()
    });
    let loaded = layer(LoadOptions::default());
    let outputs = [trained, loaded].map(|layer| layer.forward(tensor::<3>("x")));
    let [a, b] = outputs.map(Tensor::inner);
    assert!((a - b).abs().max().into_scalar::<f32>() < 1e-5);
}
