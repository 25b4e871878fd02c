//! What long texts cost: BigBird's blocks and Longformer's windows against attention over everything, two layers each of
//! the usual size. `cargo run --release -p oxiformers --example long_encoders -- 1024 2048 4096 8192`

use std::time::Instant;

use oxiformers::{AutoConfig, AutoModel, EncoderInputs, LoadOptions};
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut lengths = std::env::args()
        .skip(1)
        .map(|length| length.parse())
        .collect::<Result<Vec<usize>, _>>()?;
    if lengths.is_empty() {
        lengths = vec![1024, 2048, 4096, 8192];
    }
    let longest = lengths.iter().max().copied().unwrap_or(0);
    println!("{:<28} {:>8} {:>10} {:>12}", "", "tokens", "ms", "ms/1000");
    for (name, fields) in [
        ("BigBird, blocks", json!({"model_type": "big_bird"})),
        ("Longformer, windows", json!({"model_type": "longformer"})),
        (
            "BigBird, everything",
            json!({"model_type": "big_bird", "attention_type": "original_full"}),
        ),
    ] {
        let model = model(fields, longest)?;
        for length in &lengths {
            let ids = (0..*length).map(|i| (i * 7919 % 1000) as u32).collect();
            let mut inputs = EncoderInputs::padded(&[ids], 0);
            // Longformer's first token sees everything, as heads for whole texts want it.
            inputs.global_attention_mask = vec![(0..*length).map(|i| u32::from(i == 0)).collect()];
            let seconds = || -> Result<f64, Box<dyn std::error::Error>> {
                let begin = Instant::now();
                let x = model.forward(&inputs)?.last_hidden_state;
                x.mean_dim(1).into_data();
                Ok(begin.elapsed().as_secs_f64())
            };
            seconds()?;
            let ms = 1e3
                * (0..3)
                    .map(|_| seconds())
                    .try_fold(f64::MAX, |least, s| s.map(|s| least.min(s)))?;
            println!(
                "{name:<28} {length:>8} {ms:>10.1} {:>12.1}",
                ms * 1e3 / *length as f64
            );
        }
    }
    Ok(())
}

/// A model with fresh weights.
fn model(mut config: Value, longest: usize) -> Result<AutoModel, oxiformers::models::Error> {
    config["num_hidden_layers"] = json!(2);
    config["vocab_size"] = json!(1000);
    config["max_position_embeddings"] = json!(longest + 2);
    AutoModel::from_config(AutoConfig::from_json(config, "fresh")?, &LoadOptions::default())
}
