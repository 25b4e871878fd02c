//! Where models drop out values and add noise while they are trained.

use burn::tensor::{Device, Int, Tensor, TensorData};
use oxiformers_models::dropout::dropout;
use oxiformers_models::nn::LoadOptions;
use oxiformers_models::nn::training::Pass;
use oxiformers_models::{AutoConfig, AutoModelForCausalLM};
use serde_json::{Value, json};

fn model(config: Value) -> AutoModelForCausalLM {
    let config = AutoConfig::from_json(config, "test").expect("config");
    AutoModelForCausalLM::from_config(config, &LoadOptions::default()).expect("model")
}

fn values(x: Tensor<3>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}

/// NEFTune's noise is that of the table's module: the scale of Gemma is within it, the multiplier of Granite is not.
#[test]
fn noise_is_on_what_the_table_gives() {
    let ids = TensorData::new((0..60).collect::<Vec<i32>>(), [1, 60]);
    let ids = Tensor::<2, Int>::from_data(ids, &Device::flex());
    for (config, factor) in [
        (json!({"model_type": "gemma", "head_dim": 16}), 1.0),
        (json!({"model_type": "gemma2", "head_dim": 16}), 1.0),
        (json!({"model_type": "gemma3_text", "head_dim": 16}), 1.0),
        (
            json!({"model_type": "granite", "embedding_multiplier": 12.0}),
            12.0,
        ),
        (json!({"model_type": "llama"}), 1.0),
    ] {
        let mut config = config;
        let sizes = json!({
            "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 4,
        });
        let fields = config.as_object_mut().expect("object");
        fields.extend(sizes.as_object().expect("object").clone());
        let name = fields["model_type"].clone();
        let model = model(config);
        let plain = values(model.decoder.embed(ids.clone()));
        let pass = Pass {
            neftune_noise_alpha: 5.0,
            ..Pass::default()
        };
        let noisy = values(pass.run(|| model.decoder.embed(ids.clone())));
        let most = noisy
            .iter()
            .zip(&plain)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        let expected = factor * 5.0 / (60.0f32 * 64.0).sqrt();
        assert!(
            (0.95 * expected..1.001 * expected).contains(&most),
            "{name}: {most} {expected}"
        );
    }
}

/// What attention and the block beside it add is dropped out at once.
#[test]
fn falcon_drops_what_is_added() {
    let config = json!({
        "model_type": "falcon", "vocab_size": 16, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "hidden_dropout": 0.5, "attention_dropout": 0.3,
    });
    let model = model(config.clone());
    let device = Device::flex();
    let x = (Tensor::<1, Int>::arange(0..20 * 64, &device).float() * 0.7).sin();
    let x = x.reshape([1, 20, 64]);
    let added = |y: Tensor<3>| values(y - x.clone());
    let plain = added(model.decoder.run_layer(0, x.clone()));
    let pass = Pass {
        dropout: dropout(&config, None),
        ..Pass::default()
    };
    let dropped = added(pass.run(|| model.decoder.run_layer(0, x.clone())));
    let mut zeros = 0;
    for (dropped, plain) in dropped.iter().zip(&plain) {
        assert!(
            *dropped == 0.0 || (dropped - 2.0 * plain).abs() < 1e-5,
            "{dropped} {plain}"
        );
        zeros += usize::from(*dropped == 0.0);
    }
    assert!((500..780).contains(&zeros), "{zeros}");
}
